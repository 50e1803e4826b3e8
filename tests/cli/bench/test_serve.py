"""gdnjax bench serve: workloads, figures, pools of equal bytes, the driver; and its exit status."""

import dataclasses
import itertools
import json
import pathlib
import types

import numpy as np
import pytest

from gdnjax.cli.bench import serve as script
from gdnjax.cli.bench.serving import driver, engines, figures, report, workloads
from gdnjax.cli.bench.serving.driver import Log, Sample, Trace
from gdnjax.cli.bench.serving.engines import Arm, Sizes
from gdnjax.cli.bench.serving.workloads import Conversation, Spec, Turn
from gdnjax.config import ModelConfig
from gdnjax.memory import StateGeometry
from scripts import make_random_checkpoint

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = pathlib.Path(__file__).parents[3]
VOCABULARY = 1000


def _prompts(spec: Spec) -> list[list[int]]:
    return [turn.prompt for item in workloads.draw(spec, VOCABULARY) for turn in item.turns]


# Workloads.


def test_random_workload_has_the_lengths_that_were_asked_for():
    spec = Spec(num_requests=50, input_len=40, output_len=7)
    drawn = workloads.draw(spec, VOCABULARY)
    assert {len(prompt) for prompt in _prompts(spec)} == {40}
    assert {turn.max_tokens for item in drawn for turn in item.turns} == {7}
    assert {item.length for item in drawn} == {47}
    tokens = np.concatenate(_prompts(spec))
    assert tokens.min() >= 0
    assert tokens.max() < VOCABULARY
    # No two prompts have a beginning in common.
    assert len({tuple(prompt[:8]) for prompt in _prompts(spec)}) == 50


def test_lengths_are_uniform_in_their_range():
    spec = Spec(num_requests=3000, input_len=20, output_len=1, range_ratio=0.5)
    lengths = [len(prompt) for prompt in _prompts(spec)]
    assert set(lengths) == set(range(10, 31))
    # A mean of 3000 draws from 21 values: a standard error of 0.11.
    assert np.mean(lengths) == pytest.approx(20, abs=0.5)
    assert {turn.max_tokens for item in workloads.draw(spec, VOCABULARY) for turn in item.turns} == {1, 2}


def test_prefixes_are_shared_evenly_and_nothing_after_them():
    spec = Spec(kind="shared-prefix", num_requests=30, input_len=8, output_len=1, prefix_len=64, num_prefixes=3)
    prompts = _prompts(spec)
    counts = [sum(p[:64] == prefix for p in prompts) for prefix in {tuple(p[:64]): p[:64] for p in prompts}.values()]
    assert counts == [10, 10, 10]
    assert {len(prompt) for prompt in prompts} == {72}
    assert len({tuple(prompt[64:]) for prompt in prompts}) == 30


def test_only_first_turn_of_a_conversation_has_the_prefix():
    spec = Spec(kind="multi-turn", num_requests=2, input_len=5, output_len=3, prefix_len=16, turns=4)
    first, second = workloads.draw(spec, VOCABULARY)
    assert [len(turn.prompt) for turn in first.turns] == [21, 5, 5, 5]
    assert first.turns[0].prompt[:16] == second.turns[0].prompt[:16]
    assert first.length == 16 + 4 * (5 + 3)


def test_workload_depends_on_its_spec_alone():
    spec = Spec(num_requests=20, input_len=9, output_len=4, range_ratio=0.4, seed=3)
    assert workloads.draw(spec, VOCABULARY) == workloads.draw(spec, VOCABULARY)
    assert _prompts(spec) != _prompts(dataclasses.replace(spec, seed=4))
    assert _prompts(spec) == _prompts(dataclasses.replace(spec, request_rate=2.0))


def test_arrivals_are_a_poisson_process():
    times = workloads.arrivals(np.random.default_rng(0), 4000, 5.0)
    gaps = np.diff(times)
    assert times[0] == 0
    # Exponential gaps: the mean is known to 1 / sqrt(4000) = 1.6%, and the deviation equals it.
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    assert gaps.min() >= 0
    assert not workloads.arrivals(np.random.default_rng(0), 9, None).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "chat"}, "no workload 'chat'; allowed: random, shared-prefix, multi-turn"),
        ({"prefix_len": 8}, "random prompts share no prefix"),
        ({"kind": "shared-prefix", "turns": 2}, "shared-prefix requests have one turn, got 2"),
    ],
)
def test_spec_that_contradicts_itself_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Spec(num_requests=1, input_len=1, output_len=1, **fields)


def test_file_of_requests_and_conversations_is_read(tmp_path):
    file = tmp_path / "requests.jsonl"
    lines = [
        {"prompt_token_ids": [1, 2], "max_tokens": 5, "arrival": 0.25},
        {"prompt": "Hi", "arrival": 1},
        {"turns": [{"prompt": "Hi", "max_tokens": 2}, {"prompt_token_ids": [7]}]},
        {"turns": [{"prompt": "late"}], "arrival": 2.5},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = workloads.encode(workloads.read(file, 9), lambda text: list(text.encode()))
    assert found == [
        Conversation([Turn([1, 2], 5)], 0.25),
        Conversation([Turn([72, 105], 9)], 1.0),
        Conversation([Turn([72, 105], 2), Turn([7], 9)]),
        Conversation([Turn([108, 97, 116, 101], 9)], 2.5),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"max_tokens": 1}', 'a turn needs "prompt" or "prompt_token_ids"'),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "and not both"),
        ('{"prompt": [1]}', '"prompt" must be a text'),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt_token_ids": [1, true]}', "a list of integers"),
        ('{"prompt": "a", "max_tokens": 0}', '"max_tokens" must be an integer of at least 1, got 0'),
        ('{"prompt": "a", "arrival": -1}', '"arrival" must be seconds of at least 0, got -1'),
        ('{"prompt": "a", "temperature": 1}', "a turn has 'temperature'; allowed: prompt"),
        ('{"turns": []}', "at least one turn"),
        ('{"turns": ["a"]}', "a turn must be a JSON object, got str"),
    ],
)
def test_bad_line_of_a_file_is_named(tmp_path, line, message):
    file = tmp_path / "requests.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"requests\.jsonl, line 2: ") as error:
        workloads.read(file, 1)
    assert message in str(error.value)


def test_file_without_requests_is_an_error(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no requests in it"):
        workloads.read(file, 1)


# Figures.

STATS = {
    "num_turns": 4,
    "num_preemptions": 1,
    "num_compilations": 0,
    "num_decode_rows": 0,
    "num_draft_tokens": 0,
    "num_accepted_draft_tokens": 0,
    "drafted_at": [],
    "accepted_at": [],
    "prefix_cache": {"queried_tokens": 40, "hit_tokens": 10, "lost_tokens": 4},
    "seconds": dict.fromkeys(figures.HOST_PARTS, 0.002),
}

LOG = Log(
    traces=[
        Trace(0, 0, arrival=0.0, prompt_tokens=10, output_tokens=3, cached_tokens=0, times=[0.1, 0.2, 0.4]),
        Trace(1, 0, arrival=0.5, prompt_tokens=30, output_tokens=1, cached_tokens=10, times=[0.8]),
    ],
    samples=[Sample(0.5, 1, 0, 3), Sample(1.0, 2, 0, 1), Sample(2.0, 0, 0, 0)],
    seconds=2.0,
    stats=STATS,
)


def test_figures_of_a_log_are_those_by_hand():
    found = figures.of_log(LOG)
    by_hand = {
        "request_throughput": 1.0,
        "input_throughput": 20.0,
        "output_throughput": 2.0,
        "total_token_throughput": 22.0,
        "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0,
        "p90_ttft_ms": 280.0,
        "p99_ttft_ms": 298.0,
        "mean_tpot_ms": 150.0,
        "mean_itl_ms": 150.0,
        "p99_itl_ms": 199.0,
        "mean_e2el_ms": 350.0,
        # 1 until 0.5 s, 2 until 1.0 s, none until 2.0 s.
        "mean_running": 0.75,
        "max_running": 2,
        "preemptions": 1,
        "cached_tokens": 10,
        "hit_rate": 0.25,
        "lost_rate": 0.1,
        "plan_step_ms": 0.5,
        "steps": 4,
    }
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)


def test_single_tokens_have_no_time_between_tokens():
    single = dataclasses.replace(LOG, traces=LOG.traces[1:])
    found = figures.of_log(single)
    assert found["mean_tpot_ms"] is None
    assert found["p99_itl_ms"] is None
    assert found["mean_ttft_ms"] == pytest.approx(300.0)
    assert "TPOT" not in report.table([report.ArmReport(Arm("one"), engines.Pools(0, 1, 1), [single])], "title")


def test_ratios_are_medians_over_pairs_of_runs():
    before = [{"rate": rate, "none": None, "zero": 0.0} for rate in (1.0, 2.0, 4.0)]
    after = [{"rate": rate, "none": None, "zero": 3.0} for rate in (3.0, 4.0, 4.0)]
    found = figures.ratios(before, after)
    assert found == {"rate": figures.Ratio(2.0, 1.0, 3.0)}
    assert str(found["rate"]) == "2.00x [1.00, 3.00]"
    assert figures.medians(before) == {"rate": 2.0, "none": None, "zero": 0.0}


def test_host_work_is_the_sum_of_plan_pack_and_commit():
    steps = [dict.fromkeys(figures.HOST_PARTS, seconds) for seconds in (0.001, 0.003)]
    found = figures.of_steps(steps)
    assert found["plan + pack + commit"]["mean"] == pytest.approx(6.0)
    assert found["dispatch"]["median"] == pytest.approx(2.0)


def test_table_has_a_column_for_each_setting_and_one_for_ratios():
    slow = dataclasses.replace(LOG, seconds=4.0)
    arms = [report.ArmReport(Arm(name), engines.Pools(0, 1, 1), [log]) for name, log in (("a", slow), ("b", LOG))]
    lines = report.table(arms, "title").splitlines()
    assert lines[2].split() == ["a", "b", "ratio"]
    (line,) = [line for line in lines if line.startswith("output throughput")]
    assert line.split()[-3:] == ["1", "2", "2.00x"]
    # Nobody reads a ratio of what is no cost.
    (line,) = [line for line in lines if line.startswith("preemptions")]
    assert line.split() == ["preemptions", "1", "1"]


DRAFTING = dataclasses.replace(
    LOG,
    seconds=1.0,
    stats=STATS
    | {
        "num_decode_rows": 10,
        "num_draft_tokens": 20,
        "num_accepted_draft_tokens": 14,
        "drafted_at": [10, 10],
        "accepted_at": [9, 5],
    },
)


def test_acceptance_is_of_drafts_and_length_of_decode_rows():
    found = figures.of_log(DRAFTING)
    assert (found["draft_acceptance"], found["tokens_per_step"]) == (0.7, 2.4)
    assert (figures.of_log(LOG)["draft_acceptance"], figures.of_log(LOG)["tokens_per_step"]) == (None, None)
    drafting = report.table([report.ArmReport(Arm("one"), engines.Pools(0, 1, 1), [DRAFTING])], "title")
    lines = [line.split() for line in drafting.splitlines()]
    assert ["drafts", "accepted", "0.7"] in lines
    assert ["tokens", "of", "a", "row", "and", "decode", "step", "2.4"] in lines
    # A run without drafts has no line for them.
    plain = report.table([report.ArmReport(Arm("one"), engines.Pools(0, 1, 1), [LOG])], "title")
    assert "drafts" not in plain


def _speculation_arms(**given):
    arms = engines.drafting({"num_speculative_tokens": 2, **given})
    logs = [[LOG, LOG], [LOG, LOG], [DRAFTING, DRAFTING]]
    return [report.ArmReport(arm, engines.Pools(0, 1, 1), own) for arm, own in zip(arms, logs, strict=True)]


def test_comparison_of_speculation_has_a_row_for_each_number_of_drafts():
    rows = report.speculation_rows(_speculation_arms())
    assert [row["num_drafts"] for row in rows] == [0, 1, 2]
    assert [row["ratio"]["median"] for row in rows] == [1.0, 1.0, 2.0]
    assert rows[0]["tokens_per_step"] == 1
    last = rows[2]
    assert (last["draft_acceptance"], last["tokens_per_step"], last["forced_length"]) == (0.7, 2.4, None)
    assert last["acceptance_per_position"] == [0.9, 0.5]
    lines = report.speculation_table(_speculation_arms(), "title").splitlines()
    assert lines[0] == "title"
    assert lines[2].split("  ")[0] == "drafts"
    assert lines[-1].split() == ["k", "=", "2", "4", "150", "70.0%", "90%,", "50%", "2.4", "2.00x"]
    assert lines[-3].split() == ["k", "=", "0", "2", "150", "-", "-", "1", "1.00x"]


def test_forced_acceptance_is_marked_wherever_it_is_reported():
    arms = _speculation_arms(spec_acceptance_length=2.5)
    # One draft makes two tokens a step at most.
    assert [arm.arm.forced_length for arm in arms] == [None, 2, 2.5]
    assert [row["forced_length"] for row in report.speculation_rows(arms)] == [None, 2, 2.5]
    text = report.speculation_table(arms, "title")
    assert "k = 1 (forced to 2)" in text
    assert "k = 2 (forced to 2.5)" in text
    assert text.endswith("Acceptance was forced: the outputs are not the model's.")
    assert [arm.as_json()["forced_acceptance"] for arm in arms] == [False, True, True]
    assert "forced" not in report.speculation_table(_speculation_arms(), "title")


def test_settings_of_speculation_differ_in_their_drafts_alone():
    arms = engines.drafting({"num_speculative_tokens": 3, "draft_acceptance": "rejection"})
    assert [arm.num_drafts for arm in arms] == [0, 1, 2, 3]
    assert {arm.prefix_cache for arm in arms} == {True}
    assert {arm.speculation.get("draft_acceptance") for arm in arms[1:]} == {"rejection"}
    assert arms[0].speculation == {}


def test_drafts_take_their_part_of_a_slot_and_of_a_block():
    config = ModelConfig.from_hf(ROOT / "gdnjax" / "assets" / "tiny")
    options = {"tensor_parallel_size": 1, "dtype": "float32", "kv_cache_dtype": "auto", "ssm_dtype": "float32"}
    arms = engines.drafting({"num_speculative_tokens": 3})
    plain, one, _, three = (engines.geometry_of(arm, config, options, 16) for arm in arms)
    assert plain == GEOMETRY
    assert plain.slot_bytes < one.slot_bytes < three.slot_bytes
    assert one.block_bytes == three.block_bytes > plain.block_bytes


# Pools of equal bytes.

GEOMETRY = StateGeometry.of(
    ModelConfig.from_hf(ROOT / "gdnjax" / "assets" / "tiny"), tp=1, block_size=16, dtype="float32", ssm_dtype="float32"
)


def test_packed_pool_holds_the_requests_that_were_asked_for():
    packed, decoupled = engines.COMPARISONS["accounting"]
    sizes = Sizes(rows=8, longest=65, block_size=16, pool_requests=4)
    assert sizes.blocks_per_request == 4
    assert engines.pools(packed, GEOMETRY, sizes) == engines.Pools(0, 16, 16)
    # The same bytes hold all that the others can use.
    found = engines.pools(decoupled, GEOMETRY, sizes)
    assert found.blocks == 8 * 4
    spent = 8 * GEOMETRY.slot_bytes + found.afforded * GEOMETRY.block_bytes
    assert 0 <= 16 * GEOMETRY.packed_block_bytes - spent < GEOMETRY.block_bytes


def test_checkpoints_come_out_of_the_same_bytes():
    off, on = engines.COMPARISONS["prefix-cache"]
    sizes = Sizes(rows=4, longest=4096, block_size=16, pool_bytes=100 * GEOMETRY.slot_bytes)
    without, with_cache = (engines.pools(arm, GEOMETRY, sizes) for arm in (off, on))
    assert without.checkpoints == 0
    assert with_cache.checkpoints == 8
    lost = (without.afforded - with_cache.afforded) * GEOMETRY.block_bytes
    assert lost == pytest.approx(8 * GEOMETRY.slot_bytes, abs=GEOMETRY.block_bytes)


def test_pool_without_limit_holds_everything():
    _, on = engines.COMPARISONS["prefix-cache"]
    sizes = Sizes(rows=4, longest=100, block_size=16, checkpoints=3)
    assert engines.pools(on, GEOMETRY, sizes) == engines.Pools(3, 7 * 7, 7 * 7)


def test_pool_below_one_request_is_an_error():
    packed, _ = engines.COMPARISONS["accounting"]
    sizes = Sizes(rows=4, longest=100, block_size=16, pool_bytes=3 * GEOMETRY.packed_block_bytes)
    with pytest.raises(ValueError, match=r"packed: .* have 3 blocks .* of 100 tokens needs 7; raise --pool-gib"):
        engines.pools(packed, GEOMETRY, sizes)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 32, 48, 256])
def test_half_of_the_rows_have_a_bucket(rows):
    buckets = engines.decode_buckets(rows)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == rows
    assert rows < 16 or rows // 2 in buckets


def test_published_geometry_has_the_published_blocks():
    form = script.published_form()
    assert (form.packed, form.slot_bytes, form.block_bytes) == (6906, 24_422_400, 124_800)
    assert form.ratio > 180


# The driver, on an engine that gives every request a token a step.


class _Engine:
    """Requests of a prompt's tokens; the reply is 100, 101, 102, ..."""

    def __init__(self):
        self.scheduler = types.SimpleNamespace(running=[], waiting=[])

    def step(self):
        moved = list(self.scheduler.running)
        for request in moved:
            request.output_token_ids.append(100 + len(request.output_token_ids))
            request.finished = len(request.output_token_ids) == request.max_tokens
        self.scheduler.running = [request for request in moved if not request.finished]
        return moved


@dataclasses.dataclass(eq=False)
class _Request:
    prompt: list[int]
    max_tokens: int
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    finished: bool = False

    @property
    def requests(self):
        return [self]

    def output(self):
        completion = types.SimpleNamespace(token_ids=tuple(self.output_token_ids))
        return types.SimpleNamespace(num_cached_tokens=5, outputs=(completion,))


class _LLM:
    def __init__(self):
        self.engine = _Engine()
        self.submitted = []
        self._turns = itertools.count()

    def submit(self, prompt, max_tokens):
        request = _Request(prompt["prompt_token_ids"], max_tokens)
        self.submitted.append(request)
        self.engine.scheduler.running.append(request)
        return request

    def stats(self):
        counters = dict.fromkeys(driver.COUNTERS, next(self._turns))
        return {**counters, "prefix_cache": {"hit_tokens": 1, "hit_rate": 0.5}, "seconds": {}}


def test_next_prompt_is_the_conversation_so_far():
    llm = _LLM()
    conversations = [Conversation([Turn([1, 2], 3), Turn([3], 1), Turn([4, 5], 2)]), Conversation([Turn([9], 2)])]
    log = driver.run(llm, conversations, lambda max_tokens: max_tokens)
    assert [request.prompt for request in llm.submitted] == [
        [1, 2],
        [9],
        [1, 2, 100, 101, 102, 3],
        [1, 2, 100, 101, 102, 3, 100, 4, 5],
    ]
    assert [(t.conversation, t.turn, t.prompt_tokens, t.output_tokens, len(t.times)) for t in log.traces] == [
        (0, 0, 2, 3, 3),
        (1, 0, 1, 2, 2),
        (0, 1, 6, 1, 1),
        (0, 2, 9, 2, 2),
    ]
    first, _, second, third = log.traces
    assert (second.arrival, third.arrival) == (first.times[-1], second.times[-1])
    assert sum(sample.tokens for sample in log.samples) == 8
    assert {trace.cached_tokens for trace in log.traces} == {5}
    # Counters by how much they grew; a rate does not grow.
    assert (log.stats["num_turns"], log.stats["prefix_cache"]) == (1, {"hit_tokens": 0})


def test_lists_of_counters_grow_longer():
    before = dict.fromkeys(driver.COUNTERS, 0) | {"prefix_cache": {}, "seconds": {}, "drafted_at": [3]}
    after = dict.fromkeys(driver.COUNTERS, 1) | {"prefix_cache": {}, "seconds": {}, "drafted_at": [5, 2]}
    assert driver.growth(before, after)["drafted_at"] == [2, 2]


def test_time_to_first_token_counts_from_when_a_request_was_due():
    conversations = [Conversation([Turn([1], 1)], 0.03), Conversation([Turn([2], 1)], 0.0)]
    log = driver.run(_LLM(), conversations, lambda max_tokens: max_tokens)
    assert [trace.conversation for trace in log.traces] == [1, 0]
    late = log.traces[1]
    assert late.arrival == 0.03
    assert figures.time_to_first_token(late) == late.times[0] - 0.03 >= 0


# The command.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num-requests", "0"], "--num-requests must be at least 1, got 0"),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--range-ratio", "2"], "--range-ratio must be in [0, 1], got 2"),
        (["--request-rate", "0"], "--request-rate must be a number above 0, got 0"),
        (["--pool-gib", "nan"], "--pool-gib must be a number above 0, got nan"),
        (["--pool-gib", "1", "--pool-requests", "1"], "both size the pools; give one"),
        (
            ["--workload", "none"],
            "--workload none: no such file; allowed: random, shared-prefix, multi-turn, or a file",
        ),
        (["--turns", "2"], "--turns is nothing of this workload; allowed: --num-requests, --input-len"),
        (
            ["--workload", "{file}", "--input-len", "2"],
            "--input-len is nothing of this workload; allowed: --output-len",
        ),
        (["--workload", "{file}", "--request-rate", "2"], "a file says itself when requests come"),
        (["--workload", "{file}", "--random-weights", "qwen3.5-0.8b"], "random weights have no tokenizer"),
        (["--compare", "accounting", "--accounting", "packed"], "leave --accounting out"),
        (["--compare", "prefix-cache", "--prefix-cache", "on"], "leave --prefix-cache out"),
        (["--accounting", "packed", "--prefix-cache", "on"], "emulated without a cache"),
        (["--num-speculative-tokens", "8"], "num_speculative_tokens must be at most 7, got 8"),
        (["--num-speculative-tokens", "-1"], "num_speculative_tokens must be an integer of at least 0, got -1"),
        (["--draft-acceptance", "rejection"], "--draft-acceptance needs --num-speculative-tokens above 0"),
        (["--adaptive-speculation"], "--adaptive-speculation needs --num-speculative-tokens above 0"),
        (["--spec-acceptance-length", "2"], "--spec-acceptance-length needs --num-speculative-tokens above 0"),
        (
            ["--num-speculative-tokens", "2", "--spec-acceptance-length", "3.5"],
            "spec_acceptance_length must be between 1 and 1 + num_speculative_tokens=3, and needs speculation, got 3.5",
        ),
        (["--compare", "speculation", "--num-speculative-tokens", "0"], "above 0, got 0"),
        (["--compare", "speculation", "--pool-requests", "2"], "with --compare speculation: --pool-gib"),
        (["--compare", "speculation", "--prefix-cache", "on"], "leave --prefix-cache out"),
        (
            ["--compare", "invariance", "--num-speculative-tokens", "2", "--adaptive-speculation"],
            "adaptive_speculation=True needs num_speculative_tokens above 0 and batch_invariant=False",
        ),
        (["--overhead", "--compare", "accounting"], "--overhead is a measurement of its own"),
        (["--overhead", "--request-rate", "1"], "--overhead has random requests at once"),
        (["--output", "{tmp}/none/x.json"], "no such directory"),
        (["--plot", "{tmp}/x.pdf"], "a picture is a .png"),
        (["--model", "{tmp}/none"], "no such directory; a model is a local checkpoint directory"),
        (["--model", "{tmp}", "--random-weights", "qwen3.5-9b"], "leave it or --model out"),
        (["--random-weights", "qwen9"], "no such file; a configuration is"),
        (["--input-len", "5000"], "the longest request has 5064 tokens with its output, more than the model's context"),
        (["--memory-fraction", "2"], "--memory-fraction must be in (0, 1], got 2"),
        (["--pool-gib", "0.001"], "slots"),
        (["--accounting", "packed", "--pool-gib", "0.001"], "have 2 blocks for 32 slots"),
    ],
)
def test_mistake_is_one_line_and_status_2(capsys, tmp_path, given, message):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    assert script.main([flag.format_map({"tmp": tmp_path, "file": file}) for flag in given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("gdnjax bench serve: error: ")
    assert err.count("\n") == 1


def test_plot_without_matplotlib_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main(["--plot", str(tmp_path / "x.png")]) == 2
    assert "--plot needs matplotlib: pip install 'gdnjax[bench]'" in capsys.readouterr().err


@pytest.fixture
def small_config(tmp_path):
    """A configuration of two layers, which compile in seconds."""
    config = make_random_checkpoint.model_config(vocab_size=64, layers=2, hidden_size=64, dtype="float32")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "layer_types": ["linear_attention", "full_attention"]}), encoding="utf-8")
    return file


@pytest.mark.thorough
def test_comparison_is_complete(capsys, tmp_path, small_config):
    output, plot = tmp_path / "result.json", tmp_path / "result.png"
    shape = (
        "--num-requests",
        "3",
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--prefix-len",
        "64",
        "--num-prefixes",
        "1",
    )
    small = ("--random-weights", str(small_config), "--max-num-seqs", "1", "--max-num-batched-tokens", "64")
    flags = ("--compare", "prefix-cache", "--repeat", "2", "--output", str(output), "--plot", str(plot))
    assert script.main([*shape, *small, *flags]) == 0
    out, _ = capsys.readouterr()
    title, _, header, first, *_ = out.splitlines()
    assert title.endswith("shared-prefix, 3 requests, at once, medians of 2 runs")
    assert header.split() == ["cache", "off", "cache", "on", "ratio"]
    assert first.startswith("request throughput (req/s)")
    result = json.loads(output.read_text())
    assert {"random_weights", "seed", "device", "jax", "workload", "sizes"} <= set(result["settings"])
    off, on = result["arms"]
    assert (off["prefix_cache"], on["prefix_cache"]) == (False, True)
    for run in (*off["runs"], *on["runs"]):
        assert [(r["prompt_tokens"], r["output_tokens"]) for r in run["requests"]] == [(72, 4)] * 3
        assert (run["max_running"], run["compilations"], run["preemptions"]) == (1, 0, 0)
        assert run["stats"]["num_turns"] > 0
    # One after the other: the second and the third go on from what the first has left, and a run from nothing.
    assert [run["cached_tokens"] for run in (*off["runs"], *on["runs"])] == [0, 0, 128, 128]
    assert on["median"]["hit_rate"] == pytest.approx(128 / 216)
    assert result["ratios"]["input_throughput"]["least"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_comparison_of_speculation_is_complete(capsys, tmp_path, small_config):
    output = tmp_path / "result.json"
    config = json.loads(small_config.read_text())
    small_config.write_text(json.dumps({**config, "mtp_num_hidden_layers": 1}), encoding="utf-8")
    shape = ("--num-requests", "2", "--input-len", "8", "--output-len", "12")
    small = ("--random-weights", str(small_config), "--max-num-seqs", "1", "--max-num-batched-tokens", "64")
    flags = ("--num-speculative-tokens", "2", "--spec-acceptance-length", "2.5", "--output", str(output))
    assert script.main([*shape, *small, "--compare", "speculation", *flags]) == 0
    out, _ = capsys.readouterr()
    assert "k = 1 (forced to 2)" in out
    assert out.endswith("Acceptance was forced: the outputs are not the model's.\n")
    result = json.loads(output.read_text())
    plain, one, two = result["speculation"]
    assert [row["num_drafts"] for row in (plain, one, two)] == [0, 1, 2]
    assert (plain["draft_acceptance"], plain["tokens_per_step"], plain["ratio"]["median"]) == (None, 1, 1)
    assert one["tokens_per_step"] > 1.5
    assert two["tokens_per_step"] > one["tokens_per_step"]
    assert [arm["forced_acceptance"] for arm in result["arms"]] == [False, True, True]
    for arm in result["arms"]:
        for run in arm["runs"]:
            assert [r["output_tokens"] for r in run["requests"]] == [12, 12]
            assert run["compilations"] == 0


def test_model_without_an_mtp_head_is_one_line(capsys, small_config):
    assert script.main(["--random-weights", str(small_config), "--num-speculative-tokens", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "num_speculative_tokens above 0 needs a model with an MTP head" in err
    assert err.count("\n") == 1
