"""Two processes of two CPU devices each run one engine: their tokens are one process's of four, and neither outlives
the other.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from gdnjax.distributed import LOST
from tests.serving import process_program

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = pathlib.Path(process_program.__file__)
pytestmark = pytest.mark.usefixtures("quickly_compiled")


class Processes:
    """Two processes of the program. What is left of them is killed at the end."""

    def __init__(self, job: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        cache = str(jax.config.jax_compilation_cache_dir)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "NPROC": "8"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, PROGRAM, job, str(port), str(number), cache],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for number in range(2)
        ]  # fmt: skip
        self.errors = ["", ""]
        self._readers = [threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(2)]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int) -> None:
        # A pipe that nobody empties would stop who writes into it.
        self.errors[number] = self.processes[number].stderr.read()

    def said(self):
        """What process 0 prints next: gloo prints, too."""
        for line in self.processes[0].stdout:
            if line.startswith(("[", '"')) and not line.startswith("[Gloo]"):
                return json.loads(line)
        raise AssertionError(f"process 0 has ended: {self.end_of(0)}")

    def end_of(self, number: int) -> tuple[int, str]:
        """Exit status and standard error of a process that ends by itself."""
        status = self.processes[number].wait(timeout=60)
        self._readers[number].join(timeout=10)
        return status, self.errors[number]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.mark.short_cases("serve")
@pytest.mark.parametrize("job", ["serve", "serve again"])
def test_two_processes_give_the_tokens_of_one_and_a_lost_follower_ends_the_leader(job):
    with Processes(job) as both:
        with process_program.engine() as llm:
            expected = process_program.generate(llm)
        assert both.said() == expected
        calls = both.said()
        assert {"admit", "fill_counts", "fill_logit_row", "fill_masks", "prefill", "decode"} <= set(calls)
        # The turn that was cut off has left all processes with the same empty pools.
        assert both.said() == expected
        for refused in ("one engine at a time", "save_state is for engines of one", "restore is for engines of one"):
            assert refused in both.said()
        assert both.said() == "running"
        both.processes[1].kill()
        began = time.monotonic()
        status, error = both.end_of(0)
        assert time.monotonic() - began < 20
        assert status == LOST
        assert "process 1 of 2 (host" in error
        assert "is gone: its connection" in error
    assert "this is process 1 of 2, and process 0 has the engine" in both.end_of(1)[1]


@pytest.mark.thorough
def test_lost_leader_ends_the_follower():
    with Processes("run on") as both:
        assert both.said() == "running"
        both.processes[0].kill()
        began = time.monotonic()
        status, error = both.end_of(1)
        assert time.monotonic() - began < 20
        # The runtime, whose service is in process 0, may be first to end it.
        assert status != 0
        assert "process 0 of 2 (host" in error
        assert "is gone: its connection" in error


@pytest.mark.thorough
def test_processes_of_different_models_are_named():
    with Processes("other") as both:
        (_, leader), (_, follower) = both.end_of(0), both.end_of(1)
        what = "model's hidden_size is '64', on process 0 '32'"
        assert what in follower
        assert "process 1 of 2 (host" in leader
        assert what in leader
