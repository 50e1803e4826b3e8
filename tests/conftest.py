"""Four CPU devices, so that tensor parallelism is tested everywhere; tests of a GPU run only where there is one."""

import contextlib
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


IN_ONE_PIECE = ("xla_cpu_parallel_codegen_split_count", 1)
"""Of modules: other test processes have the cores that their parts would take."""

WITHOUT_MLIR = ("xla_cpu_use_fusion_emitters", False)
"""Of fusions, which are written as LLVM's at once. XLA of jax 0.12 has the option no more."""


def known(option: tuple[str, bool | int]) -> bool:
    """Whether this version of XLA has the option."""
    try:
        jax.jit(lambda x: x, compiler_options=dict([option])).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextlib.contextmanager
def compiled_with(*options: tuple[str, bool | int]):
    """LLVM optimises nothing, and XLA has the options that it knows; on a CPU."""
    if jax.default_backend() != "cpu":
        yield
        return
    options_of = compiler.get_compile_options
    chosen = [*filter(known, options)]

    def options_for(*arguments, **keywords):
        found = options_of(*arguments, **keywords)
        found.env_option_overrides = [*found.env_option_overrides, *chosen]
        return found

    jax.config.update("jax_disable_most_optimizations", True)
    with mock.patch.object(compiler, "get_compile_options", options_for):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quickly_compiled():
    """For modules that compile much and run little: it saves more than half of XLA's time.

    The embedded model would answer three times as slowly.
    """
    with compiled_with(IN_ONE_PIECE, WITHOUT_MLIR):
        yield


@pytest.fixture(scope="module")
def unoptimised():
    """The same for modules that compare bits over shapes: without MLIR, sums of interpreted kernels are rounded by the
    shape.
    """
    with compiled_with(IN_ONE_PIECE):
        yield


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
