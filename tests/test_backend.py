"""The one decision by platform."""

import dataclasses

import jax
import pytest
from jax import lax

from gdnjax import backend
from gdnjax.backend import Backend


@pytest.mark.parametrize("platform", ["cpu", "rocm", "cuda"])
def test_reference_runs_everywhere(platform):
    assert backend.resolve("reference", platform).is_reference


def test_auto_is_pallas_on_gpus_and_reference_elsewhere():
    assert backend.resolve("auto", "cpu") == Backend("reference")
    assert backend.resolve("auto", "cuda", "9.0") == Backend("pallas", "sm_90")
    assert backend.resolve("auto", "rocm", "gfx942:sramecc+:xnack-") == Backend("pallas", "gfx942")


@pytest.mark.parametrize("platform", ["cpu", "rocm", "cuda"])
def test_interpreter_runs_everywhere(platform):
    found = backend.resolve("interpret", platform)
    assert found.interpret
    assert not found.is_reference


def test_kernels_that_a_platform_cannot_run_are_an_error_and_never_a_fallback():
    with pytest.raises(ValueError, match=r"kernels='pallas' on cpu.*allowed: 'auto', 'reference', 'interpret'"):
        backend.resolve("pallas", "cpu")


@pytest.mark.parametrize("kernels", ["reference", "pallas"])
def test_order_of_what_is_not_interpreted_is_an_error(kernels):
    with pytest.raises(ValueError, match=f"order=1 with kernels='{kernels}'.*allowed: 0"):
        Backend(kernels, order=1)


def test_unknown_kernels_are_an_error():
    with pytest.raises(ValueError, match="kernels='triton'; allowed: 'auto', 'pallas', 'interpret', 'reference'"):
        backend.resolve("triton", "rocm")


@pytest.mark.parametrize(
    ("architecture", "row"), [("sm_90", "sm_90's"), ("sm_80", "cuda's"), ("gfx950", "rocm's"), ("rocm", "rocm's")]
)
def test_an_architecture_without_a_row_has_that_of_its_platform(architecture, row):
    table = {"sm_90": "sm_90's", "cuda": "cuda's", "rocm": "rocm's", "interpret": "small"}
    assert Backend("pallas", architecture).tiles(table) == row
    assert backend.INTERPRET.tiles(table) == "small"


@dataclasses.dataclass
class Client:
    platform_version: str


@dataclasses.dataclass
class Device:
    platform: str
    client: Client
    compute_capability: str = ""


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device("cpu", Client("")), Backend("reference")),
        (Device("gpu", Client("cuda 13000"), "9.0"), Backend("pallas", "sm_90")),
        (Device("gpu", Client("rocm 70253211"), "gfx950"), Backend("pallas", "gfx950")),
        (Device("gpu", Client("rocm 70253211")), Backend("pallas", "rocm")),
    ],
    ids=["cpu", "NVIDIA", "AMD", "AMD that does not say which"],
)
def test_device_says_what_it_is(device, expected):
    assert backend.of_device("auto", device) == expected


def test_float32_products_are_never_rounded_to_tf32():
    assert backend.dot_precision("float32") == lax.Precision.HIGHEST
    assert backend.dot_precision("bfloat16") is None


@dataclasses.dataclass
class Device:
    platform: str


APART = {"xla_gpu_dot_merger_threshold_mb": 0}
AT_ONCE = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


@pytest.mark.parametrize(
    ("platform", "count", "architecture", "decodes", "told"),
    [
        ("cpu", 1, "", True, {}),
        ("gpu", 1, "sm_90", True, APART | AT_ONCE),
        ("gpu", 1, "sm_90", False, APART),
        ("gpu", 2, "sm_90", True, APART),
        ("gpu", 1, "sm_89", True, APART),
        ("gpu", 1, "gfx942", True, APART),
        ("gpu", 1, "", True, APART),
    ],
)
def test_launches_are_at_once_only_where_that_was_compared(platform, count, architecture, decodes, told):
    """The values of steps in a row and at once: decode on one Hopper, without drafts."""
    found = backend.options_of_compiler([Device(platform)] * count, Backend("pallas", architecture), decodes=decodes)
    assert found == told
    # XLA knows them, and a CPU passes over them.
    assert jax.jit(lambda x: 2 * x, compiler_options=found)(3) == 6
