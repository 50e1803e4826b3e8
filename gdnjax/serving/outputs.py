"""What a request gives back: frozen, with vLLM's names. Imports no jax."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position, under the model before any sampling parameter.

    `rank` is 1 for the most probable token; None where it was not computed. `decoded_token` is the token's text alone,
    with U+FFFD for a part of a character; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request's prompt, complete or as far as it has come.

    index               0 to n - 1.
    text                what is safe to show: no split character, no part of a possible stop string.
    token_ids           every kept output token, an ending EOS or stop token included.
    cumulative_logprob  sum of the drawn tokens' log-probabilities; None unless logprobs were asked for.
    logprobs            one dictionary per output token: the drawn token and the most probable ones.
    finish_reason       "stop", "length", "abort", or "error" where no token might be drawn any more or its text could
                        not be made; None while the sample runs.
    stop_reason         the stop string or stop token id that ended it, "timeout", or the error in words; None for EOS
                        and every other end.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, and how much of it there was.

    Times are seconds on the clock of time.monotonic: differences mean something, the values alone do not. A time is
    None until the event has happened.

    arrival_time          the request was queued.
    first_scheduled_time  its first prompt tokens were dispatched.
    first_token_time      its first output token reached the host.
    finished_time         its last sample ended.
    num_prompt_tokens     tokens of the prompt.
    num_output_tokens     tokens produced so far, over all n samples.
    num_preemptions       times it lost its slot and had to be computed again.

    With speculation:
    num_draft_tokens           drafts that were verified, over all n samples.
    num_accepted_draft_tokens  those of them that were kept.
    num_decode_steps           decode steps that its samples had a part in, each counted for itself.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_decode_steps: int = 0

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Share of the drafts that were kept; None where nothing was drafted."""
        return acceptance_rate(self.num_accepted_draft_tokens, self.num_draft_tokens)

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens of a decode step on average, 1 without drafts; None before the first."""
        return mean_acceptance_length(self.num_accepted_draft_tokens, self.num_decode_steps)

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival until the first prompt tokens were dispatched."""
        return _elapsed(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival until the first output token (TTFT)."""
        return _elapsed(self.arrival_time, self.first_token_time)

    @property
    def latency(self) -> float | None:
        """Seconds from arrival until the end."""
        return _elapsed(self.arrival_time, self.finished_time)

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per output token after the first (TPOT); None before the end and for fewer than two tokens."""
        decode_time = _elapsed(self.first_token_time, self.finished_time)
        if decode_time is None or self.num_output_tokens < 2:
            return None
        return decode_time / (self.num_output_tokens - 1)


def acceptance_rate(accepted: int, drafted: int) -> float | None:
    """Share of drafts that were kept; None where nothing was drafted."""
    return accepted / drafted if drafted else None


def mean_acceptance_length(accepted: int, steps: int) -> float | None:
    """Tokens of a decode step on average: one, and the drafts that it kept; None without a step."""
    return 1 + accepted / steps if steps else None


def _elapsed(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request and its samples, complete or as far as they have come.

    request_id         the engine's or the caller's name for the request.
    prompt             its text, of a chat that which the template gave; None where token ids were given.
    prompt_token_ids   its tokens.
    prompt_logprobs    one dictionary per prompt token, None for the first; None unless asked for.
    outputs            the n samples, by index.
    finished           whether every sample has ended.
    metrics            its times; None where they were not kept.
    num_cached_tokens  prompt tokens that the prefix cache saved from being computed.
    cache_miss_reason  why there were not more of them; None where everything that was cached was used.
    forced_acceptance  the outputs are not the model's: spec_acceptance_length was set, which keeps drafts unseen.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    cache_miss_reason: str | None = None
    forced_acceptance: bool = False


class StreamOutput(NamedTuple):
    """What has come of a stream since its last piece. `str()` of it is its text.

    A tuple, since one is made for every token of every stream.

    text           newly released text, possibly empty.
    token_ids      the tokens that came with it.
    finish_reason  as of CompletionOutput, on a sample's last piece; None before.
    output         on the last piece of the last sample, the whole RequestOutput.
    index          which of the n samples it is of.
    logprobs       of `token_ids`, one dictionary each as in CompletionOutput; None unless asked for.
    stop_reason    as of CompletionOutput, on a sample's last piece.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    output: RequestOutput | None = None
    index: int = 0
    logprobs: list[dict[int, Logprob]] | None = None
    stop_reason: int | str | None = None

    def __str__(self) -> str:
        return self.text
