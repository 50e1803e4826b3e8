"""scripts/bench_kernels.py: values first, times of what is right alone, what is written and drawn, tables restored."""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import bench_kernels as script
import jax
import jax.numpy as jnp
import pytest
from kernel_bench import jax_peers, measure, report, sweeps, timing, workloads
from kernel_bench.measure import Row
from kernel_bench.timing import Ceilings

from gdnjax.backend import INTERPRET, REFERENCE, Backend
from gdnjax.pallas_kernels import causal_conv1d, gated_delta_rule, grouped_matmul, paged_attention
from gdnjax.pallas_kernels.gated_delta_rule import StateOrder

pytestmark = pytest.mark.usefixtures("quickly_compiled")

HEADS = workloads.Heads(1, 2)
CHANNELS = workloads.Heads(2, 2, key_dim=24, value_dim=16, per_channel=True, beta_scale=2.0)
SMALL = {
    work.name: work
    for work in (
        workloads.recurrent("decode", 2, HEADS),
        workloads.recurrent("decode", 2, HEADS, vk=False, state="bfloat16"),
        workloads.recurrent("verify", 3, HEADS, old=2, new=3, real=2),
        workloads.recurrent("fold", 3, CHANNELS, old=2, new=0, real=2),
        workloads.chunked((70, 70), HEADS),
        workloads.conv_prefill((70, 70), 48),
        workloads.normed(3, 96),
        workloads.conv_update(3, 48),
        workloads.conv_update(3, 48, pending=3, new=3, real=2),
        workloads.attention(3, 70, 1, 4, 2, 32, real=2),
        workloads.attention(1, 128, 128, 4, 2, 32),
        workloads.kv_write(3, 2, 32, real=2),
        workloads.kv_write(3, 2, 32, int8=True),
        workloads.latent(3, 70, 1, 4, value_dim=32, rest=8, real=2),
        workloads.latent(1, 128, 128, 4, value_dim=32, rest=8),
        workloads.latent_write(3, value_dim=32, rest=8, real=2),
        workloads.grouped(20, 4, 2, 32, 48),
    )
}
"""One of each kind, made as the large ones are, some of them with a row of padding."""
DECODE = "gdn-decode-2h-2"
CEILINGS = Ceilings(copy=1e10, read=1.2e10, matmul=1e11)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(workloads, "WORKLOADS", dict(SMALL))


@pytest.fixture
def ceilings(monkeypatch):
    """There at once."""
    monkeypatch.setattr(timing, "ceilings", lambda *_, **__: CEILINGS)


@pytest.fixture
def clocked(monkeypatch, ceilings):
    """Times that need no device: 2 ms a call, of the calls that `clocked` lists."""
    timed = []

    def time_calls(calls, arguments, pools, runs):
        timed.append(calls)
        return [2e-3] * runs, pools

    monkeypatch.setattr(timing, "MOST", 1)
    monkeypatch.setattr(timing, "check_kernels", lambda *_: None)
    monkeypatch.setattr(timing.Calls, "time", time_calls)
    return timed


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def spoil(monkeypatch, name: str, change) -> None:
    """The workload's call, with `change` of its (outputs, pools)."""
    work = SMALL[name]

    def call(*arguments):
        return change(*work.call(*arguments))

    monkeypatch.setitem(workloads.WORKLOADS, name, dataclasses.replace(work, call=call))


# What is asked for.


def test_list_prints_names_and_no_more(capsys):
    assert script.main(["--list", "conv-*"]) == 0
    assert capsys.readouterr().out.split() == ["conv-prefill-48-2x70", "conv-decode-48-3", "conv-verify-48-2of3"]


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
def test_kernel_in_triton_is_of_gpus_and_has_no_sweep(capsys):
    assert script.main([DECODE, "--kernels", "triton"]) == 2
    assert "--kernels triton on cpu: the kernel is compiled for ROCm and CUDA" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([DECODE, "--kernels", "triton", "--sweep"])
    assert "--sweep changes the tiles of the kernels in Pallas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernels", "names"),
    [
        pytest.param("interpret", list(SMALL), marks=pytest.mark.thorough),
        ("interpret", [name for name in SMALL if name.startswith("conv-")]),
        ("reference", [DECODE]),
    ],
)
def test_values_of_every_kind_of_workload_are_right(kernels, names, capsys):
    assert script.main(["--check-only", "--kernels", kernels, "--seed", "3", *names]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith(f"kernels {kernels}, seed 3")
    assert lines.pop().startswith(f"{len(names)} of {len(names)} workloads in ")
    lines = [line for line in lines if not line.startswith("[")]
    assert [line.split()[0] for line in lines] == names
    assert not any("WRONG" in line or "FAULT" in line or "us" in line.split() for line in lines)


WRONG = {
    "outputs": lambda outputs, pools: (-outputs, pools),
    "one NaN among outputs": lambda outputs, pools: (outputs.at[0, 0, 0].set(jnp.nan), pools),
    "states": lambda outputs, pools: (outputs, 1.01 * pools),
    "states that are NaN": lambda outputs, pools: (outputs, pools * jnp.nan),
}


@pytest.mark.thorough
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


def test_memory_of_the_outputs_is_poisoned_before_the_call(monkeypatch, pool):
    """And the call comes after it."""
    order = []
    leave_behind = measure._leave_behind

    def poison(leaves):
        order.append([(leaf.shape, bool(jnp.isnan(leaf).all())) for leaf in leaves])
        leave_behind(leaves)
        assert all(leaf.is_deleted() for leaf in leaves)

    monkeypatch.setattr(measure, "_leave_behind", poison)
    prepared = measure.Prepared(SMALL[DECODE], REFERENCE, pool)
    calls = prepared.ours.result()
    alone = calls.alone
    calls.alone = lambda *arguments: (order.append("call"), alone(*arguments))[1]
    assert prepared.measure(0, None).right
    assert order == [[((2, 2, 128), True)], "call"]


def test_relative_error_is_of_norms_over_all_leaves():
    assert measure.relative_error((), ()) == 0
    found = (jnp.array([3.0, 0.0]), jnp.array([4.0]))
    wanted = (jnp.array([3.0, 3.0]), jnp.array([0.0]))
    assert float(measure.relative_error(found, wanted)) == pytest.approx(5 / 18**0.5)


# Times.


def test_calls_are_timed_through_the_layers(monkeypatch):
    """Every call is of the layer behind that of the call before, and reads what that one left."""
    monkeypatch.setattr(timing, "AT_LEAST", 1e-9)

    def call(arguments, pools, layer):
        return pools[layer, 0], pools.at[layer].add(arguments["one"])

    arguments, pools = {"one": jnp.ones(())}, jnp.zeros((3, 2))
    calls = timing.Calls(call, arguments, pools, 3, count=6).compile()
    # What the compiler joins here is no matter: the values are.
    calls.fault = None
    times, pools = calls.time(arguments, pools, 4)
    assert len(times) == 4
    assert min(times) > 0
    # Once to warm up, once to guess, four times on the clock; each layer twice.
    assert pools.tolist() == [[12, 12]] * 3


@pytest.mark.parametrize(("seconds", "count"), [(1e-6, 96), (1e-3, 32), (9e-3, 4), (1.0, 4)])
def test_functions_have_whole_rounds_of_layers_and_about_30_ms(seconds, count):
    assert timing.count_of(4, seconds) == count


def test_chained_calls_read_what_the_one_before_wrote():
    def call(arguments, pools, layer):
        seen.append((arguments["order"], layer))
        return arguments["order"] + 1, pools

    seen = []
    repeat = functools.partial(timing._repeat, call, layers=2, chain="order", count=3, backend=REFERENCE)
    jax.make_jaxpr(lambda order: repeat({"order": order}, ()))(4)
    assert len(seen) == 3
    assert len({id(order) for order, _ in seen}) == 3
    seen.clear()
    repeat({"order": jnp.int32(4)}, ())
    assert [(int(order), int(layer)) for order, layer in seen] == [(4, 0), (4, 1), (4, 0)]


def test_chain_needs_every_output():
    """Products of which only the first would be chained are all there; unchained, those of all calls but the last are
    not, and there is no time.
    """
    x, weights = jnp.ones((64, 64)), [jnp.full((64, 64), float(i)) for i in range(3)]

    def call(arguments, pools, layer):
        return tuple(arguments["x"] @ weight for weight in arguments["weights"]), pools

    arguments = {"x": x, "weights": weights}
    chained = timing.Calls(call, arguments, (), 2, chain="x", count=4).compile()
    assert chained.fault is None

    unread = {**arguments, "unread": jnp.int32(0)}
    lost = timing.Calls(call, unread, (), 2, chain="unread", count=4).compile()
    assert lost.fault
    assert "what is left out cannot be timed" in lost.fault
    with pytest.raises(timing.NotMeasuredError, match="4 calls were compiled to"):
        lost.time(unread, (), 1)


HLO = """HloModule jit_many, is_scheduled=true

%region_0.1 (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %add.1 = s32[] add(%a, %b), metadata={op_name="reduce"}
}

%fused_computation.2 (param_0.1: f32[4,4]) -> f32[4,4] {
  %param_0.1 = f32[4,4]{1,0} parameter(0)
  ROOT %dot.7 = f32[4,4]{1,0} dot(%param_0.1, %param_0.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%command_buffer (p: f32[4,4]) -> (f32[4,4], f32[4,4]) {
  %p = f32[4,4]{1,0} parameter(0)
  %kernel.1 = (f32[4,4]{1,0}, s32[1]{0}) custom-call(%p), custom_call_target="__gpu$xla.gpu.triton"
  %kernel.2 = s32[1]{0} custom-call(%p), custom_call_target="t", metadata={op_name="jit(need_outputs)/pallas_call"}
  %f.1 = f32[4,4]{1,0} fusion(%p), kind=kCustom, calls=%fused_computation.2
  %f.2 = f32[4,4]{1,0} fusion(%f.1), kind=kCustom, calls=%fused_computation.2
  ROOT %tuple = (f32[4,4]{1,0}, f32[4,4]{1,0}) tuple(%f.1, %f.2)
}

ENTRY %main.3 (x.1: f32[4,4]) -> (f32[4,4], f32[4,4]) {
  %x.1 = f32[4,4]{1,0} parameter(0)
  ROOT %call.1 = (f32[4,4]{1,0}, f32[4,4]{1,0}) call(%x.1), to_apply=%command_buffer
}
"""


def test_operations_are_counted_where_they_are_called():
    """A computation that is called twice counts twice, one that nobody calls not at all, nor the benchmark's kernel."""
    found = timing.operations_of(HLO)
    assert (found["custom-call"], found["dot"], found["fusion"], found["add"]) == (1, 2, 2, 0)
    timing.check_kernels(HLO, HLO, 1)
    with pytest.raises(timing.NotMeasuredError, match=r"2 calls were compiled to 3 kernels .* where each has 3"):
        timing.check_kernels(HLO, HLO, 2)


def test_call_of_nothing_that_is_counted_is_not_timed():
    nothing = "ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %copy = f32[2]{0} copy(%x)\n}\n"
    with pytest.raises(timing.NotMeasuredError, match="nothing that is counted"):
        timing.check_kernels(nothing, nothing, 2)


def test_what_has_more_than_the_device_is_refused():
    compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((1 << 28,), jnp.float32)).compile()
    timing.check_fits(compiled, None)
    timing.check_fits(compiled, 2 << 30)
    with pytest.raises(timing.DoesNotFitError, match=r"does not fit \(2 GiB\)"):
        timing.check_fits(compiled, (2 << 30) - 1)


def test_one_workload_is_timed_for_real(ceilings, monkeypatch, capsys):
    monkeypatch.setattr(timing, "MOST", 24)
    assert script.main(["conv-decode-*", "--runs", "2", "--no-peers"]) == 0
    assert "of the ceiling" in capsys.readouterr().out


@pytest.mark.thorough
def test_ceilings_of_this_machine_are_numbers():
    found = timing.copy_ceiling(0.001, 1), timing.read_ceiling(0.001, 1, REFERENCE), timing.matmul_ceiling(64, 1)
    assert min(found) > 0


# Figures that cannot be.


@pytest.mark.parametrize(
    ("moved", "flops", "seconds", "said"),
    [
        (10**10, 0, 1.0, None),
        # Reading is faster than copying, and 5% are allowed.
        (10**10, 0, 1 / 1.25, None),
        (10**10, 0, 1 / 1.27, "us would be 0.01 TB/s, and the device has 0.01"),
        (0, 10**11, 1 / 1.04, None),
        (0, 10**11, 1 / 1.06, "us would be 0.11 TFLOP/s, and the device has 0.10"),
    ],
)
def test_more_than_the_device_has_is_a_fault(moved, flops, seconds, said):
    fault = CEILINGS.fault_of(moved, flops, seconds)
    assert (fault is None) if said is None else said in fault


@pytest.mark.thorough
def test_fault_of_the_measurement_is_no_result(clocked, monkeypatch, capsys, tmp_path):
    """The figures of a prompt's convolution once stood at 3265% of the ceiling."""
    target = tmp_path / "kernels.json"
    work = SMALL["conv-decode-48-3"]
    monkeypatch.setitem(workloads.WORKLOADS, work.name, dataclasses.replace(work, bytes=3 * 10**7))
    assert script.main(["conv-*", "--no-peers", "--runs", "1", "--output", str(target)]) == 1
    out = capsys.readouterr().out
    assert "FAULT OF THE MEASUREMENT: 2000.0 us would be 0.01 TB/s, and the device has 0.01" in out
    assert f"| {work.name} | FAULT |" in out
    assert f"not as it should be: {work.name}\n" in out
    first, second, _ = json.loads(target.read_text())["workloads"]
    assert (first["fault"], first["times"]) == (None, [2e-3])
    assert second["fault"]
    assert second["times"] == []


def test_peer_above_the_ceiling_is_a_fault_too():
    row = dataclasses.replace(ROW, peers={})
    row.add_peer("fla", {"median": 0.5}, CEILINGS)
    row.add_peer("XLA", {"median": 0.1}, CEILINGS)
    assert row.peers["fla"] == {"median": 0.5}
    assert not row.is_as_it_should_be
    assert "| XLA FAULT OF THE MEASUREMENT: 100000.0 us would be 0.04 TB/s" in report.line(row, CEILINGS)
    assert "XLA" not in report.table([row], CEILINGS)


def test_peer_that_does_not_fit_is_left_out(clocked, monkeypatch, capsys, pool):
    """Nothing of it runs."""
    work = SMALL["grouped-4e-top2-32x48-20"]
    prepared = measure.Prepared(work, REFERENCE, pool, CEILINGS, peers=True)
    prepared.peers["ragged_dot"] = pool.submit(prepared.ours.result().compile, 10)
    row = prepared.measure(0, 1)
    assert row.peers == {"ragged_dot": {"failed": "does not fit (0 GiB)"}}
    assert len(clocked) == 1
    assert "| ragged_dot failed: does not fit (0 GiB)" in report.line(row, CEILINGS)


# Time.


def test_time_that_is_over_leaves_workloads_out_by_name(clocked, monkeypatch, capsys, tmp_path):
    """What was measured is written, and what was not is named."""
    target = tmp_path / "kernels.json"
    measured, clock, ahead = measure.Prepared.measure, time.monotonic, []

    def slow(prepared, seed, runs):
        ahead.append(0 if not clocked else 100)
        return measured(prepared, seed, runs)

    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(ahead))
    monkeypatch.setattr(measure.Prepared, "measure", slow)
    flags = ["--no-peers", "--runs", "1", "--limit-s", "60", "--output", str(target)]
    assert script.main(["conv-*", *flags]) == 3
    out = capsys.readouterr().out
    assert "not run within --limit-s 60: conv-verify-48-2of3\n" in out
    assert "2 of 3 workloads in " in out
    figures = json.loads(target.read_text())
    assert [row["name"] for row in figures["workloads"]] == ["conv-prefill-48-2x70", "conv-decode-48-3"]
    assert figures["not_run"] == ["conv-verify-48-2of3"]


def test_run_that_is_ended_keeps_what_it_had(clocked, monkeypatch, tmp_path):
    target = tmp_path / "kernels.json"
    measured = measure.Prepared.measure

    def ended(prepared, seed, runs):
        if clocked:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(prepared, seed, runs)

    monkeypatch.setattr(measure.Prepared, "measure", ended)
    assert script.main(["conv-*", "--no-peers", "--runs", "1", "--output", str(target)]) == 143
    figures = json.loads(target.read_text())
    assert [row["name"] for row in figures["workloads"]] == ["conv-prefill-48-2x70"]
    assert figures["not_run"] == ["conv-decode-48-3", "conv-verify-48-2of3"]


# What is written.


@pytest.mark.thorough
def test_json_has_device_ceilings_and_a_row_a_workload(clocked, tmp_path):
    target = tmp_path / "kernels.json"
    flags = ["--kernels", "reference", "--no-peers", "--runs", "3", "--output", str(target)]
    assert script.main([DECODE, "grouped-*", *flags]) == 0
    figures = json.loads(target.read_text())
    assert figures["device"] == jax.devices()[0].device_kind
    assert figures["jax"] == jax.__version__
    assert figures["kernels"] == dataclasses.asdict(REFERENCE)
    assert figures["ceilings"] == dataclasses.asdict(CEILINGS)
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


@pytest.mark.thorough
def test_plot_is_a_picture(clocked, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "roofline.png"
    assert script.main(["conv-decode-*", DECODE, "--no-peers", "--runs", "1", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


ROW = Row("gdn-decode-1h-1", 4 * 10**9, 10**10, 1e-3, 0.0, (4e-3, 0.0), times=[0.5, 1.0, 9.0])


def test_share_of_the_ceiling_is_that_of_the_longer_of_bytes_and_operations():
    assert ROW.median == 1.0
    assert CEILINGS.least_seconds(ROW.bytes, ROW.flops) == 0.4
    assert CEILINGS.least_seconds(ROW.bytes, 9 * 10**10) == 0.9
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
    assert measure.torch_peers([DECODE], 1, 9.0) == {}
    said = capsys.readouterr().out
    assert said == "peers of PyTorch: not measured (ModuleNotFoundError: No module named 'fla')\n"
    assert measure.torch_peers(["grouped-4e-top2-32x48-20"], 1, 9.0) == {}
    assert capsys.readouterr().out == ""


def test_peers_that_take_too_long_are_ended_and_what_they_had_is_taken(monkeypatch, capsys):
    def instead_of_running(command, *, timeout, **_):
        pathlib.Path(command[3]).write_text(json.dumps({DECODE: {"fla": {"median": 1.0}}}))
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", instead_of_running)
    assert measure.torch_peers([DECODE, "gdn-decode-2h-4"], 1, 9.0) == {DECODE: {"fla": {"median": 1.0}}}
    assert capsys.readouterr().out == "peers of PyTorch: 1 workloads in 9 s, then ended\n"


# Sweeps.

TABLES = {
    "gdn": gated_delta_rule.tiles.RECURRENT,
    "gdn-prefill": gated_delta_rule.tiles.CHUNKED,
    "conv": causal_conv1d.tiles.TILES,
    "attention": paged_attention.tiles.TILES,
    "latent": paged_attention.tiles.LATENT,
    "grouped": grouped_matmul.tiles.TILES,
}
LOOKED_UP = {
    "gdn-decode-48h-1": lambda b: gated_delta_rule.tiles.recurrent(b, "float32", StateOrder(True, True), 128, 128),
    "gdn-decode-48h-1-kv": lambda b: gated_delta_rule.tiles.recurrent(b, "float32", StateOrder(False, False), 128, 128),
    "gdn-verify-48h-1-4+4-bf16state": lambda b: gated_delta_rule.tiles.recurrent(
        b, "bfloat16", StateOrder(True, True), 128, 128
    ),
    "gdn-prefill-48h-1024": lambda b: gated_delta_rule.tiles.chunked(b, "bfloat16", 128, 128),
    "kda-prefill-32h-1024": lambda b: gated_delta_rule.tiles.chunked(b, "bfloat16", 128, 128),
    "conv-prefill-48-70": causal_conv1d.tiles.of,
    "conv-decode-48-3": causal_conv1d.tiles.of,
    "attention-decode-4/2x32-2x70": lambda b: paged_attention.tiles.of(b, 1),
    "attention-prefill-4/2x32-1x128-128q": lambda b: paged_attention.tiles.of(b, 64),
    "latent-decode-4x32+8-2x70": lambda b: paged_attention.tiles.of_latents(b, 1, 4, "bfloat16"),
    "latent-decode-40x32+8-2x70": lambda b: paged_attention.tiles.of_latents(b, 1, 40, "bfloat16"),
    "latent-prefill-4x32+8-1x128-128q": lambda b: paged_attention.tiles.of_latents(b, 64, 4, "bfloat16"),
    "grouped-4e-top2-32x48-128": lambda b: grouped_matmul.tiles.of(b, 1.0, "bfloat16", jnp.zeros((4, 48, 32))),
    "grouped-4e-top2-32x48-8192": lambda b: grouped_matmul.tiles.of(b, 4096.0, "bfloat16", jnp.zeros((4, 48, 32))),
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


def test_sweep_reports_the_best_and_goes_on_behind_a_failure(monkeypatch, capsys, pool):
    """Times are by tile; the tile that fails takes its pools with it. Without ceilings' worth of time none is tried."""
    before = copy.deepcopy(TABLES)

    class FakeCalls:
        def __init__(self, *_, **__):
            self.tile = gated_delta_rule.tiles.recurrent(INTERPRET, "float32", StateOrder(True, True), 128, 128)

        def compile(self):
            return self

        def time(self, arguments, pools, runs):
            if self.tile.columns == 32:
                pools.delete()
                raise RuntimeError("too large")
            assert not pools.is_deleted()
            # One of them is faster than the device.
            fast = self.tile == gated_delta_rule.tiles.Recurrent(8, 1)
            return [1e-9 if fast else abs(self.tile.columns - 16) * 1e-3 + self.tile.warps * 1e-5], pools

    monkeypatch.setattr(measure, "Calls", FakeCalls)
    sweep = functools.partial(measure.sweep, SMALL[DECODE], INTERPRET, 0, 1, Ceilings(1e13, 1e13, 1e15), pool)
    sweep(time.monotonic() + 600)
    out = capsys.readouterr().out
    assert out.count("RuntimeError: too large") == 3
    assert out.count("not measured: 0.0 us would be") == 1
    assert out.splitlines()[-1].strip() == "best: Recurrent(columns=16, warps=1)"
    assert before == TABLES
    sweep(time.monotonic() - 1)
    out = capsys.readouterr().out
    assert out.count("not tried, the time is over") == 12
    assert "best" not in out


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("sizes", "fits"), [((8192, 512, 10, 4096, 2048), False), ((128, 256, 8, 2048, 1024), True)], ids=["large", "small"]
)
def test_ragged_dot_that_the_device_does_not_hold_is_not_even_compiled(sizes, fits, monkeypatch):
    """Of 8,192 tokens for 512 experts XLA stores 320 GiB."""
    work = workloads.grouped(*sizes)
    (call,) = jax_peers.of(work).values()
    arguments, pools = jax.eval_shape(work.inputs, jax.random.key(0))
    device = mock.Mock(memory_stats=lambda: {"bytes_limit": 80 << 30})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    refused = pytest.raises(timing.DoesNotFitError, match=r"does not fit \(320 GiB\)")
    with contextlib.nullcontext() if fits else refused:
        jax.eval_shape(lambda x, p: call(x, p, 0), arguments, pools)
