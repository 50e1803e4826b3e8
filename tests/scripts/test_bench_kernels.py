"""scripts/bench_kernels.py: values first, times of what is right alone, what is written and drawn, tables restored."""

import copy
import dataclasses
import json
import subprocess

import bench_kernels as script
import jax
import jax.numpy as jnp
import pytest
from kernel_bench import measure, report, sweeps, timing, workloads
from kernel_bench.measure import Row

from gdnjax.backend import INTERPRET, REFERENCE, Backend
from gdnjax.pallas_kernels import causal_conv1d, gated_delta_rule, grouped_matmul, paged_attention
from gdnjax.pallas_kernels.gated_delta_rule import StateOrder

SMALL = {
    work.name: work
    for work in (
        workloads.recurrent("decode", 2, 1, 2),
        workloads.recurrent("decode", 2, 1, 2, vk=False, state="bfloat16"),
        workloads.recurrent("verify", 2, 1, 2, old=2, new=3),
        workloads.chunked((70, 70), 1, 2),
        workloads.conv_prefill((70, 70), 48),
        workloads.conv_update(3, 48),
        workloads.conv_update(3, 48, pending=3, new=3),
        workloads.attention(2, 70, 1, 4, 2, 32),
        workloads.attention(1, 128, 128, 4, 2, 32),
        workloads.kv_write(3, 2, 32),
        workloads.kv_write(3, 2, 32, int8=True),
        workloads.grouped(20, 4, 2, 32, 48),
    )
}
"""One of each kind, made as the large ones are."""
DECODE = "gdn-decode-2h-2"
CEILINGS = {"copy": 1e10, "matmul": 1e11}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(workloads, "WORKLOADS", dict(SMALL))


@pytest.fixture
def clocked(monkeypatch):
    """Times that need no device: 2 ms a call, of the calls that `clocked` lists, and ceilings at once."""
    timed = []

    def time_calls(call, arguments, pools, layers, *, chain=None, runs=12, most=96):
        timed.append(call)
        return [2e-3] * runs, pools

    monkeypatch.setattr(timing, "time_calls", time_calls)
    monkeypatch.setattr(timing, "copy_ceiling", lambda *_: CEILINGS["copy"])
    monkeypatch.setattr(timing, "matmul_ceiling", lambda *_: CEILINGS["matmul"])
    return timed


def spoil(monkeypatch, name: str, change) -> None:
    """The workload's call, with `change` of its (outputs, pools)."""
    work = SMALL[name]

    def call(*arguments):
        return change(*work.call(*arguments))

    monkeypatch.setitem(workloads.WORKLOADS, name, dataclasses.replace(work, call=call))


# What is asked for.


def test_list_prints_names_and_no_more(capsys):
    assert script.main(["--list", "conv-*"]) == 0
    assert capsys.readouterr().out.split() == ["conv-prefill-48-2x70", "conv-decode-48-3", "conv-verify-48-3"]


def test_pattern_of_no_workload_is_an_error(capsys):
    assert script.main(["gdn-decode-2h-2", "--list"]) == 0
    capsys.readouterr()
    assert script.main(["gdn_decode*", "conv"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "bench_kernels.py: error: no workload is named like gdn_decode* or conv; --list prints them\n"


@pytest.mark.parametrize("flags", [["--runs", "0"], ["--check-only", "--sweep"], ["--check-only", "--plot", "x.png"]])
def test_flags_that_exclude_each_other_are_refused(flags):
    with pytest.raises(SystemExit) as ended:
        script.main([DECODE, *flags])
    assert ended.value.code == 2


def test_kernels_that_cannot_run_here_are_an_error(capsys):
    assert script.main([DECODE, "--kernels", "pallas"]) == 2
    assert "kernels='pallas' on cpu" in capsys.readouterr().err


# Values.


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("kernels", "names"), [("interpret", list(SMALL)), ("reference", [DECODE])])
def test_values_of_every_kind_of_workload_are_right(kernels, names, capsys):
    assert script.main(["--check-only", "--kernels", kernels, "--seed", "3", *names]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith(f"kernels {kernels}, seed 3")
    assert [line.split()[0] for line in lines] == names
    assert not any("WRONG" in line or "us" in line.split() for line in lines)


WRONG = {
    "outputs": lambda outputs, pools: (-outputs, pools),
    "one NaN among outputs": lambda outputs, pools: (outputs.at[0, 0, 0].set(jnp.nan), pools),
    "states": lambda outputs, pools: (outputs, 1.01 * pools),
    "states that are NaN": lambda outputs, pools: (outputs, pools * jnp.nan),
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_values_are_reported_and_not_timed(change, clocked, monkeypatch, capsys, tmp_path):
    """What is right beside them is timed."""
    spoil(monkeypatch, DECODE, WRONG[change])
    target = tmp_path / "kernels.json"
    flags = ["--no-peers", "--runs", "2", "--output", str(target)]
    assert script.main([DECODE, "conv-decode-*", *flags]) == 1
    out = capsys.readouterr().out
    (wrong,) = [line for line in out.splitlines() if line.startswith(DECODE)]
    assert "WRONG: allowed 0.004 and 1e-05" in wrong
    assert f"| {DECODE} | WRONG |" in out
    assert len(clocked) == 1
    first, second = json.loads(target.read_text())["workloads"]
    assert (first["times"], second["times"]) == ([], [2e-3, 2e-3])


def test_wrong_values_end_a_check(monkeypatch):
    spoil(monkeypatch, DECODE, WRONG["outputs"])
    assert script.main([DECODE, "--check-only"]) == 1


def test_memory_of_the_outputs_is_poisoned_before_the_call(monkeypatch):
    """And the call comes after it."""
    work, order = SMALL[DECODE], []
    poison = measure._leave_nan_behind
    monkeypatch.setattr(measure, "_leave_nan_behind", lambda shapes: (order.append(shapes), poison(shapes)))

    def call(*arguments):
        order.append("call")
        return work.call(*arguments)

    assert measure.one(dataclasses.replace(work, call=call), REFERENCE, 0, None).right
    # Traced once for its shapes.
    assert order[0] == "call"
    assert order[1].shape == (2, 2, 128)
    assert order[2:] == ["call"]


def test_relative_error_is_of_norms_over_all_leaves():
    assert measure.relative_error((), ()) == 0
    found = (jnp.array([3.0, 0.0]), jnp.array([4.0]))
    wanted = (jnp.array([3.0, 3.0]), jnp.array([0.0]))
    assert measure.relative_error(found, wanted) == pytest.approx(5 / 18**0.5)


# Times.


def test_calls_are_timed_through_the_layers(monkeypatch):
    """Every call is of the layer behind that of the call before, and reads what that one left."""
    monkeypatch.setattr(timing, "AT_LEAST", 1e-9)

    def call(arguments, pools, layer):
        return pools[layer, 0], pools.at[layer].add(arguments["one"])

    times, pools = timing.time_calls(call, {"one": jnp.ones(())}, jnp.zeros((3, 2)), 3, runs=4)
    assert len(times) == 4
    assert min(times) > 0
    # Twice to compile and to guess, twice to warm up, four times on the clock.
    assert pools.tolist() == [[8, 8]] * 3


def test_chained_calls_read_what_the_one_before_wrote():
    def call(arguments, pools, layer):
        seen.append((arguments["order"], layer))
        return arguments["order"] + 1, pools

    seen = []
    jax.make_jaxpr(lambda order: timing._repeat(call, {"order": order}, (), layers=2, chain="order", count=3))(4)
    assert len(seen) == 3
    assert len({id(order) for order, _ in seen}) == 3
    seen.clear()
    timing._repeat(call, {"order": jnp.int32(4)}, (), layers=2, chain="order", count=3)
    assert [(int(order), int(layer)) for order, layer in seen] == [(4, 0), (4, 1), (4, 0)]


def test_one_workload_is_timed_for_real(monkeypatch, capsys):
    monkeypatch.setattr(timing, "copy_ceiling", lambda *_: CEILINGS["copy"])
    monkeypatch.setattr(timing, "matmul_ceiling", lambda *_: CEILINGS["matmul"])
    assert script.main(["conv-decode-*", "--runs", "2", "--no-peers"]) == 0
    assert "of the ceiling" in capsys.readouterr().out


# What is written.


def test_json_has_device_ceilings_and_a_row_a_workload(clocked, tmp_path):
    target = tmp_path / "kernels.json"
    flags = ["--kernels", "reference", "--no-peers", "--runs", "3", "--output", str(target)]
    assert script.main([DECODE, "grouped-*", *flags]) == 0
    figures = json.loads(target.read_text())
    assert figures["device"] == jax.devices()[0].device_kind
    assert figures["jax"] == jax.__version__
    assert figures["kernels"] == dataclasses.asdict(REFERENCE)
    assert figures["ceilings"] == CEILINGS
    first, second = figures["workloads"]
    assert (first["name"], second["name"]) == (DECODE, "grouped-4e-top2-32x48-20")
    assert first["bytes"] == SMALL[DECODE].bytes
    assert first["times"] == [2e-3] * 3
    assert 0 < first["error"] < first["limits"][0]


def test_json_of_a_check_has_no_times(tmp_path):
    target = tmp_path / "kernels.json"
    assert script.main(["conv-decode-*", "--check-only", "--output", str(target)]) == 0
    figures = json.loads(target.read_text())
    assert figures["ceilings"] is None
    assert [row["times"] for row in figures["workloads"]] == [[]]


def test_plot_is_a_picture(clocked, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "roofline.png"
    assert script.main(["conv-decode-*", DECODE, "--no-peers", "--runs", "1", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


ROW = Row("gdn-decode-1h-1", 4 * 10**9, 10**10, 1e-3, 0.0, (4e-3, 0.0), times=[0.5, 1.0, 9.0])


def test_share_of_the_ceiling_is_that_of_the_longer_of_bytes_and_operations():
    assert ROW.median == 1.0
    assert report.ceiling_time(ROW, CEILINGS) == 0.4
    assert report.ceiling_time(dataclasses.replace(ROW, flops=9 * 10**10), CEILINGS) == 0.9
    assert "40% of the ceiling" in report.line(ROW, CEILINGS)


def test_peers_stand_beside_ours():
    row = dataclasses.replace(ROW, peers={"fla": {"median": 1.5, "error": 2e-3}, "cuDNN": {"failed": "no GPU"}})
    line = report.line(row, CEILINGS)
    assert "| fla 1500000.0 us (1.50x), error 2.0e-03" in line
    assert "| cuDNN failed: no GPU" in line
    *_, last = report.table([row], CEILINGS).splitlines()
    assert last == "| gdn-decode-1h-1 | 1000000.0 | 40% | 1.0e-03 | fla | 1500000.0 | 1.50x |"


def test_peers_that_are_not_installed_are_left_out_with_the_reason(monkeypatch, capsys):
    def instead_of_running(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "Traceback:\nModuleNotFoundError: No module named 'fla'\n")

    monkeypatch.setattr(subprocess, "run", instead_of_running)
    assert measure.torch_peers([DECODE], 1) == {}
    said = capsys.readouterr().out
    assert said == "peers of PyTorch: not measured (ModuleNotFoundError: No module named 'fla')\n"


# Sweeps.

TABLES = {
    "gdn": gated_delta_rule.tiles.RECURRENT,
    "gdn-prefill": gated_delta_rule.tiles.CHUNKED,
    "conv": causal_conv1d.tiles.TILES,
    "attention": paged_attention.tiles.TILES,
    "grouped": grouped_matmul.tiles.TILES,
}
LOOKED_UP = {
    "gdn-decode-48h-1": lambda b: gated_delta_rule.tiles.recurrent(b, "float32", StateOrder(True, True), 128, 128),
    "gdn-decode-48h-1-kv": lambda b: gated_delta_rule.tiles.recurrent(b, "float32", StateOrder(False, False), 128, 128),
    "gdn-verify-48h-1-4+4-bf16state": lambda b: gated_delta_rule.tiles.recurrent(
        b, "bfloat16", StateOrder(True, True), 128, 128
    ),
    "gdn-prefill-48h-1024": lambda b: gated_delta_rule.tiles.chunked(b, "bfloat16", 128, 128),
    "conv-prefill-48-70": causal_conv1d.tiles.of,
    "conv-decode-48-3": causal_conv1d.tiles.of,
    "attention-decode-4/2x32-2x70": lambda b: paged_attention.tiles.of(b, 1),
    "attention-prefill-4/2x32-1x128-128q": lambda b: paged_attention.tiles.of(b, 64),
    "grouped-4e-top2-32x48-128": lambda b: grouped_matmul.tiles.of(b, 1.0, "bfloat16"),
    "grouped-4e-top2-32x48-8192": lambda b: grouped_matmul.tiles.of(b, 4096.0, "bfloat16"),
}
"""What an op finds in its table while a workload of that name is swept."""


@pytest.mark.parametrize("backend", [Backend("pallas", "sm_90"), Backend("pallas", "cuda"), INTERPRET], ids=str)
@pytest.mark.parametrize("name", LOOKED_UP)
def test_sweep_puts_each_tile_where_the_op_looks_and_restores_the_table(name, backend):
    before = copy.deepcopy(TABLES)
    tried = []
    for tile, entry in sweeps.candidates(name, backend):
        with entry:
            assert LOOKED_UP[name](backend) == tile
        assert before == TABLES
        tried.append(tile)
    assert len(set(tried)) >= 4


def test_table_is_restored_behind_a_tile_that_fails():
    before = copy.deepcopy(TABLES)
    _, entry = next(sweeps.candidates(DECODE, Backend("pallas", "gfx942")))
    with pytest.raises(MemoryError), entry:
        raise MemoryError
    assert before == TABLES


def test_sweep_reports_the_best_and_goes_on_behind_a_failure(clocked, monkeypatch, capsys):
    """Times are by tile; the tile that fails takes the pools with it."""
    before = copy.deepcopy(TABLES)

    def time_calls(call, arguments, pools, layers, **_):
        tile = gated_delta_rule.tiles.recurrent(INTERPRET, "float32", StateOrder(True, True), 128, 128)
        if tile.columns == 32:
            pools.delete()
            raise RuntimeError("too large")
        assert not pools.is_deleted()
        return [abs(tile.columns - 16) * 1e-3 + tile.warps * 1e-5], pools

    monkeypatch.setattr(timing, "time_calls", time_calls)
    measure.sweep(SMALL[DECODE], INTERPRET, 0, 1)
    out = capsys.readouterr().out
    assert out.count("RuntimeError: too large") == 3
    assert out.splitlines()[-1].strip() == "best: Recurrent(columns=16, warps=1)"
    assert before == TABLES
