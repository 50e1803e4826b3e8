"""scripts/triton_gate.py without Triton: what it says then, and that its cases are forms which the kernel has."""

import importlib.util
from unittest import mock

import jax
import pytest
import triton_gate as script
from kernel_bench.workloads import WORKLOADS
from rocm import by_triton
from rocm.cases import MIXED_VK, delta

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.gated_delta_rule import triton_decode

TRITON = Backend("triton", "gfx942")


def test_what_is_missing_is_said_with_its_extras(capsys):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        assert script.main([]) == 2
    assert capsys.readouterr().err == (
        "triton_gate.py: error: jax_triton is not installed: pip install -e '.[rocm-gate,triton]'\n"
    )


def test_cases_and_workloads_are_of_forms_that_the_kernel_has():
    """Nothing is computed: a form that it lacks is refused before the kernel is imported, which is the last step."""
    names = [case.name for case in by_triton.cases()]
    assert len(set(names)) == len(names)
    reached = mock.Mock(side_effect=ImportError("here"))
    with mock.patch.object(triton_decode, "from_the_triton_extra", reached):
        for case in by_triton.cases():
            with pytest.raises(ImportError, match="here"):
                shapes_of(case)
        for name in by_triton.COMPILED:
            work = WORKLOADS[name]
            with pytest.raises(ImportError, match="here"):
                jax.eval_shape(lambda key, work=work: work.call(*work.inputs(key), 0, TRITON), jax.random.key(0))
        with pytest.raises(ValueError, match="a pool of both orders"):
            shapes_of(delta("decode", MIXED_VK))


def shapes_of(case):
    return jax.eval_shape(lambda arrays: case.call(arrays, TRITON), case.arrays)
