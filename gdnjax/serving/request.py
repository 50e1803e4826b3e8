"""A sample on its way through the engine: host state only, plain ints and lists."""

import dataclasses
import enum
from typing import Any

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.detokenizer import Detokenizer
from gdnjax.serving.outputs import Logprob
from gdnjax.serving.radix_tree import Node
from gdnjax.serving.structured import Matcher


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """One sequence: a prompt and what it has produced. `n` samples of one prompt are `n` of these.

    max_length      prompt and output tokens at which it ends: max_tokens, or the model's length if that is shorter.
    stop_token_ids  everything that ends it on the device, EOS included unless ignored.
    seed            64 bits that key its noise.
    priority        places in the queue, in steps of `scheduler.PLACES_PER_PRIORITY`; lower comes first.
    deadline        `time.monotonic()` at which it is aborted; None: never.
    turn_start      prompt tokens before a chat's generation prompt, where the next turn of the chat parts; 0: no chat.
    matcher         where it stands in the grammar of its structured_outputs; None: it has none.
    system_end      prompt tokens that other chats with the same system messages and tools begin with, too; 0: no chat.
    order           its place in the queue, (place, arrival): what comes first is admitted first and preempted last.

    While it runs it holds `slot`, `logit_row`, `count_row` and `blocks`, of which the first `num_shared` belong to the
    prefix cache, up to `node`. `unpublished` are (position, slot) of checkpoints that the cache has not taken over yet;
    a request that is `detached` found somebody else's blocks in the place of its own, and publishes when it ends.
    `marks` are (position, slot) of checkpoints that decode steps are asked for and that have not been seen written yet.

    prefill_length  tokens to prefill: the prompt, and what it had produced when it was preempted.
    num_settled     tokens that the device has been fed, as far as the host knows: those of dispatched pieces and of
                    harvested decode steps.
    num_ahead       the most that the decode steps in flight feed beyond.
    num_steps       decode steps in flight.
    num_folded      tokens in the recurrent state once nothing is in flight. The rest of `num_settled` is pending.
    next_mark       where the next checkpoint is wanted as it decodes.
    num_cached      tokens whose KV was cached when it was admitted; their blocks are not its to write.
    num_placed      blocks that the device's block table holds.

    num_committed   output tokens that are its own for good. What stands behind them came with a turn that is not over.
    half_done       a commit or its end is under way; where it stays so, it was cut off.

    num_decode_steps, num_draft_tokens and num_accepted_tokens count over its life: the decode steps that it had a part
    in, the drafts that they verified, and those of them that were kept.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_length: int
    stop_token_ids: tuple[int, ...]
    seed: int
    detokenizer: Detokenizer
    bad_words: list[list[int]] = dataclasses.field(default_factory=list)
    index: int = 0
    arrival_time: float = 0.0
    priority: int = 0
    deadline: float | None = None
    turn_start: int = 0
    system_end: int = 0
    matcher: Matcher | None = None
    order: tuple[int, int] = (0, 0)

    status: Status = Status.WAITING
    slot: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    logit_row: int = 0
    count_row: int = 0
    num_shared: int = 0
    node: Node | None = None
    detached: bool = False
    unpublished: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    wanted: tuple[int, ...] = ()
    prefill_length: int = 0
    num_settled: int = 0
    num_ahead: int = 0
    num_steps: int = 0
    num_folded: int = 0
    marks: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    next_mark: int = 0
    num_cached: int = 0
    num_placed: int = 0
    num_committed: int = 0
    half_done: bool = False

    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    output_logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int | None = None
    cache_miss_reason: str | None = None
    num_preemptions: int = 0
    num_decode_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    _block_keys: list[tuple[int, ...]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows: the prompt and the output so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def num_computed(self) -> int:
        """The most tokens that the device has been fed once everything in flight has run."""
        # Every token but the last is fed, once.
        return min(self.num_settled + self.num_ahead, self.max_length - 1)

    @property
    def filled(self) -> bool:
        """Whether every token to prefill has been dispatched, and with the last of them the next output token."""
        return self.num_settled >= self.prefill_length > 0

    @property
    def may_decode(self) -> bool:
        """Of a running request: whether another decode step may be dispatched. Each feeds at least one token."""
        return self.prefill_length <= self.num_settled and self.num_settled + self.num_steps < self.max_length - 1

    @property
    def is_known(self) -> bool:
        """Of a running request that is filled: whether the host knows every token that was drawn for it."""
        return not self.num_steps and self.num_settled < self.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed: they need every position, cached or not."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length - 1

    @property
    def cumulative_logprob(self) -> float:
        """Sum over the output tokens, as far as their log-probabilities were asked for."""
        pairs = zip(self.output_token_ids, self.output_logprobs, strict=False)
        return sum(entries[token].logprob for token, entries in pairs)

    def logprobs_since(self, start: int) -> list[dict[int, Any]] | None:
        """Log-probabilities of the output tokens from `start` on; None unless they were asked for."""
        return None if self.params.logprobs is None else self.output_logprobs[start:]

    def let_go(self) -> None:
        """As it was before it was admitted: it holds nothing, and nothing of it is computed."""
        self.slot, self.logit_row, self.count_row, self.blocks, self.num_shared = 0, 0, 0, [], 0
        self.node, self.detached, self.unpublished, self.wanted = None, False, [], ()
        self.marks, self.next_mark = [], 0
        self.num_settled = self.num_ahead = self.num_steps = self.num_folded = 0
        self.prefill_length = self.num_cached = self.num_placed = 0

    def roll_back(self) -> None:
        """Undoes what a turn that was cut off has done to its output. What is drawn again will be the same."""
        if self.wants_prompt_logprobs:
            self.prompt_logprobs.clear()
        if self.half_done:
            self.detokenizer = self.detokenizer.fresh()
            del self.output_token_ids[self.num_committed :]
            self._block_keys.clear()
            self.detokenizer.append(self.output_token_ids)
            if self.matcher is not None:
                self.matcher.follow(self.output_token_ids)
        del self.output_logprobs[self.num_committed :]
        self.half_done = False

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens `start` to `stop` of prompt and output."""
        prompt = len(self.prompt_token_ids)
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(0, start - prompt) : stop - prompt]

    def block_keys(self, count: int, block_size: int) -> list[tuple[int, ...]]:
        """The tokens of each of the first `count` blocks, all of which are known. Built once, block by block."""
        keys = self._block_keys
        while len(keys) < count:
            start = len(keys) * block_size
            keys.append(tuple(self.tokens(start, start + block_size)))
        return keys[:count]
