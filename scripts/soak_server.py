"""Soaks a server: clients that leave, requests that are wrong, turns that fail; and looks for what is left."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import gc
import json
import random
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gdnjax.assets import EMBEDDED_MODEL
from gdnjax.cli.command import exit_status, prepare_environment, run_as_process

if TYPE_CHECKING:
    from gdnjax import LLM, AsyncLLM

DESCRIPTION = """\
Serves the embedded model and asks it for --seconds, from --clients at once: completions of random lengths, streamed or
whole, with one sample or several. Of these --leave are left at a random moment; one in ten is wrong, and has to be
refused. Meanwhile turns of the engine fail: at their dispatch, at their read as where memory is short, and in making
the text of one request in fifty, which alone has to end by it. Every answer has to be the one that its prompt has
alone, to the token, and what was read of one that was left its beginning. In the end no slot, block, row or queue entry
may be held, and memory may not have grown.
"""

EXAMPLES = """\
examples:
  python scripts/soak_server.py                              15 minutes, 64 clients
  python scripts/soak_server.py --seconds 120 --clients 16

Exit status: 0 nothing was wrong, 1 something was (it is on stdout), 2 a bad argument, 130 interrupted.
"""

OPTIONS = {
    "dtype": "float32",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_model_len": 256,
    # Fewer than all need: some are preempted.
    "num_kv_blocks": 160,
    # One size of each step: tokens are then the same, bit for bit, alone and in a batch.
    "prefill_buckets": (256,),
    "decode_buckets": (16,),
}
"""Of the engine."""

PROMPTS = 32
"""Different requests that are asked for again and again."""

LONGEST = 48
"""Output tokens of the longest of them."""

WRONG: tuple[tuple[dict[str, Any], int], ...] = (
    ({"prompt": []}, 400),
    ({"prompt": "x", "max_tokens": -1}, 400),
    ({"prompt": "x", "temperature": "hot"}, 400),
    ({"prompt": [10**9]}, 400),
    ({"prompt": "word " * 3000}, 400),
    ({"prompt": "x", "model": "another"}, 404),
)
"""Requests that are refused, and the statuses that they get."""

MEMORY = 64 << 20
"""Bytes by which the process may grow in the second half: caches fill, and allocators keep pages."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A request and the token ids of each of its samples where it runs alone."""

    body: dict[str, Any]
    expected: tuple[tuple[int, ...], ...]


class Faults:
    """Turns of an engine that fail now and then, and texts that cannot be made. `done` counts them."""

    def __init__(self, llm: "LLM", seed: int, share: float):
        self.done: collections.Counter[str] = collections.Counter()
        self._random, self._share = random.Random(seed), share
        self._llm = llm
        self._doomed: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        """Has them happen while within."""
        from unittest import mock

        from gdnjax.serving.detokenizer import Detokenizer

        runner, frontend = self._llm.engine.runner, self._llm.frontend
        dispatch, read, prepare, append = runner.dispatch, runner.read, frontend.prepare, Detokenizer.append

        def fails(name: str, share: float) -> bool:
            if self._random.random() >= share:
                return False
            self.done[name] += 1
            return True

        def failing_dispatch(plan):
            turn = dispatch(plan)
            # The pools have been donated.
            if fails("dispatch", self._share):
                raise RuntimeError("injected: a step has failed")
            return turn

        def failing_read(turn):
            if fails("read", self._share):
                raise RuntimeError("injected: RESOURCE_EXHAUSTED: out of memory")
            return read(turn)

        def dooming(*given, **options):
            groups = prepare(*given, **options)
            if fails("text", 0.02):
                self._doomed.update(request.detokenizer for group in groups for request in group.requests)
            return groups

        def failing_append(detokenizer, token_ids):
            if detokenizer in self._doomed:
                raise UnicodeError("injected: no such letter")
            return append(detokenizer, token_ids)

        with (
            mock.patch.object(runner, "dispatch", failing_dispatch),
            mock.patch.object(runner, "read", failing_read),
            mock.patch.object(frontend, "prepare", dooming),
            mock.patch.object(Detokenizer, "append", failing_append),
        ):
            yield


def make_cases(llm: "LLM", seed: int) -> list[Case]:
    """The requests, each run alone."""
    rng, cases = random.Random(seed), []
    shared = [rng.randrange(300) for _ in range(40)]
    for number in range(PROMPTS):
        prompt = [rng.randrange(300) for _ in range(rng.randint(1, 60))]
        body = {
            "prompt": shared[: rng.randint(1, 40)] + prompt if number % 2 else prompt,
            "max_tokens": rng.randint(1, LONGEST),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": number,
            "n": rng.choice([1, 1, 1, 2]),
            "ignore_eos": True,
        }
        cases.append(Case(body, alone(llm, body)))
    return cases


def alone(llm: "LLM", body: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The token ids of each sample of a request that runs alone."""
    from gdnjax import SamplingParams

    params = SamplingParams(**{name: value for name, value in body.items() if name != "prompt"})
    (output,) = llm.generate([body["prompt"]], params, use_tqdm=False)
    return tuple(sample.token_ids for sample in output.outputs)


def fault_of(case: Case, found: dict[int, list[int]], whole: bool) -> str | None:
    """What is wrong with the token ids that came of a case, by sample; None: nothing."""
    for index, expected in enumerate(case.expected):
        tokens = tuple(found.get(index, ()))
        if tokens != (expected if whole else expected[: len(tokens)]):
            return f"sample {index} of {case.body} is {tokens}, alone it is {expected}"
    return None


class Clients:
    """Asks a server. `done` counts how requests ended, `wrong` says what should not have been."""

    def __init__(self, url: str, cases: list[Case], *, leave: float, seed: int):
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._url, self._cases, self._leave, self._seed = url, cases, leave, seed

    async def run(self, count: int, seconds: float) -> None:
        """So many at once, for so long."""
        import httpx

        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=count)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as session:
            await asyncio.gather(*(self._client(session, random.Random(self._seed + i), until) for i in range(count)))

    async def _client(self, session: Any, rng: random.Random, until: float) -> None:
        while time.monotonic() < until:
            try:
                await self._ask(session, rng)
            except Exception as error:
                self.wrong.append(f"a request failed by {type(error).__name__}: {error}")
                await asyncio.sleep(0.1)

    async def _ask(self, session: Any, rng: random.Random) -> None:
        if rng.random() < 0.1:
            body, status = rng.choice(WRONG)
            response = await session.post("/v1/completions", json=body)
            self.done["refused"] += 1
            if response.status_code != status:
                self.wrong.append(f"{str(body)[:80]} has status {response.status_code} and not {status}")
            return
        case = rng.choice(self._cases)
        patience = rng.expovariate(1.0) if rng.random() < self._leave else None
        if rng.random() < 0.3:
            await self._whole(session, case, patience)
        else:
            await self._stream(session, case, patience)

    async def _whole(self, session: Any, case: Case, patience: float | None) -> None:
        try:
            asking = session.post("/v1/completions", json={**case.body, "return_token_ids": True})
            response = await asyncio.wait_for(asking, patience)
        except TimeoutError:
            self.done["left"] += 1
            return
        answer = response.json()
        if response.status_code != 200:
            self._count_error(answer)
            return
        found = {choice["index"]: choice["token_ids"] for choice in answer["choices"]}
        self._check(case, found, whole=True)

    async def _stream(self, session: Any, case: Case, patience: float | None) -> None:
        found: dict[int, list[int]] = collections.defaultdict(list)
        body = {**case.body, "return_token_ids": True, "stream": True}
        try:
            async with asyncio.timeout(patience), session.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._count_error(response.json())
                    return
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        self._count_error(chunk)
                        return
                    for choice in chunk["choices"]:
                        found[choice["index"]] += choice["token_ids"]
        except TimeoutError:
            self.done["left"] += 1
            self._check(case, found, whole=False)
            return
        self._check(case, found, whole=True)

    def _count_error(self, answer: dict[str, Any]) -> None:
        """Only the text that was made to fail may end an answer."""
        message = answer["error"]["message"]
        if "injected: no such letter" in message:
            self.done["text"] += 1
        else:
            self.wrong.append(f"a request got the error {message!r}")

    def _check(self, case: Case, found: dict[int, list[int]], whole: bool) -> None:
        self.done["answered"] += whole
        fault = fault_of(case, found, whole)
        if fault is not None:
            self.wrong.append(fault)


@contextlib.contextmanager
def served(llm: "AsyncLLM") -> Iterator[str]:
    """The URL of a server over `llm`, which a thread of its own runs."""
    import uvicorn

    from gdnjax.serving.server.app import make_app
    from gdnjax.serving.server.settings import ServerConfig

    app = make_app(llm, ServerConfig(served_model_names=("soaked",)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server has ended before it began")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def held(llm: "AsyncLLM") -> dict[str, int]:
    """What is held though nobody asks for anything any more; empty: nothing."""
    engine = llm.llm.engine
    deadline = time.monotonic() + 60
    while (llm.num_unfinished or engine.has_work) and time.monotonic() < deadline:
        time.sleep(0.05)
    llm.llm.reset_prefix_cache()
    engine.between_turns(engine.scheduler.check_integrity)
    pools = {name: pool.num_used for name, pool in engine.scheduler.allocator.pools.items()}
    found = pools | {
        "streams": llm.num_unfinished,
        "unfinished": len(engine.scheduler.unfinished),
        "waiting": len(engine.scheduler.waiting),
        "parked": len(engine.scheduler.parked),
        "samples": len(llm._loop._samples),
    }
    return {name: count for name, count in found.items() if count}


def memory() -> int:
    """Bytes of the process that are in memory."""
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss


def build_parser() -> argparse.ArgumentParser:
    """The command line. Imports no jax."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", default=EMBEDDED_MODEL, help="default: the embedded model")
    parser.add_argument("--seconds", type=float, default=900.0, metavar="S", help="default: 900")
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="at once (default: 64)")
    parser.add_argument("--leave", type=float, default=0.3, metavar="F", help="share that leaves (default: 0.3)")
    parser.add_argument("--faults", type=float, default=0.01, metavar="F", help="share of turns (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--output", metavar="FILE", help="write what was found there, as JSON")
    parser.add_argument("--verbose", action="store_true", help="log what the engine does")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("soak_server.py", lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    for name, most in (("leave", 1.0), ("faults", 0.5)):
        if not 0 <= getattr(arguments, name) <= most:
            raise ValueError(f"--{name} must be a share from 0 to {most}, got {getattr(arguments, name)}")
    if arguments.seconds <= 0 or arguments.clients < 1:
        raise ValueError(f"--seconds must be above 0 and --clients at least 1, got {arguments.seconds} and "
                         f"{arguments.clients}")  # fmt: skip
    prepare_environment(None, verbose=arguments.verbose)
    report = soak(arguments)
    print(json.dumps(report, indent=2))
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    return 1 if report["wrong"] else 0


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """What came of it; "wrong" says what should not have been."""
    import logging

    from gdnjax import AsyncLLM

    if not arguments.verbose:
        # Every injected fault is logged with where it came from.
        logging.getLogger("gdnjax").setLevel(logging.CRITICAL)
    with AsyncLLM(arguments.model, use_tqdm=False, **OPTIONS) as llm:
        cases = make_cases(llm.llm, arguments.seed)
        compiled = llm.llm.stats()["num_compilations"]
        faults, sizes, wrong = Faults(llm.llm, arguments.seed, arguments.faults), [], []
        totals: collections.Counter[str] = collections.Counter()
        began = time.monotonic()
        for half in range(2):
            with served(llm) as url, faults.injected():
                seed = arguments.seed + half * arguments.clients
                clients = Clients(url, cases, leave=arguments.leave, seed=seed)
                asyncio.run(clients.run(arguments.clients, arguments.seconds / 2))
            totals += clients.done
            wrong += clients.wrong
            wrong += [f"{count} {name} are held" for name, count in held(llm).items()]
            sizes.append(memory())
        seconds = time.monotonic() - began
        stats = llm.llm.stats()
        if sizes[1] - sizes[0] > MEMORY:
            wrong.append(f"memory has grown by {(sizes[1] - sizes[0]) >> 20} MiB in the second half")
        if stats["num_compilations"] != compiled:
            wrong.append(f"{stats['num_compilations'] - compiled} steps were compiled meanwhile")
        if llm.failure is not None:
            wrong.append(f"the engine's thread has failed: {llm.failure!r}")
        found = [case for case in cases if alone(llm.llm, case.body) != case.expected]
        wrong += [f"afterwards {case.body} is another one alone" for case in found]
    # A soak in which nothing happened says nothing.
    for name in ("answered", "refused"):
        if not totals[name]:
            wrong.append(f"no request was {name}")
    return {
        "seconds": seconds,
        "requests": dict(totals),
        "faults": dict(faults.done),
        "preemptions": stats["num_preemptions"],
        "start_overs": stats["num_start_overs"],
        "memory_mib": [size >> 20 for size in sizes],
        "num_wrong": len(wrong),
        "wrong": wrong[:20],
    }


if __name__ == "__main__":
    run_as_process(main)
