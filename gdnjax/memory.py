"""Bytes: what one slot and one block cost, and how a device's memory is divided. Pure, imports no jax.

slot  = delta layers * (conv window + recurrent state)                              per tensor-parallel rank
block = 2 * attention layers * block_size * kv heads * head width * bytes + scales
"""

import dataclasses

from gdnjax.config import EngineConfig, ModelConfig

ITEMSIZE = {"float32": 4, "uint32": 4, "int32": 4, "bfloat16": 2, "fp8": 1}

# 8-bit KV carries one float32 scale per token and head, for keys and for values.
KV_SCALE_BYTES = {"fp8": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateGeometry:
    """Shapes and dtypes of everything that outlives a step, for one tensor-parallel rank.

    delta_layers, value_heads, state_size    `ssm [delta_layers, slots, value_heads, state_size]` in `ssm_dtype`
    conv_rows, conv_dim                      `conv [delta_layers, slots, conv_rows, conv_dim]` in `conv_dtype`
    attention_layers, kv_heads, head_dim     `k, v [attention_layers, blocks, block_size, kv_heads, head_dim]`
    vocab_size                               width of a logit row
    """

    delta_layers: int
    value_heads: int
    state_size: int
    conv_rows: int
    conv_dim: int
    attention_layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    ssm_dtype: str
    conv_dtype: str
    kv_dtype: str

    @classmethod
    def of(
        cls, model: ModelConfig, *, tp: int, block_size: int, dtype: str, ssm_dtype: str, kv_dtype: str | None = None
    ) -> "StateGeometry":
        """The geometry of one of `tp` ranks of a model. `kv_dtype` None means `dtype`."""
        rank = model.shard(tp)
        return cls(
            delta_layers=model.num_delta_layers,
            value_heads=rank.delta.num_value_heads,
            state_size=rank.delta.key_head_dim * rank.delta.value_head_dim,
            conv_rows=rank.delta.conv_kernel - 1,
            conv_dim=rank.delta.conv_dim,
            attention_layers=model.num_attention_layers,
            kv_heads=rank.attention.num_kv_heads,
            head_dim=rank.attention.head_dim,
            vocab_size=rank.vocab_size,
            block_size=block_size,
            ssm_dtype=ssm_dtype,
            conv_dtype=dtype,
            kv_dtype=kv_dtype or dtype,
        )

    @property
    def slot_bytes(self) -> int:
        """One request's recurrent state and convolution windows, all layers."""
        conv = self.conv_rows * self.conv_dim * ITEMSIZE[self.conv_dtype]
        state = self.value_heads * self.state_size * ITEMSIZE[self.ssm_dtype]
        return self.delta_layers * (conv + state)

    @property
    def block_bytes(self) -> int:
        """One KV block, all layers, scales included."""
        per_head = self.head_dim * ITEMSIZE[self.kv_dtype] + KV_SCALE_BYTES.get(self.kv_dtype, 0)
        return 2 * self.attention_layers * self.block_size * self.kv_heads * per_head

    @property
    def logit_row_bytes(self) -> int:
        """The vocabulary-sized rows of one request with penalties or bans: counts, bias, prompt flags."""
        return self.vocab_size * (4 + 4 + 1)

    @property
    def packed_block_bytes(self) -> int:
        """A block of the old layout, which holds a whole recurrent state beside its KV: the field's baseline."""
        return self.slot_bytes + self.block_bytes

    @property
    def equivalent_blocks(self) -> int:
        """KV blocks that take the place of one slot, rounded up; for operators who compare, never charged."""
        return -(-self.slot_bytes // self.block_bytes) if self.block_bytes else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the bytes of one rank are divided. Counts leave out slot 0, block 0 and logit row 0; bytes include them."""

    num_slots: int
    num_blocks: int
    num_logit_rows: int
    slot_bytes: int
    block_bytes: int
    weight_bytes: int
    state_bytes: int
    kv_bytes: int
    logit_row_bytes: int
    workspace_bytes: int
    equivalent_blocks: int

    @classmethod
    def of_counts(
        cls,
        geometry: StateGeometry,
        *,
        num_slots: int,
        num_blocks: int,
        num_logit_rows: int,
        weight_bytes: int = 0,
        workspace_bytes: int = 0,
    ) -> "MemoryPlan":
        """The plan that holds so many slots, blocks and logit rows, whatever the budget."""
        return cls(
            num_slots=num_slots,
            num_blocks=num_blocks,
            num_logit_rows=num_logit_rows,
            slot_bytes=geometry.slot_bytes,
            block_bytes=geometry.block_bytes,
            weight_bytes=weight_bytes,
            state_bytes=(num_slots + 1) * geometry.slot_bytes,
            kv_bytes=(num_blocks + 1) * geometry.block_bytes,
            logit_row_bytes=(num_logit_rows + 1) * geometry.logit_row_bytes,
            workspace_bytes=workspace_bytes,
            equivalent_blocks=geometry.equivalent_blocks,
        )

    @property
    def total_bytes(self) -> int:
        parts = (self.weight_bytes, self.state_bytes, self.kv_bytes, self.logit_row_bytes, self.workspace_bytes)
        return sum(parts)

    def __str__(self) -> str:
        mib = 1 << 20
        rows = [
            ("weights", self.weight_bytes, ""),
            ("recurrent state", self.state_bytes, f"{self.num_slots} slots of {self.slot_bytes:,} B"),
            ("KV cache", self.kv_bytes, f"{self.num_blocks} blocks of {self.block_bytes:,} B"),
            ("logit rows", self.logit_row_bytes, f"{self.num_logit_rows} rows"),
            ("workspace", self.workspace_bytes, ""),
            ("total", self.total_bytes, f"a slot is worth {self.equivalent_blocks} blocks"),
        ]
        return "\n".join(f"  {name:<16} {size / mib:>10.1f} MiB  {note}".rstrip() for name, size, note in rows)


def _coarse(count: int, least: int) -> int:
    """`count` rounded down to five significant bits, so that a little more or less free memory gives the same shapes
    and the compilation cache hits; never below `least`.
    """
    grid = 1 << max(0, count.bit_length() - 5)
    return max(least, count // grid * grid)


def plan(
    geometry: StateGeometry,
    engine: EngineConfig,
    *,
    max_model_len: int,
    budget_bytes: int,
    weight_bytes: int = 0,
    workspace_bytes: int = 0,
) -> MemoryPlan:
    """Divides `budget_bytes` of one rank: weights and workspace, then all slots, then as many blocks as fit.

    The state floor comes first: every one of `max_num_seqs` requests has a slot before any block is counted. Blocks
    stop at what `max_num_seqs` requests of `max_model_len` tokens can use. Raises MemoryError that names the shortfall
    in bytes and the settings that change it.
    """
    slots = engine.max_num_seqs + 1
    logit_rows = engine.num_logit_rows + 1
    state_bytes = slots * geometry.slot_bytes
    row_bytes = logit_rows * geometry.logit_row_bytes
    floor = weight_bytes + workspace_bytes + state_bytes + row_bytes
    per_request = -(-max_model_len // engine.block_size)
    wanted = engine.num_kv_blocks or engine.max_num_seqs * per_request
    least = engine.num_kv_blocks or per_request
    if geometry.block_bytes:
        available = (budget_bytes - floor) // geometry.block_bytes - 1
    else:
        available = wanted
    if available < least:
        missing = floor + (least + 1) * geometry.block_bytes - budget_bytes
        raise MemoryError(
            f"{missing:,} bytes short: weights {weight_bytes:,} + workspace {workspace_bytes:,} + {slots} slots "
            f"{state_bytes:,} + {logit_rows} logit rows {row_bytes:,} + {least + 1} KV blocks "
            f"{(least + 1) * geometry.block_bytes:,} exceed the budget of {budget_bytes:,} bytes. Lower max_num_seqs "
            f"(now {engine.max_num_seqs}), max_model_len (now {max_model_len}), max_num_batched_tokens (now "
            f"{engine.max_num_batched_tokens}) or num_kv_blocks, or raise gpu_memory_utilization or "
            "tensor_parallel_size"
        )
    blocks = wanted if available >= wanted else _coarse(available, least)
    return MemoryPlan.of_counts(
        geometry,
        num_slots=engine.max_num_seqs,
        num_blocks=blocks,
        num_logit_rows=logit_rows - 1,
        weight_bytes=weight_bytes,
        workspace_bytes=workspace_bytes,
    )
