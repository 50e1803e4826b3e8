"""One engine of the embedded model and one server over it, on a socket of this machine, for all tests here."""

import httpx
import pytest

from gdnjax import LLM
from gdnjax.serving.async_llm import AsyncLLM
from gdnjax.serving.server.app import make_app
from gdnjax.serving.server.settings import ServerConfig
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with
from tests.serving.server.sockets import serving

OPTIONS = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "max_model_len": 256,
    "num_kv_blocks": 64,
    # One size of each step: tokens are then the same, bit for bit, alone and in a batch, and little is compiled.
    "prefill_buckets": (128,),
    "decode_buckets": (4,),
    "max_logprobs": 5,
    "warmup": False,
}

CONFIG = ServerConfig(served_model_names=("tiny", "embedded"), max_queue=256, max_body_bytes=1 << 20)


@pytest.fixture(scope="session")
def llm():
    """Its own calls work beside the server's."""
    # Compiled quickly: it is met in few tokens.
    with compiled_with(IN_ONE_PIECE, WITHOUT_MLIR), LLM("tiny", use_tqdm=False, **OPTIONS) as made:
        yield made


@pytest.fixture(scope="session")
def async_llm(llm):
    made = AsyncLLM.from_llm(llm)
    yield made
    made.close()


@pytest.fixture(scope="session")
def app(async_llm):
    return make_app(async_llm, CONFIG)


@pytest.fixture(scope="session")
def url(app):
    with serving(app) as found:
        yield found


@pytest.fixture(scope="session")
def client(url):
    with httpx.Client(base_url=url, timeout=300) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def release_executables():
    """Nothing, in place of what tests/conftest.py does: the modules here share one engine, and its few programs."""
