"""The only place that decides by platform: which implementation of the ops runs, resolved once, at start."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jax import lax

Row = TypeVar("Row")

PALLAS_PLATFORMS = ("rocm", "cuda")
"""Where Pallas kernels are lowered through Triton."""

FLOAT8_CAPABILITY = 89
"""The lowest compute capability on which Pallas converts float8_e4m3fn (Ada; Hopper is 90)."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """What every op is told. Static: a step is compiled for one.

    Fields:
      kernels       "reference": the definitions in XLA; "pallas": the kernels; "interpret": the kernels, interpreted
                    by XLA on any platform, for tests. "triton": the one kernel in Triton's own language, that of
                    gated_delta_rule.decode; all others refuse it, and `resolve` gives it to no engine.
      architecture  the row of the tile tables: "sm_90", "gfx942", "gfx950", or "cuda", "rocm" where a table has no row
                    of its own.
      order         of interpreted kernels alone, which run one program after another: 0 in the order of their numbers,
                    else a seed that shuffles them. What a kernel computes must not depend on it.
      quantize_activations  rows of large steps meet FP8 weights of one scale a row as FP8 themselves, each with a scale
                    of its own; see `pallas_kernels/matmul/fp8.py`.

    Raises ValueError for an order of what is not interpreted.
    """

    kernels: str = "reference"
    architecture: str = ""
    order: int = 0
    quantize_activations: bool = False

    def __post_init__(self) -> None:
        if self.order and not self.interpret:
            raise ValueError(
                f"order={self.order} with kernels={self.kernels!r}: only 'interpret' has an order; allowed: 0"
            )

    @property
    def is_reference(self) -> bool:
        return self.kernels == "reference"

    @property
    def interpret(self) -> bool:
        return self.kernels == "interpret"

    @property
    def is_triton(self) -> bool:
        return self.kernels == "triton"

    @property
    def capability(self) -> int | None:
        """The compute capability of an NVIDIA GPU, 90 for sm_90; None elsewhere, and where the device does not say."""
        found = re.fullmatch(r"sm_(\d+)a?", self.architecture)
        return int(found[1]) if found else None

    @property
    def lacks_float8(self) -> bool:
        """Whether kernels cannot convert float8_e4m3fn on the device: NVIDIA GPUs before sm_89."""
        return self.capability is not None and self.capability < FLOAT8_CAPABILITY

    @property
    def has_fp8_products(self) -> bool:
        """Whether XLA and Triton multiply float8_e4m3fn on matrix units: NVIDIA GPUs from sm_89 on. gfx942 has another
        FP8, gfx950 is not measured.
        """
        return self.capability is not None and not self.lacks_float8

    def tiles(self, table: Mapping[str, Row]) -> Row:
        """The row of a tile table for this architecture, or that of its platform."""
        if self.interpret:
            return table["interpret"]
        if self.architecture in table:
            return table[self.architecture]
        return table["rocm" if self.architecture.startswith(("gfx", "rocm")) else "cuda"]


REFERENCE = Backend()
INTERPRET = Backend("interpret", "interpret")


def resolve(kernels: str, platform: str, architecture: str = "") -> Backend:
    """The implementation that `EngineConfig.kernels` means on a platform ("cpu", "rocm", "cuda").

    "auto" is "pallas" on ROCm and CUDA, and "reference" elsewhere. `architecture` is the device's own name for it:
    "9.0" or "sm_90", "gfx942:sramecc+:xnack-". Raises ValueError for kernels that the platform cannot run.
    """
    if kernels == "auto":
        kernels = "pallas" if platform in PALLAS_PLATFORMS else "reference"
    if kernels == "pallas" and platform not in PALLAS_PLATFORMS:
        raise ValueError(
            f"kernels='pallas' on {platform}: the kernels are compiled for ROCm and CUDA; "
            "allowed: 'auto', 'reference', 'interpret'"
        )
    if kernels not in ("reference", "pallas", "interpret"):
        raise ValueError(f"kernels={kernels!r}; allowed: 'auto', 'pallas', 'interpret', 'reference'")
    if kernels == "interpret":
        return INTERPRET
    return Backend(kernels, _architecture(platform, architecture) if kernels == "pallas" else "")


def of_device(kernels: str, device) -> Backend:
    """`resolve` for a jax.Device."""
    return resolve(kernels, platform_of(device), getattr(device, "compute_capability", None) or "")


def platform_of(device) -> str:
    """ "cpu", "rocm" or "cuda". JAX calls both kinds of GPU "gpu"; the version of its runtime says which it is."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


AT_ONCE = 90
"""The compute capability on which steps were timed and compared whose launches are at once."""


def options_of_compiler(devices: Sequence[Any], backend: Backend, *, decodes: bool) -> dict[str, Any]:
    """What XLA is told for a step of a mesh of such devices. `decodes`: a decode step without drafts.

    On GPUs that it leaves products apart: of those that take the same rows, one of them small, it would make one, and
    for that lay their matrices side by side anew in each step (100 MB in a GDN layer of 9B) and copy the results apart.

    In decode steps on one Hopper that the launches which it keeps in a graph wait only for those whose results they
    need. They would stand in a row, and many are too small for a whole device. Left out elsewhere: in prefill, which
    fills a device and would take more memory, and where nobody has compared the values with those in a row: with
    drafts, on several devices, on other GPUs.
    """
    if devices[0].platform != "gpu":
        return {}
    told: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 0}
    if decodes and backend.capability == AT_ONCE and len(devices) == 1:
        told["xla_gpu_command_buffer_scheduling_mode"] = "CONCURRENT"
    return told


HOST_MEMORY = "pinned_host"
"""The kind of memory that the host tier of the prefix cache is in: the host's own, which a device copies to and from
without waiting for the host. A CPU has it, too.
"""


def host_memory(device) -> str:
    """HOST_MEMORY. Raises ValueError where a device cannot address it."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"host_cache_gib needs a device that addresses memory of the kind {HOST_MEMORY}; {device} has "
            f"{', '.join(kinds)}; allowed: 0"
        )
    return HOST_MEMORY


def _architecture(platform: str, name: str) -> str:
    """ "9.0" -> "sm_90", "gfx942:sramecc+:xnack-" -> "gfx942"; the platform where the device does not say."""
    name = name.split(":")[0]
    if name and name[0].isdigit():
        return "sm_" + name.replace(".", "")
    return name or platform


FLOAT32_DOT = lax.Precision.HIGHEST
"""Precision of float32 products. GPUs otherwise round the operands to tf32 or xf32 (relative error 1e-3)."""


def dot_precision(dtype: object) -> lax.Precision | None:
    """What a product of operands of `dtype` needs: bfloat16 products are exact in float32 as they are."""
    return FLOAT32_DOT if dtype == "float32" else None
