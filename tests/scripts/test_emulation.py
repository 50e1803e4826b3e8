"""The cases that the gate executes, and what is made of their results, without its compiler."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rocm_gate as script
from rocm import compiling, emulation, executing, functions, mutants, report
from rocm.cases import BFLOAT16, attention, cases, chunked, conv, delta, kv_write, race
from rocm.cases.case import Bound, difference, poisoned
from rocm.large_pools import PAGE, Large, large_cases, standing_controls

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels import launch as package

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ALL = {case.name: case for case in cases()}
POOLS = ("ssm", "conv", "k_blocks", "v_blocks", "c_blocks")
KV_POOLS = ("k", "v", "k_scale", "v_scale", "c")


def launches_of(case) -> list[str]:
    """Names of what the case launches on AMD; nothing is computed."""
    names = []

    def recorded(launch, arguments):
        names.append(launch.name)
        return [jnp.zeros(out.shape, out.dtype) for out in launch.out]

    with mock.patch.object(package, "run", recorded):
        jax.eval_shape(lambda x: case.call(x, Backend("pallas", "gfx942")), case.arrays)
    return names


def test_every_kernel_has_a_case():
    launched = {name: launches_of(case) for name, case in ALL.items()}
    assert all(launched.values())
    assert {kernel for kernels in launched.values() for kernel in kernels} == set(functions.WAVES)


def test_mutants_are_of_every_kernel_that_owns_recurrent_state():
    launched = {kernel for group in mutants.groups() for kernel in launches_of(group.cases[0])}
    assert launched == {name for name in functions.WAVES if name.startswith(("gated_delta_rule", "causal_conv1d"))}


def test_names_tell_cases_apart():
    assert len(ALL) == len(cases())
    assert len({large.name for large in large_cases()}) == len(large_cases())


@pytest.mark.parametrize("name", ALL)
def test_what_must_not_be_read_is_poison(name):
    case = ALL[name]
    for pool, x in case.arrays.items():
        if pool in POOLS or (pool in KV_POOLS and x.ndim > 3):
            there = poisoned(x)
            others = np.arange(x.shape[0]) != case.layer
            assert there[others].all()
            assert there[:, 0].all(), "the null slot or block"
            assert not there[case.layer].all() or pool.endswith("_blocks")


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if "table" in case.arrays])
def test_keys_that_no_query_sees_are_poison(name):
    case = ALL[name]
    first = 20 if "first20" in name else 0
    end = 16 * case.arrays["table"].shape[1]
    seen = sum(max(0, min(int(row.max()) + 1, end) - first) for row in case.arrays["position"])
    for pool in set(KV_POOLS) & set(case.arrays):
        # A key of int8 may have the bytes of the poison by chance: its scale has not.
        if case.arrays[pool].dtype != np.int8:
            there = poisoned(case.arrays[pool][case.layer])
            assert (~there).reshape(*there.shape[:2], -1).all(-1).sum() == seen
            assert there.reshape(*there.shape[:2], -1).all(-1).sum() == there.shape[0] * there.shape[1] - seen


@pytest.mark.parametrize("name", ALL)
def test_places_are_compared_or_kept_but_not_both(name):
    case = ALL[name]
    for pool, kept in case.kept.items():
        seen = np.broadcast_to(case.seen[pool], case.arrays[pool].shape)
        assert kept.shape == seen.shape
        assert not (kept & seen).any()
        assert kept[np.arange(kept.shape[0]) != case.layer].all()


def outputs_as_wanted(case) -> tuple[dict, dict]:
    """(outputs of an op that is right, what is wanted). The definition computes padding, too, where kernels do not."""
    wanted = case.wanted()
    found = jax.jit(lambda x: case.call(x, REFERENCE))({k: jnp.asarray(v) for k, v in case.arrays.items()})
    outputs = {name: np.array(found[name]) for name in case.bounds if "[" not in name}
    for name, mask in case.padding.items():
        outputs[name][np.broadcast_to(mask, outputs[name].shape)] = 0
    for pool in case.kept:
        # The null slot, or block.
        outputs[pool][:, 0] = case.arrays[pool][:, 0]
    return outputs, wanted


@functools.cache
def right(name: str) -> tuple[dict, dict]:
    return outputs_as_wanted(ALL[name])


DECODE, WRITE, CONV = delta("decode").name, kv_write().name, conv("decode").name


def judged(name: str, change) -> list[str]:
    outputs, wanted = right(name)
    outputs = {output: x.copy() for output, x in outputs.items()}
    change(outputs)
    return ALL[name].compare(outputs, wanted)[1]


@pytest.mark.parametrize("name", [DECODE, WRITE, CONV])
def test_what_is_right_passes(name):
    assert judged(name, lambda outputs: None) == []


def test_a_wrong_value_is_refused():
    def change(outputs):
        outputs["ssm"][1, 4, 0, 77] *= 1.001

    faults = judged(DECODE, change)
    assert any(fault.startswith("ssm: place") for fault in faults)


def test_a_small_error_everywhere_is_refused_though_it_is_less_than_rounding():
    def change(outputs):
        real = [0, 2]
        outputs["o"][real] = (right(DECODE)[1]["o"][real] * (1 + 2**-11)).astype(BFLOAT16)

    (fault,) = judged(DECODE, change)
    assert fault.startswith("o: flips")


@pytest.mark.parametrize("place", [(0, 2, 0, 5), (1, 3, 1, 0), (1, 1, 0, 9)])
def test_a_touched_slot_is_refused(place):
    def change(outputs):
        outputs["ssm"][place] = 0.0

    assert judged(DECODE, change) == ["ssm: 1 places changed that nobody addresses"]


def test_poison_that_spreads_is_refused():
    def change(outputs):
        outputs["o"][2, 1, 3] = np.nan

    assert judged(DECODE, change) == ["o: not finite where the definition is, or the other way"]


def test_padding_that_gives_anything_but_zeros_or_goes_somewhere_is_refused():
    def change(outputs):
        outputs["o"][1, 0, :2] = 3.0, np.nan
        outputs["ssm"][1, 0, 1, 5] = 3.0

    assert judged(DECODE, change) == ["ssm: 1 places changed that nobody addresses", "o: 2 places of padding are not 0"]


def test_values_are_bit_equal_where_nothing_is_computed():
    def change(outputs):
        outputs["k_blocks"][1, 3, 2, 0, 0] += np.asarray(2**-6, BFLOAT16)

    assert judged(WRITE, change)


def test_errors_are_measured_against_the_unrounded():
    wanted = np.array([1.0, 2.0, 1 + 2**-9], np.float32)
    error = difference(wanted.astype(BFLOAT16), wanted)
    assert error is not None
    assert error.flips == 0
    assert error.largest == 2**-9
    assert error.place == pytest.approx(2**-9 / 2, rel=0.01)
    assert difference(np.array([np.inf], np.float32), np.array([1.0], np.float32)) is None


def test_chunks_hand_on_what_they_are_said_to():
    """The terms of a chunk that the emulator's outputs are held against give the op's own outputs."""
    case = chunked(act=np.float32)
    wanted = case.wanted()
    assert set(case.bounds) == set(wanted)
    scores, inverse = (wanted[f"gated_delta_rule_{name}"] for name in ("scores[0]", "inverse[1]"))
    values = case.arrays["qkv"][:64, 256:].reshape(64, 2, 128).swapaxes(0, 1)
    # A fresh row's first chunk: its state is zero.
    o = scores[0] @ (inverse[0] @ values)
    np.testing.assert_allclose(o.swapaxes(0, 1), wanted["o"][:64], rtol=0, atol=1e-5)


def moved(layers: int = 3, count: int = 40) -> Large:
    """A large case that is small."""
    return Large(delta("decode"), ("ssm",), ("read", "write"), layers, count, {0: 0, 1: 38, 2: 39, 4: 21})


def test_a_moved_case_is_the_same_call():
    large = moved()
    case = large.case()
    assert case.arrays["ssm"].shape == (3, 40, 2, 128 * 128)
    assert case.arrays["read"].tolist() == [38, 0, 21]
    assert case.layer == 2
    outputs, _ = outputs_as_wanted(case)
    assert large.small.compare(large.moved_back(outputs), large.small.wanted())[1] == []


def test_pages_of_a_large_pool_are_those_of_its_places():
    large = moved()
    pool = large.case().arrays["ssm"]
    size = 2 * 128 * 128 * 4
    assert large.pages(pool) == {
        (2 * 40 + number) * size // PAGE + i for number in (0, 38, 39, 21) for i in range(size // PAGE)
    }


def test_sixteen_of_the_large_pools_need_the_bound():
    every = large_cases()
    assert len(every) == 33
    assert sum(large.wrong_unbounded for large in every) == 16
    assert all(large.nbytes > 1 << 32 for large in every if large.wrong_unbounded)
    kinds = {large.small.name.split("-")[0] for large in standing_controls()}
    assert kinds == {"gdn", "attention", "kv"}


def test_kernels_lose_their_bounds_and_get_them_back():
    case = moved().case()

    def text() -> str:
        # As one function: what was traced with bounds has the same arguments.
        call = jax.jit(lambda x: case.call(x, Backend("pallas", "gfx942")))
        (launch,) = compiling.launches_of(call.trace(case.arrays).lower(lowering_platforms=("rocm",)))
        return launch.ir

    bounded = text()
    with emulation.without_bounds():
        assert text().count("arith.minsi") < bounded.count("arith.minsi")
    assert text() == bounded


def test_tasks_are_chosen_by_name():
    machine = mock.Mock(arch="gfx942")
    every = executing.tasks(machine, executing.ALL)
    assert len({task.name for task in every}) == len(every)
    assert sum(task.kind == executing.CONTROL for task in every) == 1 + len(standing_controls())
    named = executing.tasks(machine, ["*-without-bounds"])
    assert len(named) == 16
    assert all(task.fails for task in named)
    assert [task.name for task in executing.tasks(machine, [race().name])] == [race().name]


@pytest.mark.thorough
def test_chips_share_the_mutants_and_nothing_else():
    machine = mock.Mock(arch="gfx942")
    every = [task.name for task in executing.tasks(machine, executing.ALL)]
    shares = [[task.name for task in executing.tasks(machine, executing.ALL, (i, 2))] for i in range(2)]
    mutants = [[name for name in share if name.startswith("mutants of")] for share in shares]
    assert all(mutants)
    assert set(mutants[0]).isdisjoint(mutants[1])
    assert set(every) == set(shares[0]) | set(shares[1])
    assert all(set(every) - set(share) == set(other) for share, other in zip(shares, reversed(mutants), strict=True))
    named = [task.name for task in executing.tasks(machine, ["mutants*"], (1, 2))]
    assert named == [name for name in every if name.startswith("mutants of")]


def test_what_is_found_wrong_passes_only_where_it_has_to_be(monkeypatch):
    found = {"fine": [], "bad": ["o: norm 1, at most 0.1"], "broken": None}

    def run(name):
        if found[name] is None:
            raise KeyError(name)
        return {"wrong": found[name]}

    todo = [
        executing.Task(executing.CASE, name, functools.partial(run, name), fails)
        for fails in (False, True)
        for name in found
    ]
    monkeypatch.setattr(executing, "tasks", lambda *_: todo)
    results = [*executing.results(mock.Mock(arch="gfx942"), ["*"], backwards=False)]
    assert [result["passed"] for result in results] == [True, False, False, False, True, False]
    assert results[3]["wrong"] == ["was not found wrong"]
    assert results[5]["wrong"] == ["KeyError: 'broken'"]


def tallied(caught: int, missed: int, within: int = 0) -> dict:
    """A result of mutants: `missed` changed nothing, `within` changed what they may."""
    lost = [mutants.Missed(7, "v_mov_b32 v0, v1", "copies", i < missed) for i in range(missed + within)]
    tally = mutants.Tally("walk", {"numbers": caught}, lost)
    return result(kind="mutants", name="mutants of w", tallies=[dataclasses.asdict(tally)])


def result(**fields) -> dict:
    return {
        "arch": "gfx942",
        "kind": "case",
        "name": "w",
        "passed": True,
        "wrong": [],
        "fails": False,
        "seconds": 1.0,
    } | (fields)


def test_the_summary_counts():
    results = [result(), result(passed=False, wrong=["x"]), tallied(3, 1)]
    assert report.summary(results) == "2 executed, 1 wrong; 3 of 4 mutants caught (75%, 100% of what changes a bit)"
    assert report.summary(results[:1]) == "1 executed, 0 wrong"
    table = report.table(results)
    assert "walk, gfx942" in table
    assert "copies" in table


def test_a_draw_with_too_few_mutants_caught_is_refused():
    """82% of all and 94.5% of what changes a bit, less two standard deviations of the draw: 7.7 and 4.6 of 100."""
    assert report.too_few([result(), tallied(75, 25)]) == []
    (fault,) = report.too_few([result(), tallied(74, 26)])
    assert "74 of 100 are 74.0% of all mutants, and 82.0% is wanted" in fault
    assert report.too_few([tallied(90, 0, 10)]) == []
    (fault,) = report.too_few([tallied(89, 0, 11)])
    assert "89 of 100 are 89.0% of what changes a bit, and 94.5% is wanted" in fault
    assert len(report.too_few([tallied(7200, 2800)])) == 1
    assert report.too_few([tallied(8150, 1850)]) == []
    assert report.too_few([result()]) == ["no mutant was executed"]


@pytest.mark.parametrize(
    ("names", "results", "status"),
    [
        (["*"], [tallied(80, 20)], 0),
        (["*"], [tallied(60, 40)], 1),
        (["mutants of w"], [tallied(60, 40)], 0),
        (["w"], [result(passed=False)], 1),
        (["*"], [tallied(80, 20), result(passed=False)], 1),
    ],
)
def test_the_emulation_fails_for_what_is_wrong_and_for_too_few_mutants(monkeypatch, capsys, names, results, status):
    monkeypatch.setattr(script, "decoder", lambda: None)
    monkeypatch.setattr(script, "in_processes", lambda *_: results)
    assert script.emulate(mock.Mock(names=names)) == status
    assert ("too few mutants are caught" in capsys.readouterr().out) == (status == 1 and results[0] == tallied(60, 40))


def test_lines_say_what_was_wrong():
    error = {"norm": 1e-7, "place": 1e-6, "flips": 0, "largest": 2e-7}
    text = report.line(json.loads(json.dumps(result(errors={"o": error}))))
    assert text == "ok    gfx942 w, o 2e-07/1e-07 (1.0 s)"
    text = report.line(result(passed=False, wrong=["o: norm 1, at most 0.1"]))
    assert text == "WRONG gfx942 w (1.0 s)\n    o: norm 1, at most 0.1"
    assert report.line(tallied(3, 1)).splitlines()[1] == "    missed in walk: 7 v_mov_b32 v0, v1"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("s_waitcnt vmcnt:0x0", "waits that something else waits for, and hints"),
        ("v_fmac_f32_e32 v1, v2, v3", "low terms of exp, log, rsqrt and division"),
        ("v_div_fixup_f32_e64 v1, v2, v3, 1.0", "guards for infinity, NaN and denormals"),
        ("s_ashr_i32 s3, s2, 31", "numbers, signs and bounds of places"),
        ("v_perm_b32_e64 v0, v1, v2, s4", "numbers, signs and bounds of places"),
        ("v_mfma_f32_32x32x2_f32 v[2:17], v66, v82, v[2:17]", mutants.OTHER),
    ],
)
def test_missed_mutants_have_kinds(text, kind):
    assert mutants.kind_of(text) == kind


def test_without_the_decoder_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert script.main(["--emulate"]) == 2
    assert capsys.readouterr().err == (
        "rocm_gate.py: error: the emulator's decoder is not installed: pip install -e '.[rocm-gate]'\n"
    )


def test_bounds_say_what_they_allow():
    bounds = {bound for case in ALL.values() for bound in case.bounds.values()}
    assert all(isinstance(bound, Bound) and bound.norm <= 1e-2 for bound in bounds)
    assert attention("decode").bounds["o"].norm < 1e-2
