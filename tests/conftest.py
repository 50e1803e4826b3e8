"""Four CPU devices, so that tensor parallelism is tested everywhere; tests of a GPU run only where there is one."""

import os
import pathlib

# Both are read by libraries that load later, scipy with the first triangular solve at the latest.
# XLA's CPU pool otherwise has a thread per core, and ranks that wait for one another on fewer threads wait for ever.
os.environ.setdefault("NPROC", "8")
# The BLAS behind the triangular solve otherwise spins up threads for 64 x 64 systems: 100 times slower on a busy host.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)

# Many tests compile the same steps; the first to do so does it for all, and for the next run.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
