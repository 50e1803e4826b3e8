"""Every test of an op runs on its definition, and on its kernels in the interpreter; on a GPU, compiled, too."""

import pytest

from gdnjax.backend import REFERENCE
from tests.pallas_kernels import backends


@pytest.fixture(scope="module", autouse=True)
def interpreted_code(quickly_compiled):
    """The interpreter's code is large and runs once or twice. Bits of convolutions need another."""


@pytest.fixture(autouse=True, params=backends.BACKENDS.values(), ids=backends.BACKENDS)
def backend(request):
    backends.run(request.param)
    yield request.param
    backends.run(REFERENCE)
