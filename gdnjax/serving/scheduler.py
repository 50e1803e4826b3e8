"""Who runs in the next step, and with what. Plain ints, no jax.

Requests are admitted in the order of their places, all or nothing: a slot, a logit row if they need one, and blocks for
everything that has to be prefilled. Prompts longer than a step are cut at absolute multiples of CHUNK; other requests
decode between the pieces, and get another block whenever they have filled theirs. When no block is left, not even one
that the prefix cache could do without, the request that came last is preempted: it goes back to its place in the queue,
what it has computed goes to the prefix cache, and it resumes from what is left of that. Drafts are verified as far as
there are blocks for them that nobody else is about to need: they never cost anybody its place.

A request with a structure decodes only when the host knows its last token, on which it depends what the next may be: in
every other turn beside others, which go on as if it were not there. Its drafts are never verified.

Nobody starves. Once the first in order runs it is never preempted, and every plan made with nothing in flight moves it
on by a chunk or a token. While it waits, such plans fill prompts of those that run, or preempt one of them, with at
most two exceptions in a row. A priority is worth a fixed number of places, so boundedly many later requests come first.

Who waits for a logit row alone keeps nobody back who needs none. However many pass it, they cost it no more than a
preemption or two: the rows are with those before it, which end as everybody does, or with some behind it, of whom the
last-come is preempted; and when a row is free it stands before all that have passed, so that it takes their seats and
blocks as an urgent request does. In invariant mode, where nobody is preempted, nobody passes it from the moment that a
row is free, and it waits for those alone that run by then. Nobody is preempted for a request that would have to wait
all the same: only who holds what it lacks, and only if what stands behind it holds enough.
"""

import bisect
import copy
import dataclasses
import heapq
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

from gdnjax.config import CHUNK, EngineConfig
from gdnjax.sampling_params import NO_TOKEN
from gdnjax.serving import prefix_cache, records
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.host_tier import HostTier
from gdnjax.serving.plan import (
    Admission,
    Growth,
    Mark,
    Moves,
    Piece,
    Plan,
    Seal,
    max_chunks,
    max_growth,
    num_blocks_for,
)
from gdnjax.serving.prefix_cache import Match, PrefixCache
from gdnjax.serving.request import Request, Status
from gdnjax.serving.structured import Matcher
from gdnjax.serving.tokenizer import Tokenizer
from gdnjax.serving.waiting import WaitingQueue

log = logging.getLogger("gdnjax")

PLACES_PER_PRIORITY = 64
"""A request of priority p stands in the queue as if it had come 64 p requests later."""

NONE_LEFT = "no token may be drawn: "
"""What the stop_reason of a request begins with that its own masks have ended."""

NOTHING_ALLOWED = NONE_LEFT + "bans and masks forbid all of them"


@dataclasses.dataclass
class _Room:
    """What a prefill step can still take, and how many prompts may still come to it."""

    tokens: int
    rows: int
    chunks: int
    prompts: int


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """A request that found too few blocks, `short` of what it needs, when `num_freed` had been freed in all.

    Nothing that happens meanwhile brings it more than what is freed, published or no more kept for those that run.
    """

    request: Request
    cache: PrefixCache
    short: int
    num_freed: int
    num_running: int


class Scheduler:
    """Holds every request that has not finished."""

    def __init__(
        self, config: EngineConfig, allocator: Allocator, needs_state: bool = True, host: HostTier | None = None
    ):
        """`needs_state`: a cached prefix can be gone on from only where the state behind it was kept. `host`: where
        what is evicted goes.
        """
        self.config: EngineConfig = config
        self.allocator: Allocator = allocator
        self.cache: PrefixCache = PrefixCache(config.block_size, allocator, needs_state, host)
        # Whoever has not ended, whatever becomes of the queues: what `start_over` goes by.
        self.unfinished: dict[Request, None] = {}
        self.waiting: WaitingQueue = WaitingQueue()
        self.running: list[Request] = []
        # Those that nobody is to admit for now, though they have not ended.
        self.parked: dict[Request, None] = {}
        # Those that have ended and whose end nobody has taken note of. The engine empties it.
        self.ended: list[Request] = []
        self.num_preemptions: int = 0
        self.detokenise_seconds: float = 0.0
        # The head that drafts keeps a key for the token that is fed next, too.
        self._places_behind = 1 if config.num_speculative_tokens else 0
        self._arrivals = itertools.count()
        self._deadlines: list[tuple[float, int, Request]] = []
        # Of slots that have become checkpoints while tokens were pending there. The next plan takes them along.
        self._seals: list[Seal] = []
        self._preempting = False
        # Checkpoints that running requests are to write or have not handed over: see _num_fixed_checkpoints.
        self._num_kept_back = 0
        self._refusal: _Refusal | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.unfinished)

    def num_blocks_for(self, max_length: int) -> int:
        """Blocks of a request of `max_length` tokens. Its last token is drawn, never fed, and needs no place."""
        return num_blocks_for(max_length, self.config.block_size)

    def add(self, request: Request) -> None:
        """Queues a request that `plan.check_fits` let pass."""
        arrival = next(self._arrivals)
        request.order = (arrival + PLACES_PER_PRIORITY * request.priority, arrival)
        self.unfinished[request] = None
        self.waiting.add(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, arrival, request))

    # Planning.

    def plan(self, in_flight: bool = False, now: float | None = None, num_drafts: int | None = None) -> Plan | None:
        """What to dispatch next, with everything it needs reserved; None if nothing can be dispatched now.

        With steps `in_flight` lengths are upper bounds, and requests may have ended already: then nobody is preempted,
        and the answer is None where somebody would have to be, so that the caller harvests first. A decode row verifies
        `num_drafts` at most; None: as many as the engine is set up for.
        """
        self.cache.begin_turn()
        self._preempting = False
        self._abort_overdue(time.monotonic() if now is None else now)
        if not self._yield_to_urgent(in_flight) or not self._grow_all(in_flight):
            return None
        decoding, filling = [], []
        # What a structure allows next follows from its last token. All that have one go in step, so that none is alone
        # in every other turn.
        waits = any(request.matcher is not None and request.num_steps for request in self.running)
        for request in self.running:
            if request.may_decode:
                if request.matcher is None or (request.is_known and not waits):
                    decoding.append(request)
            elif not request.filled:
                filling.append(request)
        room = _Room(
            tokens=self.config.max_num_batched_tokens,
            rows=self.config.prefill_rows,
            chunks=max_chunks(self.config.max_num_batched_tokens, self.config.prefill_rows),
            prompts=len(filling) + len(self.waiting),
        )
        pieces: list[Piece] = []
        for request in filling:
            if self._has_room(request, request.num_settled, request.prefill_length, room, pieces):
                self._cut_piece(request, request.slot, room, pieces)
        # Who is preempted waits for the next turn at least, and so does everybody behind it.
        admitted = [] if self._preempting else self._admit(room, pieces)
        if not (pieces or decoding):
            return None
        if num_drafts is None:
            num_drafts = self.config.num_speculative_tokens
        marks = self._marks_for(decoding)
        bounds = self._bounds_of(decoding, num_drafts)
        growth = _place_growth(decoding)
        moves = self.take_moves()
        # A slot that was sealed and has been given up since may be the one that a mark writes: its last owner counts.
        seals = {seal.write_slot: seal for seal in self._seals}
        seals |= {mark.slot: Seal(mark.request.slot, mark.slot, mark.position) for mark in marks}
        self._seals.clear()
        drawing = (*(piece.request for piece in pieces if piece.is_last), *decoding)
        masked = tuple(request for request in drawing if request.matcher is not None)
        seals = list(seals.values())
        return Plan(admitted, pieces, decoding, growth, bounds, seals, marks, num_drafts, moves, masked)

    def take_moves(self) -> Moves | None:
        """What has to be copied between device and host. The seals that wait come first: they may be of states that
        leave, or of slots that have been given up since and are to be filled.
        """
        moves = self.cache.host.take_moves() if self.cache.host is not None else None
        if moves is None or not self._seals:
            return moves
        moves = dataclasses.replace(moves, seals=tuple({seal.write_slot: seal for seal in self._seals}.values()))
        self._seals.clear()
        return moves

    def _abort_overdue(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            self.finish(heapq.heappop(self._deadlines)[-1], "abort", "timeout")

    def _drop_deadlines(self) -> None:
        """Forgets finished requests, or they would stay in memory until their deadlines."""
        if len(self._deadlines) > 2 * len(self.unfinished):
            self._deadlines = [entry for entry in self._deadlines if not entry[-1].finished]
            heapq.heapify(self._deadlines)

    def _yield_to_urgent(self, in_flight: bool) -> bool:
        """Preempts requests that hold what one lacks that waits before them: a seat, a logit row or blocks.

        Where all have one priority, only those stand behind somebody who waits that have passed it for want of a row.
        """
        if self.config.batch_invariant:
            return True
        while (request := self._in_the_way()) is not None:
            if in_flight:
                return False
            self.preempt(request)
        return True

    def _in_the_way(self) -> Request | None:
        """The last-come of those that hold what the first that waits lacks, and stand behind it; None if there is
        nobody, or if all of them together do not hold enough.
        """
        firsts = (self.waiting.first, self.waiting.first_without_row)
        for first in dict.fromkeys(request for request in firsts if request is not None):
            num_ahead = bisect.bisect(self.running, first.order, key=_order)
            behind, lacks_row = self.running[num_ahead:], self._lacks_row(first)
            holders = [request for request in behind if request.logit_row] if lacks_row else behind
            match = self._match(first) if holders else None
            if match and self._fits_beside(first, match, self.running[:num_ahead]):
                fits = self._fits_beside(first, match, self.running, tails=1)
                return None if self._has_place(first) and fits else holders[-1]
            if not lacks_row:
                return None
        return None

    def _fits_beside(self, request: Request, match: Match, others: list[Request], tails: int = 0) -> bool:
        """Whether there are blocks for a request, and one for each of these to grow by, if they alone ran.

        A tail that it forks stays with the cache until it is copied; count it with `tails`.
        """
        own = sum(len(other.blocks) - other.num_shared for other in others)
        shared = self.cache.num_blocks_before((other.node for other in others if other.node is not None), match)
        size = self.config.block_size
        own += self._blocks_to_admit(request) - match.seen // size + (tails if match.tail else 0)
        return own + shared + len(others) <= self.allocator.blocks.size

    def _grow_all(self, in_flight: bool) -> bool:
        """A block for every decode row that may have filled its last one, by preemption if need be."""
        size, more = self.config.block_size, 1 + self._places_behind
        # Most have room, and this is asked of everybody in every turn.
        full = [r for r in self.running if r.num_settled + r.num_ahead + more > len(r.blocks) * size]
        for request in [r for r in full if r.may_decode and self._num_places(r) > len(r.blocks) * size]:
            while request.status is Status.RUNNING and not self._grow(request, 1):
                if in_flight:
                    return False
                self.preempt(self.running[-1])
        return True

    def _num_places(self, request: Request) -> int:
        """Tokens for which another decode step without drafts has to have a place."""
        return min(request.num_settled + request.num_ahead + 1 + self._places_behind, request.max_length - 1)

    def _grow(self, request: Request, count: int) -> bool:
        """A plan that is given up keeps the blocks, and a later one tells the device."""
        if not self.cache.make_room(count):
            return False
        request.blocks += self.allocator.blocks.take(count) or []
        return True

    def _bounds_of(self, decoding: list[Request], num_drafts: int) -> list[int]:
        """The most tokens that each row may emit: one, and as many drafts as its blocks have room for.

        Blocks for drafts, those to verify and those to make, are taken as long as every other request that runs can
        still get one.
        """
        size = self.config.block_size
        num_growing = sum(len(r.blocks) < self.num_blocks_for(r.max_length) for r in self.running) if num_drafts else 0
        bounds = []
        for request in decoding:
            # What may come behind a draft, no mask says.
            drafts = num_drafts if request.params.speculate and request.matcher is None else 0
            most = self.num_blocks_for(request.max_length)
            # Nothing is fed past the length that its last block is for, whatever is in flight.
            if drafts and len(request.blocks) < most:
                places = self._num_places(request)
                wanted = min(-(-(places + 2 * drafts - 1) // size), most)
                if wanted > len(request.blocks):
                    self._grow_for_drafts(request, wanted, num_growing - 1)
                    num_growing -= len(request.blocks) == most
                if len(request.blocks) < most:
                    drafts = min(drafts, len(request.blocks) * size - places)
            bounds.append(1 + drafts)
            request.num_ahead += 1 + drafts
            request.num_steps += 1
        return bounds

    def _grow_for_drafts(self, request: Request, wanted: int, reserved: int) -> None:
        """Up to `wanted` blocks in all, as far as there are more than `reserved` to be had."""
        spare = self.allocator.blocks.num_free + self.cache.num_evictable_blocks - reserved
        # Of those that a step may bring, a plan that was given up may have left some.
        most = request.num_placed + max_growth(self.config.num_speculative_tokens, self.config.block_size)
        count = min(wanted - len(request.blocks), spare, most - len(request.blocks))
        if count > 0:
            self._grow(request, count)

    def _marks_for(self, decoding: list[Request]) -> list[Mark]:
        """Checkpoints at the interval that decoding requests may have come to before this turn's decode step.

        A position is asked for from the first turn on in which the state may have come so far, so it was not past it
        before, and in every turn until it is seen to be written. Where no slot is to be had, it is left out.
        """
        if not self._keeps_states or self.config.batch_invariant:
            return []
        marks = []
        for request in decoding:
            if not request.marks and request.num_settled + request.num_ahead < request.next_mark:
                continue
            reached = request.num_computed
            while request.next_mark <= reached:
                slot = self._take_checkpoint_slot()
                if slot:
                    request.marks.append((request.next_mark, slot))
                    self._num_kept_back += 1
                request.next_mark += self.config.checkpoint_interval
            marks += [Mark(request, position, slot) for position, slot in request.marks]
        return marks

    def _take_checkpoint_slot(self) -> int:
        """A slot for a checkpoint; 0 where that would keep waiting requests out."""
        slot = 0
        if not self.waiting or self._num_fixed_checkpoints() < self.allocator.slots.size - self.config.max_num_seqs:
            slot = self.cache.take_slot()
        if not slot:
            self.cache.counters.skipped_states += 1
        return slot

    def _num_fixed_checkpoints(self) -> int:
        """Slots of checkpoints that are not the cache's to give up, or not in this turn."""
        return self.cache.num_busy_states + self._num_kept_back

    # Admission.

    def _lacks_row(self, request: Request) -> bool:
        return request.params.needs_logit_row and not self.allocator.logit_rows.num_free

    def _has_place(self, request: Request) -> bool:
        return len(self.running) < self.config.max_num_seqs and not self._lacks_row(request)

    def _blocks_to_admit(self, request: Request) -> int:
        """Blocks that a request needs to begin, cached ones among them: for what is to be prefilled, and for the drafts
        behind it; all of them where nothing may be preempted.
        """
        length = request.max_length
        if not self.config.batch_invariant:
            length = min(request.num_tokens + 1 + self.config.num_speculative_tokens, length)
        return self.num_blocks_for(length)

    def _admit(self, room: _Room, pieces: list[Piece]) -> list[Admission]:
        """Admits in order, but for requests that wait for a logit row alone, and no more than the step can start on."""
        admitted: list[Admission] = []
        while room.tokens and room.rows:
            request = self.waiting.first
            if request is not None and self._lacks_row(request):
                request = self.waiting.first_without_row
            if request is None or not self._has_place(request) or self._is_still_refused(request):
                break
            admission = self._admit_one(request, room, pieces)
            if admission is None:
                break
            admitted.append(admission)
        return admitted

    def _admit_one(self, request: Request, room: _Room, pieces: list[Piece]) -> Admission | None:
        match = self._match(request)
        if match.pending:
            # What it needs is being computed by this turn for somebody else: it starts from there in the next.
            return None
        match = self._bring_back(request, match, room, pieces)
        if not self._has_room(request, match.position, request.num_tokens, room, pieces):
            return None
        reserved = self._reserve(request, match)
        if not reserved and match.slot and (not self.running or self.allocator.slots.size == self.config.max_num_seqs):
            # The checkpoint itself, or its block, is what is in the way, and will be for ever.
            match = self.cache.match(request, 0)
            reserved = self._has_room(request, 0, request.num_tokens, room, pieces) and self._reserve(request, match)
        if not reserved:
            return None
        request.num_settled = request.num_folded = match.position
        request.prefill_length = request.num_tokens
        request.wanted = self._wanted_checkpoints(request, match)
        self._cut_piece(request, match.slot or request.slot, room, pieces)
        if request.params.needs_logit_row:
            (request.logit_row,) = self.allocator.logit_rows.take(1) or [0]
        if request.params.needs_counts:
            (request.count_row,) = self.allocator.count_rows.take(1) or [0]
        self._count_hit(request, match)
        self.waiting.discard(request)
        request.status = Status.RUNNING
        bisect.insort(self.running, request, key=_order)
        copy_to = request.blocks[match.seen // self.config.block_size] if match.tail else 0
        return Admission(request, match.position, match.tail, copy_to)

    def _bring_back(self, request: Request, match: Match, room: _Room, pieces: list[Piece]) -> Match:
        """What of a request is cached once the host's part of it is back: as before where there is none, or where the
        request could not be admitted with it.
        """
        found = self.cache.look_on_host(request, self._limit_of(request), match)
        if found is None or not self._has_room(request, found.position, request.num_tokens, room, pieces):
            return match
        node, shared = self.cache.share(match)
        # Whole blocks that come back are among those that the request needs; a tail is copied, and stays the cache's.
        short = self._num_short(request, len(shared)) + (found.tail is not None)
        slot = self._take_checkpoint_slot() if short <= 0 and found.state is not None else 0
        if short <= 0 and (slot or found.state is None):
            assert self.cache.host is not None
            self.cache.bring_back(node, found, slot)
            self.cache.host.counters.hits += 1
            self.cache.host.counters.hit_tokens += found.position - match.position
        self.cache.unlock(node)
        # Sharing may have parted the node that the match speaks of.
        return self._match(request)

    def _num_short(self, request: Request, shared: int) -> int:
        """Blocks that lack to admit a request whose first `shared` blocks are cached and locked; below 1: none."""
        # Room for everybody who runs to grow by a block, or whoever comes in would be the next to be preempted.
        headroom = 0 if self.config.batch_invariant else len(self.running)
        needed = self._blocks_to_admit(request) - shared
        return needed + headroom - self.allocator.blocks.num_free - self.cache.num_evictable_blocks

    def _reserve(self, request: Request, match: Match) -> bool:
        """Gives a request its slot and its blocks, those it shares among them; nothing, and nothing is evicted, where
        there are not enough.
        """
        node, shared = self.cache.share(match)
        newly_held = self.cache.hold(match.slot)
        needed = self._blocks_to_admit(request) - len(shared)
        short = self._num_short(request, len(shared))
        slot = 0 if short > 0 else self._take_live_slot()
        if not slot:
            self.cache.unlock(node)
            if newly_held:
                self.cache.let_go(match.slot)
            self._refuse(request, short)
            return False
        self.cache.make_room(needed)
        blocks = self.allocator.blocks.take(needed)
        assert blocks is not None, "the cache counts more blocks as evictable than it can evict"
        request.slot, request.node, request.num_shared = slot, node, len(shared)
        request.blocks = shared + blocks
        request.num_cached = len(shared) * self.config.block_size
        return True

    def _refuse(self, request: Request, short: int) -> None:
        """Remembers that a request lacks blocks. Where a slot is what it lacks, the next turn may have one."""
        running = len(self.running)
        self._refusal = _Refusal(request, self.cache, short, self._num_freed, running) if short > 0 else None

    @property
    def _num_freed(self) -> int:
        """Blocks that have come to be to be had since the beginning, never fewer: free, or evictable."""
        # One that is evicted is given to the pool, and was counted as it came to be evictable.
        evicted = self.cache.counters.evicted_blocks
        return self.allocator.blocks.num_given + self.cache.num_loosened_blocks - evicted

    def _is_still_refused(self, request: Request) -> bool:
        """Whether less has been freed than a request lacked when it was looked at last, so nobody need look again."""
        refusal = self._refusal
        if refusal is None or refusal.request is not request or refusal.cache is not self.cache or not self.running:
            return False
        freed = self._num_freed - refusal.num_freed + max(0, refusal.num_running - len(self.running))
        return freed < refusal.short

    def _take_live_slot(self) -> int:
        """A slot for a request: a free one, a cached state's, or that of a checkpoint which a running request keeps for
        later, or has asked for and not seen.
        """
        slot = self.cache.take_slot()
        if slot:
            return slot
        for request in self.running:
            for checkpoints in (request.unpublished, request.marks):
                for checkpoint in checkpoints:
                    if not self.cache.is_held(checkpoint[1]):
                        checkpoints.remove(checkpoint)
                        self._num_kept_back -= request.detached or checkpoints is request.marks
                        return checkpoint[1]
        return 0

    def _match(self, request: Request) -> Match:
        """What of a request is cached. At least its last token is always computed: something has to be drawn from."""
        match = self.cache.match(request, self._limit_of(request))
        if self.cache.needs_state or not match.position:
            return match
        # The head that drafts needs the hidden state of the last cached token, and nobody has kept it: it is fed again.
        position = match.position - (1 if self.config.num_speculative_tokens else 0)
        # Where bits may not depend on the cache, chunks are those of a fresh start.
        grid = self.config.checkpoint_grid if self.config.batch_invariant else 1
        return dataclasses.replace(match, position=position // grid * grid)

    def _limit_of(self, request: Request) -> int:
        """How many of a request's first tokens may be cached ones."""
        if not self.config.enable_prefix_caching or request.wants_prompt_logprobs:
            return 0
        return request.num_tokens - 1

    @property
    def _keeps_states(self) -> bool:
        return self.config.enable_prefix_caching and self.cache.needs_state

    def _count_hit(self, request: Request, match: Match) -> None:
        if request.num_cached_tokens is not None:
            return
        request.first_scheduled_time = time.monotonic()
        request.num_cached_tokens = match.position
        counters = self.cache.counters
        counters.queried_tokens += request.prompt_length
        counters.hit_tokens += match.position
        lost = max(0, match.seen - match.position) if self.cache.needs_state else 0
        counters.lost_tokens += lost
        if not self.config.enable_prefix_caching:
            request.cache_miss_reason = prefix_cache.DISABLED
        elif request.wants_prompt_logprobs:
            request.cache_miss_reason = prefix_cache.BYPASSED
        elif lost:
            request.cache_miss_reason = prefix_cache.NO_CHECKPOINT
        elif match.position == 0:
            short = request.prompt_length <= self.config.block_size
            request.cache_miss_reason = prefix_cache.TOO_SHORT if short else prefix_cache.NOTHING_CACHED

    def _wanted_checkpoints(self, request: Request, match: Match) -> tuple[int, ...]:
        """Positions at which later requests may want to go on, the most likely first: below the last token (at the end
        itself an identical prompt would miss), before a chat's generation prompt, behind its system messages, at a
        branch, and every interval of what is new. What was seen before had its states, and lost them for want of
        slots: those at its intervals again would push out what others go on from.
        """
        if not self._keeps_states:
            return ()
        grid, interval, last = self.config.checkpoint_grid, self.config.checkpoint_interval, request.num_tokens - 1
        step = -(-interval // grid) * grid
        every = range((max(match.position, match.seen) // step + 1) * step, last + 1, step)
        first = (position // grid * grid for position in (last, request.turn_start, request.system_end, match.seen))
        return tuple(dict.fromkeys(p for p in (*first, *reversed(every)) if match.position < p <= last))

    # Pieces.

    def _has_room(self, request: Request, start: int, end: int, room: _Room, pieces: list[Piece]) -> bool:
        """Whether a step with these pieces can take some of a request's tokens `start` to `end`."""
        if not room.rows or (self.config.batch_invariant and not _may_share(request, pieces)):
            return False
        return _end_of_piece(start, end, room) > start

    def _cut_piece(self, request: Request, read_slot: int, room: _Room, pieces: list[Piece]) -> None:
        """The next tokens of a prompt, as many as there is room for."""
        start = request.num_settled
        end = _end_of_piece(start, request.prefill_length, room)
        room.rows -= 1
        room.prompts -= 1
        spare = room.chunks - (-(-end // CHUNK) - start // CHUNK)
        checkpoints = self._checkpoints_of_piece(request, start, end, spare, min(room.rows, room.prompts))
        piece = Piece(request, start, end - start, end == request.prefill_length, read_slot, checkpoints)
        pieces.append(piece)
        room.tokens -= piece.length
        room.chunks -= len(piece.chunks())
        request.num_settled = request.num_folded = end
        request.num_placed = len(request.blocks)
        request.next_mark = (end // self.config.checkpoint_interval + 1) * self.config.checkpoint_interval
        request.unpublished += checkpoints
        self._num_kept_back += len(checkpoints) if request.detached else 0
        # A piece's tokens are known, and every later step runs after it, so what it computes can be shared at once.
        self._publish(request, end)

    def _checkpoints_of_piece(
        self, request: Request, start: int, end: int, spare: int, prompts: int
    ) -> tuple[tuple[int, int], ...]:
        """Slots for the wanted positions within a piece; those off the grid of chunks cost one of `spare` chunks.

        A state that saves less than a chunk is not worth the place of one of the `prompts` that may come behind.
        """
        found = []
        for position in request.wanted:
            cut = position % CHUNK != 0 and position != end
            if not start < position <= end or cut > spare - (prompts if position < CHUNK else 0):
                continue
            slot = self._take_checkpoint_slot()
            if not slot:
                break
            self.cache.hold(slot)
            spare -= cut
            found.append((position, slot))
        return tuple(sorted(found))

    # What has been computed becomes the cache's.

    def _publish(self, request: Request, length: int) -> None:
        """Hands the whole blocks of a running request's first `length` tokens to the cache, and its checkpoints.

        They stay the request's to read. Where somebody else's block stands in the place of one of its own, the request
        goes on with its own, detached from the tree, and publishes what the tree lacks when it ends.
        """
        if not self.config.enable_prefix_caching or request.detached:
            return
        if self.config.batch_invariant:
            length = min(length, request.prompt_length)
        size = self.config.block_size
        marks = sorted(mark for mark in request.unpublished if mark[0] <= length)
        for position, slot in [*marks, (length, 0)]:
            count = position // size
            assert request.node is not None
            if count > request.num_shared:
                keys = request.block_keys(count, size)[request.num_shared :]
                if self.cache.has_child(request.node, keys[0]):
                    request.detached = True
                    self._num_kept_back += len(request.unpublished)
                    return
                node, _ = self.cache.insert(request.node, keys, request.blocks[request.num_shared : count])
                self.cache.lock(node, above=request.node)
                request.node, request.num_shared = node, count
            if slot:
                request.unpublished.remove((position, slot))
                self.cache.keep_state(self.cache.node_at(request.node, position), slot)

    def _retire(self, request: Request, computed: int, sealed: bool) -> None:
        """Hands everything that a request has computed to the cache, and what the cache has no use for to the pools.

        Its KV is right for its first `computed` tokens; if `sealed`, its slot holds the state behind them.
        """
        taken = request.num_shared
        if self.config.enable_prefix_caching:
            if self.config.batch_invariant:
                computed, sealed = min(computed, request.prompt_length), False
            taken = self._hand_over(request, computed, sealed and self.cache.needs_state)
        self._release(request, taken)

    def _hand_over(self, request: Request, computed: int, sealed: bool) -> int:
        """Returns how many of the request's first blocks need not be freed any more."""
        size, node, taken = self.config.block_size, request.node, request.num_shared
        assert node is not None
        marks = sorted(mark for mark in request.unpublished if mark[0] <= computed)
        for position, slot in [*marks, (computed, 0)]:
            count = position // size
            if count > taken:
                keys, blocks = request.block_keys(count, size)[taken:], request.blocks[taken:count]
                node, known = self.cache.insert(node, keys, blocks)
                self.allocator.blocks.give(blocks[:known])
                taken = count
            if slot:
                request.unpublished.remove((position, slot))
                self._num_kept_back -= request.detached
                self.cache.keep_state(self.cache.node_at(node, position), slot)
        slot = request.slot
        if sealed and computed % size == 0:
            self.cache.keep_state(self.cache.node_at(node, computed), slot)
            request.slot = 0
        elif sealed and computed // size == taken:
            rest = tuple(request.tokens(taken * size, computed))
            if self.cache.keep_tail(node, rest, request.blocks[taken], slot):
                request.slot = 0
                taken += 1
        has_decoded = request.num_steps > 0 or request.num_folded < request.num_settled
        if not request.slot and has_decoded and self.config.num_speculative_tokens:
            # Should the slot have changed hands by then, its next owner comes after this.
            self._seals.append(Seal(slot, slot, computed))
        return taken

    def _release(self, request: Request, taken: int | None = None) -> None:
        """Gives back what a request holds, but for its first `taken` blocks, which are the cache's."""
        self.allocator.blocks.give(request.blocks[request.num_shared if taken is None else taken :])
        self.allocator.slots.give([slot for _, slot in (*request.unpublished, *request.marks)])
        self._num_kept_back -= len(request.marks) + (len(request.unpublished) if request.detached else 0)
        if request.slot:
            self.allocator.slots.give([request.slot])
        if request.logit_row:
            self.allocator.logit_rows.give([request.logit_row])
        if request.count_row:
            self.allocator.count_rows.give([request.count_row])
        if request.node is not None:
            self.cache.unlock(request.node)
        request.let_go()

    def preempt(self, request: Request) -> None:
        """Sends a running request back to its place in the queue. Nothing of it is in flight."""
        self._preempting = True
        self.num_preemptions += 1
        request.num_preemptions += 1
        if request.wants_prompt_logprobs:
            request.prompt_logprobs.clear()
        self._leave(request)
        self._retire(request, *self._reach_of(request, ended=False))
        request.status = Status.WAITING
        self.waiting.add(request)

    def park(self, request: Request) -> None:
        """Takes a request that waits out of the queue until `unpark`. Its deadline and its place stay."""
        self.waiting.discard(request)
        self.parked[request] = None

    def unpark(self, request: Request) -> None:
        """Puts a request that was parked, and has not ended, into its place again."""
        if self.parked.pop(request, self) is None:
            self.waiting.add(request)

    def _leave(self, request: Request) -> None:
        """Takes a request from those that run, if it is one of them."""
        place = bisect.bisect_left(self.running, request.order, key=_order)
        if place < len(self.running) and self.running[place] is request:
            del self.running[place]

    def _reach_of(self, request: Request, ended: bool) -> tuple[int, bool]:
        """(tokens whose KV is right and known, whether its slot can be sealed behind them) of a request that stops.

        What has ended on the device does not change any more. Else each step in flight moves the state on: without
        speculation by a token; with it, to where the step began, which is known of the first alone. Tokens that a stop
        string has cut off may have been fed already: a state that has folded some of them is of no use.
        """
        settled, kept = request.num_settled, request.num_tokens
        reach = min(settled, kept)
        if not request.filled:
            return settled, True
        if not self.config.num_speculative_tokens:
            state = settled if ended else settled + request.num_steps
            return (state, True) if state <= kept else (reach, False)
        if ended or not request.num_steps:
            return reach, request.num_folded <= reach
        return reach, request.num_steps == 1 and settled <= reach

    # Harvest.

    def confirm(self, mark: Mark) -> None:
        """Takes over a checkpoint that a turn was to write, if it did.

        To be called when the tokens of all steps before that turn's decode step are committed, and none of its own:
        then the host knows how far the state could be sealed before that step.
        """
        request, checkpoint = mark.request, (mark.position, mark.slot)
        if checkpoint in request.marks and mark.position <= request.num_settled:
            request.marks.remove(checkpoint)
            request.unpublished.append(checkpoint)
            self._num_kept_back -= not request.detached

    def commit(self, request: Request, token_ids: list[int], ended: bool, bound: int = 0) -> None:
        """Takes what a step emitted for a request: appends its tokens, and finishes it if it has ended.

        `ended` says that the device stopped it with the last of these tokens, which is NO_TOKEN where no token might
        be drawn; `bound` is the plan's for a row of a decode step, 0 for one of a prefill step. Tokens of a request
        that has finished meanwhile (a stop string seen late, an abort) are dropped.
        """
        if request.status is Status.FINISHED or not token_ids:
            return
        request.half_done = True
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
        if bound:
            self._settle(request, len(token_ids), bound)
        exhausted = token_ids[-1] == NO_TOKEN
        token_ids = token_ids[:-1] if exhausted else token_ids
        request.output_token_ids.extend(token_ids)
        stopped = ended and not exhausted and token_ids[-1] in request.stop_token_ids
        # The text of a token that ends the output is shown only where stop strings are.
        shown = token_ids[:-1] if stopped and not request.params.include_stop_str_in_output else token_ids
        began = time.perf_counter()
        try:
            request.detokenizer.append(shown)
        except Exception as error:
            self.fail(request, error)
            return
        self.detokenise_seconds += time.perf_counter() - began
        matcher = request.matcher
        if matcher is not None and not (stopped or exhausted):
            matcher.follow(request.output_token_ids)
        if request.detokenizer.stop_reason is not None:
            kept = request.detokenizer.num_tokens_kept
            del request.output_token_ids[kept:], request.output_logprobs[kept:]
            self.finish(request, "stop", request.detokenizer.stop_reason, ended=ended)
        elif matcher is not None and not stopped and (matcher.is_complete or (exhausted and matcher.may_end)):
            self.finish(request, "stop", ended=ended)
        elif exhausted:
            why = f"{NONE_LEFT}{matcher.error}" if matcher and matcher.error else NOTHING_ALLOWED
            self.finish(request, "error", why, ended=True)
        elif stopped:
            explicit = token_ids[-1] in (request.params.stop_token_ids or ())
            self.finish(request, "stop", token_ids[-1] if explicit else None, ended=True)
        elif ended:
            self.finish(request, "length", ended=True)
        elif request.unpublished:
            self._publish(request, request.num_settled)
        request.num_committed = len(request.output_token_ids)
        request.half_done = False

    def _settle(self, request: Request, count: int, bound: int) -> None:
        """A decode step has fed `count` tokens, of `bound` that it might have."""
        speculates = self.config.num_speculative_tokens > 0
        # A speculating step folds what was pending before it, and leaves its own tokens pending.
        request.num_folded = request.num_settled if speculates else request.num_settled + count
        request.num_settled += count
        request.num_ahead -= bound
        request.num_steps -= 1

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, *, ended: bool = False
    ) -> None:
        """Ends a request, waiting or running, and frees what it holds. Does nothing to one that has finished.

        `ended` says that it has ended on the device. A step in flight may still write to its slot and blocks; it runs
        before any step of their next owner.
        """
        if request.finished:
            return
        request.half_done = True
        if request.status is Status.RUNNING:
            self._leave(request)
            self._retire(request, *self._reach_of(request, ended))
        else:
            self.waiting.discard(request)
            self.parked.pop(request, None)
        began = time.perf_counter()
        try:
            request.detokenizer.finish()
        except Exception as error:
            log.exception("the text of request %s cannot be ended", request.request_id)
            reason, stop_reason = "error", _words(error)
        self.detokenise_seconds += time.perf_counter() - began
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.finished_time = time.monotonic()
        self.ended.append(request)
        request.status = Status.FINISHED
        self.unfinished.pop(request, None)
        self._drop_deadlines()

    def fail(self, request: Request, error: Exception) -> None:
        """Ends a request that cannot go on, its text say cannot be made, with finish_reason "error". Others go on."""
        log.error("request %s ends by an error", request.request_id, exc_info=error)
        self.finish(request, "error", _words(error))

    def start_over(self) -> None:
        """Forgets everything that was computed, and who holds what: everybody who has not ended waits in the place that
        he had, with the tokens that were committed to him.

        Nothing is asked of the queues, the pools and the cache: a turn that was cut off may have left them anyhow. May
        itself be cut off, and called again.
        """
        counters = self.cache.counters
        self.allocator = self.allocator.fresh()
        host = self.cache.host.fresh() if self.cache.host is not None else None
        self.cache = PrefixCache(self.config.block_size, self.allocator, self.cache.needs_state, host)
        self.cache.counters = counters
        self._seals.clear()
        self.ended = [request for request in self.ended if request.finished]
        waiting = [request for request in self.unfinished if not request.finished]
        faults = []
        for request in waiting:
            if request.slot:
                self.num_preemptions += 1
                request.num_preemptions += 1
            request.status = Status.WAITING
            request.let_go()
            try:
                request.roll_back()
            except Exception as error:
                faults.append((request, error))
        self.running, self._num_kept_back, self._refusal = [], 0, None
        self.parked = {request: None for request in waiting if request in self.parked}
        self.waiting = WaitingQueue(request for request in waiting if request not in self.parked)
        self.unfinished = dict.fromkeys(waiting)
        self._deadlines = [(r.deadline, r.order[1], r) for r in waiting if r.deadline is not None]
        heapq.heapify(self._deadlines)
        for request, error in faults:
            self.fail(request, error)

    # Saving and restoring.

    def record(self, now: float) -> dict[str, Any]:
        """Everybody who has not ended and everything that is cached, as plain data for `restore`. Nothing is in flight,
        and the moves have been taken. `now` is the clock of deadlines.
        """
        cache, numbers = self.cache.record(request.node for request in self.running if request.node is not None)
        return {
            "cache": cache,
            "free": {name: pool.record() for name, pool in self.allocator.pools.items()},
            "requests": [records.of_request(request, numbers, now) for request in self.unfinished],
            "seals": [dataclasses.astuple(seal) for seal in self._seals],
            "arrivals": next(copy.copy(self._arrivals)),
        }

    def restore(
        self,
        record: dict[str, Any],
        tokenizer: Tokenizer | None,
        now: float,
        matchers: Sequence[Matcher | None] | None = None,
    ) -> list[Request]:
        """Makes a scheduler without requests what another was, with an empty host tier. Returns the requests, with
        these `matchers`; None: nobody has one.
        """
        self.start_over()
        for name, pool in self.allocator.pools.items():
            pool.restore(record["free"][name])
        nodes = self.cache.restore(record["cache"])
        entries = record["requests"]
        pairs = zip(entries, [None] * len(entries) if matchers is None else matchers, strict=True)
        requests = [records.request_of(entry, nodes, tokenizer, now, matcher) for entry, matcher in pairs]
        self.unfinished = dict.fromkeys(requests)
        self.running = sorted((r for r in requests if r.status is Status.RUNNING), key=_order)
        self.waiting = WaitingQueue(r for r in requests if r.status is Status.WAITING)
        self._num_kept_back = sum(len(r.marks) + (len(r.unpublished) if r.detached else 0) for r in self.running)
        self._seals = [Seal(*seal) for seal in record["seals"]]
        self._arrivals = itertools.count(record["arrivals"])
        self._deadlines = [(r.deadline, r.order[1], r) for r in requests if r.deadline is not None]
        heapq.heapify(self._deadlines)
        return requests

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot, block and logit row is free or held once, by the right holder."""
        blocks, slots = self.cache.check_integrity()
        for request in self.running:
            assert request.slot
            assert request.status is Status.RUNNING
            assert request.node is not None
            assert request.node.end == request.num_shared * self.config.block_size
            places = request.num_computed + (self._places_behind if request.filled else 0)
            assert len(request.blocks) * self.config.block_size >= min(places, request.max_length - 1)
            assert request.num_folded <= request.num_settled
            assert (
                request.num_steps <= request.num_ahead <= request.num_steps * (1 + self.config.num_speculative_tokens)
            )
            blocks += request.blocks[request.num_shared :]
            slots += [request.slot, *(slot for _, slot in (*request.unpublished, *request.marks))]
        for request in (*self.waiting, *self.parked):
            assert request.status is Status.WAITING
            assert not request.slot
            assert not request.blocks
            assert not request.marks
        assert self.unfinished.keys() == {*self.running, *self.waiting, *self.parked}
        assert not any(request in self.waiting for request in self.parked)
        assert not any(request.half_done for request in self.unfinished)
        self.allocator.blocks.check_integrity(blocks)
        self.allocator.slots.check_integrity(slots)
        self.allocator.logit_rows.check_integrity([r.logit_row for r in self.running if r.logit_row])
        self.allocator.count_rows.check_integrity([r.count_row for r in self.running if r.count_row])
        self.waiting.check_integrity()
        orders = [_order(request) for request in self.running]
        assert orders == sorted(orders), "a queue is out of order"
        kept_back = sum(len(r.marks) + (len(r.unpublished) if r.detached else 0) for r in self.running)
        assert self._num_kept_back == kept_back, "checkpoints that running requests keep back are miscounted"
        live = {*self.waiting, *self.running, *self.parked}
        overdue = [request for *_, request in self._deadlines]
        assert live.issuperset(request for request in overdue if not request.finished)
        assert len(overdue) <= 2 * len(live), "finished requests stay alive"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _end_of_piece(start: int, end: int, room: _Room) -> int:
    """Where a piece of tokens `start` to `end` has to end, with so much room; at or before `start`: there is none."""
    if end - start > room.tokens:
        end = (start + room.tokens) // CHUNK * CHUNK
    # Chunks end at multiples of CHUNK, so the first may be a short one.
    return min(end, (start // CHUNK + room.chunks) * CHUNK)


def _place_growth(decoding: list[Request]) -> dict[int, list[Growth]]:
    """Blocks that the device has not been told of, by row."""
    growth = {}
    for row, request in enumerate(decoding):
        if request.num_placed < len(request.blocks):
            growth[row] = [Growth(i, request.blocks[i]) for i in range(request.num_placed, len(request.blocks))]
            request.num_placed = len(request.blocks)
    return growth


def _may_share(request: Request, pieces: list[Piece]) -> bool:
    """Whether two requests' pieces run the same program: steps with prompt_logprobs are others."""
    wants = request.params.prompt_logprobs is not None
    return all((piece.request.params.prompt_logprobs is not None) == wants for piece in pieces)
