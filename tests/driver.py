"""The steps driven by hand: the test says which slot, block and checkpoint; no engine and no scheduler in between."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gdnjax.batch import AdmitBatch, CopyBatch, DecodeBatch, Emitted, PrefillBatch
from gdnjax.config import CHUNK, EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.sampling_params import MAX_STOP_TOKENS
from gdnjax.sharding import make_mesh, shardings_of
from gdnjax.state import NO_TOKEN, empty_state
from gdnjax.step import StepOptions, build_steps

BLOCK = 16
ROWS, TOKENS, CHUNKS = 3, 192, 16
"""The one bucket of every step, so that each is compiled once."""
NUM_SLOTS, NUM_BLOCKS, MAX_MODEL_LEN = 12, 40, 176


@dataclasses.dataclass(frozen=True)
class Admission:
    """A slot handed out. `copy` is a block and the block that gets what is in it."""

    slot: int
    length: int = 0
    copy: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that follow the first `behind` of a slot's sequence; they read the state of `read_slot`, or of `slot`.

    `checkpoints` are positions in the sequence and the slots that keep what stands there, 0 for a cut alone. Before
    `kv_start` keys and values are there already.
    """

    slot: int
    blocks: Sequence[int]
    tokens: Sequence[int]
    behind: int = 0
    read_slot: int | None = None
    checkpoints: Mapping[int, int] = dataclasses.field(default_factory=dict)
    kv_start: int = 0


def pack_admissions(admissions: Sequence[Admission], *, table_width: int) -> AdmitBatch:
    """Greedy requests without an end. Their block tables are null: a prefill step brings them."""

    def column(values, dtype=np.int32):
        return np.array([*values, *[0] * (ROWS - len(admissions))], dtype)

    return AdmitBatch(
        slot=column(a.slot for a in admissions),
        length=column(a.length for a in admissions),
        max_length=np.full(ROWS, 1 << 20, np.int32),
        min_length=np.zeros(ROWS, np.int32),
        stop_tokens=np.full((ROWS, MAX_STOP_TOKENS), NO_TOKEN, np.int32),
        block_table=np.zeros((ROWS, table_width), np.int32),
        temperature=np.zeros(ROWS, np.float32),
        top_k=np.zeros(ROWS, np.int32),
        top_p=np.ones(ROWS, np.float32),
        min_p=np.zeros(ROWS, np.float32),
        seed=np.zeros((ROWS, 2), np.uint32),
        logit_row=np.zeros(ROWS, np.int32),
        copy_from=column(a.copy[0] for a in admissions),
        copy_to=column(a.copy[1] for a in admissions),
    )


def pack_pieces(pieces: Sequence[Piece], *, table_width: int) -> PrefillBatch:
    """Pieces one after another, each the last of its prompt."""
    rows = {name: np.zeros(ROWS, np.int32) for name in ("slot", "start", "length", "read_slot", "kv_start")}
    packed = {name: np.zeros(TOKENS, np.int32) for name in ("tokens", "token_row")}
    block_table = np.zeros((ROWS, table_width), np.int32)
    valid = np.zeros(TOKENS, bool)
    table, place = [], 0
    for row, piece in enumerate(pieces):
        size = len(piece.tokens)
        here = slice(place, place + size)
        packed["tokens"][here], packed["token_row"][here], valid[here] = piece.tokens, row, True
        rows["slot"][row], rows["start"][row], rows["length"][row] = piece.slot, place, size
        rows["read_slot"][row] = piece.slot if piece.read_slot is None else piece.read_slot
        rows["kv_start"][row] = piece.kv_start
        block_table[row, : len(piece.blocks)] = piece.blocks
        end = piece.behind + size
        grid = range(piece.behind - piece.behind % CHUNK + CHUNK, end, CHUNK)
        cuts = sorted({piece.behind, *grid, *piece.checkpoints, end})
        for first, last in itertools.pairwise(cuts):
            table.append((row, place + first - piece.behind, last - first, piece.checkpoints.get(last, 0)))
        place += size
    table += [(0, 0, 0, 0)] * (CHUNKS - len(table))
    chunk_row, chunk_start, chunk_length, checkpoint = np.array(table, np.int32).T
    return PrefillBatch(
        **rows,
        **packed,
        token_valid=valid,
        is_last=rows["length"] > 0,
        chunk_row=chunk_row,
        chunk_start=chunk_start,
        chunk_length=chunk_length,
        target=np.full(TOKENS, NO_TOKEN, np.int32),
        block_table=block_table,
        chunk_checkpoint=checkpoint,
    )


def pack_copies(pairs: Sequence[tuple[int, int]], *, room: int = 4, count: int | None = None) -> CopyBatch:
    """Pairs of source and target, of which `count` (all) are to be copied."""
    padded = np.array([*pairs, *[(0, 0)] * (room - len(pairs))], np.int32)
    return CopyBatch(source=padded[:, 0], target=padded[:, 1], count=np.int32(len(pairs) if count is None else count))


class Driver:
    """A model of any kind over pools of its own. Steps are compiled at first use."""

    def __init__(self, model, params, state_layout: str):
        self.model, self.params = model, params
        self.options = StepOptions(state_layout=state_layout)
        config = EngineConfig(max_num_seqs=4, block_size=BLOCK, tensor_parallel_size=model.tp)
        geometry = model.geometry(BLOCK, "float32")
        plan = MemoryPlan.of_counts(geometry, num_slots=NUM_SLOTS, num_blocks=NUM_BLOCKS, num_logit_rows=1)
        self.mesh = make_mesh(model.tp)
        empty = jax.eval_shape(lambda: empty_state(geometry, plan, config, MAX_MODEL_LEN))
        make = jax.jit(
            lambda: empty_state(geometry, plan, config, MAX_MODEL_LEN), out_shardings=shardings_of(empty, self.mesh)
        )
        self.state = make()
        self.table_width = self.state.slots.block_table.shape[1]
        self.steps = build_steps(model, self.mesh, self.options, params, self.state)

    def poison(self) -> None:
        """Garbage in every pool, NaN where it is a float; what the device knows of slots stays."""
        numbers = np.random.default_rng(0)

        def garbage(leaf):
            if np.issubdtype(leaf.dtype, np.floating):
                values = np.full(leaf.shape, np.nan, leaf.dtype)
            else:
                values = numbers.integers(0, 2 if leaf.dtype == np.int8 else 1 << 30, leaf.shape).astype(leaf.dtype)
            return jax.device_put(values, leaf.sharding)

        state = self.state
        slots = dataclasses.replace(state.slots, hidden=garbage(state.slots.hidden))
        gdn, kv = jax.tree.map(garbage, (state.gdn, state.kv))
        self.state = dataclasses.replace(state, gdn=gdn, kv=kv, slots=slots)

    def admit(self, *admissions: Admission) -> None:
        self.state = self.steps.admit(self.state, pack_admissions(admissions, table_width=self.table_width))

    def prefill(self, *pieces: Piece) -> Emitted:
        batch = pack_pieces(pieces, table_width=self.table_width)
        self.state, emitted = self.steps.prefill(self.options)(self.params, self.state, batch)
        return jax.device_get(emitted)

    def decode(self, *slots: int, grown: Mapping[int, tuple[int, int]] | None = None) -> list[int]:
        """The next token of each slot. `grown`: for a slot, an index of its table and the block that goes there."""
        padded = [*slots, *[0] * (ROWS - len(slots))]
        pairs = [(grown or {}).get(slot, (self.table_width, 0)) for slot in padded]
        index, block = np.array(pairs, np.int32).T
        batch = DecodeBatch(slot=np.array(padded, np.int32), grown_index=index, grown_block=block)
        self.state, emitted = self.steps.decode(self.options)(self.params, self.state, batch)
        return jax.device_get(emitted).tokens[: len(slots), 0].tolist()

    def copy_rows(self, *pairs: tuple[int, int], count: int | None = None) -> None:
        self.state = self.steps.copy_rows(self.state, pack_copies(pairs, count=count))

    def row(self, slot: int) -> dict[str, np.ndarray]:
        """Copies of what a slot knows of its sequence."""
        gdn, slots = jax.device_get((self.state.gdn, self.state.slots))
        return {
            "ssm": gdn.ssm[:, slot].copy(),
            "conv": gdn.conv[:, slot].copy(),
            "layout": gdn.layout[slot].copy(),
            "hidden": slots.hidden[slot].copy(),
        }
