"""gdnjax bench engine: its sizes and sections, one run of them all on the embedded geometry, and its errors."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from gdnjax.assets import config_file
from gdnjax.cli.bench import engine as script
from gdnjax.cli.bench.offline import run, sections
from gdnjax.cli.bench.offline.record import Record
from gdnjax.cli.bench.offline.sizes import Sizes
from gdnjax.config import ModelConfig
from gdnjax.memory import StateGeometry
from gdnjax.sharding import make_mesh
from tests.micro import micro_model, micro_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")

# As small as it gets, with sequences long enough that packed blocks for one pay for the states of both.
SMALL = ["--config", "tiny", "--layers", "4", "--scale", "0.016", "--batches", "2", "--num-speculative-tokens", "1"]
SMALL += ["--acceptance-length", "1.5", "--input-len", "48", "--output-len", "48", "--padded", "1"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(status, stdout, JSON) of a run of every section."""
    import io

    target = tmp_path_factory.mktemp("bench_engine") / "engine.json"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = script.main([*SMALL, "--output", str(target)])
    return status, out.getvalue(), json.loads(target.read_text())


@pytest.mark.thorough
def test_every_section_is_measured_and_kept(whole_run):
    status, out, content = whole_run
    assert status == 0
    assert content["failed"] == {}
    assert list(content["sections"]) == [name for name in sections.SECTIONS if name != "balance"]
    for section, figures in content["sections"].items():
        assert out.count(f"\n{section} ") == len(figures)
        # Whatever a figure is of, compiling is no part of it.
        assert all(not figure.get("compilations") for figure in figures.values()), section


@pytest.mark.thorough
def test_ratios_are_those_of_the_figures_beside_them(whole_run):
    found = whole_run[2]["sections"]
    plain, drafting = found["decode"]["2"], found["speculation"]["2"]
    assert drafting["ratio"] == pytest.approx(drafting["tokens_per_second"] / plain["tokens_per_second"])
    assert drafting["outputs_are_the_models"] is False
    served, plain = found["speculation"]["throughput"], found["throughput"]["run"]
    ratio = served["output_tokens_per_second"] / plain["output_tokens_per_second"]
    assert served["ratio"] == pytest.approx(ratio)
    assert served["outputs_are_the_models"] is False
    packed, decoupled = found["accounting"]["packed"], found["accounting"]["decoupled"]
    ratio = decoupled["output_tokens_per_second"] / packed["output_tokens_per_second"]
    assert found["accounting"]["ratio"] == {"value": pytest.approx(ratio), "published": 1.59}
    assert decoupled["seconds"] == found["throughput"]["run"]["seconds"]
    cached, computed = found["prefix"]["with"], found["prefix"]["without"]
    assert found["prefix"]["ratio"]["value"] == pytest.approx(computed["seconds"] / cached["seconds"])


@pytest.mark.thorough
def test_figures_are_of_what_they_say(whole_run):
    content = whole_run[2]
    found, sizes = content["sections"], content["sizes"]
    assert found["decode"]["2"]["tokens_per_step"] == 1.0
    # In the bucket of 2: no other was compiled.
    assert found["decode"]["1 of 2"]["batch"] == 1
    assert list(content["engines"]["k = 0"]["prepare_seconds"]) == ["rows 2"]
    assert 1.0 <= found["speculation"]["2"]["tokens_per_step"] <= 2.0
    run = found["throughput"]["run"]
    assert run["output_tokens"] == sizes["requests"] * sizes["output_len"]
    assert found["speculation"]["throughput"]["output_tokens"] == run["output_tokens"]
    # Of one request; that all of them take is more.
    assert 0 < run["ttft_ms"] + run["tpot_ms"] * (sizes["output_len"] - 1) <= 1e3 * run["seconds"]
    # The packed pool makes requests wait, or end early and come again, and all of them end.
    assert found["accounting"]["packed"]["output_tokens"] == found["throughput"]["run"]["output_tokens"]
    assert found["accounting"]["packed"]["blocks"] < found["accounting"]["decoupled"]["blocks"]
    assert found["prefix"]["with"]["cached_tokens"] > 0
    assert found["prefix"]["without"]["cached_tokens"] == 0


@pytest.mark.thorough
def test_head_has_what_figures_depend_on(whole_run):
    content = whole_run[2]
    for name in ("device", "jax", "gdnjax", "preset", "layers", "kernels", "sizes", "load_seconds"):
        assert name in content
    assert sorted(content["engines"]) == ["k = 0", "k = 1"]
    for engine in content["engines"].values():
        assert engine["memory_plan"]["total_bytes"] > 0
        assert engine["build_seconds"] > 0
        assert engine["prepare_seconds"]


def test_section_that_fails_leaves_the_others_figures(monkeypatch, tmp_path, capsys):
    def fail(bench, sizes):
        bench.open(0, [])
        raise RuntimeError("the device\nis on fire")

    def measure(name):
        return lambda bench, sizes: bench.record.figure(name, "run", "a line", {"seconds": 1.0})

    monkeypatch.setattr(
        sections, "SECTIONS", {"decode": measure("decode"), "prefill": fail, "prefix": measure("prefix")}
    )
    target = tmp_path / "engine.json"
    assert script.main([*SMALL, "decode", "prefill", "prefix", "--output", str(target)]) == 2
    content = json.loads(target.read_text())
    assert list(content["sections"]) == ["decode", "prefix"]
    assert content["failed"] == {"prefill": "the device is on fire"}
    assert capsys.readouterr().err.splitlines()[-1] == "gdnjax bench engine: error: 1 of 3 sections failed: prefill"


def test_engine_that_does_not_fit_is_said_to(monkeypatch, tmp_path, capsys):
    from gdnjax import LLM

    def no_room(*_, **__):
        raise MemoryError("7 bytes short")

    monkeypatch.setattr(LLM, "from_model", no_room)
    target = tmp_path / "engine.json"
    assert script.main([*SMALL, "decode", "prefix", "--output", str(target)]) == 2
    assert "does not fit into the device's memory: 7 bytes short; lower --batches" in capsys.readouterr().err
    assert "7 bytes short" in json.loads(target.read_text())["failed"]["decode"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["decoding"], "no section 'decoding'; allowed: decode, prefill"),
        (["--batches", "4,0"], "--batches must be at least 1, got 0"),
        (["--batches", "4,2", "--padded", "3,2"], "--padded 2 is a batch with a bucket of its own"),
        (["--batches", "4", "--padded", "9"], "or larger than all; allowed: others below 4"),
        (["--scale", "2"], "--scale must be in (0, 1], got 2"),
        (["--max-num-batched-tokens", "100"], "--max-num-batched-tokens must be a multiple of 64, got 100"),
        (["--layers", "99"], "--layers must be between 1 and the model's 32, got 99"),
        (["--num-speculative-tokens", "0"], "--num-speculative-tokens must be at least 1, got 0"),
        (["--acceptance-length", "9"], "spec_acceptance_length must be between 1 and"),
        (["--config", "tiny"], "more than the model's context of 4096; lower --scale"),
        ([], "of weights and 131072 prompt tokens; there it takes 1 GiB and 32768 at most: --config tiny --scale 0.03"),
        (["balance"], "balance is of a model with a mixture of experts"),
        (["--enable-expert-parallel"], "enable_expert_parallel=True needs a model with a mixture of experts"),
        (["--config", "none.json"], "none.json: no such file"),
        (["--output", "nowhere/engine.json"], "--output nowhere/engine.json: no such directory"),
        (["--memory-fraction", "2"], "--memory-fraction must be in (0, 1], got 2"),
    ],
)
def test_wrong_flag_is_one_line_before_anything_is_loaded(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert script.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_flag_of_no_number_is_an_error_of_the_command_line(capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(["--batches", "many"])
    assert caught.value.code == 2
    assert "numbers with commas between them, got 'many'" in capsys.readouterr().err


def test_sections_come_in_their_order_with_those_they_need():
    assert sections.choose([]) == list(sections.SECTIONS)
    assert sections.choose(["prefix", "prefill"]) == ["prefill", "prefix"]
    assert sections.choose(["speculation"]) == ["decode", "speculation"]
    assert sections.choose(["accounting"]) == ["throughput", "accounting"]
    assert sections.choose([], experts=False) == [name for name in sections.SECTIONS if name != "balance"]


def test_flags_of_devices_reach_the_engines(tmp_path):
    flags = ["--config", "qwen3.5-35b-a3b", "--tensor-parallel-size", "4", "--enable-expert-parallel"]
    arguments = script.build_parser().parse_args(flags)
    config = run.read_config(arguments)
    assert config.expert_parallel
    for engine in run.choose_engines(arguments, run.read_config(arguments), Sizes(), ["speculation"]).values():
        assert (engine.tensor_parallel_size, engine.enable_expert_parallel) == (4, True)


@pytest.mark.thorough
def test_balance_is_of_the_tokens_of_a_full_step_and_of_a_decode_step(capsys):
    """Two ranks with two whole experts each."""
    model = micro_model(2, expert_parallel=True)
    llm = SimpleNamespace(model=model, params=micro_params(2, expert_parallel=True), mesh=make_mesh(2))
    bench = SimpleNamespace(
        open=lambda drafts, batches: llm,
        prompts=lambda count, length: np.random.default_rng(0).integers(0, 101, (count, length)).tolist(),
        record=Record(None),
    )
    sections.balance(bench, Sizes(batches=(8, 1), prefill_len=40))
    found = bench.record.of("balance")
    assert list(found) == ["40 tokens", "8 tokens"]
    for figures in found.values():
        assert figures["ranks"] == 2
        assert sum(figures["tokens_per_rank"]) == 2 * figures["tokens"]
        assert 1 <= figures["rank_imbalance"]["mean"] <= figures["expert_imbalance"]["mean"] <= 2
    assert "40 random tokens, top 2 of 4 experts: tokens per rank " in capsys.readouterr().out


def test_default_engine_holds_every_section():
    sizes = Sizes()
    engine = sizes.engine(0, None, sections.SECTIONS)
    assert engine.decode_buckets == (1, 16, 64, 128)
    assert engine.prefill_buckets == (512, 8192)
    tokens = engine.num_kv_blocks * engine.block_size
    assert tokens >= 128 * 2048
    assert tokens >= 8 * 8193
    assert tokens >= 64 * (4096 + 64 + 32)
    assert engine.max_model_len > 8192


def test_default_packed_pool_holds_half_of_the_requests_and_the_decoupled_one_all():
    geometry = StateGeometry.of(
        ModelConfig.from_hf(config_file("qwen3.5-9b")), tp=1, block_size=16, dtype="bfloat16", ssm_dtype="float32"
    )
    packed, decoupled = Sizes().pools(geometry)
    assert packed.blocks == 64 * 128
    assert decoupled.blocks >= 128 * 128


def test_record_replaces_its_file_in_one_go(tmp_path):
    record = Record(str(tmp_path / "engine.json"))
    record.head(device="one")
    record.figure("decode", "1", "a line", {"seconds": 1.0})
    record.head(load_seconds=2.0)
    assert [file.name for file in tmp_path.iterdir()] == ["engine.json"]
    content = json.loads((tmp_path / "engine.json").read_text())
    assert content["device"] == "one"
    assert content["load_seconds"] == 2.0
    assert content["sections"] == {"decode": {"1": {"seconds": 1.0}}}


def test_8_bit_pools_have_blocks_that_kernels_can_number():
    """128 requests of 9B would take 2.2e9 numbers of keys: more blocks, but fewer than these, are refused."""
    arguments = script.build_parser().parse_args(["--kv-cache-dtype", "fp8"])
    config = run.read_config(arguments)
    (engine,) = run.choose_engines(arguments, config, Sizes(), ["decode"]).values()
    assert engine.num_kv_blocks == 16382 < Sizes().engine(0, None, sections.SECTIONS).num_kv_blocks
    arguments = script.build_parser().parse_args([])
    (engine,) = run.choose_engines(arguments, config, Sizes(), ["decode"]).values()
    assert engine.num_kv_blocks == Sizes().engine(0, None, sections.SECTIONS).num_kv_blocks


def test_flags_of_the_engines_reach_them():
    flags = "--kv-cache-dtype int8 --ssm-dtype bfloat16 --state-layout mixed --kernels reference"
    arguments = script.build_parser().parse_args(flags.split())
    engines = run.choose_engines(arguments, run.read_config(arguments), Sizes(), ["decode", "speculation"])
    for engine in engines.values():
        assert (engine.kv_cache_dtype, engine.ssm_dtype) == ("int8", "bfloat16")
        assert (engine.state_layout, engine.kernels) == ("mixed", "reference")
    assert sorted(engines) == [0, 3]
