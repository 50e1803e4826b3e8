"""A sample on its way through the engine: host state only, plain ints and lists."""

import dataclasses
import enum

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.detokenizer import Detokenizer


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence: a prompt and what it has produced. `n` samples of one prompt are `n` of these.

    max_length      prompt and output tokens at which it ends: max_tokens, or the model's length if that is shorter.
    stop_token_ids  everything that ends it on the device, EOS included unless ignored.
    seed            64 bits that key its noise.
    slot, blocks, logit_row   what it holds while RUNNING; 0 and empty otherwise.
    num_prefilled   prompt tokens dispatched so far.
    num_dispatched  output tokens dispatched so far; the host learns of them one step late.
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

    status: Status = Status.WAITING
    slot: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    logit_row: int = 0
    num_prefilled: int = 0
    num_dispatched: int = 0

    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    output_logprobs: list = dataclasses.field(default_factory=list)
    prompt_logprobs: list = dataclasses.field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def prompt_dispatched(self) -> bool:
        """Whether every prompt token has been dispatched, and with the last of them the first output token."""
        return self.num_prefilled == self.prompt_length

    @property
    def may_decode(self) -> bool:
        """Whether another output token may be dispatched."""
        return self.prompt_dispatched and self.prompt_length + self.num_dispatched < self.max_length
