"""The test run checks the types and shapes of calls, wherever there are shapes."""

import pathlib
import re
import tomllib

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from gdnjax.pallas_kernels.gumbel_argmax import gumbel

ROOT = pathlib.Path(__file__).parents[1]


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        gumbel(jnp.zeros((2, 2), jnp.uint32), jnp.zeros(3, jnp.int32), jnp.zeros(5, jnp.uint32))


def test_every_module_with_shapes_is_checked():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (packages,) = [option.partition("=")[2].split(",") for option in options if "jaxtyping" in option]
    shaped = [
        file
        for file in sorted((ROOT / "gdnjax").rglob("*.py"))
        if re.search(r"\b(Float|Int|UInt|Bool)\d*\[[\w.| ]+, \"", file.read_text())
    ]
    assert len(shaped) > 20
    for file in shaped:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        assert any(f"{name}.".startswith(f"{package}.") for package in packages), name
