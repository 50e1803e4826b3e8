"""Four CPU devices, so that tensor parallelism is tested everywhere; tests of a GPU run only where there is one."""

import collections
import gc
import os
import pathlib

# The size of XLA's CPU thread pool, read when the backend starts. It is otherwise the number of cores, and ranks that
# wait for one another on fewer threads wait for ever.
os.environ.setdefault("NPROC", "8")
# PyTorch's threads wait for one another in loops: with two test processes on two cores that took most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest

import tests.checking  # noqa: F401 - see pyproject.toml
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with

jax.config.update("jax_num_cpu_devices", 4)

# Imports and items stay, so to look for garbage among them is in vain: it took a seventh of the collection's time.
GARBAGE = gc.get_threshold()
gc.set_threshold(20_000, 20, 20)

# Many tests compile the same steps; the first to do so does it for all, and for the next run.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
CACHE = jax.config.jax_compilation_cache_dir

# By scripts/check_tests.py, which wants to know that a test fails: to shrink what it failed for took minutes. Settings
# of tests begin with this profile's, so it is loaded before any of their modules.
if os.environ.get("TESTS_WITHOUT_SHRINKING"):
    import hypothesis

    phases = set(hypothesis.Phase) - {hypothesis.Phase.shrink, hypothesis.Phase.explain}
    hypothesis.settings.register_profile("without shrinking", phases=phases)
    hypothesis.settings.load_profile("without shrinking")


@pytest.fixture(scope="module", autouse=True)
def compilation_cache():
    """On again: an engine with `compilation_cache_dir=""` switches it off, for its process and every later module."""
    jax.config.update("jax_compilation_cache_dir", CACHE)


@pytest.fixture(scope="module", autouse=True)
def release_executables():
    """Compiled code is mapped memory, and a process may map 65,530 regions: past them XLA's compiler crashes.

    A whole test run compiles more than that. What another module needs again comes from the compilation cache. What is
    left stays to the end, and need not be looked at by each collection again: without that, and without dropping what
    traces hold, modules that come late took half as long again.
    """
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    """Thousands of items, and what their modules have imported."""
    gc.set_threshold(*GARBAGE)
    gc.collect()
    gc.freeze()


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    _mark_thorough(config, items)
    if jax.default_backend() != "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _mark_thorough(config, items) -> None:
    """Of tests with `short_cases` those cases that the short run leaves out. Raises UsageError for a case that a whole
    file does not have.
    """
    tests = collections.defaultdict(list)
    for item in items:
        # What is thorough by a parameter of a fixture is none of the short cases.
        if item.get_closest_marker("short_cases") and not item.get_closest_marker("thorough"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        wanted = set(cases[0].get_closest_marker("short_cases").args)
        missing = wanted - {case.callspec.id for case in cases}
        if missing and not any("::" in argument for argument in config.args):
            raise pytest.UsageError(f"{name} has no case {', '.join(map(repr, sorted(missing)))}")
        short = [case for case in cases if case.callspec.id in wanted] if wanted else _each_value_once(cases)
        for case in cases:
            if case not in short:
                case.add_marker(pytest.mark.thorough)


def _each_value_once(cases: list) -> list:
    """As few cases as go one after another, each the first of those that have most values that none had yet."""
    chosen, seen = [], set()
    values = {case: {(name, repr(value)) for name, value in case.callspec.params.items()} for case in cases}
    while best := max(cases, key=lambda case: len(values[case] - seen), default=None):
        if not values[best] - seen:
            return chosen
        chosen.append(best)
        seen |= values[best]
    return chosen
