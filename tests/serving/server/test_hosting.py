"""`gdnjax serve` as a process: it listens, is ready, and ends as it is told to."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from gdnjax.cli import serve
from gdnjax.config import EngineConfig
from gdnjax.serving.server import hosting
from scripts import make_random_checkpoint
from tests.serving.server.asking import events

SMALL = [
    "--dtype=float32",
    "--max-num-seqs=4",
    "--max-num-batched-tokens=128",
    "--max-model-len=256",
    "--num-kv-blocks=64",
    "--no-warmup",
]


class Serving:
    """The process, and what it says on stderr."""

    def __init__(self, *flags, module="gdnjax"):
        command = [sys.executable, "-m", module, *(["serve"] if module == "gdnjax" else []), "--port=0", *flags]
        # It answers one request: most of its time would go into LLVM's optimisations.
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def says(self, pattern, seconds=300):
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, "".join(self.lines))):
            assert time.monotonic() < deadline, self.lines
            assert self.process.poll() is None or re.search(pattern, "".join(self.lines)), self.lines
            time.sleep(0.02)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Of two layers, which compile in seconds."""
    directory = tmp_path_factory.mktemp("hosting") / "model"
    assert make_random_checkpoint.main([str(directory), "--layers", "2", "--hidden-size", "64"]) == 0
    return str(directory)


def test_sigterm_lets_a_stream_finish_and_lets_nobody_in(checkpoint):
    with Serving(checkpoint, *SMALL, "--served-model-name=small") as serving:
        url = serving.says(r"listening at (http\S+);")[1]
        assert httpx.get(f"{url}/live").status_code == 200
        assert httpx.get(f"{url}/health").status_code == 503
        serving.says(r"ready: small at ")
        assert httpx.get(f"{url}/health").status_code == 200
        body = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response:
            pieces = response.iter_text()
            text = next(pieces)
            serving.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        assert events(text)[-1]["choices"][0]["finish_reason"] == "length"
        assert serving.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/live")


@pytest.mark.thorough
def test_signal_before_it_is_ready_ends_it_at_once():
    with Serving(module="gdnjax.serving.server") as serving:
        url = serving.says(r"listening at (http\S+);")[1]
        assert httpx.get(f"{url}/live").status_code == 200
        serving.process.send_signal(signal.SIGTERM)
        assert serving.process.wait(30) == 143
        assert "terminated" in "".join(serving.lines)


def test_place_that_is_taken_is_a_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port), *SMALL]) == 2
    err = capsys.readouterr().err
    assert f"--host 127.0.0.1 --port {port}: Address already in use" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no/such/directory"], "no/such/directory"),
        (["--max-queue=-1"], "max_queue must be an integer of at least 0, got -1"),
        (["--max-num-seqs=0"], "max_num_seqs must be"),
        (["--draft-acceptance=rejection"], "--draft-acceptance needs --num-speculative-tokens above 0"),
        (["--api-key="], "api_keys must be a tuple of non-empty texts"),
        (["--num-processes=2"], "--num-processes is of one of several processes"),
    ],
)
def test_mistakes_are_a_line(flags, message, capsys, without_type_checks):
    assert serve.main(flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("gdnjax serve: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_checkpoint_that_cannot_be_served_ends_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert serve.main([str(tmp_path), "--port=0"]) == 2
    assert "gdnjax serve: error: " in capsys.readouterr().err


def test_flags_are_the_engine_s_own_defaults():
    """But for how many requests run at once."""
    arguments = serve.build_parser().parse_args([])
    assert serve.engine_config(arguments) == EngineConfig(max_num_seqs=serve.MAX_NUM_SEQS)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_size_of_a_request_that_is_none_is_named(value, capsys):
    assert serve.main([f"--max-request-mib={value}"]) == 2
    assert "--max-request-mib must be a number above 0" in capsys.readouterr().err


def test_flags_reach_the_engine_and_the_server():
    flags = ["--max-num-seqs=3", "--no-warmup", "--no-enable-prefix-caching", "--kv-cache-dtype=int8", "--seed=4"]
    arguments = serve.build_parser().parse_args([*flags, "--api-key=a", "--api-key=b", "--max-request-mib=0.5"])
    engine, server = serve.engine_config(arguments), serve.server_config(arguments)
    assert (engine.max_num_seqs, engine.warmup, engine.enable_prefix_caching) == (3, False, False)
    assert (engine.kv_cache_dtype, engine.seed) == ("int8", 4)
    assert (server.api_keys, server.max_body_bytes, server.served_model_names) == (("a", "b"), 1 << 19, ("tiny",))


def test_garbage_collector_leaves_alone_what_was_there_before_serving():
    before = [[] for _ in range(1000)]
    try:
        hosting.keep_what_there_is()
        assert gc.get_freeze_count() > 1000
        walked_over = {id(thing) for thing in gc.get_objects()}
        assert walked_over.isdisjoint(map(id, before))
    finally:
        gc.unfreeze()
