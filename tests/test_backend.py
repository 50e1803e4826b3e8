"""The one decision by platform."""

import pytest
from jax import lax

from gdnjax import backend


@pytest.mark.parametrize("platform", ["cpu", "rocm", "cuda", "gpu"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_reference_runs_everywhere(kernels, platform):
    assert backend.resolve(kernels, platform) == "reference"


@pytest.mark.parametrize("kernels", ["pallas", "interpret", "triton"])
def test_missing_kernels_are_an_error_and_never_a_fallback(kernels):
    with pytest.raises(ValueError, match=f"kernels='{kernels}' on rocm.*allowed: 'auto', 'reference'"):
        backend.resolve(kernels, "rocm")


def test_float32_products_are_never_rounded_to_tf32():
    assert backend.dot_precision("float32") == lax.Precision.HIGHEST
    assert backend.dot_precision("bfloat16") is None
