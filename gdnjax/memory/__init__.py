"""Bytes: what one slot and one block cost, and how a device's memory is divided. Pure, imports no jax.

slot  = all pools of the model's Slot kinds, one row each      per tensor-parallel rank; see `gdnjax.cache_kinds`
block = all pools of its Paged kinds, one block each

`gdnjax memory` prints these for a config.json or a preset, without weights.
"""

import dataclasses
import functools

from gdnjax.cache_kinds import BITS, ITEMSIZE, CacheSpec
from gdnjax.config import EngineConfig, ModelConfig

UNNUMBERED = range(1 << 31, (1 << 32) + 1)
"""Sizes of pools of one-byte numbers that no kernel takes. Pallas numbers the places of a pool in 64 bits above 2^32
bytes, and else in 32 bits with a sign: enough for numbers of two bytes, but half of what a pool of one-byte numbers
may need.
"""


HOST_BUNDLES = (16, 4, 1)
"""Blocks that go to the host's memory together, as many as there are at once."""

STAGED_BUNDLES = 8
"""Bundles on their way between device and host at most: what is more waits for the first of them."""


def check_one_byte_pool(name: str, size: int) -> None:
    """Raises ValueError where a pool of `size` one-byte numbers has places that kernels would take for others."""
    if size in UNNUMBERED:
        raise ValueError(
            f"{name} of {size:,} one-byte numbers: kernels number the places of pools up to 2^32 bytes in 32 bits with "
            f"a sign, which end before 2^31; allowed: fewer than {UNNUMBERED.start:,} or at least {UNNUMBERED.stop:,}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateGeometry:
    """Shapes and dtypes of everything that outlives a step, for one tensor-parallel rank.

    cache               what the model keeps of its requests
    hidden_size         `hidden [slots, hidden_size]` in `hidden_dtype`, whole on every rank
    vocab_size          width of a logit row
    num_drafts          most drafts of a step: `drafts [slots, num_drafts]`
    keep_draft_hidden   whether rejection sampling needs what drafts were drawn from: `draft_hidden [slots, num_drafts,
                        hidden_size]` in `hidden_dtype`
    """

    cache: CacheSpec
    hidden_size: int
    vocab_size: int
    hidden_dtype: str
    num_drafts: int = 0
    keep_draft_hidden: bool = False

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        *,
        tp: int,
        block_size: int,
        dtype: str,
        ssm_dtype: str,
        kv_cache_dtype: str = "auto",
        speculation: EngineConfig | None = None,
    ) -> "StateGeometry":
        """The geometry of one of `tp` ranks of a model. `kv_cache_dtype` "auto" means `dtype`.

        With an engine that speculates, the MTP head's layers are among the others, and there are rows for the tokens
        that a step may accept.
        """
        engine = speculation or EngineConfig()
        return cls(
            cache=model.cache_spec(
                tp=tp,
                block_size=block_size,
                dtype=dtype,
                ssm_dtype=ssm_dtype,
                kv_cache_dtype=kv_cache_dtype,
                pending_rows=engine.pending_rows,
                mtp=engine.num_speculative_tokens > 0,
            ),
            hidden_size=model.hidden_size,
            vocab_size=model.shard(tp).vocab_size,
            hidden_dtype=dtype,
            num_drafts=engine.num_speculative_tokens,
            keep_draft_hidden=engine.keeps_draft_hidden,
        )

    def as_bits(self) -> "StateGeometry":
        """The same bytes in pools of bits: see `pallas_kernels/pools.py`."""
        return dataclasses.replace(
            self, cache=self.cache.as_bits(), hidden_dtype=BITS.get(self.hidden_dtype, self.hidden_dtype)
        )

    @property
    def block_size(self) -> int:
        return self.cache.block_size

    @property
    def pending_rows(self) -> int:
        """Tokens of a slot that may be accepted and not folded in yet: none without a state to fold them into."""
        return 1 + self.num_drafts if self.num_drafts and self.cache.needs_state else 0

    @property
    def draft_rows(self) -> int:
        """Drafts of a slot whose hidden states are kept."""
        return self.num_drafts if self.keep_draft_hidden else 0

    @property
    def slot_bytes(self) -> int:
        """One request's states of all kinds, with what pending tokens need."""
        return self.cache.slot_bytes

    @property
    def block_bytes(self) -> int:
        """One block of all paged kinds, scales included."""
        return self.cache.block_bytes

    @property
    def hidden_bytes(self) -> int:
        """The hidden states that one slot keeps for the MTP head: the last, and those of its pending rows and, for
        rejection sampling, of its drafts. Not a part of `slot_bytes`.
        """
        return (1 + self.pending_rows + self.draft_rows) * self.hidden_size * ITEMSIZE[self.hidden_dtype]

    @property
    def checkpoint_bytes(self) -> int:
        """What a checkpoint is made of, wherever it is: a slot's states, layout bits and last hidden state."""
        layouts = sum(kind.ordered for kind in self.cache.slots)
        return self.slot_bytes + layouts + self.hidden_size * ITEMSIZE[self.hidden_dtype]

    @property
    def logit_row_bytes(self) -> int:
        """The row of one request with bias or bans."""
        return self.vocab_size * 4

    @property
    def count_row_bytes(self) -> int:
        """The token counts of one request with penalties: two bytes a token of the vocabulary, so that a decode step
        reads and writes them as they are. The tokens themselves take fewer bytes, up to 124,160 of them at 248,320
        entries, and would have to be counted anew in every step.
        """
        return self.vocab_size * 2

    @property
    def mask_row_bytes(self) -> int:
        """What one request with a structure may draw next: a bit a token, in words of 32."""
        return -(-self.vocab_size // 32) * 4

    @property
    def packed_block_bytes(self) -> int:
        """A block of the old layout, which holds a whole recurrent state beside its KV: the field's baseline."""
        return self.slot_bytes + self.block_bytes

    @property
    def equivalent_blocks(self) -> int:
        """KV blocks that take the place of one slot, rounded up; for operators who compare, never charged."""
        return -(-self.slot_bytes // self.block_bytes) if self.block_bytes else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostSizes:
    """The host tier of the prefix cache, by the bytes of one rank.

    capacity_bytes  what may be kept on the host.
    block_bytes     a block; of a model that keeps nothing in blocks a kibibyte, for what is noted down about each.
    state_bytes     a checkpoint; 0 for a model that has none.
    staging_bytes   of the device, for what is on its way in either direction.
    """

    capacity_bytes: int
    block_bytes: int
    state_bytes: int
    staging_bytes: int

    @classmethod
    def of(cls, geometry: StateGeometry, capacity_bytes: int) -> "HostSizes":
        """Raises ValueError where not even one prompt's first block and its state fit."""
        block = geometry.block_bytes or 1024
        state = geometry.checkpoint_bytes if geometry.cache.needs_state else 0
        if capacity_bytes < block + state:
            raise ValueError(
                f"host_cache_gib leaves {capacity_bytes:,} bytes a rank, fewer than a block of {block:,} and a state "
                f"of {state:,} take; allowed: 0, or enough for both"
            )
        staging = STAGED_BUNDLES * max(HOST_BUNDLES[0] * geometry.block_bytes, state)
        return cls(capacity_bytes=capacity_bytes, block_bytes=block, state_bytes=state, staging_bytes=staging)

    @property
    def holds(self) -> str:
        """How much there is room for, in words."""
        blocks = f"{self.capacity_bytes // self.block_bytes:,} blocks"
        return f"{blocks}, or {self.capacity_bytes // self.state_bytes:,} states" if self.state_bytes else blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the bytes of one rank are divided. Counts leave out slot 0, block 0, and row 0 of logit and count rows; bytes
    include them. There are as many rows of masks as count rows.

    `num_slots` counts all other slots; `num_checkpoint_slots` of them are there for the prefix cache. `host` is what
    that may keep in the host's memory, which is no part of the total but for its staging; None: nothing.
    """

    num_slots: int
    num_checkpoint_slots: int
    num_blocks: int
    num_logit_rows: int
    num_count_rows: int
    slot_bytes: int
    block_bytes: int
    weight_bytes: int
    state_bytes: int
    hidden_bytes: int
    kv_bytes: int
    logit_row_bytes: int
    count_row_bytes: int
    mask_row_bytes: int
    workspace_bytes: int
    equivalent_blocks: int
    host: HostSizes | None = None

    @classmethod
    def of_counts(
        cls,
        geometry: StateGeometry,
        *,
        num_slots: int,
        num_blocks: int,
        num_logit_rows: int,
        num_count_rows: int = 0,
        num_checkpoint_slots: int = 0,
        weight_bytes: int = 0,
        workspace_bytes: int = 0,
        host: HostSizes | None = None,
    ) -> "MemoryPlan":
        """The plan that holds so many slots (all of them), blocks and rows, whatever the budget."""
        return cls(
            num_slots=num_slots,
            num_checkpoint_slots=num_checkpoint_slots,
            num_blocks=num_blocks,
            num_logit_rows=num_logit_rows,
            num_count_rows=num_count_rows,
            slot_bytes=geometry.slot_bytes,
            block_bytes=geometry.block_bytes,
            weight_bytes=weight_bytes,
            state_bytes=(num_slots + 1) * geometry.slot_bytes,
            hidden_bytes=(num_slots + 1) * geometry.hidden_bytes,
            kv_bytes=(num_blocks + 1) * geometry.block_bytes,
            logit_row_bytes=(num_logit_rows + 1) * geometry.logit_row_bytes,
            count_row_bytes=(num_count_rows + 1) * geometry.count_row_bytes,
            mask_row_bytes=(num_count_rows + 1) * geometry.mask_row_bytes,
            workspace_bytes=workspace_bytes,
            equivalent_blocks=geometry.equivalent_blocks,
            host=host,
        )

    @property
    def staging_bytes(self) -> int:
        return self.host.staging_bytes if self.host else 0

    @property
    def total_bytes(self) -> int:
        rows = self.logit_row_bytes + self.count_row_bytes + self.mask_row_bytes
        pools = self.state_bytes + self.hidden_bytes + self.kv_bytes + rows
        return self.weight_bytes + pools + self.workspace_bytes + self.staging_bytes

    def __str__(self) -> str:
        mib = 1 << 20
        live = self.num_slots - self.num_checkpoint_slots
        slots = f"{self.num_slots} slots of {self.slot_bytes:,} B: {live} live, {self.num_checkpoint_slots} checkpoints"
        rows = [
            ("weights", self.weight_bytes, ""),
            ("recurrent state", self.state_bytes, slots),
            ("last hidden", self.hidden_bytes, "one a slot"),
            ("KV cache", self.kv_bytes, f"{self.num_blocks} blocks of {self.block_bytes:,} B"),
            ("logit rows", self.logit_row_bytes, f"{self.num_logit_rows} rows of bias and bans"),
            ("token counts", self.count_row_bytes, f"{self.num_count_rows} rows, for penalties"),
            ("masks", self.mask_row_bytes, f"{self.num_count_rows} rows, for structured output"),
            ("workspace", self.workspace_bytes, ""),
            ("total", self.total_bytes, f"a slot is worth {self.equivalent_blocks} blocks"),
        ]
        if self.host:
            rows.insert(-1, ("host staging", self.staging_bytes, "blocks and states on their way to the host or back"))
            rows.append(("host cache", self.host.capacity_bytes, f"of the host's memory: {self.host.holds}"))
        return "\n".join(f"  {name:<16} {size / mib:>10.1f} MiB  {note}".rstrip() for name, size, note in rows)


def packed_blocks(geometry: StateGeometry, pool_bytes: int) -> int:
    """Blocks in `pool_bytes` where every block holds a whole recurrent state: the older layout. No null block."""
    return pool_bytes // geometry.packed_block_bytes


def decoupled_blocks(geometry: StateGeometry, pool_bytes: int, num_slots: int) -> int:
    """Blocks in what `num_slots` slots leave of `pool_bytes`. Neither null block nor null slot.

    Raises MemoryError, with the shortfall in bytes, where the slots do not fit, and ValueError where the model
    keeps nothing in blocks.
    """
    if not geometry.block_bytes:
        raise ValueError("a model that keeps nothing in blocks has no KV blocks to count")
    left = pool_bytes - num_slots * geometry.slot_bytes
    if left < 0:
        raise MemoryError(
            f"{-left:,} bytes short: {num_slots} slots of {geometry.slot_bytes:,} bytes exceed the pools' "
            f"{pool_bytes:,} bytes"
        )
    return left // geometry.block_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accounting:
    """What a way to divide the pools' bytes gives.

    `block_bytes` is what one block takes, `num_blocks` how many there are, `num_tokens` what they hold, and
    `num_requests` how many requests of the full length run at once.
    """

    block_bytes: int
    num_blocks: int
    num_tokens: int
    num_requests: int

    @classmethod
    def of_blocks(
        cls, geometry: StateGeometry, *, block_bytes: int, num_blocks: int, max_num_seqs: int, max_model_len: int
    ) -> "Accounting":
        """The accounting of so many blocks, of which a request of n tokens needs ceil(n / block_size)."""
        return cls(
            block_bytes=block_bytes,
            num_blocks=num_blocks,
            num_tokens=num_blocks * geometry.block_size,
            num_requests=min(max_num_seqs, num_blocks // _blocks_of(max_model_len, geometry.block_size)),
        )


def accountings(
    geometry: StateGeometry,
    pool_bytes: int,
    *,
    max_num_seqs: int,
    max_model_len: int,
    num_checkpoint_slots: int = 0,
) -> tuple[Accounting, Accounting]:
    """The same bytes of pools packed (a state in every block) and decoupled (slots first, the rest blocks).

    Closed forms, as in `packed_blocks` and `decoupled_blocks`; the latter's errors.
    """
    of_blocks = functools.partial(
        Accounting.of_blocks, geometry, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )
    num_slots = max_num_seqs + num_checkpoint_slots
    packed = of_blocks(block_bytes=geometry.packed_block_bytes, num_blocks=packed_blocks(geometry, pool_bytes))
    decoupled = of_blocks(
        block_bytes=geometry.block_bytes, num_blocks=decoupled_blocks(geometry, pool_bytes, num_slots)
    )
    return packed, decoupled


def plan(
    geometry: StateGeometry,
    engine: EngineConfig,
    *,
    max_model_len: int,
    budget_bytes: int,
    weight_bytes: int = 0,
    workspace_bytes: int = 0,
) -> MemoryPlan:
    """Divides `budget_bytes` of one rank: weights, workspace and live slots, then checkpoint slots, then blocks.

    The state floor comes first: every one of `max_num_seqs` requests has a slot before anything else is counted.
    Checkpoint slots are as many as the settings say; else, with a prefix cache, as many as a quarter of what is left
    beside one request's blocks holds, at most twice `max_num_seqs`; none for a model that keeps no state. Blocks stop
    at what as many requests of `max_model_len` tokens as there are slots can use, and those of 8-bit KV below the sizes
    in UNNUMBERED. Raises MemoryError that names the shortfall in bytes and the settings that change it, and ValueError
    for checkpoint slots of no use, for 8-bit KV of a size in UNNUMBERED, and for a host_cache_gib that holds nothing.
    """
    if engine.num_checkpoint_slots and not geometry.cache.needs_state:
        raise ValueError(
            f"num_checkpoint_slots={engine.num_checkpoint_slots} are of no use with a model that keeps no state of a "
            "request; allowed: None or 0"
        )
    live, logit_rows = engine.max_num_seqs + 1, engine.num_logit_rows + 1
    # Everybody who runs may have penalties, and a structure.
    count_rows = live
    slot_bytes = geometry.slot_bytes + geometry.hidden_bytes
    row_bytes = logit_rows * geometry.logit_row_bytes
    count_bytes, mask_bytes = count_rows * geometry.count_row_bytes, count_rows * geometry.mask_row_bytes
    host = HostSizes.of(geometry, engine.host_cache_bytes) if engine.host_cache_gib else None
    staging = host.staging_bytes if host else 0
    floor = weight_bytes + workspace_bytes + live * slot_bytes + row_bytes + count_bytes + mask_bytes + staging
    per_request = _blocks_of(max_model_len, engine.block_size)
    least = engine.num_kv_blocks or per_request
    # What is left beside the floor and the least blocks; below 0 where not even those fit.
    left = budget_bytes - floor - (least + 1) * geometry.block_bytes
    checkpoints = _checkpoint_slots(engine, left, slot_bytes) if geometry.cache.needs_state else 0
    left -= checkpoints * slot_bytes
    if left < 0:
        shortfall = _shortfall(
            -left,
            budget_bytes,
            parts={
                "weights": weight_bytes,
                "workspace": workspace_bytes,
                "staging for host_cache_gib": staging,
                f"{live} slots": live * slot_bytes,
                f"{checkpoints} checkpoint slots": checkpoints * slot_bytes,
                f"{logit_rows} logit rows": row_bytes,
                f"{count_rows} rows of token counts": count_bytes,
                f"{count_rows} rows of masks": mask_bytes,
                f"{least + 1} KV blocks": (least + 1) * geometry.block_bytes,
            },
            settings={
                "max_num_seqs": engine.max_num_seqs,
                "num_checkpoint_slots": checkpoints,
                "num_kv_blocks": engine.num_kv_blocks,
                "max_model_len": None if engine.num_kv_blocks else max_model_len,
                "max_num_batched_tokens": engine.max_num_batched_tokens,
            },
        )
        raise MemoryError(shortfall)
    num_slots = engine.max_num_seqs + checkpoints
    blocks = engine.num_kv_blocks or num_slots * per_request
    if geometry.block_bytes and blocks > least + left // geometry.block_bytes:
        blocks = max(least, _coarse(least + left // geometry.block_bytes))
    if engine.num_kv_blocks is None:
        blocks = max(least, numbered_blocks(geometry.cache, blocks))
    _check_paged_pools(geometry.cache, blocks)
    return MemoryPlan.of_counts(
        geometry,
        num_slots=num_slots,
        num_checkpoint_slots=checkpoints,
        num_blocks=blocks,
        num_logit_rows=logit_rows - 1,
        num_count_rows=count_rows - 1,
        weight_bytes=weight_bytes,
        workspace_bytes=workspace_bytes,
        host=host,
    )


def _one_byte_pools(cache: CacheSpec) -> list[tuple[str, int]]:
    """Names of the paged pools of 8 bits, and the bytes of a block in each."""
    return [
        (f"{kind.name}.{leaf.name}", leaf.bytes * kind.entries(cache.block_size))
        for kind in cache.paged
        for leaf in kind.leaves
        if ITEMSIZE[leaf.dtype] == 1
    ]


def _below_unnumbered(of_block: int) -> int:
    """Blocks of so many bytes, without the null one, of the largest pool below UNNUMBERED."""
    return (UNNUMBERED.start - 1) // of_block - 1


def numbered_blocks(cache: CacheSpec, num_blocks: int) -> int:
    """So many blocks, or fewer where 8-bit pools of them are of a size in UNNUMBERED."""
    pools = [of_block for _, of_block in _one_byte_pools(cache) if (num_blocks + 1) * of_block in UNNUMBERED]
    return min([num_blocks, *map(_below_unnumbered, pools)])


def _check_paged_pools(cache: CacheSpec, num_blocks: int) -> None:
    """`check_one_byte_pool` of each paged pool of 8 bits, in numbers of blocks."""
    for name, of_block in _one_byte_pools(cache):
        try:
            check_one_byte_pool(f"the pool {name}", (num_blocks + 1) * of_block)
        except ValueError as error:
            # The null block is one more.
            most, least = _below_unnumbered(of_block), -(-UNNUMBERED.stop // of_block) - 1
            raise ValueError(
                f"{error}. Set num_kv_blocks (now {num_blocks}) to at most {most} or at least {least}"
            ) from None


def _checkpoint_slots(engine: EngineConfig, left: int, slot_bytes: int) -> int:
    """Checkpoint slots: those that were asked for, or what a quarter of `left` bytes holds."""
    if engine.num_checkpoint_slots is not None:
        return engine.num_checkpoint_slots
    if not engine.enable_prefix_caching:
        return 0
    wanted, available = 2 * engine.max_num_seqs, max(0, left) // 4 // slot_bytes
    return wanted if available >= wanted else _coarse(available)


def _shortfall(missing: int, budget: int, *, parts: dict[str, int], settings: dict[str, int | None]) -> str:
    """The message for `missing` bytes: what takes the budget, and which settings (0 and None have no part) to lower."""
    taken = " + ".join(f"{name} {size:,}" for name, size in parts.items() if size)
    lower = ", ".join(f"{name} (now {value})" for name, value in settings.items() if value)
    return (
        f"{missing:,} bytes short: {taken} exceed the budget of {budget:,} bytes. Lower {lower}, or raise "
        "gpu_memory_utilization or tensor_parallel_size"
    )


def _blocks_of(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _coarse(count: int) -> int:
    """`count` rounded down to five significant bits, so that a little more or less free memory gives the same shapes
    and the compilation cache hits.
    """
    grid = 1 << max(0, count.bit_length() - 5)
    return count // grid * grid
