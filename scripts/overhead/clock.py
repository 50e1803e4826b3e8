"""An LLM whose device is a clock: all else is real."""

import argparse
import threading
import time
import weakref
from typing import Any

TEXT = """In the morning there were 12 apples in the box. Anna took 3 of them, and Ben, who had come late, took 4 more.
How many apples were left? We count: 12 - 3 = 9, then 9 - 4 = 5. So 5 apples were left in the box. "Five," said Anna.
"""
"""What is generated, again and again."""

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
