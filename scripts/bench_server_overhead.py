"""Measures what the HTTP server costs, over an engine whose device is a clock. Needs no GPU."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import selectors
import socket
import statistics
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from gdnjax.cli.command import exit_status, run_as_process, write_json

DESCRIPTION = """\
Streams over HTTP from an engine whose device is a clock: a step takes --step-ms of waiting and gives every row a token.
All else is real: scheduler, packing, detokenizer, streams, parser, application, sockets. So what the device idles is
what the host has lost. Beside the server's lines there is one of the same prompts by LLM.generate ("alone"):

  busy         the share of the time that the device has something to do while all streams run; alone it is 100%
  us a token   of the processor, by thread: the engine's, the event loop's, others (prompts are prepared there)
  events       of the streams; fewer than tokens where the loop lags and tells of several in one
  first token  milliseconds to it, of requests that come one by one while all streams run: the median as the client sees
               it, and how much of that is not in the engine's own figure

Three threads have work at once: where others use the machine, too, the share says how long they wait for a core. Then
compare the processor's times, or give it a core each (`chrt -f 1 python ...`, as root). The client counts events in a
process of its own, and reads no JSON.
"""

EXAMPLES = """\
examples:
  python scripts/bench_server_overhead.py                           128 streams of both endpoints, 10 ms a step
  python scripts/bench_server_overhead.py --streams 32 --step-ms 5 --tokens 1000
  python scripts/bench_server_overhead.py --endpoints chat --profile chat.prof    where the event loop's time goes

Exit status: 0 done, 2 wrong arguments (the reason is on stderr).
"""

TEXT = """In the morning there were 12 apples in the box. Anna took 3 of them, and Ben, who had come late, took 4 more.
How many apples were left? We count: 12 - 3 = 9, then 9 - 4 = 5. So 5 apples were left in the box. "Five," said Anna.
"""
"""What is generated, again and again."""

QUESTION = "A box has 3 apples. 4 more are put in. How many apples are in the box?"

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

WARM_S = 1.0
"""Seconds from the first step of all rows on that are not counted, and before the first of the single requests."""

PROBE_S = 0.1
"""Seconds between two of the requests that come one by one."""

BLOCK = 16
LONGEST_PROMPT = 512


class Clock:
    """In a Runner's place. Steps take their time one after another, and rows get the tokens of a text in turn."""

    def __init__(self, config: Any, token_ids: list[int], full_rows: int, step_s: float, dispatch_s: float):
        from gdnjax.serving.metrics import Metrics

        self.config, self.metrics, self.compile_seconds = config, Metrics(), 0.0
        self.needs_state, self.num_compilations, self.host_sizes = True, 0, None
        self._token_ids, self._full_rows = token_ids, full_rows
        self._step_s, self._dispatch_s = step_s, dispatch_s
        self._free_at = 0.0
        # When a turn is through, and how many tokens a request was given.
        self._ends: dict[int, float] = {}
        self._given: dict[Any, int] = {}
        # When each turn's steps have begun and ended, and whether all streams had a row in it.
        self.turns: list[tuple[float, float, bool]] = []

    @property
    def counters(self) -> Any:
        return self.metrics.counters

    def dispatch(self, plan: Any) -> Any:
        from gdnjax.serving import packing
        from gdnjax.serving.plan import max_growth
        from gdnjax.serving.runner import InFlight

        self.counters.num_turns += 1
        if plan.decoding:
            packing.pack_decode(
                plan.decoding,
                plan.growth,
                plan.bounds,
                rows=packing.bucket_for(len(plan.decoding), self.config.decode_buckets),
                table_width=512,
                grown_width=max_growth(0, self.config.block_size),
                drafts=False,
            )
        prefill = self._emit([(piece.request, piece.is_last) for piece in plan.pieces]) if plan.pieces else None
        decode = self._emit([(request, True) for request in plan.decoding]) if plan.decoding else None
        # Half of a launch holds Python's lock, half of it does not.
        busy_until = time.perf_counter() + self._dispatch_s / 2
        while time.perf_counter() < busy_until:
            pass
        time.sleep(self._dispatch_s / 2)
        begins = max(time.monotonic(), self._free_at)
        self._free_at = begins + self._step_s * ((prefill is not None) + (decode is not None))
        self.turns.append((begins, self._free_at, len(plan.decoding) >= self._full_rows))
        turn = InFlight(plan, prefill, decode)
        self._ends[id(turn)] = self._free_at
        return turn

    def _emit(self, rows: list[tuple[Any, bool]]) -> Any:
        import numpy as np

        from gdnjax.batch import Emitted

        tokens = np.full((len(rows), 1), -1, np.int32)
        count, done = np.zeros((2, len(rows)), np.int32)
        for row, (request, draws) in enumerate(rows):
            given, most = self._given.get(request, 0), request.max_length - request.prompt_length
            if draws and given < most:
                tokens[row], count[row] = self._token_ids[(7 * request.seed + given) % len(self._token_ids)], 1
                given += 1
                self._given[request] = given
            done[row] = given >= most
        return Emitted.of(tokens=tokens, count=count, done=done, drafted=0 * count, logprobs=None, prompt_logprobs=None)

    def read(self, turn: Any) -> Any:
        self.counters.num_device_reads += 1
        with self.metrics.timed("read"):
            time.sleep(max(0.0, self._ends.pop(id(turn)) - time.monotonic()))
        return turn.prefill, turn.decode

    def start_over(self, unread: Any) -> None:
        """Nothing is kept but how much was given, which is what it was."""

    def give_up(self, turns: Any) -> None:
        """Nothing runs that could be waited for."""

    def close(self) -> None:
        """There is no device to free."""


def make_llm(arguments: argparse.Namespace) -> Any:
    """An LLM over a clock, with room for one request more than there are streams."""
    from gdnjax import LLM
    from gdnjax.config import EngineConfig
    from gdnjax.serving.allocator import Allocator
    from gdnjax.serving.engine import Engine
    from gdnjax.serving.frontend import Frontend
    from gdnjax.serving.tokenizer import Tokenizer

    tokenizer, seqs = Tokenizer.named(arguments.tokenizer), arguments.streams + 1
    longest = arguments.tokens + LONGEST_PROMPT
    num_blocks = seqs * (longest // BLOCK + 1)
    config = EngineConfig(max_num_seqs=seqs, block_size=BLOCK, warmup=False)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    clock: Any = Clock(config, token_ids, arguments.streams, arguments.step_ms / 1e3, arguments.dispatch_ms / 1e3)
    llm = LLM.__new__(LLM)
    llm.config, llm.max_model_len = config, longest
    llm.frontend = Frontend(
        config, max_model_len=longest, vocab_size=tokenizer.vocab_size, num_blocks=num_blocks, tokenizer=tokenizer
    )
    llm.engine = Engine(clock, Allocator(seqs + 32, num_blocks, 1, seqs), tokenizer)
    llm._submissions, llm._submissions_lock = weakref.WeakSet(), threading.Lock()
    return llm


def share_busy(llm: Any) -> float | None:
    """Of the time from the warm part to the last turn of all streams; None where there were too few to tell."""
    turns = llm.engine.runner.turns
    full = [begun for begun, _, is_full in turns if is_full]
    if len(full) < 2 or full[-1] - full[0] < 2 * WARM_S:
        return None
    kept = [(begun, ended) for begun, ended, _ in turns if full[0] + WARM_S <= begun < full[-1]]
    return sum(ended - begun for begun, ended in kept) / (full[-1] - kept[0][0])


@contextlib.contextmanager
def cpu_seconds() -> Iterator[dict[str, float]]:
    """Of the threads that there are, by name, and of the process; to be read behind the block."""
    threads = {thread.name: thread for thread in threading.enumerate() if thread.ident is not None}

    def now() -> dict[str, float]:
        found = {"process": time.process_time()}
        for name, thread in threads.items():
            if thread.is_alive():
                found[name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
        return found

    before, found = now(), {}
    yield found
    found |= {name: seconds - before[name] for name, seconds in now().items()}


def run_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """LLM.generate."""
    from gdnjax import SamplingParams

    llm = make_llm(arguments)
    params = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
    with cpu_seconds() as seconds:
        llm.generate([QUESTION] * arguments.streams, params, use_tqdm=False)
    tokens, busy = llm.engine.counters.num_output_tokens, share_busy(llm)
    llm.close()
    return {"what": "alone", "busy": busy, "engine_us": 1e6 * seconds["process"] / tokens}


class Client:
    """Streams of a server, counted as they come, and single requests beside them; in a process of its own."""

    def __init__(self, port: int, endpoint: str, streams: int, tokens: int):
        self._port, self._path, self._streams, self._tokens = port, PATHS[endpoint], streams, tokens
        self._asked = {"messages": [{"role": "user", "content": QUESTION}]} if endpoint == "chat" else {}
        self._asked |= {} if self._asked else {"prompt": QUESTION}
        # A chat's first event has no token.
        self._first = 1 + (endpoint == "chat")
        self._chosen = selectors.DefaultSelector()
        self._events: dict[socket.socket, int] = {}
        self._open = 0
        # The single request that is on its way: its socket, what came, when it began and when its first token came.
        self._probe: socket.socket | None = None
        self._text, self._began, self._came = b"", 0.0, 0.0
        self._firsts: list[tuple[float, float]] = []

    def _ask(self, tokens: int, **fields: Any) -> socket.socket:
        body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, **self._asked, **fields}
        content = json.dumps(body).encode()
        head = f"POST {self._path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
        sock = socket.create_connection(("127.0.0.1", self._port))
        sock.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        self._chosen.register(sock, selectors.EVENT_READ)
        return sock

    def run(self, connection: Any) -> None:
        """Sends (events, [(seconds to the first token, those by the engine)])."""
        for _ in range(self._streams):
            self._events[self._ask(self._tokens)] = 0
        self._open = self._streams
        next_probe = time.monotonic() + WARM_S
        while self._open:
            if self._probe is None and time.monotonic() >= next_probe and self._open == self._streams:
                self._text, self._came, self._began = b"", 0.0, time.monotonic()
                self._probe = self._ask(2, stream_options={"include_usage": True})
                next_probe = self._began + PROBE_S
            for key, _ in self._chosen.select(PROBE_S):
                self._read(key.fileobj)
        connection.send((sum(self._events.values()), self._firsts))

    def _read(self, sock: Any) -> None:
        data = sock.recv(1 << 16)
        if not data:
            self._chosen.unregister(sock)
            sock.close()
            if sock is self._probe:
                self._probe = None
                inside = json.loads(b"{" + self._text.split(b'"metrics":{')[1].split(b"}")[0] + b"}")
                self._firsts.append((self._came - self._began, inside["time_to_first_token_ms"] / 1e3))
            else:
                self._open -= 1
        elif sock is self._probe:
            self._text += data
            if not self._came and self._text.count(b"data: ") >= self._first:
                self._came = time.monotonic()
        else:
            self._events[sock] += data.count(b"data: ")


def run_client(connection: Any, *arguments: Any) -> None:
    Client(*arguments).run(connection)


def run_served(arguments: argparse.Namespace, endpoint: str) -> dict[str, Any]:
    """The same streams over HTTP."""
    import uvicorn

    from gdnjax.serving.async_llm import AsyncLLM
    from gdnjax.serving.server.app import make_app
    from gdnjax.serving.server.settings import ServerConfig

    llm = make_llm(arguments)
    with AsyncLLM.from_llm(llm) as front:
        app = make_app(front, ServerConfig(served_model_names=("clock",), max_queue=arguments.streams))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
        listening = socket.create_server(("127.0.0.1", 0), backlog=2048)

        def serve() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                if arguments.profile is None:
                    runner.run(server.serve([listening]))
                    return
                import cProfile

                profile = cProfile.Profile(time.thread_time)
                profile.runcall(runner.run, server.serve([listening]))
                profile.dump_stats(arguments.profile)

        thread = threading.Thread(target=serve, name="http")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            asked = (listening.getsockname()[1], endpoint, arguments.streams, arguments.tokens)
            client = context.Process(target=run_client, args=(theirs, *asked), daemon=True)
            client.start()
            theirs.close()
            with cpu_seconds() as seconds:
                events, firsts = ours.recv()
            client.join()
        finally:
            server.should_exit = True
            thread.join()
        tokens, busy = llm.engine.counters.num_output_tokens, share_busy(llm)
    used = {"engine_us": seconds["gdnjax-engine"], "loop_us": seconds["http"]}
    used["others_us"] = seconds["process"] - sum(used.values())
    found: dict[str, Any] = {"what": endpoint, "busy": busy, "tokens": tokens, "events": events}
    found |= {name: 1e6 * value / tokens for name, value in used.items()}
    if firsts:
        found["first_token_ms"] = 1e3 * statistics.median(whole for whole, _ in firsts)
        found["first_token_added_ms"] = 1e3 * statistics.median(whole - inside for whole, inside in firsts)
    return found


def line(row: dict[str, Any]) -> str:
    busy = "too short to tell" if row["busy"] is None else f"busy {row['busy']:.1%}"
    names = [name for name in ("engine", "loop", "others") if f"{name}_us" in row]
    parts = [f"{row['what']:12}{busy}", "us a token: " + ", ".join(f"{name} {row[name + '_us']:.1f}" for name in names)]
    if "events" in row:
        parts.append(f"{row['events']:,} events of {row['tokens']:,} tokens")
    if "first_token_ms" in row:
        parts.append(f"first token {row['first_token_ms']:.1f} ms, {row['first_token_added_ms']:.1f} added")
    return " | ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--streams", type=int, default=128, metavar="N", help="at once (default: 128)")
    add("--tokens", type=int, default=600, metavar="N", help="of each (default: 600)")
    add("--step-ms", type=float, default=10.0, metavar="MS", help="of a step of the device (default: 10)")
    add("--dispatch-ms", type=float, default=1.0, metavar="MS", help="of the host to launch one (default: 1)")
    add("--endpoints", nargs="+", choices=list(PATHS), default=list(PATHS), help="which are served (default: both)")
    add("--tokenizer", default="tiny", metavar="DIR", help="of a checkpoint directory (default: the embedded model's)")
    add("--profile", metavar="FILE", help="write a cProfile of the event loop's thread here, for one endpoint")
    add("--json", metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args(argv)
    for name in ("streams", "tokens", "step_ms"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name)}")
    if arguments.profile is not None and len(arguments.endpoints) != 1:
        parser.error("--profile is of one endpoint; name it by --endpoints")
    rows = [run_alone(arguments)]
    print(line(rows[-1]), flush=True)
    for endpoint in arguments.endpoints:
        rows.append(run_served(arguments, endpoint))
        print(line(rows[-1]), flush=True)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    run_as_process(lambda: exit_status("bench_server_overhead.py", main))
