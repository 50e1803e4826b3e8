"""The implementation that a test of an op runs: `conftest.py` runs each test once for every one."""

import functools

import jax
import pytest

from gdnjax.backend import INTERPRET, REFERENCE, Backend, of_device

BACKENDS = {"reference": REFERENCE, "interpret": INTERPRET}
if jax.default_backend() != "cpu":
    BACKENDS["compiled"] = of_device("auto", jax.devices()[0])

once = pytest.mark.parametrize("backend", [REFERENCE], ids=["once"], indirect=True)
"""Of a test that is the same whatever runs: it names its implementations itself, or needs none."""

_running = REFERENCE


def running() -> Backend:
    return _running


def run(backend: Backend) -> None:
    global _running
    _running = backend


def jit(function=None, **options):
    """jax.jit, compiled for each implementation by itself: `function` calls ops with `backend=running()`."""
    if function is None:
        return functools.partial(jit, **options)

    def copy():
        return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))

    compiled = {backend: jax.jit(copy(), **options) for backend in BACKENDS.values()}
    return functools.wraps(function)(lambda *args, **kwargs: compiled[running()](*args, **kwargs))
