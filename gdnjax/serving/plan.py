"""What the scheduler decides and the engine dispatches: one turn in plain ints, no jax."""

import dataclasses
import itertools

from gdnjax.config import CHUNK
from gdnjax.serving.request import Request


@dataclasses.dataclass(frozen=True)
class Admission:
    """A request takes over its slot with `position` tokens behind it; block `copy_from` is copied to `copy_to`."""

    request: Request
    position: int
    copy_from: int
    copy_to: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens `start` to `start + length` of a request; `is_last` if nothing is left to prefill after them.

    read_slot    where the state before the piece stands: the request's own slot, or a checkpoint that it forks.
    checkpoints  (position, slot), ascending: states that the step keeps on its way.
    """

    request: Request
    start: int
    length: int
    is_last: bool
    read_slot: int
    checkpoints: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.length

    def chunks(self) -> list[tuple[int, int, int]]:
        """(start, length, checkpoint slot) of its chunks, cut at absolute multiples of CHUNK and at checkpoints."""
        slots = dict(self.checkpoints)
        cuts = sorted({self.end, *slots, *range(-(-(self.start + 1) // CHUNK) * CHUNK, self.end, CHUNK)})
        return [(a, b - a, slots.get(b, 0)) for a, b in itertools.pairwise([self.start, *cuts])]


@dataclasses.dataclass(frozen=True)
class Growth:
    """A request's block table gets `block` as its entry `index`."""

    index: int
    block: int


@dataclasses.dataclass(frozen=True)
class Copy:
    """After the decode step the request's state, `position` tokens long, is copied to the checkpoint slot `target`."""

    request: Request
    position: int
    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One turn: admissions, then a prefill step, then a decode step, then copies of states that it reached.

    `growth` is by row of `decoding`. Pieces and decoding rows may be empty, not both. What a step emits belongs to the
    requests named here, whoever owns their slots when it arrives.
    """

    admitted: list[Admission]
    pieces: list[Piece]
    decoding: list[Request]
    growth: dict[int, Growth]
    copies: list[Copy]


def max_chunks(tokens: int, rows: int) -> int:
    """Rows of the chunk table of a prefill step: whole chunks, a cut one for each row, and two for good measure."""
    return tokens // CHUNK + rows + 2
