"""What the scheduler decides and the engine dispatches: one turn in plain ints, no jax."""

import dataclasses
import itertools

from gdnjax.config import CHUNK, LONG_ROWS
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
class Seal:
    """The state of `read_slot`, `position` tokens long, goes to `write_slot`; see SealBatch."""

    read_slot: int
    write_slot: int
    position: int


@dataclasses.dataclass(frozen=True)
class Mark:
    """A seal of this turn is to write a decoding request's checkpoint, if its state has come so far."""

    request: Request
    position: int
    slot: int


@dataclasses.dataclass(frozen=True)
class Spill:
    """Rows of the device's pools, blocks or a slot, go to the host as bundle `bundle`."""

    bundle: int
    is_state: bool
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Restore:
    """A bundle comes back: the row of the device for each of its entries, 0 for those that nobody wants."""

    bundle: int
    is_state: bool
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Moves:
    """What a turn copies between device and host before anything else: bundles are dropped, then states sealed that may
    be among those that leave, then rows spilled as they stand, then bundles restored.
    """

    dropped: tuple[int, ...] = ()
    seals: tuple[Seal, ...] = ()
    spills: tuple[Spill, ...] = ()
    restores: tuple[Restore, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """One turn: moves, then seals in their order, then admissions, then a prefill step, then a decode step.

    Pieces and decoding rows may be empty, not both. What a step emits belongs to the requests named here, whoever owns
    their slots when it arrives.

    growth      by row of `decoding`: what its block table gets, `max_growth` blocks at most.
    bounds      for each row of `decoding`: the most tokens that it may emit, 1 and the drafts that may be verified.
    marks       checkpoints that are among the seals, to be confirmed before what the decode step emits is committed.
    num_drafts  drafts that the decode step has room for in a row.
    moves       between device and host; None: none.
    masked      requests with a structure for which a token is drawn: the i-th has row i + 1 of the masks.
    """

    admitted: list[Admission]
    pieces: list[Piece]
    decoding: list[Request]
    growth: dict[int, list[Growth]]
    bounds: list[int]
    seals: list[Seal]
    marks: list[Mark]
    num_drafts: int
    moves: Moves | None = None
    masked: tuple[Request, ...] = ()

    @property
    def mask_rows(self) -> dict[Request, int]:
        return {request: row for row, request in enumerate(self.masked, start=1)}


def max_growth(num_drafts: int, block_size: int) -> int:
    """Blocks that a row of a decode step may get at once."""
    return -(-(1 + num_drafts) // block_size)


def max_chunks(tokens: int, rows: int) -> int:
    """Rows of the chunk table of a prefill step: whole chunks, a cut one for each of a few rows, and two for good
    measure; and one for each row, where they are many and their pieces short.
    """
    return max(tokens // CHUNK + min(rows, LONG_ROWS), rows) + 2


def num_blocks_for(max_length: int, block_size: int) -> int:
    """Blocks of a request of `max_length` tokens. Its last token is drawn, never fed, and needs no place."""
    return -(-(max_length - 1) // block_size)


def check_fits(max_length: int, prompt_length: int, *, num_blocks: int, block_size: int) -> None:
    """Raises ValueError for a request that could never run in a pool of so many blocks, however long it waited."""
    needed = num_blocks_for(max_length, block_size)
    if needed > num_blocks:
        raise ValueError(
            f"a prompt of {prompt_length} tokens with up to {max_length - prompt_length} output tokens needs "
            f"{needed} KV blocks, the pool has {num_blocks} of {block_size} tokens; "
            "shorten it, lower max_tokens or raise num_kv_blocks"
        )
