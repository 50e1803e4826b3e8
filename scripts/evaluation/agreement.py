"""Whether two cells give the same tokens, and if not, whether rounding explains it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gdnjax import LLM

NEAR_TIE = 1e-3
"""In logits. Sums in another order move a float32 log-probability by up to 4e-6 in the small models of the tests, by
some 1e-4 where logits are tens and layers are many; the weakest of the faults that the tests inject moves one by 0.06.
The bound lies between."""

Judge = Callable[[int, int, int, int], float]
"""(problem, position, token, other token) -> how far the worse of the two tokens is below the best logit there."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two cells first part on a problem.

    position  of the output token; what is before it is common.
    tokens    the reference's and the other's; None where a cell had ended already.
    gap       how far the worse token's logit is below the best; None where a cell had ended, or nobody looked.
    """

    problem: int
    position: int
    tokens: tuple[int | None, int | None]
    gap: float | None

    @property
    def near_tie(self) -> bool:
        return self.gap is not None and self.gap < NEAR_TIE


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first position at which two sequences differ, or one has ended; None where they are equal."""
    for position, (token, other) in enumerate(zip(left, right, strict=False)):
        if token != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def compare(
    reference: Sequence[Sequence[int]], others: Sequence[Sequence[int]], judge: Judge | None = None
) -> list[Difference]:
    """The problems on which two cells differ. Without a judge nothing is a near tie.

    Beyond the first differing token two sequences continue different texts, so nothing is compared there.
    """
    differences = []
    for problem, (left, right) in enumerate(zip(reference, others, strict=True)):
        position = first_difference(left, right)
        if position is None:
            continue
        token = left[position] if position < len(left) else None
        other = right[position] if position < len(right) else None
        gap = None
        if judge is not None and token is not None and other is not None:
            gap = judge(problem, position, token, other)
        differences.append(Difference(problem, position, (token, other), gap))
    return differences


def gap_of(logits: Sequence[float], token: int, other: int) -> float:
    """How far the worse of two tokens is below the best of all. Small only where both are nearly the best."""
    return float(max(logits)) - min(float(logits[token]), float(logits[other]))


class Teacher:
    """A Judge that computes the logits behind the common tokens by one prefill, without the engine."""

    def __init__(self, loaded: "LLM", prompts: Sequence[list[int]], reference: Sequence[Sequence[int]]):
        import jax

        from gdnjax import full_logits, sharding
        from gdnjax.models import partition

        def last_logits(params, tokens, length):
            return full_logits(loaded.model, params, tokens, length)[length - 1]

        specs = partition.specs_of(loaded.params, expert_parallel=loaded.model.expert_parallel)
        # Ranks have parts of the vocabulary; what pads it is -inf.
        whole, of_rank = sharding.P(), sharding.P(sharding.AXIS)
        self._last_logits = jax.jit(sharding.shard_step(last_logits, loaded.mesh, (specs, whole, whole), of_rank))
        self._params = loaded.params
        self._prompts, self._reference = prompts, reference

    def __call__(self, problem: int, position: int, token: int, other: int) -> float:
        import numpy as np

        from .cells import CHUNK, doubled

        prefix = [*self._prompts[problem], *self._reference[problem][:position]]
        padded = np.zeros(doubled(CHUNK, len(prefix)), np.int32)
        padded[: len(prefix)] = prefix
        logits = np.asarray(self._last_logits(self._params, padded, np.int32(len(prefix))))
        return gap_of(logits.tolist(), token, other)
