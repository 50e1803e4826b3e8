"""A device of plain Python, and the engine's loop over it: the scheduler and the prefix cache without jax.

Instead of numbers the pools hold what the numbers stand for: a slot the tokens folded into its state, a place of a
block the tokens up to its own. So every read checks that what stands there is right, and the next token is a hash of
the tokens before it. Sequences are named by a running hash, `chain`.
"""

import collections
import dataclasses
import itertools

from gdnjax.config import EngineConfig
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.plan import Plan, max_chunks
from gdnjax.serving.prefix_cache import Node
from gdnjax.serving.request import Request, Status
from gdnjax.serving.scheduler import Scheduler
from gdnjax.serving.tokenizer import Tokenizer

MAX_MODEL_LEN = 400
EOS = 9
START = 1
"""The chain of no tokens."""


class Letters:
    """Stands for a transformers tokenizer: token i is the i-th letter."""

    eos_token_id = EOS

    def __init__(self):
        self.added_tokens_decoder = {}

    def __len__(self):
        return 26

    def decode(self, token_ids, **_):
        return "".join(chr(ord("a") + token % 26) for token in token_ids)


LETTERS = Tokenizer(Letters())


def make_scheduler(*, seqs=3, tokens=128, blocks=40, rows=1, checkpoints=4, block_size=16, **config) -> Scheduler:
    """A scheduler over pools of these sizes, with the prefix cache on."""
    config = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, block_size=block_size, **config)
    return Scheduler(config, Allocator(seqs + checkpoints, blocks, rows))


def make_request(prompt, *, name="r", priority=0, deadline=None, turn_start=0, **params) -> Request:
    """A request for token ids, or for that many tokens that no other length begins with."""
    if isinstance(prompt, int):
        prompt = [(prompt * 31 + i * i) % 26 for i in range(prompt)]
    params = SamplingParams(**({"max_tokens": 8} | params))
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        params=params,
        max_length=min(len(prompt) + params.max_tokens, MAX_MODEL_LEN),
        stop_token_ids=(*(() if params.ignore_eos else (EOS,)), *params.stop_token_ids),
        seed=0,
        detokenizer=Detokenizer(LETTERS, params),
        priority=priority,
        deadline=deadline,
        turn_start=turn_start,
    )


def chains(tokens) -> list[int]:
    """The chain before the first token, and after each."""
    return list(itertools.accumulate(tokens, lambda chain, token: hash((chain, token)), initial=START))


def next_token(chain: int) -> int:
    return chain // 7 % (EOS + 1)


def solo_run(request: Request) -> list[int]:
    """What a request must produce, stop strings and all."""
    detokenizer = Detokenizer(LETTERS, request.params)
    tokens, chain = [], chains(request.prompt_token_ids)[-1]
    while request.prompt_length + len(tokens) < request.max_length:
        tokens.append(next_token(chain))
        chain = hash((chain, tokens[-1]))
        if tokens[-1] in request.stop_token_ids:
            break
        detokenizer.append(tokens[-1:])
        if detokenizer.stop_reason is not None:
            break
    return tokens


@dataclasses.dataclass
class Row:
    """What the device knows of a slot's request."""

    table: list[int]
    length: int
    max_length: int
    stops: tuple[int, ...]
    last_token: int = 0
    done: bool = False


class Paper:
    """Executes plans at once, in the order of the steps, and checks everything that a step reads."""

    def __init__(self, block_size: int, prefill_rows: int, max_tokens: int):
        self.block_size, self.prefill_rows, self.max_tokens = block_size, prefill_rows, max_tokens
        self.states: dict[int, tuple[int, int]] = {}  # slot: (tokens folded, their chain)
        self.keys: dict[int, dict[int, int]] = collections.defaultdict(dict)  # block: offset: chain up to there
        self.rows: dict[int, Row] = {}

    def execute(self, plan: Plan) -> tuple[list, list]:
        """(tokens, done) of every piece and of every decoding row."""
        self._admit(plan)
        prefill = self._prefill(plan) if plan.pieces else []
        decode = [self._decode(row, request, plan) for row, request in enumerate(plan.decoding)]
        for copy in plan.copies:
            self.states[copy.target] = self.states[copy.source]
        return prefill, decode

    def _admit(self, plan: Plan) -> None:
        copied = {admission.copy_to: dict(self.keys[admission.copy_from]) for admission in plan.admitted}
        for admission in plan.admitted:
            request = admission.request
            self.rows[request.slot] = Row(
                list(request.blocks), admission.position, request.max_length, request.stop_token_ids
            )
            # Its layout bit is reset, so nobody can read any more what stood there.
            self.states.pop(request.slot, None)
        self.keys |= {block: keys for block, keys in copied.items() if block}

    def _prefill(self, plan: Plan) -> list:
        assert len(plan.pieces) <= self.prefill_rows
        assert sum(piece.length for piece in plan.pieces) <= self.max_tokens
        assert sum(len(piece.chunks()) for piece in plan.pieces) <= max_chunks(self.max_tokens, self.prefill_rows)
        slots = [slot for piece in plan.pieces for slot in (piece.request.slot, *dict(piece.checkpoints).values())]
        assert len(set(slots)) == len(slots), "two writers of a slot in one step"
        known, emitted = [], []
        for piece in plan.pieces:
            request, row = piece.request, self.rows[piece.request.slot]
            chain = chains(request.tokens(0, piece.end))
            assert row.length == piece.start, "pieces tile what is to be prefilled"
            assert not row.length or self.states[piece.read_slot] == (row.length, chain[row.length])
            row.table = list(request.blocks)
            for position in range(max(piece.start, request.num_cached), piece.end):
                self._store(row, position, chain[position + 1])
            known.append(chain)
        for piece, chain in zip(plan.pieces, known, strict=True):
            row = self.rows[piece.request.slot]
            self._check_keys(row, chain)
            self.states[piece.request.slot] = (piece.end, chain[-1])
            for position, slot in piece.checkpoints:
                self.states[slot] = (position, chain[position])
            row.length = piece.end
            emitted.append(self._draw(row, chain[-1]) if piece.is_last else ([], False))
        return emitted

    def _decode(self, index: int, request: Request, plan: Plan) -> tuple[list[int], bool]:
        row = self.rows[request.slot]
        if index in plan.growth:
            growth = plan.growth[index]
            assert len(row.table) == growth.index
            row.table.append(growth.block)
        if row.done:
            return [], False
        length, chain = self.states[request.slot]
        assert length == row.length
        chain = hash((chain, row.last_token))
        self._store(row, length, chain)
        self.states[request.slot] = (length + 1, chain)
        row.length += 1
        return self._draw(row, chain)

    def _draw(self, row: Row, chain: int) -> tuple[list[int], bool]:
        row.last_token = next_token(chain)
        row.done = row.last_token in row.stops or row.length + 1 >= row.max_length
        return [row.last_token], row.done

    def _store(self, row: Row, position: int, chain: int) -> None:
        self.keys[row.table[position // self.block_size]][position % self.block_size] = chain

    def _check_keys(self, row: Row, chain: list[int]) -> None:
        """Keys and values up to a chain's end are those of its tokens."""
        size = self.block_size
        for position in range(len(chain) - 1):
            found = self.keys[row.table[position // size]].get(position % size)
            assert found == chain[position + 1], f"position {position} is not its own"

    def check_request(self, request: Request) -> None:
        """What a running request has computed stands in its slot and blocks."""
        row = self.rows[request.slot]
        length, chain = self.states[request.slot]
        if row.length:
            assert row.length == length
            known = chains([*request.tokens(0, request.num_tokens)])
            if length < len(known):
                assert chain == known[length]
            self._check_keys(row, known[: length + 1])

    def check_cache(self, root: Node) -> None:
        """The cache holds nothing but the truth: every block and every state is that of the tokens before it."""

        def visit(node: Node, chain: int) -> None:
            for key, block in zip(node.keys, node.blocks, strict=True):
                for offset, token in enumerate(key):
                    chain = hash((chain, token))
                    assert self.keys[block].get(offset) == chain
            if node.slot:
                assert self.states[node.slot] == (node.end, chain)
            for child in [*node.children.values(), *node.tails.values()]:
                visit(child, chain)

        visit(root, START)


class Loop:
    """The engine's loop: plans are executed at dispatch, and harvested when the test says so."""

    def __init__(self, scheduler: Scheduler):
        config = scheduler.config
        self.scheduler = scheduler
        self.device = Paper(config.block_size, config.prefill_rows, config.max_num_batched_tokens)
        self.in_flight: collections.deque = collections.deque()
        self.now = 0.0

    def dispatch(self) -> Plan | None:
        self.now += 1
        plan = self.scheduler.plan(in_flight=bool(self.in_flight), now=self.now)
        if plan is not None:
            self.in_flight.append((plan, *self.device.execute(plan)))
        return plan

    def fail(self) -> None:
        """A plan whose dispatch raises: what was in flight is never read."""
        self.now += 1
        self.scheduler.plan(in_flight=bool(self.in_flight), now=self.now)
        self.in_flight.clear()
        self.scheduler.reset()

    def harvest(self) -> None:
        plan, prefill, decode = self.in_flight.popleft()
        for piece, (tokens, done) in zip(plan.pieces, prefill, strict=True):
            self.scheduler.commit(piece.request, tokens, done)
        count = {request: len(tokens) for request, (tokens, _) in zip(plan.decoding, decode, strict=True)}
        for copy in plan.copies:
            self.scheduler.confirm(copy, bool(count[copy.request]))
        for request, (tokens, done) in zip(plan.decoding, decode, strict=True):
            self.scheduler.commit(request, tokens, done)

    def harvest_all(self) -> None:
        while self.in_flight:
            self.harvest()

    def turn(self) -> Plan | None:
        """One turn as the engine takes it: dispatch, then read the turn before."""
        plan = self.dispatch()
        if self.in_flight and (plan is None or len(self.in_flight) > 1):
            self.harvest()
        return plan

    def drain(self, turns: int = 1000) -> None:
        for _ in range(turns):
            if not self.scheduler.has_work and not self.in_flight:
                return
            self.turn()
            self.check()
        raise AssertionError(f"work is left after {turns} turns")

    def run(self, *requests: Request) -> None:
        """Queues requests and runs until nothing is left to do."""
        for request in requests:
            self.scheduler.add(request)
        self.drain()

    def check(self) -> None:
        """Nothing is lost or held twice, and whatever is held is right."""
        self.scheduler.check_integrity()
        for request in self.scheduler.running:
            self.device.check_request(request)
        self.device.check_cache(self.scheduler.cache.root)


def check_output(request: Request) -> None:
    """What a request produced is what it produces alone, or the beginning of it if it was aborted."""
    expected = solo_run(request)
    assert request.status is Status.FINISHED
    if request.finish_reason == "abort":
        assert request.output_token_ids == expected[: len(request.output_token_ids)]
        return
    assert request.output_token_ids == expected
    if request.finish_reason == "length":
        assert request.prompt_length + len(expected) == request.max_length


def check_nothing_is_held(scheduler: Scheduler) -> None:
    """Without the cache's part every pool is full again."""
    scheduler.cache.reset()
    scheduler.check_integrity()
    allocator = scheduler.allocator
    for pool in (allocator.slots, allocator.blocks, allocator.logit_rows):
        assert pool.num_free == pool.size
