"""Four CPU devices, so that tensor parallelism is tested everywhere; tests of a GPU run only where there is one."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
