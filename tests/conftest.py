"""Four CPU devices, so that tensor parallelism is tested everywhere; tests of a GPU run only where there is one."""

import gc
import os
import pathlib
from unittest import mock

# The size of XLA's CPU thread pool, read when the backend starts. It is otherwise the number of cores, and ranks that
# wait for one another on fewer threads wait for ever.
os.environ.setdefault("NPROC", "8")
# PyTorch's threads wait for one another in loops: with two test processes on two cores that took most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest
from jax._src import compiler

jax.config.update("jax_num_cpu_devices", 4)

# Many tests compile the same steps; the first to do so does it for all, and for the next run.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def release_executables():
    """Compiled code is mapped memory, and a process may map 65,530 regions: past them XLA's compiler crashes.

    A whole test run compiles more than that. What another module needs again comes from the compilation cache.
    """
    yield
    jax.clear_caches()
    gc.collect()


QUICKLY = (("xla_cpu_use_fusion_emitters", False), ("xla_cpu_parallel_codegen_split_count", 1))
"""Options of XLA for `quickly_compiled`: fusions without MLIR, and a module in one piece, since other test processes
have the cores that its parts would take."""


def known(option: tuple[str, bool | int]) -> bool:
    """Whether this version of XLA has the option: the first is gone in that of jax 0.12."""
    try:
        jax.jit(lambda x: x, compiler_options=dict([option])).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(scope="module")
def quickly_compiled():
    """For modules that compile much and run little: on a CPU LLVM optimises nothing, and fusions are written in its
    language at once. Together that saves more than half of the time.

    The embedded model would answer three times as slowly.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    options_of = compiler.get_compile_options
    quickly = [*filter(known, QUICKLY)]

    def options_for(*arguments, **keywords):
        options = options_of(*arguments, **keywords)
        options.env_option_overrides = [*options.env_option_overrides, *quickly]
        return options

    jax.config.update("jax_disable_most_optimizations", True)
    with mock.patch.object(compiler, "get_compile_options", options_for):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def without_type_checks():
    """As users run it: the type checks of the test run would refuse wrong types before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
