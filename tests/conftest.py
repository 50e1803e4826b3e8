"""Four CPU devices, so that tensor parallelism is tested everywhere; tests of a GPU run only where there is one."""

import os

import jax
import pytest

# The size of XLA's CPU thread pool, else the number of cores: ranks that wait for one another on fewer threads than
# ranks wait for ever. Read when the backend starts, which is later than this.
os.environ.setdefault("NPROC", "8")
jax.config.update("jax_num_cpu_devices", 4)


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
