"""What the answers of both endpoints have in common."""

from collections.abc import Sequence
from typing import Any

from gdnjax.serving.outputs import RequestOutput
from gdnjax.serving.server.service import Run


def head(run: Run, kind: str, model: str) -> dict[str, Any]:
    """The first fields of an answer, or of each of its chunks."""
    return {"id": run.answer_id, "object": kind, "created": run.created, "model": model}


def usage(
    num_prompt: int, num_output: int, *, num_cached: int | None = None, num_reasoning: int | None = None
) -> dict[str, Any]:
    """OpenAI's usage. What is not known yet is left out."""
    found: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    if num_cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": num_cached}
    if num_reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
    return found


def whole_usage(outputs: Sequence[RequestOutput], num_output: int, num_reasoning: int | None = None) -> dict[str, Any]:
    """The usage of prompts whose samples have all ended, with `num_output` tokens that are shown."""
    return usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        num_output,
        num_cached=sum(output.num_cached_tokens for output in outputs),
        num_reasoning=num_reasoning,
    )


def num_output_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)


def times(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """How long the first of the prompts waited, in milliseconds, as load generators read it."""
    metrics = outputs[0].metrics
    if metrics is None or metrics.queue_time is None or metrics.time_to_first_token is None:
        return {}
    return {
        "queue_time_ms": round(1e3 * metrics.queue_time, 3),
        "time_to_first_token_ms": round(1e3 * metrics.time_to_first_token, 3),
    }


class Meter:
    """Counts the tokens of a stream, for the usage of its chunks."""

    def __init__(self, num_prompt: int, *, every: bool):
        self._num_prompt, self._every = num_prompt, every
        self.num_output = 0

    def note(self, chunk: dict[str, Any]) -> None:
        """Gives a chunk the usage so far, if every chunk is to have it; else null, as OpenAI does."""
        chunk["usage"] = usage(self._num_prompt, self.num_output) if self._every else None
