"""Measures what the host's bookkeeping costs as requests, cached tokens and texts grow. No device, no model."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from gdnjax.assets import config_file
from gdnjax.cli.command import check_writable, exit_status, run_as_process, write_json
from gdnjax.config import EngineConfig, ModelConfig
from gdnjax.memory import StateGeometry
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.plan import Plan
from gdnjax.serving.prefix_cache import Match, PrefixCache
from gdnjax.serving.request import Request
from gdnjax.serving.scheduler import Scheduler
from gdnjax.serving.tokenizer import Tokenizer

DESCRIPTION = """\
Drives the scheduler and its prefix cache as the engine does, with made-up tokens in place of a device, and prints what
each kind of work costs at several sizes:

  plan, commit     a turn in which everybody decodes, without drafts and with three
  turn             the same by the engine's own loop, packing and text among it, and a token's share of all turns: texts
                   that are streamed, and texts that are read at their end, by the embedded model's tokenizer
  interval         the slowest plan while all come to a checkpoint's interval at once, and somebody waits
  abort            one of many that wait, from the far end of the queue
  head             a turn while the first that waits has a long cached prompt and does not fit
  logit rows       where every second request needs one of two logit rows: turns, and those until the others have ended
  reset            forgetting everything in a cache of many blocks
  count            asking such a cache how many blocks it holds, as a line of the log does
  text             making and reading the text of one output, token by token, as a stream does
  agents           prompt tokens found in the cache and the states that it holds, where 16 agents share system prompts,
                   go on from their last turn and ask questions aside: by the places of checkpoints, with so many slots
                   for them; GiB are Qwen3.5-9B's
  deadlines        finished requests that are still kept in memory, of so many served with a deadline far away

Times are those of the processor, of this machine and what else it does: compare runs of one hour, and growth rather
than numbers. Python's garbage collector walks over everything now and then, which is in them as far as it happens.
"""

EXAMPLES = """\
examples:
  python scripts/bench_scheduler.py                        every part, about two minutes
  python scripts/bench_scheduler.py --only plan interval   some of it
  python scripts/bench_scheduler.py --largest 1000 --json costs.json    small sizes alone, and the figures as JSON

Exit status: 0 done, 2 wrong arguments (the reason is on stderr).
"""

BLOCK = 16

STORY = "Once upon a time there was a little girl who lived near the forest. One day she found a small red ball. "

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--largest", type=int, default=1_000_000, metavar="N", help="leave out larger sizes than N")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args(argv)
    if arguments.largest < 1:
        parser.error(f"--largest must be at least 1, got {arguments.largest}")
    check_writable("--json", arguments.json)
    rows: list[Row] = []
    for name in arguments.only or PARTS:
        for size in PARTS[name].sizes:
            if size <= arguments.largest:
                gc.collect()
                measured = PARTS[name].measure(size)
                rows += [{"part": name, "size": size, **row} for row in measured]
                for row in measured:
                    print(f"{name:11} {size:>9,} {row['what']:44} {row['value']:>12,.3f} {row['unit']}", flush=True)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})
    return 0


class WideConfig(EngineConfig):
    """Everybody's prompt fits into one step, so that all come to the same place at once."""

    @property
    def prefill_rows(self) -> int:
        return self.max_num_seqs


def make_scheduler(
    seqs: int, blocks: int, *, drafts: int = 0, rows: int = 16, checkpoints: int = 64, tokens: int = 8192
) -> Scheduler:
    config = WideConfig(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, block_size=BLOCK, num_speculative_tokens=drafts
    )
    return Scheduler(config, Allocator(seqs + checkpoints, blocks, rows, seqs))


def make_request(prompt: list[int], max_tokens: int, *, deadline: float | None = None, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    return Request(
        request_id="",
        prompt_token_ids=prompt,
        params=sampling,
        max_length=len(prompt) + max_tokens,
        stop_token_ids=(),
        seed=0,
        detokenizer=Detokenizer(None, sampling),
        deadline=deadline,
    )


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10_000), k=count)


def commit(scheduler: Scheduler, plan: Plan, tokens: int = 1) -> None:
    """What a device would have emitted: so many tokens a row, as far as its bound goes."""
    for piece in plan.pieces:
        if piece.is_last:
            scheduler.commit(piece.request, [1], piece.request.num_tokens + 1 >= piece.request.max_length)
    for mark in plan.marks:
        scheduler.confirm(mark)
    for request, bound in zip(plan.decoding, plan.bounds, strict=True):
        count = min(tokens, bound, request.max_length - request.num_tokens)
        scheduler.commit(request, [1] * count, request.num_tokens + count >= request.max_length, bound)


def turn(scheduler: Scheduler) -> Plan | None:
    plan = scheduler.plan()
    if plan is not None:
        commit(scheduler, plan)
    # As the engine does, once it has told of them.
    scheduler.ended.clear()
    return plan


def timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def figure(what: str, value: float, unit: str) -> Row:
    return {"what": what, "value": value, "unit": unit}


def fill(scheduler: Scheduler, count: int, prompt: int, max_tokens: int) -> None:
    """So many requests that decode."""
    for index in range(count):
        scheduler.add(make_request(random_tokens(prompt, index), max_tokens))
    turn(scheduler)
    assert len(scheduler.running) == count
    assert all(request.filled for request in scheduler.running)
    # Or the collector would walk all that was built here now and then.
    gc.freeze()


def steady(count: int) -> list[Row]:
    rows = []
    for drafts in (0, 3):
        scheduler = make_scheduler(count, count * 16, drafts=drafts, tokens=count * 64)
        fill(scheduler, count, 20, 200)
        plans, commits = [], []
        for _ in range(20):
            began = time.process_time()
            plan = scheduler.plan()
            planned = time.process_time()
            assert plan is not None
            commit(scheduler, plan, tokens=1 + drafts // 2)
            plans.append(planned - began)
            commits.append(time.process_time() - planned)
        rows.append(figure(f"plan, {drafts} drafts", 1e3 * statistics.median(plans), "ms"))
        rows.append(figure(f"commit, {drafts} drafts", 1e3 * statistics.median(commits), "ms"))
    return rows


def interval(count: int) -> list[Row]:
    scheduler = make_scheduler(count, count * 80, checkpoints=2 * count, tokens=count * 2048)
    fill(scheduler, count, 1000, 200)
    # It waits for blocks, so checkpoints leave slots for it.
    scheduler.add(make_request(random_tokens(8, count), 10))
    scheduler.add(make_request(random_tokens(count * 80 * BLOCK - 100, count + 1), 10))
    worst = 0.0
    for _ in range(60):
        began = time.process_time()
        plan = scheduler.plan()
        worst = max(worst, time.process_time() - began)
        assert plan is not None
        commit(scheduler, plan)
    return [figure("slowest plan of 60 turns", 1e3 * worst, "ms")]


def abort(count: int) -> list[Row]:
    scheduler = make_scheduler(4, 1000)
    requests = [make_request([index % 100, 1, 2], 8) for index in range(count)]
    adding = timed(lambda: [scheduler.add(request) for request in requests])
    some = requests[-1 : -1 - min(count, 2000) : -1]
    aborting = timed(lambda: [scheduler.finish(request, "abort") for request in some])
    return [
        figure("add", 1e6 * adding / count, "us each"),
        figure("abort", 1e6 * aborting / len(some), "us each"),
    ]


def head(tokens: int) -> list[Row]:
    prompt = random_tokens(tokens)
    blocks = tokens // BLOCK + 100
    scheduler = make_scheduler(64, blocks)
    scheduler.add(make_request(prompt, 2))
    while scheduler.has_work:
        turn(scheduler)
    # Somebody goes on from all of it and holds it, and the next one would fit alone, not beside.
    scheduler.add(make_request([*prompt, *random_tokens(100, 1)], 600))
    turn(scheduler)
    scheduler.add(make_request([*prompt, *random_tokens(1500, 2)], 8))
    times = [timed(lambda: turn(scheduler)) for _ in range(40)]
    assert (len(scheduler.running), len(scheduler.waiting)) == (1, 1)
    return [figure("turn", 1e3 * statistics.median(times), "ms")]


def logit_rows(count: int) -> list[Row]:
    scheduler = make_scheduler(32, 32 * 16, rows=2, tokens=1024)
    for index in range(count):
        bias = {1: 1.0} if index % 2 else None
        scheduler.add(make_request(random_tokens(40, index), 20, logit_bias=bias))
    requests, turns, plain = list(scheduler.waiting), 0, 0
    while scheduler.has_work:
        turn(scheduler)
        turns += 1
        if not all(request.finished or request.params.logit_bias for request in requests):
            plain = turns
    return [figure("turns", turns, ""), figure("turns until all without a row have ended", plain, "")]


def tree(blocks: int) -> Scheduler:
    """A cache of so many blocks, in nodes of four."""
    scheduler = make_scheduler(4, blocks)
    pool, cache = scheduler.allocator.blocks, scheduler.cache
    for index in range(blocks // 4):
        cache.insert(cache.root, [(index, place) for place in range(4)], pool.take(4) or [])
    return scheduler


def reset(blocks: int) -> list[Row]:
    scheduler = tree(blocks)
    return [figure("reset", 1e3 * timed(scheduler.cache.reset), "ms")]


def count_blocks(blocks: int) -> list[Row]:
    cache = tree(blocks).cache
    return [figure("count", 1e6 * min(timed(lambda: cache.num_blocks) for _ in range(3)), "us")]


class Letters:
    """Stands for a transformers tokenizer: token i is the i-th letter."""

    eos_token_id = 0

    def __init__(self):
        self.added_tokens_decoder: dict[int, str] = {}

    def __len__(self):
        return 26

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(ord("a") + token % 26) for token in token_ids)


def text(tokens: int) -> list[Row]:
    detokenizer, shown = Detokenizer(Tokenizer(Letters()), SamplingParams()), 0
    began = time.process_time()
    for index in range(tokens):
        detokenizer.append([index % 26])
        shown += len(detokenizer.text_since(shown))
    assert shown == tokens
    return [figure("append and read", time.process_time() - began, "s")]


def deadlines(count: int) -> list[Row]:
    scheduler = make_scheduler(8, 1000)
    for index in range(count):
        scheduler.add(make_request([index % 100, 2], 2, deadline=time.monotonic() + 3600))
    while scheduler.has_work:
        turn(scheduler)
        # As the engine does, when it has told of them.
        scheduler.ended.clear()
    gc.collect()
    return [figure("finished requests kept", sum(isinstance(o, Request) for o in gc.get_objects()), "")]


def engine_turns(count: int) -> list[Row]:
    """The engine's loop over a device that emits a token a row, and costs nothing."""
    from gdnjax.serving.engine import Engine

    rows = []
    tokenizer = Tokenizer.from_directory(config_file("tiny").parent)
    for what, defers in (("streamed", False), ("read at the end", True)):
        config = WideConfig(max_num_seqs=count, max_num_batched_tokens=count * 64, block_size=BLOCK, warmup=False)
        engine = Engine(no_device(config, tokenizer.encode(STORY)), Allocator(count, count * 16, 1, count), tokenizer)
        for index in range(count):
            request = make_request(random_tokens(20, index), 150)
            request.detokenizer = Detokenizer(tokenizer, request.params)
            if defers:
                request.detokenizer.defer()
            engine.add(request)
        for _ in range(4):
            engine.step()
        gc.freeze()
        times = [timed(engine.step) for _ in range(100)]
        assert len(engine.scheduler.running) == count
        rows.append(figure(f"a turn, texts {what}", 1e3 * statistics.median(times), "ms"))
        while engine.has_work:
            times.append(timed(engine.step))
        rows.append(figure(f"a token to the end, texts {what}", 1e6 * sum(times) / count / 145, "us"))
    return rows


def no_device(config: EngineConfig, text: list[int]) -> Any:
    """A runner that packs a turn's decode step, and has every row emit the next token of a text at once."""
    import numpy as np

    from gdnjax.batch import Emitted
    from gdnjax.serving import packing
    from gdnjax.serving.metrics import Metrics
    from gdnjax.serving.runner import InFlight, Runner
    from gdnjax.words import Form

    class NoDevice(Runner):
        # Properties of a runner that has steps.
        needs_state = True  # pyright: ignore[reportAssignmentType]
        num_compilations = 0  # pyright: ignore[reportAssignmentType]

        def __init__(self) -> None:
            self.config, self.metrics, self.compile_seconds = config, Metrics(), 0.0

        def dispatch(self, plan: Plan) -> InFlight:
            prefill = decode = None
            if plan.pieces:
                prefill = self._emitted([piece.request for piece in plan.pieces])
            if plan.decoding:
                with self.metrics.timed("pack"):
                    batch = packing.pack_decode(
                        plan.decoding,
                        plan.growth,
                        plan.bounds,
                        rows=packing.bucket_for(len(plan.decoding), config.decode_buckets),
                        table_width=64,
                        grown_width=1,
                        drafts=False,
                    )
                    Form.of(batch).pack(batch)
                decode = self._emitted(plan.decoding)
            return InFlight(plan, prefill, decode)

        def _emitted(self, requests: list[Request]) -> Emitted:
            count = np.ones(len(requests), np.int32)
            # Requests of this bench end by their lengths. The step in flight is not counted yet.
            done = np.array([request.num_tokens + 2 >= request.max_length for request in requests])
            tokens = np.array([[text[request.num_tokens % len(text)]] for request in requests], np.int32)
            return Emitted.of(
                tokens=tokens, count=count, done=done, drafted=0 * count, logprobs=None, prompt_logprobs=None
            )

        def read(self, turn: InFlight) -> tuple[Emitted | None, Emitted | None]:
            return turn.prefill, turn.decode

    return NoDevice()


class Intervals(Scheduler):
    """Leaves checkpoints of a prompt at every interval, and nowhere else."""

    def _wanted_checkpoints(self, request: Request, match: Match) -> tuple[int, ...]:
        interval = self.config.checkpoint_interval
        return tuple(range((match.position // interval + 1) * interval, request.num_tokens, interval))[::-1]


class Agent:
    """A conversation over a system prompt. Every second turn is followed by a question aside, of which nothing stays.

    thinks   the first half of a reply is left out of what the next turn goes on from, as chat templates do.
    chat     the engine knows where the system prompt and the turn end.
    """

    TURNS = 8
    OPENING, THOUGHT = [7, 7, 8], [7, 7, 9]

    def __init__(self, number: int, system: list[int], *, thinks: bool, chat: bool):
        self._rng, self._system, self._thinks, self._chat = random.Random(number), system, thinks, chat
        self._history, self._turn, self._aside = list(system), 0, False

    def next(self) -> Request | None:
        """What it asks next; None: nothing more."""
        self._aside = self._turn > 0 and not self._aside and self._rng.random() < 0.5
        if self._aside:
            prompt, count = self._history + self._tokens(30, 100), self._rng.randint(20, 60)
        elif self._turn == self.TURNS:
            return None
        else:
            self._turn += 1
            self._history += self._tokens(50, 800)
            prompt, count = self._history, self._rng.randint(100, 400)
        request = make_request([*prompt, *self.OPENING], count)
        if self._chat:
            request.turn_start, request.system_end = len(prompt), len(self._system)
        return request

    def hear(self, request: Request) -> None:
        """Takes the reply of what it asked."""
        if not self._aside:
            reply = request.output_token_ids
            self._history += self.THOUGHT + reply[len(reply) // 2 :] if self._thinks else self.OPENING + reply

    def _tokens(self, least: int, most: int) -> list[int]:
        return self._rng.choices(range(10_000), k=self._rng.randint(least, most))


PLACES = (
    ("today's places", Scheduler, 1024),
    ("today's, no interval", Scheduler, 1 << 20),
    ("every 1,024", Intervals, 1024),
    ("every 256", Intervals, 256),
    ("every 64", Intervals, 64),
)


def agents(slots: int) -> list[Row]:
    config = ModelConfig.from_hf(config_file("qwen3.5-9b"))
    geometry = StateGeometry.of(
        config, tp=1, block_size=BLOCK, dtype="bfloat16", ssm_dtype="float32", kv_cache_dtype="auto"
    )
    rows = []
    for kind, thinks, chat in (("chats", False, True), ("chats that think", True, True), ("plain ids", False, False)):
        for name, scheduler, interval in PLACES:
            cache, most = run_agents(scheduler, slots, interval, thinks=thinks, chat=chat)
            found = cache.counters
            rows += [
                figure(f"{kind}, {name}: hits", 100 * found.hit_tokens / found.queried_tokens, "%"),
                figure(f"{kind}, {name}: states", most * geometry.slot_bytes / 2**30, "GiB"),
            ]
    return rows


def run_agents(of: type[Scheduler], slots: int, interval: int, **kind: bool) -> tuple[PrefixCache, int]:
    """The cache at the end, and the most states that it held."""
    count, live, turns, most = 16, {}, 0, 0
    config = EngineConfig(
        max_num_seqs=count, max_num_batched_tokens=2048, block_size=BLOCK, state_checkpoint_interval=interval
    )
    scheduler = of(config, Allocator(count + slots, 60_000, 1, count))
    systems = [random_tokens(3000, seed) for seed in (1, 2)]
    coming = [Agent(number, systems[number % 2], **kind) for number in range(count)]

    def ask(agent: Agent) -> None:
        request = agent.next()
        if request is not None:
            scheduler.add(request)
            live[request] = agent

    while coming or live:
        if coming and turns % 20 == 0:
            ask(coming.pop())
        turns += 1
        turn(scheduler)
        most = max(most, scheduler.cache.num_states)
        for request in [request for request in live if request.finished]:
            agent = live.pop(request)
            agent.hear(request)
            ask(agent)
    return scheduler.cache, most


class Part:
    """A measurement, and the sizes at which it is taken."""

    def __init__(self, measure: Callable[[int], list[Row]], *sizes: int):
        self.measure, self.sizes = measure, sizes


PARTS = {
    "plan": Part(steady, 64, 256, 1024, 4096),
    "turn": Part(engine_turns, 64, 256),
    "agents": Part(agents, 32, 128, 4096),
    "interval": Part(interval, 256, 1024),
    "abort": Part(abort, 1000, 100_000),
    "head": Part(head, 10_000, 100_000, 250_000),
    "logit rows": Part(logit_rows, 60, 600),
    "reset": Part(reset, 10_000, 1_000_000),
    "count": Part(count_blocks, 10_000, 1_000_000),
    "text": Part(text, 8000, 32_000, 100_000),
    "deadlines": Part(deadlines, 100, 1000),
}


if __name__ == "__main__":
    run_as_process(lambda: exit_status("bench_scheduler.py", main))
