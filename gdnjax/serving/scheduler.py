"""Who runs in the next step, and with what. Plain ints, no jax.

Requests are admitted in the order of their places, all or nothing: a slot, a logit row if they need one, and blocks for
everything that has to be prefilled. Prompts longer than a step are cut at absolute multiples of CHUNK; other requests
decode between the pieces, and get another block whenever they have filled theirs. When no block is left, not even one
that the prefix cache could do without, the request that came last is preempted: it goes back to its place in the queue,
what it has computed goes to the prefix cache, and it resumes from what is left of that.

Nobody starves. Once the first in order runs it is never preempted, and every plan made with nothing in flight moves it
on by a chunk or a token. While it waits, such plans fill prompts of those that run, or preempt one of them, with at
most two exceptions in a row. A priority is worth a fixed number of places, so boundedly many later requests overtake.
"""

import bisect
import dataclasses
import heapq
import itertools
import time

from gdnjax.config import CHUNK, EngineConfig
from gdnjax.serving import prefix_cache
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.plan import Admission, Copy, Growth, Piece, Plan, max_chunks
from gdnjax.serving.prefix_cache import Match, PrefixCache
from gdnjax.serving.request import Request, Status

PLACES_PER_PRIORITY = 64
"""A request of priority p stands in the queue as if it had come 64 p requests later."""


@dataclasses.dataclass
class _Room:
    """What a prefill step can still take."""

    tokens: int
    rows: int
    chunks: int


class Scheduler:
    """Holds every request that has not finished."""

    def __init__(self, config: EngineConfig, allocator: Allocator):
        self.config = config
        self.allocator = allocator
        self.cache = PrefixCache(config.block_size, allocator)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.detokenise_seconds = 0.0
        self._arrivals = itertools.count()
        self._deadlines: list[tuple[float, int, Request]] = []
        # Checkpoint slots of dispatched steps that no harvest has confirmed.
        self._unconfirmed: set[int] = set()
        self._preempting = False
        # Requests whose newest block the device has not been told of.
        self._grown: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def num_blocks_for(self, max_length: int) -> int:
        """Blocks of a request of `max_length` tokens. Its last token is drawn, never fed, and needs no place."""
        return -(-(max_length - 1) // self.config.block_size)

    def check_fits(self, max_length: int, prompt_length: int) -> None:
        """Raises ValueError for a request that could never run, however long it waited."""
        needed = self.num_blocks_for(max_length)
        if needed > self.allocator.blocks.size:
            raise ValueError(
                f"a prompt of {prompt_length} tokens with up to {max_length - prompt_length} output tokens needs "
                f"{needed} KV blocks, the pool has {self.allocator.blocks.size} of {self.config.block_size} tokens; "
                "shorten it, lower max_tokens or raise num_kv_blocks"
            )

    def add(self, request: Request) -> None:
        """Queues a request that `check_fits` let pass."""
        arrival = next(self._arrivals)
        request.order = (arrival + PLACES_PER_PRIORITY * request.priority, arrival)
        bisect.insort(self.waiting, request, key=_order)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, arrival, request))

    # Planning.

    def plan(self, in_flight: bool = False, now: float | None = None) -> Plan | None:
        """What to dispatch next, with everything it needs reserved; None if nothing can be dispatched now.

        With steps `in_flight` lengths are upper bounds, and requests may have ended already: then nobody is preempted,
        and the answer is None where somebody would have to be, so that the caller harvests first.
        """
        self.cache.begin_turn()
        self._preempting = False
        self._abort_overdue(time.monotonic() if now is None else now)
        if not self._yield_to_urgent(in_flight) or not self._grow_all(in_flight):
            return None
        decoding = [request for request in self.running if request.may_decode]
        filling = [request for request in self.running if not request.filled]
        room = _Room(
            tokens=self.config.max_num_batched_tokens,
            rows=self.config.prefill_rows,
            chunks=max_chunks(self.config.max_num_batched_tokens, self.config.prefill_rows),
        )
        pieces: list[Piece] = []
        for request in filling:
            self._cut_piece(request, request.slot, room, pieces)
        # Who is preempted waits for the next turn at least, and so does everybody behind it.
        admitted = [] if self._preempting else self._admit(room, pieces)
        if not (pieces or decoding):
            return None
        growth = self._place_growth(decoding) if self._grown else {}
        for request in decoding:
            request.num_computed += 1
            request.num_dispatched += 1
        return Plan(admitted, pieces, decoding, growth, self._copies_for(decoding))

    def _abort_overdue(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            self.finish(heapq.heappop(self._deadlines)[-1], "abort", "timeout")

    def _yield_to_urgent(self, in_flight: bool) -> bool:
        """Preempts requests that stand behind the first of the queue while it lacks a slot, a row or blocks.

        Where all have one priority, nobody who runs stands behind somebody who waits.
        """
        if self.config.batch_invariant:
            return True
        while self.waiting and self.running and self.running[-1].order > self.waiting[0].order:
            first = self.waiting[0]
            needed = self._blocks_to_admit(first) + len(self.running)
            room = self.allocator.blocks.num_free + self.cache.num_evictable_blocks
            if self._has_place(first) and needed <= room:
                return True
            if in_flight:
                return False
            self.preempt(self.running[-1])
        return True

    def _grow_all(self, in_flight: bool) -> bool:
        """A block for every decode row that has filled its last one, by preemption if need be."""
        size = self.config.block_size
        for request in [r for r in self.running if r.num_computed >= len(r.blocks) * size and r.may_decode]:
            while request.status is Status.RUNNING and not self._grow(request):
                if in_flight:
                    return False
                self.preempt(self.running[-1])
        return True

    def _grow(self, request: Request) -> bool:
        if not self.cache.make_room(1):
            return False
        request.blocks += self.allocator.blocks.take(1) or []
        # A plan that is given up keeps the block, and a later one tells the device.
        self._grown.append(request)
        return True

    def _place_growth(self, decoding: list[Request]) -> dict[int, Growth]:
        grown = set(self._grown)
        self._grown.clear()
        growth = {}
        for row, request in enumerate(decoding):
            if request in grown and request.num_placed < len(request.blocks):
                growth[row] = Growth(request.num_placed, request.blocks[request.num_placed])
                request.num_placed += 1
        return growth

    def _copies_for(self, decoding: list[Request]) -> list[Copy]:
        """Copies of the states that stand at the interval after this turn's decode step."""
        if not self.config.enable_prefix_caching or self.config.batch_invariant:
            return []
        interval = self.config.checkpoint_interval
        copies = []
        for request in [request for request in decoding if request.num_computed % interval == 0]:
            slot = self._take_checkpoint_slot()
            if slot:
                copies.append(Copy(request, request.num_computed, request.slot, slot))
        return copies

    def _take_checkpoint_slot(self) -> int:
        """A slot for a checkpoint that this turn writes; 0 where that would keep waiting requests out."""
        slot = 0
        if not self.waiting or self._num_fixed_checkpoints() < self.allocator.slots.size - self.config.max_num_seqs:
            slot = self.cache.take_slot()
        if slot:
            self._unconfirmed.add(slot)
        else:
            self.cache.counters.skipped_states += 1
        return slot

    def _num_fixed_checkpoints(self) -> int:
        """Slots of checkpoints that cannot give way to a request in this turn."""
        unpublished = sum(len(request.unpublished) for request in self.running if request.detached)
        return len(self._unconfirmed) + self.cache.num_busy_states + unpublished

    # Admission.

    def _has_place(self, request: Request) -> bool:
        free_row = self.allocator.logit_rows.num_free > 0 or not request.params.needs_logit_row
        return len(self.running) < self.config.max_num_seqs and free_row

    def _blocks_to_admit(self, request: Request) -> int:
        """Blocks that a request needs to begin, cached ones among them; all of them where nothing may be preempted."""
        length = request.max_length if self.config.batch_invariant else request.num_tokens + 1
        return self.num_blocks_for(length)

    def _admit(self, room: _Room, pieces: list[Piece]) -> list[Admission]:
        """Admits from the head of the queue only, so nobody is overtaken, and no more than the step can start on."""
        admitted: list[Admission] = []
        while self.waiting and room.tokens and room.rows and self._has_place(self.waiting[0]):
            admission = self._admit_one(self.waiting[0], room, pieces)
            if admission is None:
                break
            admitted.append(admission)
        return admitted

    def _admit_one(self, request: Request, room: _Room, pieces: list[Piece]) -> Admission | None:
        match = self._match(request)
        if match.pending:
            # What it needs is being computed by this turn for somebody else: it starts from there in the next.
            return None
        reserved = self._reserve(request, match)
        if not reserved and match.slot and (not self.running or self.allocator.slots.size == self.config.max_num_seqs):
            # The checkpoint itself, or its block, is what is in the way, and will be for ever.
            match = self.cache.match(request, 0)
            reserved = self._reserve(request, match)
        if not reserved:
            return None
        request.num_computed, request.prefill_length = match.position, request.num_tokens
        request.num_dispatched = len(request.output_token_ids)
        request.wanted = self._wanted_checkpoints(request, match)
        if not self._cut_piece(request, match.slot or request.slot, room, pieces):
            self._release(request)
            return None
        if request.params.needs_logit_row:
            (request.logit_row,) = self.allocator.logit_rows.take(1) or [0]
        self._count_hit(request, match)
        self.waiting.pop(0)
        request.status = Status.RUNNING
        bisect.insort(self.running, request, key=_order)
        copy_to = request.blocks[match.seen // self.config.block_size] if match.tail else 0
        return Admission(request, match.position, match.tail, copy_to)

    def _reserve(self, request: Request, match: Match) -> bool:
        """Gives a request its slot and its blocks, those it shares among them; nothing where there are not enough."""
        node, shared = self.cache.share(match)
        newly_held = self.cache.hold(match.slot)
        needed = self._blocks_to_admit(request) - len(shared)
        # Room for everybody who runs to grow by a block, or whoever comes in would be the next to be preempted.
        headroom = 0 if self.config.batch_invariant else len(self.running)
        enough = self.allocator.blocks.num_free + self.cache.num_evictable_blocks >= needed + headroom
        slot = self._take_live_slot() if enough and self.cache.make_room(needed) else 0
        if not slot:
            self.cache.unlock(node)
            if newly_held:
                self.cache.let_go(match.slot)
            return False
        request.slot, request.node, request.num_shared = slot, node, len(shared)
        request.blocks = shared + (self.allocator.blocks.take(needed) or [])
        request.num_cached = len(shared) * self.config.block_size
        return True

    def _take_live_slot(self) -> int:
        """A slot for a request: a free one, a cached state's, or one that a detached request keeps for later."""
        slot = self.cache.take_slot()
        if slot:
            return slot
        for request in self.running:
            for mark in request.unpublished:
                if not self.cache.is_held(mark[1]):
                    request.unpublished.remove(mark)
                    return mark[1]
        return 0

    def _match(self, request: Request) -> Match:
        """What of a request is cached. At least its last token is always computed: something has to be drawn from."""
        limit = request.num_tokens - 1
        if not self.config.enable_prefix_caching or request.wants_prompt_logprobs:
            limit = 0
        return self.cache.match(request, limit)

    def _count_hit(self, request: Request, match: Match) -> None:
        if request.num_cached_tokens is not None:
            return
        request.first_scheduled_time = time.monotonic()
        request.num_cached_tokens = match.position
        counters = self.cache.counters
        counters.queried_tokens += request.prompt_length
        counters.hit_tokens += match.position
        counters.lost_tokens += max(0, match.seen - match.position)
        if not self.config.enable_prefix_caching:
            request.cache_miss_reason = prefix_cache.DISABLED
        elif request.wants_prompt_logprobs:
            request.cache_miss_reason = prefix_cache.BYPASSED
        elif match.seen > match.position:
            request.cache_miss_reason = prefix_cache.NO_CHECKPOINT
        elif match.position == 0:
            short = request.prompt_length <= self.config.block_size
            request.cache_miss_reason = prefix_cache.TOO_SHORT if short else prefix_cache.NOTHING_CACHED

    def _wanted_checkpoints(self, request: Request, match: Match) -> tuple[int, ...]:
        """Positions at which later requests may want to go on, the most likely first: below the last token (at the end
        itself an identical prompt would miss), before a chat's generation prompt, at a branch, and every interval.
        """
        if not self.config.enable_prefix_caching:
            return ()
        grid, interval, last = self.config.checkpoint_grid, self.config.checkpoint_interval, request.num_tokens - 1
        step = -(-interval // grid) * grid
        every = range((match.position // step + 1) * step, last + 1, step)
        first = (position // grid * grid for position in (last, request.turn_start, match.seen))
        return tuple(dict.fromkeys(p for p in (*first, *reversed(every)) if match.position < p <= last))

    # Pieces.

    def _cut_piece(self, request: Request, read_slot: int, room: _Room, pieces: list[Piece]) -> bool:
        """The next tokens of a prompt, as many as there is room for. False, and nothing taken, where there is none."""
        if not room.rows or (self.config.batch_invariant and not _may_share(request, pieces)):
            return False
        start, end = request.num_computed, request.prefill_length
        if end - start > room.tokens:
            end = (start + room.tokens) // CHUNK * CHUNK
        # Chunks end at multiples of CHUNK, so the first may be a short one.
        end = min(end, (start // CHUNK + room.chunks) * CHUNK)
        if end <= start:
            return False
        spare = room.chunks - (-(-end // CHUNK) - start // CHUNK)
        checkpoints = self._checkpoints_of_piece(request, start, end, spare)
        piece = Piece(request, start, end - start, end == request.prefill_length, read_slot, checkpoints)
        pieces.append(piece)
        room.tokens -= piece.length
        room.rows -= 1
        room.chunks -= len(piece.chunks())
        request.num_computed, request.num_placed = end, len(request.blocks)
        request.num_dispatched += piece.is_last
        for position, slot in checkpoints:
            self._unconfirmed.discard(slot)
            request.unpublished.append((position, slot))
            self.cache.hold(slot)
        # A piece's tokens are known, and every later step runs after it, so what it computes can be shared at once.
        self._publish(request, end)
        return True

    def _checkpoints_of_piece(self, request: Request, start: int, end: int, spare: int) -> tuple[tuple[int, int], ...]:
        """Slots for the wanted positions within a piece; those off the grid of chunks cost one of `spare` chunks."""
        found = []
        for position in request.wanted:
            cut = position % CHUNK != 0 and position != end
            if not start < position <= end or spare < cut:
                continue
            slot = self._take_checkpoint_slot()
            if not slot:
                break
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
            taken = self._hand_over(request, computed, sealed)
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
                self.cache.keep_state(self.cache.node_at(node, position), slot)
        if sealed and computed % size == 0:
            self.cache.keep_state(self.cache.node_at(node, computed), request.slot)
            request.slot = 0
        elif sealed and computed // size == taken:
            rest = tuple(request.tokens(taken * size, computed))
            if self.cache.keep_tail(node, rest, request.blocks[taken], request.slot):
                request.slot = 0
                taken += 1
        return taken

    def _release(self, request: Request, taken: int | None = None) -> None:
        """Gives back what a request holds, but for its first `taken` blocks, which are the cache's."""
        self.allocator.blocks.give(request.blocks[request.num_shared if taken is None else taken :])
        self.allocator.slots.give([slot for _, slot in request.unpublished])
        if request.slot:
            self.allocator.slots.give([request.slot])
        if request.logit_row:
            self.allocator.logit_rows.give([request.logit_row])
        if request.node is not None:
            self.cache.unlock(request.node)
        request.slot, request.logit_row, request.blocks, request.num_shared = 0, 0, [], 0
        request.node, request.detached, request.unpublished, request.wanted = None, False, [], ()
        request.num_computed = request.prefill_length = request.num_cached = request.num_placed = 0

    def preempt(self, request: Request) -> None:
        """Sends a running request back to its place in the queue. Nothing of it is in flight."""
        self._preempting = True
        self.num_preemptions += 1
        request.num_preemptions += 1
        if request.wants_prompt_logprobs:
            request.prompt_logprobs.clear()
        self.running.remove(request)
        self._retire(request, request.num_computed, sealed=True)
        request.status = Status.WAITING
        bisect.insort(self.waiting, request, key=_order)

    # Harvest.

    def confirm(self, copy: Copy, written: bool) -> None:
        """What came of a copy that a plan asked for: `written` if the row was not done before that step.

        To be called before the tokens of that step are committed: a stop string may cut what the copy holds.
        """
        self._unconfirmed.discard(copy.target)
        if written and copy.request.status is Status.RUNNING:
            copy.request.unpublished.append((copy.position, copy.target))
        else:
            self.allocator.slots.give([copy.target])

    def commit(self, request: Request, token_ids: list[int], ended: bool) -> None:
        """Takes what a step emitted for a request: appends its tokens, and finishes it if it has ended.

        `ended` says that the device stopped it with the last of these tokens. Tokens of a request that has finished
        meanwhile (a stop string seen late, an abort) are dropped.
        """
        if request.status is Status.FINISHED or not token_ids:
            return
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
        request.output_token_ids.extend(token_ids)
        if ended:
            # What is in flight for it changes nothing: the state stands before its last token.
            request.num_computed = request.num_tokens - 1
            request.num_dispatched = len(request.output_token_ids)
        stopped = ended and token_ids[-1] in request.stop_token_ids
        # The text of a token that ends the output is shown only where stop strings are.
        shown = token_ids[:-1] if stopped and not request.params.include_stop_str_in_output else token_ids
        began = time.perf_counter()
        request.detokenizer.append(shown)
        self.detokenise_seconds += time.perf_counter() - began
        if request.detokenizer.stop_reason is not None:
            kept = request.detokenizer.num_tokens_kept
            del request.output_token_ids[kept:], request.output_logprobs[kept:]
            self.finish(request, "stop", request.detokenizer.stop_reason, ended=True)
        elif stopped:
            explicit = token_ids[-1] in (request.params.stop_token_ids or ())
            self.finish(request, "stop", token_ids[-1] if explicit else None, ended=True)
        elif ended:
            self.finish(request, "length", ended=True)
        elif request.unpublished:
            self._publish(request, request.num_tokens - 1)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, *, ended: bool = False
    ) -> None:
        """Ends a request, waiting or running, and frees what it holds. Does nothing to one that has finished.

        `ended` says that everything dispatched for it is accounted for in `num_computed`: it has ended on the device,
        or its last token was harvested and did not end it there. A step in flight may still write to its slot and
        blocks; it runs before any step of their next owner.
        """
        if request.finished:
            return
        if request.status is Status.RUNNING:
            self.running.remove(request)
            # Between harvests a step in flight may have ended it or not, and nobody knows how long its state is.
            known = ended or not request.filled or request.num_dispatched == len(request.output_token_ids)
            sealed = known and request.num_computed <= request.num_tokens
            computed = request.num_computed if sealed else min(request.num_computed, request.num_tokens - 1)
            self._retire(request, computed, sealed)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.finished_time = time.monotonic()
        request.detokenizer.finish()

    def reset(self) -> None:
        """After a failure on the device: ends every running request, and forgets everything that was computed."""
        for request in list(self.running):
            self.finish(request, "abort")
        self.allocator.slots.give(self._unconfirmed)
        self._unconfirmed.clear()
        self.cache.reset()

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot, block and logit row is free or held once, by the right holder."""
        blocks, slots = self.cache.check_integrity()
        for request in self.running:
            assert request.slot
            assert request.status is Status.RUNNING
            assert request.node is not None
            assert request.node.end == request.num_shared * self.config.block_size
            assert len(request.blocks) * self.config.block_size >= request.num_computed
            blocks += request.blocks[request.num_shared :]
            slots += [request.slot, *(slot for _, slot in request.unpublished)]
        for request in self.waiting:
            assert request.status is Status.WAITING
            assert not request.slot
            assert not request.blocks
        self.allocator.blocks.check_integrity(blocks)
        self.allocator.slots.check_integrity([*slots, *self._unconfirmed])
        self.allocator.logit_rows.check_integrity([r.logit_row for r in self.running if r.logit_row])
        for queue in (self.waiting, self.running):
            assert [_order(r) for r in queue] == sorted(_order(r) for r in queue), "a queue is out of order"


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _may_share(request: Request, pieces: list[Piece]) -> bool:
    """Whether two requests' pieces run the same program: steps with prompt_logprobs are others."""
    wants = request.params.prompt_logprobs is not None
    return all((piece.request.params.prompt_logprobs is not None) == wants for piece in pieces)
