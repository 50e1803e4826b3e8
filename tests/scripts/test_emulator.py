"""The emulator's launches: what it refuses, the conflicts that it finds, branches, barriers and memory."""

import dataclasses
import mmap
import sys

import numpy as np
import pytest
from rocm import emulator
from rocm.emulator import Fault, Instruction, missing, nop_at
from rocm.emulator.shadow import Shadow

from tests.scripts.emulating import END, WAIT, asm, kernel, launch

BARRIER = asm("s_barrier")
OFFSETS = asm("v_lshlrev_b32 v1, 2, v0")
"""v1: of each thread the offset of its word."""


def words(n: int = 64) -> np.ndarray:
    return np.zeros(n, np.uint32)


def test_a_kernel_writes_what_it_reads():
    source, target = np.arange(512, dtype=np.uint32), words(512)
    result = launch(
        asm("s_lshl_b32 s3, s2, 9"),
        asm("v_lshl_add_u32 v1, v0, 2, s3"),
        asm("global_load_dword v2, v1, s[4:5]"),
        WAIT,
        asm("v_add_u32 v2, v2, s2"),
        asm("global_store_dword v1, v2, s[6:7]"),
        arrays=[source, target],
        grid=4,
        warps=2,
        shadow=True,
    )
    assert target.tolist() == [k + k // 128 for k in range(512)]
    assert result.conflicts == {}
    assert (result.barriers, result.splits, result.steps, result.instructions) == (0, 0, 10, 80)
    assert result.pages == [set(), {0}]


def test_only_the_workgroups_that_are_named_run():
    target = words(4)
    program = [asm("s_lshl_b32 s3, s2, 2"), asm("v_mov_b32 v1, s3"), asm("v_mov_b32 v2, 7")]
    launch(*program, asm("global_store_dword v1, v2, s[4:5]"), arrays=[target], workgroups=[1, 3], grid=4)
    assert target.tolist() == [0, 7, 0, 7]


def test_an_array_given_twice_is_one_place():
    pool = np.arange(64, dtype=np.uint32)
    result = launch(
        OFFSETS,
        asm("global_load_dword v2, v1, s[4:5]"),
        WAIT,
        asm("v_add_u32 v2, v2, 1"),
        asm("global_store_dword v1, v2, s[6:7]"),
        asm("global_load_dword v3, v1, s[4:5]"),
        WAIT,
        asm("global_store_dword v1, v3, s[8:9]"),
        arrays=[pool, pool, out := words()],
    )
    assert pool.tolist() == out.tolist() == [*range(1, 65)]
    assert result.pages[0] == result.pages[1] == {0}


# --- what is refused


@pytest.mark.parametrize(
    "use",
    [
        asm("v_add_u32 v3, v2, 1"),
        asm("v_mov_b32 v2, 1"),
        asm("ds_write_b32 v1, v2"),
        asm("global_store_dword v1, v2, s[4:5]"),
        asm("ds_read_b32 v2, v1"),
    ],
    ids=lambda p: p.text,
)
def test_a_register_before_its_wait(use):
    load = asm("global_load_dword v2, v1, s[4:5]")
    with pytest.raises(Fault, match=r"s_waitcnt missing: v2 \(instruction 4: "):
        launch(OFFSETS, load, use, arrays=[words()])
    launch(OFFSETS, load, WAIT, use, arrays=[words()])


def test_scalar_loads_wait_for_all():
    load = asm("s_load_dword s8, s[4:5]")
    more = asm("s_load_dword s9, s[4:5]")
    with pytest.raises(Fault, match="s_waitcnt missing: s8"):
        launch(load, more, asm("s_waitcnt", lgkmcnt=1), asm("s_add_u32 s10, s8, s8"), arrays=[words()])
    launch(load, more, asm("s_waitcnt", lgkmcnt=0), asm("s_add_u32 s10, s8, s8"), arrays=[words()])


def test_vector_loads_are_counted_from_the_oldest():
    loads = [asm(f"global_load_dword v{k}, v1, s[4:5]") for k in (2, 3)]
    launch(OFFSETS, *loads, asm("s_waitcnt", vmcnt=1), asm("v_mov_b32 v4, v2"), arrays=[words()])
    with pytest.raises(Fault, match="s_waitcnt missing: v3"):
        launch(OFFSETS, *loads, asm("s_waitcnt", vmcnt=1), asm("v_mov_b32 v4, v3"), arrays=[words()])


def test_stores_are_counted_too():
    store = asm("global_store_dword v1, v1, s[4:5]")
    load = asm("global_load_dword v2, v1, s[4:5]")
    launch(OFFSETS, load, store, asm("s_waitcnt", vmcnt=1), asm("v_mov_b32 v4, v2"), arrays=[words()])


def test_loads_of_a_kind_may_write_one_register():
    load = asm("global_load_dword v2, v1, s[4:5]")
    launch(OFFSETS, load, load, WAIT, arrays=[words()])


@pytest.mark.parametrize(("offset", "behind"), [(0, 0), (4, 4), (-4, None)])
def test_out_of_bounds(offset, behind):
    load = asm("global_load_dword v2, v1, s[4:5]", **({"offset": offset} if offset else {}))
    if offset == 0:
        launch(OFFSETS, load, arrays=[words(), words()])
        return
    said = f"out of bounds by {behind} bytes behind array 0" if behind else "out of bounds: .* before all arrays"
    with pytest.raises(Fault, match=said):
        launch(OFFSETS, load, arrays=[words(), words()])


def test_an_offset_cut_to_32_bits_leads_nowhere():
    """Arrays stand so far apart that 4 GiB from one, either way, there is no other."""
    wrong = [asm("s_add_u32 s4, s4, s4"), asm("s_addc_u32 s5, s5, 1")]
    with pytest.raises(Fault, match="out of bounds"):
        launch(OFFSETS, *wrong, asm("global_load_dword v2, v1, s[4:5]"), arrays=[words(), words()])


def test_out_of_lds():
    launch(OFFSETS, asm("ds_write_b32 v1, v1"), arrays=[words()], lds=256)
    with pytest.raises(Fault, match="out of LDS: byte 260 of 256"):
        launch(OFFSETS, asm("ds_write_b32 v1, v1", offset=4), arrays=[words()], lds=256)


def test_an_lds_write_under_way_at_a_barrier():
    write = [OFFSETS, asm("ds_write_b32 v1, v1")]
    with pytest.raises(Fault, match="LDS is being written at a barrier"):
        launch(*write, BARRIER, arrays=[words()])
    launch(*write, asm("s_waitcnt", lgkmcnt=0), BARRIER, arrays=[words()])


def test_a_program_that_does_not_end():
    with pytest.raises(Fault, match="no end after 1000 steps"):
        launch(asm("s_branch -1"), arrays=[words()], limit=1000)


def test_a_program_that_has_no_end():
    with pytest.raises(Fault, match="the kernel has no end"):
        emulator.run(kernel(asm("s_nop 0")), [words()], grid=1, warps=1, lds=0)


def test_a_branch_out_of_the_kernel():
    with pytest.raises(Fault, match="a branch out of the kernel"):
        launch(asm("s_branch 100"), arrays=[words()])


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (asm("v_sin_f32 v0, v1"), "v_sin_f32 v0, v1"),
        (asm("global_atomic_add v0, v1, s[4:5]"), "global_atomic_add"),
        (asm("v_add_f32 v0, v1, v2", encoding="e64", omod=1), "omod of v_add_f32_e64 v0, v1, v2 omod:0x1"),
        (asm("v_mov_b32 v0, v1", encoding="dpp", dpp_ctrl=0x13C), "dpp_ctrl 0x13c"),
        (asm("v_add_f32 v0, v1, v2", encoding="sdwa", clamp=1), "clamp of"),
        (asm("ds_read_b32 v0, v1", gds=1), "gds of"),
        (asm("ds_add_u32 v0, v1"), "ds_add_u32"),
        (asm("global_load_dword v0, v1, s[4:5]", sve=1), "sve of"),
        (asm("s_setreg_imm32_b32 1, 3"), "s_setreg_imm32_b32"),
        (asm("s_cbranch_cdbgsys 1"), "s_cbranch_cdbgsys"),
        (asm("v_mfma_f32_4x4x4_bf16 v[0:3], v[4:5], v[6:7], 0"), "v_mfma_f32_4x4x4_bf16"),
        (asm("v_mfma_f32_32x32x8_bf16 v[0:15], v[20:21], v[22:23], 0", cbsz=1), "cbsz of"),
        (asm("image_sample v0, v1"), "image_sample"),
    ],
    ids=lambda p: p.name if isinstance(p, Instruction) else "",
)
def test_what_is_not_known_is_named_before_the_first_step(p, said):
    assert said in missing(kernel(p, END))[p.name]
    pool = words()
    with pytest.raises(NotImplementedError) as error:
        launch(OFFSETS, asm("global_store_dword v1, v1, s[4:5]"), asm("s_branch 1"), p, arrays=[pool])
    assert said in str(error.value)
    assert not pool.any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scratch": 16}, "scratch"),
        ({"preload": 1}, "arguments in registers"),
        ({"properties": 0}, "no pointer to arguments"),
        ({"float_mode": 0xC0}, "float mode 0xc0"),
    ],
)
def test_kernels_that_start_otherwise_are_refused(change, said):
    program = kernel(END)
    program = dataclasses.replace(program, descriptor=dataclasses.replace(program.descriptor, **change))
    with pytest.raises(NotImplementedError, match=said):
        emulator.run(program, [words()], grid=1, warps=1, lds=0)


def test_arguments_that_may_come_in_registers_are_loaded_by_the_prologue():
    target = words()
    pointer, store = asm("s_load_dwordx2 s[4:5], s[0:1]", offset=0), asm("global_store_dword v1, v1, s[4:5]")
    program = kernel(pointer, WAIT, OFFSETS, store, END)
    program = dataclasses.replace(program, descriptor=dataclasses.replace(program.descriptor, preload=2))
    emulator.run(program, [target], grid=1, warps=1, lds=0)
    assert target.tolist() == (4 * np.arange(64)).tolist()


def test_a_mutant_is_the_program_but_for_one_instruction():
    program = kernel(OFFSETS, asm("v_mov_b32 v2, 1"), END)
    mutant = nop_at(program, 1)
    assert [p.name for p in mutant.instructions] == ["v_lshlrev_b32", "s_nop", "s_endpgm"]
    assert mutant.instructions[1].address == program.instructions[1].address
    assert program.instructions[1].name == "v_mov_b32"
    assert missing(mutant) == {}


DIVERGING = [
    asm("s_load_dwordx2 s[4:5], s[0:1]", offset=0),
    asm("s_load_dwordx2 s[6:7], s[0:1]", offset=8),
    WAIT,
    asm("v_lshlrev_b32 v1, 2, v0"),
    asm("global_load_dword v4, v1, s[4:5]"),
    asm("ds_write_b32 v1, v0"),
    WAIT,
    asm("v_readfirstlane_b32 s8, v0"),
    asm("s_mov_b32 s9, 2"),
    asm("s_cmp_lt_u32 s8, 64"),
    asm("s_cbranch_scc1 1"),  # the second wave adds once more
    asm("v_add_u32 v4, v4, 5"),
    asm("v_add_u32 v4, v4, s9"),
    asm("s_sub_u32 s9, s9, 1"),
    asm("s_cmp_lg_u32 s9, 0"),
    asm("s_cbranch_scc1 -4"),
    BARRIER,
    asm("v_xor_b32 v2, 0x100, v1"),
    asm("ds_read_b32 v3, v2"),
    WAIT,
    asm("v_add_u32 v3, v3, v4"),
    asm("global_store_dword v1, v3, s[6:7]"),
    END,
]
"""Waves that part and meet again, a loop, a barrier, LDS, an array that is read and one that is written."""


def test_a_mutant_from_its_place_on_is_the_mutant_from_the_beginning():
    """In all that comes of it, or its fault, and without a trace in the launch that it leaves."""
    program = kernel(*DIVERGING)
    options = {"grid": 1, "warps": 2, "lds": 512, "shadow": True}

    def arrays():
        return [np.arange(128, dtype=np.uint32), words(128)]

    def outcome(finish, found):
        try:
            return finish(), [x.tolist() for x in found()]
        except Fault as fault:
            return str(fault)

    def whole(code):
        mine = arrays()
        return outcome(lambda: emulator.run(code, mine, **options), lambda: mine)

    right = whole(program)
    assert right[1][1] == [(k ^ 64) + k + 3 + 5 * (k >= 64) for k in range(128)]
    underway = emulator.Underway(program, arrays(), **options)
    left, outcomes = {*range(len(DIVERGING) - 1)}, []
    while left:
        place = underway.run_to(left)
        left.remove(place)
        mutant = underway.without(place)
        outcomes.append(outcome(mutant.finish, mutant.arrays))
        assert outcomes[-1] == whole(nop_at(program, place)), DIVERGING[place].text
    assert underway.run_to([]) is None
    assert outcome(underway.finish, underway.arrays) == right
    assert sum(found != right for found in outcomes) > 12
    assert any("s_waitcnt" in found for found in outcomes if isinstance(found, str))
    assert any(found[0].conflicts for found in outcomes if not isinstance(found, str))


def test_registers_and_lds_begin_as_nan():
    target = words(128)
    launch(
        OFFSETS,
        asm("v_mov_b32 v4, v5"),
        asm("ds_read_b32 v6, v1"),
        WAIT,
        asm("global_store_dword v1, v4, s[4:5]"),
        asm("global_store_dword v1, v6, s[4:5]", offset=256),
        arrays=[target],
    )
    assert np.isnan(target.view(np.float32)).all()
    assert (emulator.poisoned((2, 3), np.int16).view(np.uint8) == 0xFB).all()


# --- branches and barriers


def test_waves_that_part_meet_again():
    """Odd waves take one side, even ones the other; what is behind runs once for all."""
    target = words(256)
    result = launch(
        asm("v_lshrrev_b32 v2, 6, v0"),
        asm("v_readfirstlane_b32 s8, v2"),
        asm("s_bitcmp1_b32 s8, 0"),
        asm("s_cbranch_scc1 2"),
        asm("v_mov_b32 v3, 10"),
        asm("s_branch 1"),
        asm("v_mov_b32 v3, 20"),
        asm("v_add_u32 v3, v3, v2"),
        OFFSETS,
        asm("global_store_dword v1, v3, s[4:5]"),
        arrays=[target],
        warps=4,
    )
    assert target.reshape(4, 64)[:, 0].tolist() == [10, 21, 12, 23]
    assert (target.reshape(4, 64) == target.reshape(4, 64)[:, :1]).all()
    assert result.splits == 1
    # Two for the pointer, four together, two and one apart, four together again with the end.
    assert result.steps == 2 + 4 + 2 + 1 + 4


def test_waves_that_loop_for_different_times():
    target = words(256)
    launch(
        asm("v_lshrrev_b32 v2, 6, v0"),
        asm("v_readfirstlane_b32 s8, v2"),
        asm("v_mov_b32 v3, 0"),
        asm("v_add_u32 v3, v3, 3"),
        asm("s_sub_u32 s8, s8, 1"),
        asm("s_cmp_ge_i32 s8, 0"),
        asm("s_cbranch_scc1 -4"),
        OFFSETS,
        asm("global_store_dword v1, v3, s[4:5]"),
        arrays=[target],
        warps=4,
    )
    assert target.reshape(4, 64)[:, 7].tolist() == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("before", "branch", "taken"),
    [
        ("s_cmp_eq_u32 0, 0", "s_cbranch_scc1", True),
        ("s_cmp_eq_u32 0, 0", "s_cbranch_scc0", False),
        ("s_mov_b64 vcc, 0", "s_cbranch_vccz", True),
        ("s_mov_b64 vcc, 0", "s_cbranch_vccnz", False),
        ("s_mov_b64 vcc, 4", "s_cbranch_vccz", False),
        ("s_mov_b64 vcc, 4", "s_cbranch_vccnz", True),
        ("s_mov_b64 exec, exec", "s_cbranch_execz", False),
        ("s_mov_b64 exec, exec", "s_cbranch_execnz", True),
    ],
)
def test_branches(before, branch, taken):
    target = words()
    program = [OFFSETS, asm(before), asm("v_mov_b32 v2, 1"), asm(f"{branch} 1"), asm("v_mov_b32 v2, 2")]
    launch(*program, asm("global_store_dword v1, v2, s[4:5]"), arrays=[target])
    assert target.tolist() == [1 if taken else 2] * 64


def test_lanes_that_part():
    """exec is cut to odd lanes and skipped where it has none."""
    target = words(64)
    launch(
        OFFSETS,
        asm("v_mov_b32 v3, 1"),
        asm("v_and_b32 v2, 1, v0"),
        asm("v_cmp_eq_u32 vcc, 1, v2"),
        asm("s_and_saveexec_b64 s[8:9], vcc"),
        asm("s_cbranch_execz 1"),
        asm("v_mov_b32 v3, 2"),
        asm("s_or_b64 exec, exec, s[8:9]"),
        asm("global_store_dword v1, v3, s[4:5]"),
        arrays=[target],
    )
    assert target.tolist() == [1 + k % 2 for k in range(64)]


EXCHANGE = [
    asm("v_lshlrev_b32 v1, 2, v0"),
    asm("ds_write_b32 v1, v0"),
    asm("s_waitcnt", lgkmcnt=0),
]
FETCH = [
    asm("v_xor_b32 v2, 0x100, v1"),  # the word of the same lane, in the other wave
    asm("ds_read_b32 v3, v2"),
    asm("s_waitcnt", lgkmcnt=0),
    asm("global_store_dword v1, v3, s[4:5]"),
]


def test_a_barrier_stands_between_waves():
    target = words(128)
    result = launch(*EXCHANGE, BARRIER, *FETCH, arrays=[target], warps=2, lds=512, shadow=True)
    assert target.tolist() == [k ^ 64 for k in range(128)]
    assert (result.barriers, result.conflicts) == (1, {})


def test_without_the_barrier_waves_conflict():
    result = launch(*EXCHANGE, *FETCH, arrays=[words(128)], warps=2, lds=512, shadow=True)
    assert result.conflicts == {"LDS: read after write: ds_read_b32 v3, v2": (512, 0)}


def test_a_wave_that_reads_its_own_does_not_conflict():
    own = [asm("ds_read_b32 v3, v1"), asm("s_waitcnt", lgkmcnt=0)]
    result = launch(*EXCHANGE, *own, arrays=[words()], warps=2, lds=512, shadow=True)
    assert result.conflicts == {}


def test_a_write_after_another_waves_read():
    """A wave overwrites what the other has read, with and without a barrier between."""
    again = [asm("v_add_u32 v4, v0, 1"), asm("ds_write_b32 v1, v4"), asm("s_waitcnt", lgkmcnt=0)]
    pool = words(128)
    guarded = launch(*EXCHANGE, BARRIER, *FETCH, BARRIER, *again, arrays=[pool], warps=2, lds=512, shadow=True)
    assert guarded.conflicts == {}
    open_ = launch(*EXCHANGE, BARRIER, *FETCH, *again, arrays=[pool], warps=2, lds=512, shadow=True)
    # Of each word one byte changes.
    assert open_.conflicts == {"LDS: write after read: ds_write_b32 v1, v4": (128, 0)}


def test_workgroups_conflict_whatever_barriers_there_are():
    program = [OFFSETS, asm("v_mov_b32 v2, s2"), asm("global_store_dword v1, v2, s[4:5]")]
    result = launch(*program, BARRIER, asm("global_load_dword v3, v1, s[4:5]"), arrays=[words()], grid=2, shadow=True)
    assert result.conflicts["array 0: write beside write: global_store_dword v1, v2, s[4:5]"] == (64, 0)
    assert result.conflicts["array 0: read after write: global_load_dword v3, v1, s[4:5]"][0] == 256


def test_the_same_written_twice_is_no_conflict():
    program = [OFFSETS, asm("v_mov_b32 v2, 5"), asm("global_store_dword v1, v2, s[4:5]")]
    assert launch(*program, arrays=[words(128)], grid=2, warps=2, shadow=True).conflicts == {}


def test_workgroups_that_keep_apart_do_not_conflict():
    program = [
        asm("s_lshl_b32 s3, s2, 8"),
        asm("v_lshl_add_u32 v1, v0, 2, s3"),
        asm("global_load_dword v2, v1, s[4:5]"),
        WAIT,
        asm("v_add_u32 v2, v2, 1"),
        asm("global_store_dword v1, v2, s[4:5]"),
    ]
    assert launch(*program, arrays=[words(256)], grid=4, shadow=True).conflicts == {}


# --- the shadow by itself


def note(shadow, kind, at, wave, *, size=4, epoch=1, value=1):
    at = np.atleast_1d(at)
    waves = np.broadcast_to(np.asarray(wave, np.int32), at.shape)
    if kind == "read":
        shadow.note_read(at, size, waves, epoch, "p")
    else:
        values = np.broadcast_to(np.asarray(value, np.uint8).reshape(-1, 1), (at.size, size))
        shadow.note_write(at, values, np.zeros((at.size, size), np.uint8), waves, epoch, "p")


@pytest.mark.parametrize("size", [64, 1 << 34], ids=["dense", "paged"])
class TestShadow:
    """Waves 0 and 1 are one workgroup, 2 and 3 the next."""

    def of(self, size):
        return Shadow(size, 2), (0 if size == 64 else (1 << 33) + 4096 - 4)

    def test_one_byte_of_a_word(self, size):
        shadow, at = self.of(size)
        note(shadow, "write", at, 0, size=4)
        note(shadow, "read", at + 4, 1, size=1)
        assert not shadow.conflicts
        note(shadow, "read", at + 3, 1, size=1)
        assert shadow.conflicts == {("read after write", "p"): (1, at + 3)}

    def test_rows_first_and_parts_later(self, size):
        """What was noted in large units holds for each of their bytes."""
        shadow, at = self.of(size)
        at = at // 16 * 16
        note(shadow, "write", at, 0, size=16)
        note(shadow, "read", at + 14, 2, size=2)
        note(shadow, "read", at + 16, 2, size=2)
        assert shadow.conflicts == {("read after write", "p"): (2, at + 14)}

    def test_a_barrier_parts_waves_and_not_workgroups(self, size):
        shadow, at = self.of(size)
        note(shadow, "write", at, 0)
        note(shadow, "read", at, 1, epoch=2)
        assert not shadow.conflicts
        note(shadow, "read", at, 2, epoch=2)
        assert shadow.conflicts == {("read after write", "p"): (4, at)}

    @pytest.mark.parametrize("writer", [0, 1, 2, 3])
    @pytest.mark.parametrize("together", [False, True])
    def test_every_reader_is_remembered(self, size, writer, together):
        """Read by both waves of a group; whoever writes it in this epoch is in conflict with one of them."""
        shadow, at = self.of(size)
        if together:
            note(shadow, "read", [at, at], [0, 1])
        else:
            note(shadow, "read", at, 0)
            note(shadow, "read", at, 1)
        note(shadow, "write", at, writer)
        assert shadow.conflicts == {("write after read", "p"): (4, at)}

    @pytest.mark.parametrize("together", [False, True])
    def test_readers_of_two_groups_outlive_a_barrier(self, size, together):
        shadow, at = self.of(size)
        if together:
            note(shadow, "read", [at, at], [0, 2])
        else:
            note(shadow, "read", at, 0)
            note(shadow, "read", at, 2)
        note(shadow, "write", at, 2, epoch=2)
        assert shadow.conflicts == {("write after read", "p"): (4, at)}

    def test_readers_of_one_group_do_not(self, size):
        shadow, at = self.of(size)
        note(shadow, "read", [at, at], [0, 1])
        note(shadow, "write", at, 1, epoch=2)
        assert not shadow.conflicts

    def test_two_values_at_once(self, size):
        shadow, at = self.of(size)
        note(shadow, "write", [at, at], [0, 1], value=[3, 3])
        assert not shadow.conflicts
        note(shadow, "write", [at, at], [0, 1], value=[3, 4], epoch=2)
        assert [*shadow.conflicts] == [("write beside write", "p")]

    def test_writes_of_two_waves_in_turn(self, size):
        shadow, at = self.of(size)
        note(shadow, "write", at, 0)
        note(shadow, "write", at, 0, value=2)
        assert not shadow.conflicts
        note(shadow, "write", at, 1, value=3)
        assert shadow.conflicts == {("write after write", "p"): (4, at)}


@pytest.mark.parametrize("seed", range(40))
def test_the_shadow_equals_lists_of_all_that_happened(seed):
    """Byte by byte: a read against the last write, a write against it and every read."""
    r = np.random.default_rng(seed)
    shadow, epoch = Shadow(64, 2), 1
    last: dict[int, tuple[int, int]] = {}
    reads: dict[int, list[tuple[int, int]]] = {}
    counts: dict[tuple[str, str], int] = {}

    def meets(wave, other):
        return other[0] != wave and (other[0] // 2 != wave // 2 or other[1] == epoch)

    for _ in range(60):
        epoch += int(r.random() < 0.15)
        size, wave, kind = int(r.choice([1, 2, 4, 8, 16])), int(r.integers(4)), ["read", "write"][r.integers(2)]
        at = int(r.integers(64 // size)) * size
        note(shadow, kind, at, wave, size=size, epoch=epoch)
        for byte in range(at, at + size):
            found = []
            if byte in last and meets(wave, last[byte]):
                found.append(f"{kind} after write")
            if kind == "write":
                found += ["write after read"] * any(meets(wave, other) for other in reads.get(byte, []))
                last[byte] = wave, epoch
            else:
                reads.setdefault(byte, []).append((wave, epoch))
            for what in found:
                counts[what, "p"] = counts.get((what, "p"), 0) + 1
    assert {key: count for key, (count, _) in shadow.conflicts.items()} == counts


# --- large memory


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is not reserved is asked for in Linux's way")
@pytest.mark.parametrize("shadow", [False, True])
def test_a_pool_of_24_gigabytes_costs_what_is_touched(shadow):
    unreserved = 0x4000  # MAP_NORESERVE of Linux
    pages = mmap.mmap(-1, 24 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    pool = np.frombuffer(pages, np.uint8)
    # One word for each lane at 20 GiB and 4 bytes, one at its very end.
    result = launch(
        asm("s_add_u32 s8, s4, 4"),
        asm("s_addc_u32 s9, s5, 5"),
        asm("s_add_u32 s10, s4, -256"),
        asm("s_addc_u32 s11, s5, 5"),
        OFFSETS,
        asm("global_store_dword v1, v0, s[8:9]"),
        asm("global_store_dword v1, v0, s[10:11]"),
        asm("global_load_dword v2, v1, s[8:9]"),
        arrays=[pool],
        shadow=shadow,
    )
    at = (5 << 32) + 4
    assert pool[at : at + 256].view(np.uint32).tolist() == [*range(64)]
    assert pool[(6 << 32) - 256 :].view(np.uint32).tolist() == [*range(64)]
    assert result.pages[0] == {at >> 12, (6 << 32) - 1 >> 12}
    assert result.conflicts == {}
