"""The steps driven by hand: the test says which slot, block and checkpoint; no engine and no scheduler in between."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gdnjax.batch import AdmitBatch, DecodeBatch, Emitted, PrefillBatch, SealBatch
from gdnjax.cache import LAYOUT
from gdnjax.config import CHUNK, DELTA, EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import geometry_of
from gdnjax.sampling_params import MAX_STOP_TOKENS
from gdnjax.sharding import make_mesh, path_name
from gdnjax.state import NO_TOKEN, empty_state, shardings_of
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
        repetition=np.ones(ROWS, np.float32),
        frequency=np.zeros(ROWS, np.float32),
        presence=np.zeros(ROWS, np.float32),
        count_row=np.zeros(ROWS, np.int32),
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


def pack_seals(seals: Sequence[tuple[int, int, int]], *, room: int = 4, count: int | None = None) -> SealBatch:
    """(slot to read, slot to write, position), of which `count` (all) are looked at."""
    padded = np.array([*seals, *[(0, 0, 0)] * (room - len(seals))], np.int32)
    read_slot, write_slot, position = padded.T
    number = np.int32(len(seals) if count is None else count)
    return SealBatch(read_slot=read_slot, write_slot=write_slot, position=position, count=number)


class Driver:
    """A model of any kind over pools of its own. Steps are compiled at first use.

    With `num_speculative_tokens` the model has to have a head: steps draft so many tokens and verify them.
    """

    def __init__(self, model, params, state_layout: str, num_speculative_tokens: int = 0, kv_cache_dtype: str = "auto"):
        self.model, self.params = model, params
        self.options = StepOptions(state_layout=state_layout, num_drafts=num_speculative_tokens)
        config = EngineConfig(
            max_num_seqs=4,
            block_size=BLOCK,
            tensor_parallel_size=model.tp,
            num_speculative_tokens=num_speculative_tokens,
        )
        geometry = geometry_of(
            model, block_size=BLOCK, ssm_dtype="float32", kv_cache_dtype=kv_cache_dtype, speculation=config
        )
        plan = MemoryPlan.of_counts(
            geometry, num_slots=NUM_SLOTS, num_blocks=NUM_BLOCKS, num_logit_rows=1, num_count_rows=1
        )
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

        def garbage(path, leaf):
            if np.issubdtype(leaf.dtype, np.floating):
                values = np.full(leaf.shape, np.nan, leaf.dtype)
            else:
                most = 2 if path_name(path).endswith(LAYOUT) else 1 << 30
                values = numbers.integers(0, most, leaf.shape).astype(leaf.dtype)
            return jax.device_put(values, leaf.sharding)

        state = self.state
        rows = {"hidden": state.slots.hidden, "pending_hidden": state.slots.pending_hidden}
        slots = dataclasses.replace(state.slots, **jax.tree_util.tree_map_with_path(garbage, rows))
        self.state = dataclasses.replace(
            state, cache=jax.tree_util.tree_map_with_path(garbage, state.cache), slots=slots
        )

    def admit(self, *admissions: Admission) -> None:
        self.state = self.steps.admit(self.state, pack_admissions(admissions, table_width=self.table_width))

    def prefill(self, *pieces: Piece) -> Emitted:
        batch = pack_pieces(pieces, table_width=self.table_width)
        self.state, emitted = self.steps.prefill(self.options)(self.params, self.state, batch)
        return jax.device_get(emitted)

    def decode(
        self,
        *slots: int,
        grown: Mapping[int, tuple[int, int]] | None = None,
        max_drafts: Mapping[int, int] | None = None,
        num_drafts: int | None = None,
    ) -> list[list[int]]:
        """The next tokens of each slot. `grown`: for a slot, an index of its table and the block that goes there.
        `max_drafts`: for a slot, drafts that may be verified; `num_drafts`: of this step, where it has fewer.
        """
        return [tokens for tokens, _ in self.verify(*slots, grown=grown, max_drafts=max_drafts, num_drafts=num_drafts)]

    def verify(self, *slots: int, grown=None, max_drafts=None, num_drafts=None) -> list[tuple[list[int], int]]:
        """As `decode`, with how many drafts were verified."""
        padded = [*slots, *[0] * (ROWS - len(slots))]
        pairs = [(grown or {}).get(slot, (self.table_width, 0)) for slot in padded]
        index, block = np.array(pairs, np.int32).T[..., None]
        bounds = None
        if self.options.num_drafts:
            bounds = np.array([(max_drafts or {}).get(slot, self.options.num_drafts) for slot in padded], np.int32)
        batch = DecodeBatch(slot=np.array(padded, np.int32), grown_index=index, grown_block=block, max_drafts=bounds)
        options = self.options
        if num_drafts is not None:
            options = dataclasses.replace(options, num_drafts=num_drafts)
        self.state, emitted = self.steps.decode(options)(self.params, self.state, batch)
        emitted = jax.device_get(emitted)
        rows = zip(emitted.tokens.tolist(), emitted.count.tolist(), emitted.drafted.tolist(), strict=True)
        return [(tokens[:count], drafted) for tokens, count, drafted in rows][: len(slots)]

    def produce(self, slot: int, count: int) -> list[int]:
        """At least so many tokens of a slot, of as many decode steps as that takes."""
        produced: list[int] = []
        while len(produced) < count:
            produced += self.decode(slot)[0]
        return produced

    def seal(self, *seals: tuple[int, int, int], count: int | None = None) -> None:
        """(slot to read, slot to write, position) each."""
        self.state = self.steps.seal(self.params, self.state, pack_seals(seals, count=count))

    def row(self, slot: int) -> dict[str, np.ndarray]:
        """Copies of what a slot knows of its sequence; of `conv` the window alone."""
        gdn, slots = jax.device_get((self.state.cache.slots[DELTA], self.state.slots))
        width = gdn["conv"].shape[2] - (gdn["pending_ab"].shape[2] if "pending_ab" in gdn else 0)
        return {
            "ssm": gdn["ssm"][:, slot].copy(),
            "conv": gdn["conv"][:, slot, :width].copy(),
            "layout": gdn["layout"][slot].copy(),
            "hidden": slots.hidden[slot].copy(),
            "pending": np.int32(0) if slots.pending is None else slots.pending[slot].copy(),
        }
