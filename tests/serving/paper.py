"""A device of plain Python, and the engine's loop over it: the scheduler and the prefix cache without jax.

Instead of numbers the pools hold what the numbers stand for: a slot the tokens folded into its state, a place of a
block the tokens up to its own. So every read checks that what stands there is right, and the next token is a hash of
the tokens before it. Sequences are named by a running hash, `chain`. How many drafts are kept is a hash, too, and what
the others leave behind is junk.
"""

import collections
import dataclasses
import functools
import itertools

from gdnjax.config import EngineConfig
from gdnjax.memory import HostSizes
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.host_tier import HostTier
from gdnjax.serving.plan import Moves, Plan, Seal, max_chunks, max_growth
from gdnjax.serving.radix_tree import Node
from gdnjax.serving.request import Request, Status
from gdnjax.serving.scheduler import Scheduler
from gdnjax.serving.structured import Matcher
from gdnjax.serving.tokenizer import Tokenizer

MAX_MODEL_LEN = 400
EOS = 9
START = 1
"""The chain of no tokens."""

JUNK = -1
"""The chain of nothing: no hash is that."""


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


def make_scheduler(
    *, seqs=3, tokens=128, blocks=40, rows=1, checkpoints=4, block_size=16, needs_state=True, host=0, **config
) -> Scheduler:
    """A scheduler over pools of these sizes, with the prefix cache on, and a host tier for so many blocks, of which a
    state takes three.
    """
    config = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, block_size=block_size, **config)
    slots = seqs + (checkpoints if needs_state else 0)
    sizes = HostSizes(capacity_bytes=host, block_bytes=1, state_bytes=3 * needs_state, staging_bytes=0)
    return Scheduler(config, Allocator(slots, blocks, rows, seqs), needs_state, HostTier(sizes) if host else None)


class AnyText(Matcher):
    """Stands for a structure, which everything satisfies so far. It has followed what it was told last."""

    is_complete, may_end, error = False, False, None

    def __init__(self):
        self.followed = []

    def follow(self, output_token_ids):
        self.followed = list(output_token_ids)


def make_request(
    prompt,
    *,
    name="r",
    priority=0,
    deadline=None,
    turn_start=0,
    system_end=0,
    longest=MAX_MODEL_LEN,
    structured=False,
    **params,
) -> Request:
    """A request for token ids, or for that many tokens that no other length begins with; `structured`: with a structure
    of its output.
    """
    if isinstance(prompt, int):
        prompt = [(prompt * 31 + i * i) % 26 for i in range(prompt)]
    params = SamplingParams(**({"max_tokens": 8} | params))
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        params=params,
        max_length=min(len(prompt) + params.max_tokens, longest),
        stop_token_ids=(*(() if params.ignore_eos else (EOS,)), *params.stop_token_ids),
        seed=0,
        detokenizer=Detokenizer(LETTERS, params),
        priority=priority,
        deadline=deadline,
        turn_start=turn_start,
        system_end=system_end,
        matcher=AnyText() if structured else None,
    )


def distinct(which: int, count: int) -> list[int]:
    """So many tokens that begin like those of no other number below 26."""
    return [which, *(next_token(hash((which, i))) for i in range(count - 1))]


def chains(tokens) -> list[int]:
    """The chain before the first token, and after each."""
    return list(itertools.accumulate(tokens, lambda chain, token: hash((chain, token)), initial=START))


@functools.lru_cache(maxsize=1 << 14)
def key_chains(chain: int, key: tuple[int, ...]) -> list[int]:
    """The chains after each token of a block behind `chain`."""
    return list(itertools.accumulate(key, lambda chain, token: hash((chain, token)), initial=chain))[1:]


def next_token(chain: int) -> int:
    return chain // 7 % (EOS + 1)


def num_kept(chain: int, drafts: int) -> int:
    """How many of so many drafts are kept behind a chain: each with 3 of 4 chances, if those before it are."""
    return next((count for count in range(drafts) if hash((chain, count)) // 7 % 4 == 0), drafts)


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


@dataclasses.dataclass(frozen=True)
class State:
    """A slot's recurrent state: `length` tokens folded, their chain, and the chains of the tokens pending behind."""

    length: int
    chain: int
    pending: tuple[int, ...] = ()

    @property
    def num_fed(self) -> int:
        return self.length + len(self.pending)

    def folded(self, count: int) -> "State":
        """With its first `count` pending tokens folded, and the others gone."""
        return State(self.length + count, self.pending[count - 1] if count else self.chain)


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
    """Executes plans at once, in the order of the steps, and checks everything that a step reads.

    `keys` are of the target's layers, `head_keys` of the head that drafts: for each block the chains up to its places.
    The head makes a token's key when the token is drawn, the target when it is fed. A model that needs no state has
    none to be read: what stands behind a request's tokens is in its blocks.
    """

    def __init__(self, config: EngineConfig, needs_state: bool = True):
        self.config, self.block_size, self.needs_state = config, config.block_size, needs_state
        self.num_drafts = config.num_speculative_tokens
        self.states: dict[int, State] = {}
        self.keys: dict[int, list[int]] = collections.defaultdict(lambda: [JUNK] * self.block_size)
        self.head_keys: dict[int, list[int]] = collections.defaultdict(lambda: [JUNK] * self.block_size)
        self.rows: dict[int, Row] = {}
        # Bundles, each a list of states, or of (keys, head keys).
        self.host: dict[int, list] = {}
        self.seen: collections.Counter[str] = collections.Counter()

    def execute(self, plan: Plan) -> tuple[list, list]:
        """(tokens, done) of every piece and of every decoding row."""
        assert self.needs_state or not (plan.seals or plan.marks), "there is no state to seal"
        if plan.moves is not None:
            self.move(plan.moves)
        self._seal(plan.seals)
        self._admit(plan)
        self._check_masks(plan)
        prefill = self._prefill(plan) if plan.pieces else []
        assert len(plan.bounds) == len(plan.decoding)
        decode = [self._decode(row, request, plan) for row, request in enumerate(plan.decoding)]
        return prefill, decode

    def move(self, moves: Moves) -> None:
        """Bundles are dropped, states sealed, rows spilled, bundles restored."""
        for bundle in moves.dropped:
            del self.host[bundle]
        self._seal(moves.seals)
        for spill in moves.spills:
            assert spill.bundle not in self.host
            if spill.is_state:
                (slot,) = spill.rows
                assert not self.states[slot].pending, "what leaves is sealed"
                self.host[spill.bundle] = [self.states[slot]]
            else:
                self.host[spill.bundle] = [(list(self.keys[b]), list(self.head_keys[b])) for b in spill.rows]
            self.seen["spilled"] += len(spill.rows)
        for restore in moves.restores:
            for row, kept in zip(restore.rows, self.host[restore.bundle], strict=True):
                if row and restore.is_state:
                    self.states[row] = kept
                elif row:
                    self.keys[row], self.head_keys[row] = map(list, kept)
                self.seen["restored"] += bool(row)

    def _seal(self, seals) -> None:
        for seal in seals:
            state, in_place = self.states[seal.read_slot], seal.read_slot == seal.write_slot
            written = seal_state(self.states, seal)
            assert written or not in_place, "no request ends with a state that cannot be sealed"
            self.seen["sealed at the end"] += in_place and bool(state.pending)
            self.seen["cut by a seal"] += in_place and seal.position < state.num_fed
            self.seen["marked within a run"] += not in_place and state.length < seal.position < state.num_fed

    def _check_masks(self, plan: Plan) -> None:
        """Whoever has a structure and draws a token has a mask, which is that of all tokens that the device has drawn,
        and of none behind them.
        """
        drawing = [*(piece.request for piece in plan.pieces if piece.is_last), *plan.decoding]
        structured = [request for request in drawing if request.matcher is not None]
        assert list(plan.masked) == structured
        assert plan.mask_rows == {request: row for row, request in enumerate(structured, start=1)}
        assert all(request.matcher.followed == request.output_token_ids for request in structured)
        for request, bound in zip(plan.decoding, plan.bounds, strict=True):
            if request.matcher is not None:
                row = self.rows[request.slot]
                assert (bound, row.length + 1) == (1, request.num_tokens)
                assert row.last_token == request.output_token_ids[-1]
        self.seen["masked"] += len(structured)
        self.seen["masked in company"] += bool(structured) and len(structured) < len(drawing)

    def _admit(self, plan: Plan) -> None:
        for pool in (self.keys, self.head_keys):
            copied = {admission.copy_to: list(pool[admission.copy_from]) for admission in plan.admitted}
            pool |= {block: keys for block, keys in copied.items() if block}
        for admission in plan.admitted:
            request = admission.request
            self.rows[request.slot] = Row(
                list(request.blocks), admission.position, request.max_length, request.stop_token_ids
            )
            # Its layout bit is reset, so nobody can read any more what stood there.
            self.states.pop(request.slot, None)

    def _prefill(self, plan: Plan) -> list:
        max_tokens, max_rows = self.config.max_num_batched_tokens, self.config.prefill_rows
        assert len(plan.pieces) <= max_rows
        assert sum(piece.length for piece in plan.pieces) <= max_tokens
        assert sum(len(piece.chunks()) for piece in plan.pieces) <= max_chunks(max_tokens, max_rows)
        slots = [slot for piece in plan.pieces for slot in (piece.request.slot, *dict(piece.checkpoints).values())]
        assert len(set(slots)) == len(slots), "two writers of a slot in one step"
        known, emitted = [], []
        for piece in plan.pieces:
            request, row = piece.request, self.rows[piece.request.slot]
            chain = chains(request.tokens(0, piece.end))
            assert row.length == piece.start, "pieces tile what is to be prefilled"
            if self.needs_state:
                assert not row.length or self.states[piece.read_slot] == State(row.length, chain[row.length])
            else:
                assert piece.read_slot == request.slot, "there is no state to fork"
                assert not piece.checkpoints, "there is no state to keep"
            row.table = list(request.blocks)
            for position in range(max(piece.start, request.num_cached), piece.end):
                self._store(self.keys, row, position, chain[position + 1])
                self._store(self.head_keys, row, position, chain[position + 1])
            known.append(chain)
        for piece, chain in zip(plan.pieces, known, strict=True):
            row = self.rows[piece.request.slot]
            self._check_keys(row, chain)
            self.states[piece.request.slot] = State(piece.end, chain[-1])
            for position, slot in piece.checkpoints:
                self.states[slot] = State(position, chain[position])
            row.length = piece.end
            emitted.append(self._emit(row, chain[-1:], self.num_drafts) if piece.is_last else ([], False))
        return emitted

    def _decode(self, index: int, request: Request, plan: Plan) -> tuple[list[int], bool]:
        row, bound = self.rows[request.slot], plan.bounds[index]
        for growth in plan.growth.get(index, []):
            assert len(row.table) == growth.index
            row.table.append(growth.block)
        assert len(plan.growth.get(index, [])) <= max_growth(self.num_drafts, self.block_size)
        assert 1 <= bound <= 1 + (plan.num_drafts if request.params.speculate else 0)
        if row.done:
            return [], False
        state, first = self.states[request.slot], row.length
        assert state.num_fed == first
        state = state.folded(len(state.pending))
        drafts = max(0, min(bound - 1, row.max_length - 2 - first))
        fed = self._verify(row, hash((state.chain, row.last_token)), drafts)
        for j in range(1 + drafts):
            self._store(self.keys, row, first + j, fed[j] if j < len(fed) else JUNK)
        row.length += len(fed)
        self.states[request.slot] = dataclasses.replace(state, pending=tuple(fed))
        if not (self.num_drafts and self.needs_state):
            self.states[request.slot] = self.states[request.slot].folded(len(fed))
        self.seen["kept"] += len(fed) - 1
        self.seen["refused"] += 1 + drafts - len(fed)
        self.seen["grown by several"] += len(plan.growth.get(index, [])) > 1
        self.seen["short of blocks"] += bool(
            plan.num_drafts and request.params.speculate and not request.matcher and bound <= plan.num_drafts
        )
        return self._emit(row, fed, plan.num_drafts)

    def _verify(self, row: Row, chain: int, drafts: int) -> list[int]:
        """The chains of the tokens that a decode step has fed for good, `chain` the first of them."""
        fed = [chain]
        for _ in range(num_kept(chain, drafts)):
            if next_token(fed[-1]) in row.stops:
                break
            fed.append(hash((fed[-1], next_token(fed[-1]))))
        return fed

    def _emit(self, row: Row, fed: list[int], num_drafts: int) -> tuple[list[int], bool]:
        """(tokens, done) of a row: a token behind each chain, the last of them that of everything fed. The head makes
        their keys, and then those of drafts for the next step.
        """
        tokens = [next_token(chain) for chain in fed]
        row.last_token = tokens[-1]
        row.done = row.last_token in row.stops or row.length + 1 >= row.max_length
        if self.num_drafts:
            places = len(row.table) * self.block_size
            assert row.done or row.length < places, "the key of the token that is fed next has a place"
            made = [hash(pair) for pair in zip(fed, tokens, strict=True)] + [JUNK] * max(0, num_drafts - 1)
            # What is past the table goes nowhere.
            for position, chain in zip(range(row.length - len(fed) + 1, places), made, strict=False):
                self._store(self.head_keys, row, position, chain)
        return tokens, row.done

    def _store(self, pool: dict[int, list[int]], row: Row, position: int, chain: int) -> None:
        pool[row.table[position // self.block_size]][position % self.block_size] = chain

    def _check_keys(self, row: Row, chain: list[int], num_drawn: int = 0) -> None:
        """Keys and values up to a chain's end are those of its tokens; of the last `num_drawn` the head's alone."""
        size = self.block_size
        for index in range(-(-(len(chain) - 1) // size)):
            expected = chain[1 + index * size : 1 + (index + 1) * size]
            fed = expected[: len(chain) - 1 - num_drawn - index * size]
            assert self.keys[row.table[index]][: len(fed)] == fed, f"block {index} is not its own"
            if self.num_drafts:
                found = self.head_keys[row.table[index]][: len(expected)]
                assert found == expected, f"block {index} of the head is not its own"

    def check_request(self, request: Request) -> None:
        """What a running request has computed stands in its slot and blocks."""
        row = self.rows[request.slot]
        if not row.length:
            return
        state, known = self.states[request.slot], chains(request.tokens(0, request.num_tokens))
        assert row.length == state.num_fed
        for length, chain in enumerate((state.chain, *state.pending), start=state.length):
            assert length >= len(known) or chain == known[length]
        drawn = self.num_drafts > 0 and request.filled and not row.done and row.length + 1 < len(known)
        self._check_keys(row, known[: row.length + 1 + drawn], drawn)

    def check_cache(self, root: Node, queued: list[Seal]) -> None:
        """The cache holds nothing but the truth: every block and every state is that of the tokens before it, once the
        `queued` seals are executed, which comes before anything can read them. Nothing is on its way from the host.
        """
        states = dict(self.states)
        for seal in queued:
            assert seal_state(states, seal)

        def visit(node: Node, chain: int) -> None:
            for key, block in zip(node.keys, node.blocks, strict=True):
                expected = key_chains(chain, key)
                assert self.keys[block][: len(key)] == expected
                assert not self.num_drafts or self.head_keys[block][: len(key)] == expected
                chain = expected[-1]
            if node.slot:
                assert states[node.slot] == State(node.end, chain)
            for child in [*node.children.values(), *node.tails.values()]:
                visit(child, chain)

        visit(root, START)


def seal_state(states: dict[int, State], seal: Seal) -> bool:
    """Seals one state. False, and nothing done, where the slot has none of that length."""
    state = states[seal.read_slot]
    if not state.length <= seal.position <= state.num_fed:
        return False
    states[seal.write_slot] = state.folded(seal.position - state.length)
    return True


class Loop:
    """The engine's loop: plans are executed at dispatch, and harvested when the test says so."""

    def __init__(self, scheduler: Scheduler):
        config = scheduler.config
        self.scheduler = scheduler
        self.device = Paper(config, scheduler.cache.needs_state)
        self.in_flight: collections.deque = collections.deque()
        self.now = 0.0

    def dispatch(self, num_drafts: int | None = None) -> Plan | None:
        self.now += 1
        plan = self.scheduler.plan(in_flight=bool(self.in_flight), now=self.now, num_drafts=num_drafts)
        if plan is not None:
            self.in_flight.append((plan, *self.device.execute(plan)))
        return plan

    def fail(self) -> None:
        """A plan whose dispatch raises: what was in flight is never read, and everything starts over."""
        self.now += 1
        self.scheduler.plan(in_flight=bool(self.in_flight), now=self.now)
        self.in_flight.clear()
        seen, self.device = self.device.seen, Paper(self.scheduler.config, self.scheduler.cache.needs_state)
        self.device.seen = seen
        self.scheduler.start_over()

    def harvest(self) -> None:
        plan, prefill, decode = self.in_flight.popleft()
        for piece, (tokens, done) in zip(plan.pieces, prefill, strict=True):
            self.scheduler.commit(piece.request, tokens, done)
        for mark in plan.marks:
            self.scheduler.confirm(mark)
        for request, bound, (tokens, done) in zip(plan.decoding, plan.bounds, decode, strict=True):
            self.scheduler.commit(request, tokens, done, bound)

    def harvest_all(self) -> None:
        while self.in_flight:
            self.harvest()

    def turn(self) -> Plan | None:
        """One turn as the engine takes it: dispatch, then read the turn before, and take note of who has ended."""
        plan = self.dispatch()
        if self.in_flight and (plan is None or len(self.in_flight) > 1):
            self.harvest()
        self.scheduler.ended.clear()
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
        host = self.scheduler.cache.host
        if host is not None:
            assert host._bundles.keys() | set(host._dropped) == self.device.host.keys()
            if host._returning:
                return
        self.device.check_cache(self.scheduler.cache.root, self.scheduler._seals)


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
    for pool in (allocator.slots, allocator.blocks, allocator.logit_rows, allocator.count_rows):
        assert pool.num_free == pool.size
