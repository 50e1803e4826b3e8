"""The kernel in Triton's own language: compiled by Triton as jax_triton has it do, for chips that are not there; its
machine code executed in the emulator; and interpreted by Triton.
"""

import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from kernel_bench.workloads import WORKLOADS

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import launch as package
from gdnjax.pallas_kernels.launch import Launch
from rocm import code_object, compiling, emulator, functions
from rocm.cases import BFLOAT16, KV, VK, Bound, Case, delta, race
from rocm.emulation import Code, Compiler
from rocm.executing import CASE, CONTROL, LARGE, Task, in_large_pools, small
from rocm.large_pools import slots

FORMS = ("48h-1", "48h-128", "48h-128-kv", "48h-128-bf16state", "30h-128-96x192")
COMPILED = tuple(f"gdn-decode-{form}" for form in FORMS)
"""Workloads of bench_kernels: every form that the kernel has."""

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}
"""Triton's names of pointers to what arrays hold."""

CUT_OFF = Bound(norm=2**-7, place=2**-7)
"""Triton's interpreter cuts float32 off where bfloat16 is stored; compilers round it to the nearest."""

COMPILE = "compile"
"""A kind of task beside those that execute."""

Result = dict[str, Any]


def cases() -> list[Case]:
    """The same forms, small; and extreme gates."""
    return [
        *(delta("decode", order, state=state) for state in (np.float32, BFLOAT16) for order in (VK, KV)),
        delta("decode", ("vk", "kv")),
        *(delta("decode", gates=chosen) for chosen in range(1, 8)),
        *(delta("decode", order, act=np.float32) for order in (VK, KV)),
        delta("decode", heads=3, key_heads=3, dim=48),
        delta("decode", KV, dim=96, value_dim=192, beta_scale=2.0),
    ]


def on_amd(arch: str, cache: pathlib.Path) -> list[Task]:
    """Workloads to compile, then cases, and pools of 9.4 GB, to execute; and a race that has to be found."""
    compiler = TritonCompiler(arch, cache)
    large = [slots(case, "ssm", layers=24, count=3000) for case in cases()[:2]]
    return [
        *(Task(COMPILE, name, lambda name=name: compiler.workload(name)) for name in COMPILED),
        *(Task(CASE, case.name, lambda case=case: small(case, compiler)) for case in cases()),
        *(Task(LARGE, one.name, lambda one=one: in_large_pools(one, compiler)) for one in large),
        Task(CONTROL, race().name, lambda: small(race(), compiler), fails=True),
    ]


def on_nvidia() -> list[Task]:
    return [Task(COMPILE, name, lambda name=name: to_ptx(name)) for name in COMPILED]


def interpreted() -> list[Task]:
    """TRITON_INTERPRET=1 must be in the environment before triton is imported."""
    return [Task(CASE, case.name, lambda case=case: interpret(case)) for case in cases()]


class TritonCompiler(Compiler):
    """Launches to machine code by Triton, called by jax_triton."""

    def __init__(self, arch: str, cache: pathlib.Path):
        super().__init__(arch, cache)
        self.backend = Backend("triton", arch)

    def _compile(self, launch: Launch, arguments: Sequence[Any]) -> Code:
        sharding = SingleDeviceSharding(self._device)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
        elf, kernel = made(self.arch, lambda: package.jitted(launch).lower(*placed))
        if kernel.threads != 64 * launch.warps:
            raise RuntimeError(f"{launch.name} of {launch.warps} warps was compiled for {kernel.threads} threads")
        return Code(emulator.program(elf, self.arch, launch.name), kernel.lds)

    def workload(self, name: str) -> Result:
        """The kernel, and what XLA makes of the call around it."""
        function = functions.workload(name, self._device, self.backend)
        memory: list[Any] = []
        _, kernel = made(self.arch, lambda: memory.append(function.lower().compile().memory_analysis()))
        compiled = compiling.Compiled(
            launches=[],
            kernels=[kernel],
            alias_bytes=memory[0].alias_size_in_bytes,
            temporary_bytes=memory[0].temp_size_in_bytes,
            errors=[],
        )
        return {
            "wrong": compiling.judge(compiled, function.demands, self.arch),
            "alias_bytes": compiled.alias_bytes,
            "kernels": [dataclasses.asdict(kernel) | {"waves": kernel.waves(self.arch)}],
        }


def made(arch: str, lower: Callable[[], Any]) -> tuple[bytes, code_object.Kernel]:
    """The code object that jax_triton has made while something is lowered, for a chip that is not there."""
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]

    results: list[Any] = []
    compile_inplace, library = triton_lib.compile_ttir_inplace, triton_lib.triton_kernel_call_lib

    def recorded(*args):
        results.append(compile_inplace(*args))
        return results[-1]

    triton_lib._COMPILED_KERNEL_CACHE.clear()
    with (
        mock.patch.object(triton_lib, "compile_ttir_inplace", recorded),
        mock.patch.object(library, "get_arch_details", return_value=arch),
        mock.patch.object(library, "get_compute_capability", return_value=0),
    ):
        lower()
    (result,) = results
    file = pathlib.Path(result.binary)
    elf = file.read_bytes()
    file.unlink()
    (kernel,) = code_object.kernels(elf)
    return elf, dataclasses.replace(kernel, lds=max(kernel.lds, result.shared_mem_bytes))


def to_ptx(name: str) -> Result:
    """A workload's kernel for an H100, as far as the registers that ptxas gives it."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    launch, arguments = launch_of(name, Backend("triton", "sm_90"))
    types = [POINTERS[str(x.dtype)] for x in (*arguments, *launch.out)]
    statics = dict(launch.static)
    source = ASTSource(
        launch.kernel,
        signature=dict(zip(launch.kernel.arg_names, types, strict=False)) | dict.fromkeys(statics, "constexpr"),
        constexprs=statics,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch, "kernel.ptx")
        file.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(file), "-o", f"{scratch}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,), spilled = (re.findall(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill"))
    return {"wrong": [] if not any(map(int, spilled)) else [said], "registers": int(registers)}


def launch_of(name: str, backend: Backend) -> tuple[Launch, Sequence[Any]]:
    """The one launch of a workload, and its operands' shapes."""
    launches: list[tuple[Launch, Sequence[Any]]] = []

    def recorded(launch, arguments):
        launches.append((launch, arguments))
        return [jnp.zeros(out.shape, out.dtype) for out in launch.out]

    work = WORKLOADS[name]
    with mock.patch.object(package, "run", recorded):
        jax.eval_shape(lambda key: work.call(*work.inputs(key), 0, backend), jax.random.key(0))
    (found,) = launches
    return found


def interpret(case: Case) -> Result:
    """Values that are rounded to bfloat16 are held against CUT_OFF, all others against the case's own bounds."""
    rounded = {"o": case.arrays["qkv"].dtype, "ssm": case.arrays["ssm"].dtype}
    bounds = {name: CUT_OFF if rounded[name] == BFLOAT16 else bound for name, bound in case.bounds.items()}
    case = dataclasses.replace(case, bounds=bounds)
    with mock.patch.object(package, "run", by_interpreter):
        outputs = case.call({name: jnp.asarray(x) for name, x in case.arrays.items()}, Backend("triton", "gfx942"))
    errors, wrong = case.compare({name: np.asarray(x) for name, x in outputs.items()}, case.wanted())
    return {"wrong": wrong, "errors": {name: dataclasses.asdict(error) for name, error in errors.items()}}


def by_interpreter(launch: Launch, arguments: Sequence[Any]) -> list[Any]:
    """The launch, program after program, each in numpy."""
    results = {result: operand for operand, result in launch.aliases}
    places = [np.array(x) for x in arguments]
    outputs = [
        places[results[i]] if i in results else emulator.poisoned(out.shape, out.dtype)
        for i, out in enumerate(launch.out)
    ]
    kernel: Any = launch.kernel
    kernel[(launch.programs,)](*map(_pointer, [*places, *outputs]), **dict(launch.static))
    return [jnp.asarray(x) for x in outputs]


def _pointer(x: np.ndarray) -> Any:
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton.runtime.interpreter import TensorHandle  # pyright: ignore[reportMissingImports]

    kind = tl.str_to_ty(POINTERS[str(x.dtype)], None)
    return tl.tensor(TensorHandle(np.array([x.ctypes.data], np.uint64), kind), kind)
