"""What Prometheus is told, by the names that dashboards and routers of vLLM know."""

import asyncio
import math
import time

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gdnjax.serving.server.metrics import HISTOGRAMS, make_registry
from tests.serving.fronts import PARAMS, front, held, read, settled
from tests.serving.paper import distinct

VLLM = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "iteration_tokens_total",
    "num_preemptions",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "cache_config_info",
]
"""Names without their prefix; counters are exposed with `_total` behind them."""

SPECULATION = [
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
]

OWN = [
    "slots",
    "slots_used",
    "blocks",
    "blocks_used",
    "cached_states",
    "cached_blocks",
    "tombstones",
    "pending_rows",
    "padded_tokens",
    "compilations",
]

HOST = ["host_cache_bytes", "host_cache_bytes_used", "host_cache_blocks", "host_cache_states", "host_cache_events"]


def scrape(llm) -> dict:
    """Families by name, as a scraper reads them."""
    text = generate_latest(make_registry(llm, "a model")).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families, name, **labels):
    (found,) = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return found


def play(scene, **sizes):
    async def whole():
        with front(**sizes) as llm:
            await asyncio.wait_for(scene(llm), 60)

    asyncio.run(whole())


@pytest.mark.parametrize("drafts", [0, 3])
def test_every_name_is_there_with_the_model(drafts):
    async def scene(llm):
        await asyncio.gather(*(read(llm.generate(distinct(i, 9), PARAMS)) for i in range(3)))
        families = scrape(llm)
        names = {f"vllm:{name}" for name in VLLM + (SPECULATION if drafts else [])} | {f"gdnjax:{name}" for name in OWN}
        assert names <= families.keys()
        assert (f"vllm:{SPECULATION[0]}" in families) == bool(drafts)
        assert {f"gdnjax:{name}" for name in HOST}.isdisjoint(families)
        for family in families.values():
            assert family.documentation
            assert all(sample.labels["model_name"] == "a model" for sample in family.samples)
            assert all(math.isfinite(sample.value) for sample in family.samples)
            if family.type == "counter":
                assert all(sample.name == f"{family.name}_total" for sample in family.samples)
        assert b"# EOF" in generate_openmetrics(make_registry(llm, "a model"))

    play(scene, num_speculative_tokens=drafts)


def test_host_tier_is_told_of_where_there_is_one():
    async def scene(llm):
        await read(llm.generate([1], PARAMS))
        families = scrape(llm)
        assert {f"gdnjax:{name}" for name in HOST} <= families.keys()
        assert value(families, "gdnjax:host_cache_bytes") == 100

    play(scene, host=100)


def test_counts_are_those_of_what_was_asked_for():
    async def scene(llm):
        before = scrape(llm)
        assert value(before, "vllm:generation_tokens_total") == 0
        streams = [llm.generate(distinct(1, 13), PARAMS) for _ in range(2)]
        for stream in streams:
            await read(stream)
        await read(llm.generate(distinct(2, 8), PARAMS, timeout=1e-9))
        await settled(llm)
        families = scrape(llm)
        assert value(families, "vllm:generation_tokens_total") == 2 * PARAMS.max_tokens
        cached = value(families, "vllm:prompt_tokens_cached_total")
        assert cached == value(families, "vllm:prefix_cache_hits_total") == 12
        assert value(families, "vllm:prefix_cache_queries_total") == 26
        assert value(families, "vllm:prompt_tokens_total") == 26
        assert value(families, "vllm:request_success_total", finished_reason="length") == 2
        assert value(families, "vllm:request_success_total", finished_reason="abort") == 1
        assert value(families, "gdnjax:requests_ended_total", reason="timeout") == 1
        assert value(families, "vllm:cache_config_info", block_size="4", num_gpu_blocks="60") == 1

    play(scene)


def test_histograms_have_what_has_ended():
    async def scene(llm):
        began = time.monotonic()
        streams = [llm.generate(distinct(i, 9), PARAMS) for i in range(3)]
        await asyncio.gather(*map(read, streams))
        await settled(llm)
        lasted = time.monotonic() - began
        families = scrape(llm)
        for name in HISTOGRAMS:
            assert value(families, f"{name}_bucket", le="+Inf") == value(families, f"{name}_count") > 0
            below = [sample.value for sample in families[name].samples if sample.name == f"{name}_bucket"]
            assert below == sorted(below)
        for name in ("time_to_first_token", "e2e_request_latency", "request_decode_time", "request_inference_time"):
            assert value(families, f"vllm:{name}_seconds_count") == 3
            assert 0 < value(families, f"vllm:{name}_seconds_sum") < 3 * lasted
        assert value(families, "vllm:request_prompt_tokens_sum") == 27
        assert value(families, "vllm:request_generation_tokens_sum") == 3 * PARAMS.max_tokens
        assert value(families, "vllm:request_params_max_tokens_bucket", le="20.0") == 3
        assert value(families, "vllm:request_params_max_tokens_bucket", le="10.0") == 0
        assert value(families, "vllm:iteration_tokens_total_sum") == 27 + 3 * PARAMS.max_tokens
        assert value(families, "vllm:inter_token_latency_seconds_count") == 3 * (PARAMS.max_tokens - 1)

    play(scene)


def test_scrape_waits_for_no_turn():
    async def scene(llm):
        stream = llm.generate([1], PARAMS)
        with held(llm):
            await stream.prepared()
            while not llm.llm.engine._in_flight:
                await asyncio.sleep(0.01)
            families = scrape(llm)
            assert value(families, "vllm:num_requests_running") == 1
            assert value(families, "gdnjax:streams") == 1
            assert value(families, "vllm:kv_cache_usage_perc") > 0
        await read(stream)

    play(scene)
