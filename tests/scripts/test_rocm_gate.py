"""The gate's judgement, without its compiler: what it reads, what it refuses, and that every kernel lowers for ROCm."""

import dataclasses
import itertools
import json
import math
import re
import struct

import jax
import pytest
import rocm_gate as script
from kernel_bench.workloads import WORKLOADS
from rocm import buffers, code_object, compiling, counts, functions
from rocm.code_object import Kernel
from rocm.compiling import Compiled, Demands, Launch, judge

from gdnjax.assets import config_file
from gdnjax.backend import Backend
from gdnjax.config import LayerKind, ModelConfig

GOOD = Kernel("k", vgpr=96, sgpr=40, vgpr_spills=0, sgpr_spills=0, scratch=0, threads=256, lds=16384)
LAUNCH = Launch("k", warps=4, grid=(1024, 1, 1), operands=("tensor<8x4xbf16>",), ir="")
COMPILED = Compiled(launches=[LAUNCH], kernels=[GOOD], alias_bytes=100, temporary_bytes=10, errors=[])


@pytest.mark.thorough
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_kernel_lowers_for_rocm(name):
    work = WORKLOADS[name]
    arguments, pools = jax.eval_shape(work.inputs, jax.random.key(0))
    call = jax.jit(lambda x, p: work.call(x, p, 0, Backend("pallas", "gfx942")), donate_argnums=1)
    launches = compiling.launches_of(call.trace(arguments, pools).lower(lowering_platforms=("rocm",)))
    assert launches
    for launch in launches:
        assert not [*compiling.faults_of(launch, "gfx942")]
        assert launch.name in functions.WAVES


def test_what_is_right_passes():
    assert judge(COMPILED, Demands(alias_bytes=100, most_temporary_bytes=10, waves={"k": 4}), "gfx942") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vgpr_spills": 3}, "k: 3 VGPR spills"),
        ({"scratch": 16}, "k: 16 bytes of scratch"),
        ({"lds": 65537}, "k: 65537 bytes of LDS, a group has 65536"),
        ({"vgpr": 300}, "k: 1 waves a SIMD, at least 4 wanted"),
    ],
)
def test_kernels_that_could_not_run_well_are_refused(change, said):
    compiled = dataclasses.replace(COMPILED, kernels=[dataclasses.replace(GOOD, **change)])
    assert said in judge(compiled, Demands(waves={"k": 4}), "gfx942")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warps": 32}, "32 warps of 64 lanes cannot be launched"),
        ({"grid": (1, 70000, 1)}, "cannot be launched"),
        ({"ir": "tt.elementwise_inline_asm"}, "inline assembly"),
        ({"ir": "tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x16xf32>"}, "xf32"),
        ({"operands": ("tensor<3x1024x1048576xi8>",)}, "more one-byte elements than 31 bits can number"),
    ],
)
def test_launches_that_hardware_cannot_do_are_refused(change, said):
    compiled = dataclasses.replace(COMPILED, launches=[dataclasses.replace(LAUNCH, **change)])
    (fault,) = judge(compiled, Demands(), "gfx942")
    assert said in fault


def test_missing_code_copied_pools_and_errors_are_refused():
    faults = judge(dataclasses.replace(COMPILED, kernels=[], errors=["x error: y"]), Demands(101, 9), "gfx950")
    assert faults == [
        "the compiler says: x error: y",
        "k: no code object of it was seen",
        "100 bytes are updated in place, 101 wanted",
        "10 bytes of temporaries, at most 9 wanted",
    ]


SEQUENCE = """000: kCommandBuffer [source | sink]
    001: kCustomKernel [source        | next=002 (1)] matmul_rows grid: [32, 1, 1] threads: [256, 1, 1]
    002: kCublasLtMatmul [prev=001 (1)  | sink]
003: kWhile [source | sink]
    004: kKernel loop_fusion_3 grid: [1, 1, 1]
"""


def test_launches_are_counted_and_more_of_them_are_refused():
    names = compiling.sequence(SEQUENCE)
    assert names == ["matmul_rows", "kCublasLtMatmul", "loop_fusion_3"]
    compiled = dataclasses.replace(COMPILED, sequence=names)
    assert judge(compiled, Demands(most_launches=3), "gfx942") == []
    assert judge(compiled, Demands(most_launches=2), "gfx942") == ["3 launches, 1 to 2 wanted"]
    # A compiler that does not say what it launches is not taken for one that launches nothing.
    assert judge(COMPILED, Demands(most_launches=2), "gfx942") == ["0 launches, 1 to 2 wanted"]


HLO = """
  %slice.8.1 = bf16[2048,8192]{1,0} slice(%p), slice={[0:2048], [0:8192]}, metadata={op_name="step/dot_general" x=1}
  ROOT %slice.9 = bf16[2048,64]{1,0} slice(%p), slice={[0:2048], [0:64]}, metadata={op_name="jit(step)/split" x=2}
  %dot.1 = bf16[2048,64]{1,0} dot(%slice.3, %b), metadata={op_name="jit(step)/dot_general" x=3}
"""


def test_product_that_xla_made_of_several_is_refused():
    compiled = dataclasses.replace(COMPILED, merged=compiling.merged(HLO))
    assert judge(compiled, Demands(), "gfx942") == ["%slice.8.1: sliced of a product that XLA made of several"]


@pytest.mark.parametrize("preset", sorted({functions.WHOLE_EXPERTS[0], *(name for name, *_ in functions.STEP_MODELS)}))
def test_layers_of_whole_steps_are_what_a_period_has(preset):
    """A second layer of states, too: what is in its rows is not at the beginning of a pool."""
    config = ModelConfig.from_hf(config_file(preset))
    kinds = [*zip(config.layer_kinds, config.mlp_kinds, strict=True)]
    chosen = [kinds[layer] for layer in functions.STEP_LAYERS]
    assert set(chosen) == set(kinds)
    assert [kind for kind, _ in chosen] == [LayerKind.DELTA, LayerKind.DELTA, LayerKind.ATTENTION]


def test_launches_of_layers_are_differences():
    (what, *_) = counts.COUNTED
    results = [
        {"arch": "gfx942", "name": what.of(kind), "launches": ["k"] * count}
        for kind, count in zip(counts.COUNTED_LAYERS, (44, 53, 55), strict=True)
    ]
    assert script.launches_table(results).splitlines()[-1] == f"| gfx942, {what.name} | 9 | 11 | 24 |"
    assert script.launches_table(results[:2]) == ""
    standing = [name for names in counts.STANDING.values() for name in names]
    assert {f"launches, {name}, one of each" for name in standing} <= {
        what.of("one of each") for what in counts.COUNTED
    }
    assert len(standing) == len({*standing})
    assert set(counts.STANDING) == set(script.ARCHITECTURES)


def test_whole_steps_have_every_pair_of_what_they_differ_in():
    """An orthogonal array: of MLPs, ranks, and drafts in large pools, any two in all four combinations."""
    steps = [*functions.STEP_MODELS, (*functions.WHOLE_EXPERTS, 0, False)]
    assert all(large == (drafts > 0) for _, _, drafts, large in steps)
    moe = [ModelConfig.from_hf(config_file(preset)).moe is not None for preset, *_ in steps]
    several, drafted = [ranks > 1 for _, ranks, *_ in steps], [drafts > 0 for *_, drafts, _ in steps]
    for first, second in itertools.combinations((moe, several, drafted), 2):
        assert len({*zip(first, second, strict=True)}) == 4


def test_what_was_compiled_is_not_compiled_again(monkeypatch, tmp_path):
    """Two workloads whose inputs have other values; but one of another shape is another program."""
    compiled = []

    def compile_(lowered, cache, kernels, warned):
        compiled.append(lowered)
        return dataclasses.replace(COMPILED, errors=warned)

    monkeypatch.setattr(compiling, "_compile", compile_)
    known = compiling.Known()

    def result(name):
        work = WORKLOADS[name]
        arguments, pools = jax.eval_shape(work.inputs, jax.random.key(0))
        call = jax.jit(lambda x, p: work.call(x, p, 0, Backend("pallas", "gfx942")), donate_argnums=1)
        lower = call.trace(arguments, pools).lower
        return compiling.compile_function(lambda: lower(lowering_platforms=("rocm",)), tmp_path, known)

    plain = result("gdn-prefill-48h-8192")
    assert result("gdn-prefill-48h-8192-correlated") is plain
    assert len(compiled) == 1
    result("gdn-prefill-48h-1024")
    assert len(compiled) == 2


def ir_of(name: str, *lines: str, size: str = "dereferenceable(64)") -> str:
    """A kernel as XLA writes it."""
    head = f"define amdgpu_kernel void @{name}(ptr addrspace(1) noalias align 256 {size} %arg0, "
    head += "ptr addrspace(1) noalias align 16 dereferenceable(8589934592) %arg1) #4 {\n"
    return head + "".join(f"  {line}\n" for line in lines) + "  ret void\n}\n"


RESOURCE = (
    "%9 = call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) {}, i16 0, i64 2147483646, i32 1)"
)


@pytest.mark.parametrize(
    ("lines", "reached"),
    [
        ((), []),
        ((RESOURCE.format("%arg0"),), [64]),
        ((RESOURCE.format("%arg1"),), [8 << 30]),
        (("%3 = getelementptr float, ptr addrspace(1) %arg1, i64 %2", RESOURCE.format("%3")), [8 << 30]),
        # A pointer that a loop moves on.
        (
            (
                "%3 = phi ptr addrspace(1) [ %4, %7 ], [ %arg1, %0 ]",
                "%4 = getelementptr inbounds i8, ptr addrspace(1) %3, i64 128",
                RESOURCE.format("%3"),
            ),
            [8 << 30],
        ),
        (("%3 = select i1 %2, ptr addrspace(1) %arg0, ptr addrspace(1) %arg1", RESOURCE.format("%3")), [64, 8 << 30]),
        (("%3 = load ptr addrspace(1), ptr addrspace(1) %arg1", RESOURCE.format("%3")), [None]),
    ],
)
def test_arrays_behind_buffer_resources_are_found(lines, reached):
    assert [*buffers.reached(ir_of("k", *lines))] == [("k", size) for size in reached]


def test_arrays_that_offsets_do_not_reach_are_refused():
    large, small, unknown = (RESOURCE.format(name) for name in ("%arg1", "%arg0", "%arg0"))
    ir = (
        ir_of("large", large) + ir_of("small", small) + ir_of("mine", unknown, size="") + ir_of("xla", unknown, size="")
    )
    found = [*buffers.faults(ir, {"mine"})]
    assert found == [
        ("large", "buffer instructions into an array of 8589934592 bytes; they reach 2147483647"),
        ("mine", "buffer instructions into an array of unknown size"),
    ]
    faults = judge(dataclasses.replace(COMPILED, beyond_reach=found), Demands(), "gfx942")
    assert faults == [f"{kernel}: {fault}" for kernel, fault in found]


@pytest.mark.parametrize(
    "line",
    [
        RESOURCE.format('%"of another name"'),
        RESOURCE.format("noundef %arg0"),
        RESOURCE.format("@constant"),
        RESOURCE.replace("p8.p1(ptr addrspace(1) {}", "p8.p0(ptr %arg0"),
        "%9 = call i32 @llvm.amdgcn.raw.buffer.load.i32(<4 x i32> %8, i32 %7, i32 0, i32 0)",
        "%9 = load i32, ptr addrspace(7) %8",
    ],
)
def test_resources_that_the_audit_cannot_read_are_refused(line):
    fault = "buffer resources of a form that this audit does not read"
    assert [*buffers.faults(ir_of("k", RESOURCE.format("%arg0"), line), {"k"})] == [("k", fault)]
    # The head of the kernel is another.
    other = ir_of("k", RESOURCE.format("%arg1")).replace(") #4 {", ") {")
    assert [*buffers.faults(other, {"k"})] == [("no kernel", fault)]


def test_kernels_without_ir_are_refused(tmp_path):
    file = tmp_path / "module.ir-no-opt.ll"
    file.write_text(ir_of("seen", RESOURCE.format("%arg0")))
    assert compiling._beyond_reach({file}, {"seen"}) == []
    assert compiling._beyond_reach({file}, {"seen", "k"}) == [("k", "no LLVM IR of it was seen")]
    assert compiling._beyond_reach(set(), {"k"}) == [("k", "no LLVM IR of it was seen")]


def hit(layers, count, elements, itemsize):
    """The rule as it was found: which pools an unbounded layer reads and writes at wrong places."""
    layer = count * elements
    return layers * layer * itemsize > 1 << 32 and layer < 1 << 31 and layer * itemsize * 8 >> 31 & 1 == 1


@pytest.mark.parametrize(
    ("layers", "elements", "itemsize"),
    [(24, 32 * 16384, 4), (24, 48 * 16384, 2), (8, 16 * 4 * 256, 2), (4, 16 * 2 * 128, 1), (2, 16 * 1024, 2)],
)
def test_large_pools_are_the_smallest_that_the_fault_hits(layers, elements, itemsize):
    count = functions.fatal_count(layers, elements, itemsize)
    assert hit(layers, count, elements, itemsize)
    first = (1 << 32) // (layers * elements * itemsize)
    assert not any(hit(layers, n, elements, itemsize) for n in range(first, count))


def test_fault_hits_no_pool_of_one_large_layer():
    with pytest.raises(ValueError, match="no pool of theirs is hit"):
        functions.fatal_count(1, 16 * 4 * 256, 2)


@pytest.mark.thorough
@pytest.mark.parametrize("name", functions.IN_LARGE_POOLS)
def test_workloads_in_large_pools_have_them(name):
    work = WORKLOADS[name]
    arguments, pools = jax.eval_shape(work.inputs, jax.random.key(0))
    larger, large_pools = functions.enlarged(arguments, pools)
    changed = [
        leaf
        for old, leaf in zip(jax.tree.leaves((arguments, pools)), jax.tree.leaves((larger, large_pools)), strict=True)
        if old.shape != leaf.shape
    ]
    assert any(hit(*leaf.shape[:2], math.prod(leaf.shape[2:]), leaf.dtype.itemsize) for leaf in changed)
    launches = compiling.launches_of(
        jax.jit(lambda x, p: work.call(x, p, 0, Backend("pallas", "gfx942")), donate_argnums=1)
        .trace(larger, large_pools)
        .lower(lowering_platforms=("rocm",))
    )
    assert launches


@pytest.mark.parametrize(
    ("kernel", "waves"),
    [
        ({"vgpr": 64, "lds": 0}, 8),
        ({"vgpr": 96, "lds": 0}, 5),
        ({"vgpr": 264, "lds": 0}, 1),
        ({"vgpr": 512, "lds": 0}, 1),
        # Two groups of four waves share 64 kB.
        ({"vgpr": 64, "lds": 32768}, 2),
    ],
)
def test_waves_follow_from_registers_and_lds(kernel, waves):
    assert dataclasses.replace(GOOD, **kernel).waves("gfx942") == waves


def pack(value) -> bytes:
    """As much of MessagePack as a code object has."""
    match value:
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int() if value < 128:
            return bytes([value])
        case int():
            return b"\xcd" + struct.pack(">H", value)
        case str():
            return b"\xd9" + bytes([len(value)]) + value.encode()
        case list():
            return bytes([0x90 + len(value)]) + b"".join(map(pack, value))
        case dict():
            return bytes([0x80 + len(value)]) + b"".join(pack(k) + pack(v) for k, v in value.items())
    raise TypeError(value)


def code_object_of(metadata: dict) -> bytes:
    """An ELF of one section, the note."""
    value = pack(metadata)
    note = (
        struct.pack("<III", 7, len(value), code_object.AMDGPU_METADATA) + b"AMDGPU\0\0" + value + bytes(-len(value) % 4)
    )
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<H", header, 18, code_object.AMDGPU)
    struct.pack_into("<Q", header, 40, 64 + len(note))
    struct.pack_into("<HH", header, 58, 64, 1)
    section = bytearray(64)
    struct.pack_into("<I", section, 4, code_object.NOTES)
    struct.pack_into("<QQ", section, 24, 64, len(note))
    return bytes(header) + note + bytes(section)


def test_code_objects_are_read():
    fields = {".vgpr_count": 300, ".sgpr_count": 40, ".vgpr_spill_count": 2, ".sgpr_spill_count": 0}
    fields |= {".private_segment_fixed_size": 16, ".max_flat_workgroup_size": 256, ".group_segment_fixed_size": 0}
    (kernel,) = code_object.kernels(code_object_of({"amdhsa.kernels": [{".name": "walk", **fields}]}))
    assert kernel == Kernel("walk", 300, 40, 2, 0, 16, 256, 0)


def test_what_is_no_code_object_is_an_error():
    with pytest.raises(ValueError, match="not an AMD code object"):
        code_object.kernels(b"\x7fELF" + bytes(100))


def test_table_has_a_row_a_kernel_with_the_worst_of_its_workloads(tmp_path, monkeypatch):
    def result(arch, vgpr):
        kernel = dataclasses.asdict(dataclasses.replace(GOOD, vgpr=vgpr)) | {"waves": 512 // vgpr}
        return {"arch": arch, "name": "w", "passed": True, "fails": False, "kernels": [kernel]}

    page = tmp_path / "amd.md"
    page.write_text("before\n<!-- rocm gate: begin -->\nold\n<!-- rocm gate: end -->\nafter\n")
    monkeypatch.setattr(script, "PAGE", page)
    script.write_docs([result("gfx942", 128), result("gfx942", 256), result("gfx950", 64)])
    text = page.read_text()
    assert "| `k` | 256, 16, 2 | 64, 16, 8 | 0 |" in text
    assert "old" not in text
    assert re.match(r"before\n.*after\n$", text, re.DOTALL)


def test_without_the_compiler_it_says_what_to_install(capsys):
    assert script.main(["no such workload"]) == 2
    assert capsys.readouterr().err == (
        "rocm_gate.py: error: the ROCm compiler is not installed: pip install -e '.[rocm-gate]'\n"
    )


def test_pattern_that_fits_nothing_is_an_error_before_anything_is_compiled(capsys, monkeypatch, tmp_path):
    names = ["gdn-decode-32h-1", "prefill of qwen3.5-9b", "gdn-decode"]
    assert not script.misses(["gdn-*", "*"], names)
    assert capsys.readouterr().out == ""
    assert script.misses(["gdn-*", "a kernel*", "gdm-*"], names)
    worker = tmp_path / "worker.py"
    worker.write_text(f"print({capsys.readouterr().out!r}, end='')")
    monkeypatch.setattr(script, "plugin_libraries", list)
    monkeypatch.setattr(script, "__file__", str(worker))
    assert script.main(["gdn-*", "a kernel*", "gdm-*"]) == 2
    assert capsys.readouterr().err == (
        "rocm_gate.py: error: nothing is called 'a kernel*', 'gdm-*'; names begin with gdn, prefill\n"
    )


def test_figures_that_could_not_be_written_are_an_error_at_the_start(capsys, tmp_path):
    assert script.main(["--output", str(tmp_path / "none" / "figures.json")]) == 2
    assert "none/figures.json: no such directory" in capsys.readouterr().err


def test_worker_reports_lines_of_json():
    """What `line` prints is read from them."""
    result = {"arch": "gfx942", "name": "w", "passed": False, "wrong": ["k: 3 VGPR spills"], "seconds": 1.0}
    text = script.line(json.loads(json.dumps(result | {"kernels": []})))
    assert text == "REFUSED gfx942 w (1.0 s)\n    k: 3 VGPR spills"
