"""Compile-only AMD devices, compiled functions, and what the gate demands of them."""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gdnjax.memory import UNNUMBERED
from rocm import buffers, code_object

TARGETS = {"gfx942": "mi300x.txtpb", "gfx950": "mi355x.txtpb"}
"""Architecture -> how XLA is told of a chip that is not there."""

MOST_WARPS = 16
"""Warps are 64 lanes wide: more than 1,024 threads compile, and cannot be launched."""

MOST_THREADS = 1 << 32
"""Of a launch, along x."""

SEQUENCE = "thunk_sequence_after_thunk_passes.txt"
"""The end of the name of the file in which XLA says what it launches, in order."""

HOLDERS = ("kCommandBuffer", "kSequential", "kWhile", "kConditional")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A Triton kernel as it was lowered: what can be said before it is compiled."""

    name: str
    warps: int
    grid: tuple[int, int, int]
    operands: tuple[str, ...]
    ir: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of one function. `beyond_reach` has kernels and what buffers.faults found in them; `sequence` the names
    of all that a call of it launches, in order; `merged` what is sliced of products that XLA made of several.
    """

    launches: list[Launch]
    kernels: list[code_object.Kernel]
    alias_bytes: int
    temporary_bytes: int
    errors: list[str]
    beyond_reach: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    sequence: list[str] = dataclasses.field(default_factory=list)
    merged: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Demands:
    """On one function. `waves` has the fewest waves a SIMD of each kernel, by its name; 1 for one it does not name."""

    alias_bytes: int = 0
    most_temporary_bytes: int | None = None
    most_launches: int | None = None
    waves: Mapping[str, float] = dataclasses.field(default_factory=dict)


def prepare(directory: pathlib.Path) -> None:
    """Before jax is imported: XLA keeps code objects, and the order of its launches, in `directory`.

    What it compiles for the CPU runs once, so it is compiled quickly: fusions without MLIR, modules in one piece.
    """
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TF_CPP_MIN_LOG_LEVEL="2",
        TF_XLA_HSACO_CACHE_DIR=str(directory),
        TF_XLA_HSACO_BITCODE_SIZE_THRESHOLD="0",
        XLA_FLAGS=f"--xla_dump_to={directory} --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1",
    )


def devices(arch: str, count: int = 1) -> list[Any]:
    """`count` chips that can be compiled for. The plugin must be installed, its libraries or their stand-ins loaded."""
    from jax.experimental import topologies

    let_plugin_start()
    target = (pathlib.Path(__file__).parent / TARGETS[arch]).read_text()
    return list(topologies.get_topology_desc("", "rocm", target_config=target, topology=f"1x1x{count}").devices)


def let_plugin_start() -> None:
    """It refuses to where the kernel driver shows no GPU."""
    from jax._src import hardware_utils

    hardware_utils.num_available_amd_gpus = lambda *_, **__: 1


@dataclasses.dataclass(frozen=True)
class Known:
    """What a process has compiled: kernels by name, of which XLA compiles none twice, and functions by what they were
    lowered to. Some differ in the values of their arguments alone.
    """

    kernels: dict[str, code_object.Kernel] = dataclasses.field(default_factory=dict)
    functions: dict[str, Compiled] = dataclasses.field(default_factory=dict)


def compile_function(lower: Callable[[], Any], cache: pathlib.Path, known: Known) -> Compiled:
    """Lowers, compiles, and reads the code objects that are new in `cache`, unless it is `known`."""
    with _stderr() as said:
        lowered = lower()
    text = lowered.as_text()
    if text not in known.functions:
        known.functions[text] = _compile(lowered, cache, known.kernels, said())
    return known.functions[text]


def _compile(lowered, cache: pathlib.Path, known: dict[str, code_object.Kernel], warned: list[str]) -> Compiled:
    """`warned` are lines that lowering wrote to stderr."""
    before = set(cache.iterdir())
    with _stderr() as said:
        launches = launches_of(lowered)
        compiled = lowered.compile()
    new = set(cache.iterdir()) - before
    for file in sorted(file for file in new if file.suffix == ".hsaco"):
        known |= {kernel.name: kernel for kernel in code_object.kernels(file.read_bytes())}
    memory = compiled.memory_analysis()
    shared = shared_memory({file for file in new if file.name.endswith("thunk_sequence.txt")})
    kernels = [
        dataclasses.replace(known[launch.name], lds=max(known[launch.name].lds, shared.get(launch.name, 0)))
        for launch in {launch.name: launch for launch in launches}.values()
        if launch.name in known
    ]
    return Compiled(
        launches=launches,
        kernels=kernels,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        errors=[line.strip() for line in [*warned, *said()] if re.search(r"\berror:", line)],
        beyond_reach=_beyond_reach(
            {file for file in new if file.name.endswith("ir-no-opt.ll")}, {launch.name for launch in launches}
        ),
        sequence=[name for file in sorted(new) if file.name.endswith(SEQUENCE) for name in sequence(file.read_text())],
        merged=merged(compiled.as_text()),
    )


def judge(compiled: Compiled, demands: Demands, arch: str) -> list[str]:
    """What is wrong with it: nothing, where the list is empty."""
    wrong = [f"the compiler says: {error[-160:]}" for error in compiled.errors[:3]]
    found = {kernel.name for kernel in compiled.kernels}
    for launch in compiled.launches:
        wrong += [f"{launch.name}: {fault}" for fault in faults_of(launch, arch)]
        if launch.name not in found:
            wrong.append(f"{launch.name}: no code object of it was seen")
    for kernel in compiled.kernels:
        for what, count in (("VGPR spills", kernel.vgpr_spills), ("bytes of scratch", kernel.scratch)):
            if count:
                wrong.append(f"{kernel.name}: {count} {what}")
        if kernel.lds > code_object.LDS[arch]:
            wrong.append(f"{kernel.name}: {kernel.lds} bytes of LDS, a group has {code_object.LDS[arch]}")
        floor = demands.waves.get(kernel.name, 1.0)
        if kernel.waves(arch) < floor:
            wrong.append(f"{kernel.name}: {kernel.waves(arch):g} waves a SIMD, at least {floor:g} wanted")
    wrong += [f"{kernel}: {fault}" for kernel, fault in compiled.beyond_reach]
    if compiled.alias_bytes < demands.alias_bytes:
        wrong.append(f"{compiled.alias_bytes} bytes are updated in place, {demands.alias_bytes} wanted")
    if demands.most_temporary_bytes is not None and compiled.temporary_bytes > demands.most_temporary_bytes:
        wrong.append(f"{compiled.temporary_bytes} bytes of temporaries, at most {demands.most_temporary_bytes} wanted")
    if demands.most_launches is not None and not 0 < len(compiled.sequence) <= demands.most_launches:
        wrong.append(f"{len(compiled.sequence)} launches, 1 to {demands.most_launches} wanted")
    wrong += [f"{name}: sliced of a product that XLA made of several" for name in compiled.merged]
    return wrong


def faults_of(launch: Launch, arch: str) -> Iterator[str]:
    """What a kernel must not do on AMD, though it may compile."""
    if launch.warps > MOST_WARPS:
        yield f"{launch.warps} warps of 64 lanes cannot be launched; at most {MOST_WARPS}"
    x, y, z = launch.grid
    if max(y, z) > 65535 or x * launch.warps * 64 >= MOST_THREADS:
        yield f"a grid of {launch.grid} cannot be launched"
    if "elementwise_inline_asm" in launch.ir:
        yield "inline assembly is that of another machine"
    if re.search(r"inputPrecision = tf32 : tensor<\S+xf32> \*", launch.ir):
        yield "a float32 product at default precision is rounded to xf32 on gfx942"
    for operand in launch.operands:
        match = re.match(r"tensor<((?:\d+x)+)(f8\w*|i8|ui8)>", operand)
        if match:
            size = 1
            for axis in match[1].split("x")[:-1]:
                size *= int(axis)
            if size in UNNUMBERED:
                yield f"{operand} has more one-byte elements than 31 bits can number"


def launches_of(lowered) -> list[Launch]:
    """Triton kernels in a lowered function."""
    from jaxlib.mlir import ir

    module = lowered.compiler_ir("stablehlo")
    found = []
    with module.context:
        for operation in _operations(module.operation):
            if operation.name != "stablehlo.custom_call":
                continue
            attributes = operation.attributes
            if ir.StringAttr(attributes["call_target_name"]).value != "__gpu$xla.gpu.triton":
                continue
            config = ir.DictAttr(attributes["mhlo.backend_config"])
            warps, x, y, z = (ir.IntegerAttr(config[k]).value for k in ("num_warps", "grid_x", "grid_y", "grid_z"))
            found.append(
                Launch(
                    name=ir.StringAttr(config["name"]).value,
                    warps=warps,
                    grid=(x, y, z),
                    operands=tuple(str(operand.type) for operand in operation.operands),
                    ir=_text(ir.StringAttr(config["ir"]).value_bytes),
                )
            )
    return found


def _operations(operation) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _text(bytecode: bytes) -> str:
    from jax._src.pallas.triton import lowering
    from jaxlib.mlir import ir

    with lowering._new_ir_context(), ir.Location.unknown():
        return str(ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False))


def _beyond_reach(files: set[pathlib.Path], own: set[str]) -> list[tuple[str, str]]:
    irs = [file.read_text() for file in sorted(files)]
    unseen = own - set().union(*map(buffers.kernels, irs))
    return [
        *(fault for ir in irs for fault in buffers.faults(ir, own)),
        *((name, "no LLVM IR of it was seen") for name in sorted(unseen)),
    ]


def shared_memory(files: set[pathlib.Path]) -> dict[str, int]:
    """Bytes of LDS that kernels ask for when they are launched: Triton's are in no code object."""
    pattern = r"(\w+) grid: \[[\d, ]*\] threads: \[[\d, ]*\]\s+shared_memory: (\d+) bytes"
    found: dict[str, int] = {}
    for file in files:
        for name, size in re.findall(pattern, file.read_text()):
            found[name] = max(int(size), found.get(name, 0))
    return found


def sequence(text: str) -> list[str]:
    """What is launched, by name, or kind where it has none; what holds others, a command buffer, a loop, is none."""
    found = re.findall(r"^ *\d+: (k\w+)(?: \[[^\]]*\])?(?: +(\w+))?", text, re.MULTILINE)
    return [name or kind for kind, name in found if kind not in HOLDERS]


def merged(text: str) -> list[str]:
    """Slices that XLA itself takes of the result of a product. It made that of several, whose matrices are laid side by
    side in each call (see `backend.options_of_compiler`). Whoever writes a slice has it named after that.
    """
    # Other lines hold a kernel's code: a pattern over all of them takes minutes.
    lines = [line for line in text.splitlines() if " slice(" in line and '/dot_general"' in line]
    return [line.split(" = ")[0].split()[-1] for line in lines]


@contextlib.contextmanager
def _stderr() -> Iterator[Callable[[], list[str]]]:
    """What the process, its C++ part included, writes to stderr meanwhile."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        lines: list[str] = []
        try:
            yield lambda: lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
