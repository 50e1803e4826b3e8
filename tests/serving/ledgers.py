"""Engines around the ledger model, and what must hold of everything that they produce and keep."""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from gdnjax import LLM, EngineConfig, SamplingParams
from gdnjax.cache import LAYOUT_VK
from gdnjax.config import ATTENTION, DELTA
from gdnjax.serving.tokenizer import Tokenizer
from tests.ledger import KEY_DIM, PATTERN, RING, VALUE_DIM, LedgerModel, Oracle
from tests.pools import pool_of

EOS = 3
STOPS = (5, 7, 11, 13, 17, 19)
MAX_MODEL_LEN = 256

GEOMETRIES = {
    "kv, room for all, small and large buckets": EngineConfig(
        state_layout="kv", max_num_seqs=8, max_num_batched_tokens=256, decode_buckets=(1, 8), block_size=16,
        num_kv_blocks=128, num_checkpoint_slots=16, state_checkpoint_interval=48,
    ),
    "kv, room for all, 2 drafts": EngineConfig(
        state_layout="kv", max_num_seqs=8, max_num_batched_tokens=128, prefill_buckets=(128,), decode_buckets=(8,),
        block_size=16, num_kv_blocks=160, num_checkpoint_slots=16, state_checkpoint_interval=48,
        num_speculative_tokens=2,
    ),
    "vk, one piece of 64 a step, scarce blocks, one logit row": EngineConfig(
        state_layout="vk", max_num_seqs=3, max_num_batched_tokens=64, decode_buckets=(3,), block_size=4,
        num_kv_blocks=65, max_logit_rows=1, num_checkpoint_slots=4, state_checkpoint_interval=32,
    ),
    "vk, scarce blocks, 4 drafts": EngineConfig(
        state_layout="vk", max_num_seqs=3, max_num_batched_tokens=64, decode_buckets=(3,), block_size=4,
        num_kv_blocks=65, max_logit_rows=1, num_checkpoint_slots=4, state_checkpoint_interval=32,
        num_speculative_tokens=4,
    ),
    "mixed, scarce slots and blocks": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(1, 4), block_size=16, num_kv_blocks=20, max_logit_rows=2, num_checkpoint_slots=6,
        state_checkpoint_interval=16,
    ),
    "mixed, scarce slots and blocks, 3 drafts": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(4,), block_size=8, num_kv_blocks=36, max_logit_rows=2, num_checkpoint_slots=6,
        state_checkpoint_interval=16, num_speculative_tokens=3,
    ),
    "mixed, two ranks, 1 draft": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(4,), block_size=16, num_kv_blocks=40, num_checkpoint_slots=5, tensor_parallel_size=2,
        state_checkpoint_interval=32, num_speculative_tokens=1, host_cache_gib=1e-4,
    ),
    "mixed, no slots for checkpoints, 2 drafts": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(4,), block_size=8, num_kv_blocks=38, num_checkpoint_slots=0, state_checkpoint_interval=40,
        num_speculative_tokens=2,
    ),
    "kv, a block is two chunks, 3 drafts": EngineConfig(
        state_layout="kv", max_num_seqs=4, max_num_batched_tokens=64, decode_buckets=(4,), block_size=128,
        num_kv_blocks=4, num_checkpoint_slots=3, num_speculative_tokens=3,
    ),
    "mixed, no cache, 2 drafts": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(4,), block_size=16, num_kv_blocks=19, enable_prefix_caching=False, num_speculative_tokens=2,
    ),
    "mixed, batch_invariant, 1 draft": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, block_size=16, num_kv_blocks=50,
        num_checkpoint_slots=4, batch_invariant=True, state_checkpoint_interval=64, num_speculative_tokens=1,
    ),
    "kv, one request at a time, no cache": EngineConfig(
        state_layout="kv", max_num_seqs=1, max_num_batched_tokens=256, prefill_buckets=(256,), decode_buckets=(1,),
        block_size=16, num_kv_blocks=17, enable_prefix_caching=False,
    ),
    "pages alone, scarce blocks": EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,), decode_buckets=(1, 4), block_size=8,
        num_kv_blocks=36, max_logit_rows=2,
    ),
    "pages alone, scarce blocks, 3 drafts": EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,), decode_buckets=(4,), block_size=8,
        num_kv_blocks=36, max_logit_rows=2, num_speculative_tokens=3, host_cache_gib=1e-4,
    ),
    "states alone, scarce slots": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(1, 4), block_size=16, num_kv_blocks=20, max_logit_rows=2, num_checkpoint_slots=6,
        state_checkpoint_interval=16,
    ),
    "rings and pages, scarce slots and blocks": EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,), decode_buckets=(1, 4), block_size=16,
        num_kv_blocks=20, max_logit_rows=2, num_checkpoint_slots=6, state_checkpoint_interval=16,
    ),
    "rings beside states, mixed, scarce slots and blocks, 3 drafts": EngineConfig(
        state_layout="mixed", max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(4,), block_size=8, num_kv_blocks=36, max_logit_rows=2, num_checkpoint_slots=6,
        state_checkpoint_interval=16, num_speculative_tokens=3,
    ),
    "rings beside states, one request at a time, no cache": EngineConfig(
        state_layout="kv", max_num_seqs=1, max_num_batched_tokens=256, prefill_buckets=(256,), decode_buckets=(1,),
        block_size=16, num_kv_blocks=17, enable_prefix_caching=False,
    ),
    "pages alone, one request at a time, no cache": EngineConfig(
        max_num_seqs=1, max_num_batched_tokens=256, prefill_buckets=(256,), decode_buckets=(1,), block_size=16,
        num_kv_blocks=17, enable_prefix_caching=False,
    ),
}  # fmt: skip
HOST = "mixed, scarce slots and blocks, 3 drafts, a host tier"
"""Room on the host for some 40 blocks, or 60 states: what is dropped there is among what happens."""
(
    KV, KV_DRAFTS, VK, VK_DRAFTS, MIXED, MIXED_DRAFTS, TWO_RANKS, NO_SLOTS, LARGE_BLOCKS, NO_CACHE, INVARIANT, ALONE,
    PAGES, PAGES_DRAFTS, STATES_ALONE, RINGS, RINGS_DRAFTS, RINGS_ALONE, PAGES_ALONE,
) = GEOMETRIES  # fmt: skip

GEOMETRIES[HOST] = dataclasses.replace(GEOMETRIES[MIXED_DRAFTS], host_cache_gib=2e-5)

PATTERNS = {
    PAGES: "AA", PAGES_DRAFTS: "AA", PAGES_ALONE: "AA", STATES_ALONE: "DD", RINGS: "RAR", RINGS_DRAFTS: "DRA",
    RINGS_ALONE: "DRA",
}  # fmt: skip
"""Of models with other kinds of cache than states and pages."""

WITHOUT_DRAFTS = {PAGES_DRAFTS: PAGES_ALONE, RINGS_DRAFTS: RINGS_ALONE}
"""What runs the model of a speculating engine, with its head, without drafts: of the others ALONE."""

# Beside greedy ones, which the oracle knows. All of them are compared with an engine's run of one request.
DRAWN = (
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.8},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.9, "presence_penalty": -0.7, "logit_bias": {2: 3.5, 50: -9.0}},
    {"temperature": 0.0, "min_tokens": 6, "allowed_token_ids": (3, 5, 7, 9, 20, 21, 22, 60)},
)


@functools.cache
def engine_of(name: str) -> LLM:
    """Built once; every run uses the slots and blocks that the runs before it left behind."""
    config = dataclasses.replace(GEOMETRIES[name], warmup=False)
    mtp = config.num_speculative_tokens > 0 or name in (ALONE, *WITHOUT_DRAFTS.values())
    model = LedgerModel(tp=config.tensor_parallel_size, mtp=mtp, pattern=PATTERNS.get(name, PATTERN))
    return LLM.from_model(model, model.params(), config, max_model_len=MAX_MODEL_LEN, eos_token_ids=(EOS,))


def fresh(name: str) -> LLM:
    """The engine, idle, whatever the last test did to it, and its cache empty."""
    llm = engine_of(name)
    scheduler = llm.engine.scheduler
    for request in [*scheduler.running, *scheduler.waiting]:
        llm.engine.abort(request)
    drain(llm, 8)
    llm.reset_prefix_cache()
    return llm


@functools.cache
def oracle(mtp: bool = False, pattern: str = PATTERN) -> Oracle:
    return Oracle(LedgerModel(mtp=mtp, pattern=pattern))


def oracle_of(llm: LLM) -> Oracle:
    return oracle(llm.engine.runner.model.mtp, llm.engine.runner.model.pattern)


@functools.cache
def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, length]).integers(0, LedgerModel().vocab_size, length).tolist())


def queue(llm: LLM, prompt, params: SamplingParams, priority: int = 0) -> list:
    """Queues the samples of a prompt without running anything."""
    return llm.submit(list(prompt), params, priority=priority).requests


def greedy(max_tokens: int, **params) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | params))


def drain(llm: LLM, turns: int = 400) -> None:
    for _ in range(turns):
        if not llm.engine.has_work:
            return
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
    raise AssertionError(f"work is left after {turns} turns")


def harvest_all(llm: LLM) -> None:
    while llm.engine._in_flight:
        llm.engine._harvest(llm.engine._in_flight[0])


def start(llm: LLM, prompt, max_tokens: int, tokens: int = 1, **params):
    """A greedy request that has produced at least so many tokens, with a step in flight."""
    (request,) = queue(llm, prompt, greedy(max_tokens, **params))
    while len(request.output_token_ids) < tokens:
        llm.engine.step()
        llm.engine.scheduler.check_integrity()
    return request


def generate(llm: LLM, prompt, max_tokens: int, **params):
    """One greedy request, alone; held to the oracle. Returns the request."""
    (request,) = queue(llm, prompt, greedy(max_tokens, **params))
    drain(llm)
    check_greedy(llm, request)
    return request


def in_flight_plan(llm: LLM):
    return llm.engine._in_flight[-1].plan


def go_on_from_decode(llm: LLM, seed: int, max_tokens: int = 3):
    """A conversation whose second turn goes on from a state that decode wrote, in its middle or at its end.

    Returns the second request, ended, and the layout bit of what it read.
    """
    rng = np.random.default_rng(seed)
    first = start(llm, prompt_of(seed, int(rng.integers(15, 60))), int(rng.integers(3, 8)))
    drain(llm)
    prompt = [*first.tokens(0, first.num_tokens), *prompt_of(seed + 1, int(rng.integers(1, 12)))]
    (second,) = queue(llm, prompt, greedy(max_tokens))
    read = None
    while read is None:
        llm.engine.step()
        pieces = [piece for turn in llm.engine._in_flight for piece in turn.plan.pieces if piece.request is second]
        read = pieces[0].read_slot if pieces else None
    layout = int(pool_of(llm.engine.runner.state, "layout")[read])
    drain(llm)
    assert second.num_cached_tokens == first.num_tokens - 1
    return second, layout


def greedy_run_with_stop(
    model: Oracle, tokenizer: Tokenizer, num_drafts: int = 0
) -> tuple[tuple[int, ...], list[int], str, int]:
    """A prompt, its greedy output, a text that one of its tokens is the first to contain, and the place of that token.

    With `num_drafts` a step emits that token and others behind it.
    """
    for prompt in (prompt_of(seed, 65) for seed in range(20)):
        tokens = model.solo_run(prompt, 40)
        counts = [1, *(count for _, count in model.pattern(prompt, 40, num_drafts))] if num_drafts else [1] * 40
        last = set(itertools.accumulate(counts, initial=-1)) if num_drafts else set()
        for end in range(4, len(tokens) - 4):
            text = tokenizer.decode([tokens[end]], True)
            before = tokenizer.decode(tokens[:end], True)
            if end not in last and len(text) > 1 and text.isascii() and text not in before + text[:-1]:
                return prompt, tokens, text, end
    raise AssertionError("no token of these runs can serve as a stop string")


def check_greedy(llm: LLM, request) -> None:
    """Against the oracle, to the end that the request came to."""
    longest = request.max_length - request.prompt_length
    expected = oracle_of(llm).solo_run(request.prompt_token_ids, longest, request.stop_token_ids)
    assert request.finished
    if request.finish_reason == "abort":
        expected = expected[: len(request.output_token_ids)]
    assert request.output_token_ids == expected


def check_nothing_is_held(llm: LLM) -> None:
    """Without the cache's part every pool is full again."""
    assert not llm.engine.has_work
    llm.reset_prefix_cache()
    scheduler = llm.engine.scheduler
    scheduler.check_integrity()
    allocator = scheduler.allocator
    for pool in (allocator.slots, allocator.blocks, allocator.logit_rows, allocator.count_rows):
        assert pool.num_free == pool.size


def check_cache(llm: LLM) -> int:
    """Every block and every state that the cache owns is, to the bit, what the oracle says of the tokens before it.

    Of an idle engine, in which nothing is on its way from the host. Keys of the head are among it, but for index 0,
    where it has none. Returns the states looked at.
    """
    engine = llm.engine
    if engine.scheduler._seals:
        # They wait for the next turn.
        generate(llm, prompt_of(99, 1), 1)
    assert not engine.scheduler._seals
    cache, hidden = jax.device_get((engine.runner.state.cache, engine.runner.state.slots.hidden))
    entries, gdn, rings = cache.pages.get(ATTENTION), cache.slots.get(DELTA), cache.slots.get(RING)
    wanted = oracle_of(llm)
    pools, looked_at = np.stack([entries["k"], entries["v"]]) if entries else None, 0
    nodes = [(child, ()) for child in _below(engine.scheduler.cache.root)]
    while nodes:
        node, before = nodes.pop()
        tokens = (*before, *itertools.chain.from_iterable(node.keys))
        if pools is not None:
            found = pools[:, :, node.blocks].reshape(*pools.shape[:2], -1, *pools.shape[4:])
            found, expected = found[:, :, : node.end - len(before)], wanted.entries(tokens, len(before))
            if engine.runner.model.mtp and not before:
                expected[:, -1, 0] = found[:, -1, 0]
            np.testing.assert_array_equal(found, expected, err_msg=f"blocks of tokens {len(before)} to {node.end}")
        if node.slot:
            looked_at += 1
            expected = wanted.row(tokens)
            where = f"checkpoint behind {node.end} tokens"
            if gdn is not None:
                ssm, width = gdn["ssm"][:, node.slot], expected["conv"].shape[1]
                if gdn["layout"][node.slot] == LAYOUT_VK:
                    ssm = ssm.reshape(*ssm.shape[:2], VALUE_DIM, KEY_DIM).swapaxes(2, 3).reshape(ssm.shape)
                np.testing.assert_array_equal(ssm, expected["ssm"], err_msg=where)
                np.testing.assert_array_equal(gdn["conv"][:, node.slot, :width], expected["conv"], err_msg=where)
            if rings is not None:
                count = expected["seen"].shape[1]
                row = np.arange(node.end - count, node.end) % rings["seen"].shape[2]
                np.testing.assert_array_equal(rings["seen"][:, node.slot, row], expected["seen"], err_msg=where)
            np.testing.assert_array_equal(hidden[node.slot], expected["hidden"], err_msg=where)
        nodes += [(child, tokens) for child in _below(node)]
    return looked_at


def _below(node) -> list:
    return [*node.children.values(), *node.tails.values()]


@dataclasses.dataclass
class Step:
    """A row of a harvested decode step: drafts put to the test, and tokens emitted."""

    drafts: int
    count: int


class Watch:
    """Sees every decode step of an engine as it is harvested, and holds those of greedy requests to the oracle.

    Drafts are a function of the tokens before them, whoever shares the batch, whatever was preempted, and however many
    drafts the steps before had; so how many are kept is known. Use as a context manager. `wrong` counts the steps that
    are not as they should be; if `strict`, the first of them raises AssertionError.
    """

    def __init__(self, llm: LLM, *, strict: bool = True):
        self.llm, self.strict = llm, strict
        self.wrong = 0
        self.steps: dict = {}
        """The steps of each request, those among them whose tokens are dropped."""
        self.seen: list = []
        """(request, step, drafts that were right) of the last turn that was read."""
        self.num_inside = 0
        """Checkpoints that were written with some of the pending rows folded in, and some not."""
        # Of turns in flight, and of requests as the last step that was read left them: (drafts made, their places).
        self._dispatched: dict = {}
        self._made: dict = {}

    def __enter__(self) -> "Watch":
        engine = self.llm.engine
        self._dispatch, self._read = engine.runner.dispatch, engine.runner.read
        engine.runner.dispatch, engine.runner.read = self.dispatch, self.read
        return self

    def __exit__(self, *_) -> None:
        del self.llm.engine.runner.dispatch, self.llm.engine.runner.read

    def dispatch(self, plan):
        size, most = self.llm.config.block_size, self.llm.config.num_speculative_tokens
        turn = self._dispatch(plan)
        made = {piece.request: (most, piece.request.num_placed * size) for piece in plan.pieces if piece.is_last}
        made |= {request: (plan.num_drafts, request.num_placed * size) for request in plan.decoding}
        self._dispatched[id(plan)] = made
        return turn

    def read(self, turn):
        prefill, decode = self._read(turn)
        self.seen = []
        for mark in turn.plan.marks:
            if (mark.position, mark.slot) in mark.request.marks:
                self.num_inside += mark.request.num_folded < mark.position < mark.request.num_settled
        if decode is not None:
            for row, request in enumerate(turn.plan.decoding):
                if decode.count[row]:
                    step = Step(int(decode.drafted[row]), int(decode.count[row]))
                    self.steps.setdefault(request, []).append(step)
                    if not request.finished:
                        right = self._is_right(turn.plan.bounds[row] - 1, request, step, bool(decode.done[row]))
                        assert right or not self.strict, f"{step} of {request.request_id}"
                        self.wrong += not right
        self._made |= self._dispatched.pop(id(turn.plan))
        return prefill, decode

    def _is_right(self, most: int, request, step: Step, done: bool) -> bool:
        known, (made, places) = request.num_tokens, self._made[request]
        allowed = min(most, made, request.max_length - 1 - known)
        if request.params.temperature or request.params.needs_logit_row or request.params.needs_counts:
            # What comes behind a stop token is not put to the test.
            return step.drafts == allowed or (done and step.drafts == step.count - 1)
        # Drafts for which there was no place saw what is not theirs; they may be anything.
        sound = min(allowed, places - known + 1)
        right = oracle_of(self.llm).num_accepted(request.tokens(0, known), sound) if sound > 0 else 0
        self.seen.append((request, step, right))
        if done and step.count <= right:
            return step.drafts == step.count - 1
        if right < sound or sound == allowed:
            return (step.drafts, step.count) == (allowed, 1 + right)
        return step.count > right

    def went_on(self, requests: dict) -> None:
        """Other requests in the places of some, with nothing in flight."""
        assert not self._dispatched
        for known in (self.steps, self._made):
            for before in [request for request in known if request in requests]:
                known[requests[before]] = known.pop(before)

    def check_counts(self, request) -> None:
        """What a request is told of its drafts."""
        steps = self.steps.get(request, [])
        assert request.num_decode_steps == len(steps)
        assert request.num_draft_tokens == sum(step.drafts for step in steps)
        assert request.num_accepted_tokens == sum(step.count - 1 for step in steps)
