"""What a caller asked for and gets back: the samples of one prompt, and how urgent they are."""

import dataclasses
import math
import numbers
import time
from collections.abc import Sequence

from gdnjax.serving.outputs import CompletionOutput, RequestMetrics, RequestOutput
from gdnjax.serving.request import Request


@dataclasses.dataclass(frozen=True)
class Urgency:
    """Place in the queue, and the `time.monotonic()` after which the caller does not wait any longer."""

    priority: int = 0
    deadline: float | None = None


def urgencies(count: int, priority: int | Sequence[int], timeout: float | None) -> list[Urgency]:
    """One for each of `count` prompts. `timeout` is in seconds from now. Raises ValueError for what is neither."""
    if timeout is not None and (not isinstance(timeout, numbers.Real) or math.isnan(timeout) or timeout <= 0):
        raise ValueError(f"timeout must be a number of seconds above 0, or None, got {timeout!r}")
    priorities = [priority] * count if isinstance(priority, numbers.Integral) else priority
    if isinstance(priorities, str | bytes) or not isinstance(priorities, Sequence):
        raise ValueError(f"priority must be an integer or a list of them, got {priority!r}")
    if len(priorities) != count:
        raise ValueError(f"{count} prompts but {len(priorities)} priorities; give one for all or one each")
    for value in priorities:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ValueError(f"priority must be an integer, got {value!r}")
    deadline = None if timeout is None else time.monotonic() + timeout
    return [Urgency(int(value), deadline) for value in priorities]


@dataclasses.dataclass(frozen=True, eq=False)
class Submission:
    """The samples of one prompt on their way; `output()` is what they have come to so far.

    `forced_acceptance`: the engine keeps drafts unseen (spec_acceptance_length), and the output has to say so.
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    requests: list[Request]
    forced_acceptance: bool = False

    @property
    def finished(self) -> bool:
        return all(request.finished for request in self.requests)

    def output(self) -> RequestOutput:
        first = self.requests[0]
        times = [request.first_token_time for request in self.requests if request.first_token_time is not None]
        ends = [request.finished_time for request in self.requests if request.finished_time is not None]
        metrics = RequestMetrics(
            arrival_time=first.arrival_time,
            first_scheduled_time=first.first_scheduled_time,
            first_token_time=min(times, default=None),
            finished_time=max(ends) if self.finished else None,
            num_prompt_tokens=len(self.token_ids),
            num_output_tokens=sum(len(request.output_token_ids) for request in self.requests),
            num_preemptions=sum(request.num_preemptions for request in self.requests),
            num_draft_tokens=sum(request.num_draft_tokens for request in self.requests),
            num_accepted_draft_tokens=sum(request.num_accepted_tokens for request in self.requests),
            num_decode_steps=sum(request.num_decode_steps for request in self.requests),
        )
        wants_prompt = first.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=tuple(self.token_ids),
            prompt_logprobs=[None, *first.prompt_logprobs] if wants_prompt else None,
            outputs=tuple(_completion(request) for request in self.requests),
            finished=self.finished,
            metrics=metrics,
            num_cached_tokens=first.num_cached_tokens or 0,
            cache_miss_reason=first.cache_miss_reason,
            forced_acceptance=self.forced_acceptance,
        )


def _completion(request: Request) -> CompletionOutput:
    wanted = request.params.logprobs is not None
    return CompletionOutput(
        index=request.index,
        text=request.detokenizer.text,
        token_ids=tuple(request.output_token_ids),
        cumulative_logprob=request.cumulative_logprob if wanted else None,
        logprobs=list(request.output_logprobs) if wanted else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
