"""The decode step in Triton: what it refuses, and how it is called. What it computes is scripts/triton_gate.py's."""

import functools
import inspect
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rocm.cases import BFLOAT16, MIXED_VK, attention, delta

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import gated_delta_rule as op
from gdnjax.pallas_kernels import launch as package
from tests.pallas_kernels.backends import once

pytestmark = once

TRITON = Backend("triton", "gfx942")


def call(case):
    return jax.eval_shape(lambda arrays: case.call(arrays, TRITON), case.arrays)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (delta("decode", MIXED_VK), "gated_delta_rule.decode has no kernel for a pool of both orders; allowed: a read"),
        (delta("decode", channels=True), "a decay of each key channel; allowed: one of each head"),
        (delta("decode", state=BFLOAT16, stochastic=True), "stochastic rounding; allowed: rounding=None"),
        (delta("verify", old=2, new=2), "gated_delta_rule_verify has no kernel in Triton; allowed: gated_delta"),
        (attention("decode"), "paged_attention has no kernel in Triton"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_has_no_kernel_is_refused_by_name_and_nothing_runs(case, said):
    with mock.patch.object(package, "run") as run, pytest.raises(ValueError, match=f"kernels='triton': .*{said}"):
        call(case)
    run.assert_not_called()


@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_what_is_missing_is_named_with_its_extra(monkeypatch, missing):
    installed(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"`pip install gdnjax\[triton\]`: import of {missing} "):
        call(delta("decode"))


@pytest.mark.parametrize(("order", "state"), [(("vk", "vk"), np.float32), (("kv", "vk"), BFLOAT16)], ids=["vk", "kv"])
def test_kernel_is_given_its_parameters_and_the_pool_in_place(monkeypatch, order, state):
    calls = installed(monkeypatch)
    case = delta("decode", order, state=state, heads=6, key_heads=3)
    outputs = call(case)
    ((args, said),) = calls
    kernel = said["kernel"].func
    parameters = inspect.signature(kernel).parameters
    pointers = [name for name in parameters if name.endswith("_ptr")]
    statics = {name: said[name] for name in parameters if name not in pointers}
    assert list(parameters) == [*pointers, *statics]
    assert len(pointers) == len(args) + len(said["out_shape"])
    # Of jax_triton's own words none is a static of the kernel.
    own = {"kernel", "name", "grid", "out_shape", "input_output_aliases", "num_warps", "num_stages"}
    assert own.isdisjoint(statics)
    assert set(said) == own | set(statics)
    ((operand, result),) = said["input_output_aliases"].items()
    assert (pointers[operand], pointers[len(args) + result]) == ("ssm_ptr", "out_ptr")
    assert args[operand].shape == said["out_shape"][result].shape == case.arrays["ssm"].shape
    assert outputs["ssm"].dtype == state
    assert said["name"] == kernel.__name__
    blocks = -(-128 // statics["columns"])
    assert said["grid"] == (3 * 6 * blocks,)
    assert statics["lanes"] * statics["parts"] == 128
    assert (statics["key_heads"], statics["heads"], statics["read_vk"]) == (3, 6, order[0] == "vk")


def installed(monkeypatch) -> list:
    """Stands in for triton and jax_triton; the calls of a kernel that come, which give zeros."""
    calls = []

    def triton_call(*args, **said):
        calls.append((args, said))
        return [jnp.zeros(out.shape, out.dtype) for out in said["out_shape"]]

    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    vars(triton).update(jit=functools.partial, language=language)
    vars(language).update(constexpr="constexpr")
    jax_triton = types.ModuleType("jax_triton")
    vars(jax_triton).update(triton_call=triton_call)
    for module in (triton, language, jax_triton):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # What was imported from others, and what is imported from these, is not to be found by anybody else.
    module = f"{op.__name__}.triton_kernel"
    monkeypatch.setitem(sys.modules, module, None)
    del sys.modules[module]
    return calls
