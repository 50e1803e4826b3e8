"""Who runs in the next step: first come, first served, with continuous batching. Plain ints, no jax.

A request is admitted when its slot and every block it can ever use are free, so a running one never waits for memory.
Prompts longer than a step are cut at absolute multiples of CHUNK; other requests decode between the pieces.
"""

import collections
import dataclasses
import time

from gdnjax.config import CHUNK, EngineConfig
from gdnjax.serving.allocator import Allocator
from gdnjax.serving.request import Request, Status


@dataclasses.dataclass(frozen=True)
class Piece:
    """Prompt tokens `start` to `start + length` of a request; `is_last` if the prompt ends there."""

    request: Request
    start: int
    length: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """One turn: admissions, then a prefill step, then a decode step. Any of them may be empty, not all.

    What a step emits belongs to the requests named here, whoever owns their slots when it arrives.
    """

    admitted: list[Request]
    pieces: list[Piece]
    decoding: list[Request]


class Scheduler:
    """Holds every request that has not finished."""

    def __init__(self, config: EngineConfig, allocator: Allocator):
        self.config = config
        self.allocator = allocator
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def num_blocks_for(self, max_length: int) -> int:
        """Blocks of a request of `max_length` tokens. Its last token is drawn, never fed, and needs no place."""
        return -(-(max_length - 1) // self.config.block_size)

    def check_fits(self, max_length: int, prompt_length: int) -> None:
        """Raises ValueError for a request that could never be admitted, however long it waited."""
        needed = self.num_blocks_for(max_length)
        if needed > self.allocator.num_blocks:
            raise ValueError(
                f"a prompt of {prompt_length} tokens with up to {max_length - prompt_length} output tokens needs "
                f"{needed} KV blocks, the pool has {self.allocator.num_blocks} of {self.config.block_size} tokens; "
                "shorten it, lower max_tokens or raise num_kv_blocks"
            )

    def add(self, request: Request) -> None:
        """Queues a request that `check_fits` let pass."""
        self.waiting.append(request)

    def plan(self) -> Plan | None:
        """What to dispatch next, with everything it needs reserved; None if nothing can be dispatched now."""
        decoding = [request for request in self.running if request.may_decode]
        admitted = self._admit()
        pieces = self._cut_pieces()
        for request in decoding:
            request.num_dispatched += 1
        if not (pieces or decoding):
            return None
        return Plan(admitted, pieces, decoding)

    def _admit(self) -> list[Request]:
        """Admits from the head of the queue only, so nobody is overtaken, and no more than the step can start on."""
        unfilled = [request for request in self.running if not request.prompt_dispatched]
        budget = self.config.max_num_batched_tokens - sum(r.prompt_length - r.num_prefilled for r in unfilled)
        rows = self.config.prefill_rows - len(unfilled)
        admitted: list[Request] = []
        while self.waiting and budget > 0 and len(admitted) < rows:
            request = self.waiting[0]
            grant = self.allocator.grant(self.num_blocks_for(request.max_length), request.params.needs_logit_row)
            if grant is None:
                break
            self.waiting.popleft()
            request.slot, request.blocks, request.logit_row = grant.slot, grant.blocks, grant.logit_row
            request.status = Status.RUNNING
            request.first_scheduled_time = time.monotonic()
            self.running.append(request)
            admitted.append(request)
            budget -= request.prompt_length
        return admitted

    def _cut_pieces(self) -> list[Piece]:
        """The next tokens of unfinished prompts, in order of arrival, within the step's tokens and rows."""
        budget = self.config.max_num_batched_tokens
        pieces: list[Piece] = []
        for request in self.running:
            if request.prompt_dispatched or len(pieces) == self.config.prefill_rows:
                continue
            start, rest = request.num_prefilled, request.prompt_length - request.num_prefilled
            length = rest if rest <= budget else budget // CHUNK * CHUNK
            if length == 0:
                break
            budget -= length
            request.num_prefilled += length
            if request.prompt_dispatched:
                request.num_dispatched = 1
            pieces.append(Piece(request, start, length, request.prompt_dispatched))
        return pieces

    def commit(self, request: Request, token_ids: list[int], ended: bool) -> None:
        """Takes what a step emitted for a request: appends its tokens, and finishes it if it has ended.

        `ended` says that the device stopped it with the last of these tokens. Tokens of a request that has finished
        meanwhile (a stop string seen late, an abort) are dropped.
        """
        if request.finished or not token_ids:
            return
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
        request.output_token_ids.extend(token_ids)
        stopped = ended and token_ids[-1] in request.stop_token_ids
        # The text of a token that ends the output is shown only where stop strings are.
        shown = token_ids[:-1] if stopped and not request.params.include_stop_str_in_output else token_ids
        request.detokenizer.append(shown)
        if request.detokenizer.stop_reason is not None:
            kept = request.detokenizer.num_tokens_kept
            del request.output_token_ids[kept:]
            self.finish(request, "stop", request.detokenizer.stop_reason)
        elif stopped:
            explicit = token_ids[-1] in (request.params.stop_token_ids or ())
            self.finish(request, "stop", token_ids[-1] if explicit else None)
        elif ended:
            self.finish(request, "length")

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends a request, waiting or running, and frees what it holds. Does nothing to one that has finished.

        A step in flight may still write to its slot and blocks; it runs before any step of their next owner.
        """
        if request.finished:
            return
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.allocator.release(request.slot)
        else:
            self.waiting.remove(request)
        request.slot, request.blocks, request.logit_row = 0, [], 0
        request.status = Status.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.finished_time = time.monotonic()
        request.detokenizer.finish()

    def check_integrity(self) -> None:
        """Raises AssertionError unless running requests hold exactly what the allocator says is held."""
        self.allocator.check_integrity()
        held = sorted(request.slot for request in self.running)
        free = self.allocator.num_free_slots
        if len(set(held)) != len(held) or 0 in held or len(held) + free != self.allocator.num_slots:
            raise AssertionError(f"running requests hold slots {held}, and {free} are free")
        for request in self.running:
            if len(request.blocks) != self.num_blocks_for(request.max_length):
                raise AssertionError(f"{request.request_id} holds {len(request.blocks)} blocks")
