"""Where the values of each parameter lie in a checkpoint.

The global array of a parameter is what `tp` ranks hold, side by side along the sharded axis. That is not always the
checkpoint's order: q, k and v of one rank stand together, kv heads may be held by several ranks, the vocabulary is
padded, and some checkpoints group their projections by key head, or have q, k and v in tensors of their own, which are
then joined in this order. All of it is one index vector along one axis: global row -> checkpoint row, or PADDING.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from gdnjax.config import AttentionConfig, DeltaConfig, KimiDeltaConfig, LatentAttentionConfig, ModelConfig

PADDING = -1
"""In an index vector: a row of zeros that no checkpoint row stands behind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The index vector of a parameter.

    index         [global size along `axis`]: the checkpoint's row, or PADDING
    stored_size   the checkpoint's size along `axis`
    axis          the axis that is indexed; the others are as in the checkpoint
    stored_as     the checkpoint's name for the last module of the path, where that is another one
    joined        the checkpoint's names for it and their sizes along axis 0, where several tensors stand there
    """

    index: np.ndarray
    stored_size: int
    axis: int = 0
    stored_as: str | None = None
    joined: tuple[tuple[str, int], ...] = ()


RowsOf = Callable[[ModelConfig, int], Rows]


def rank_major(parts: Sequence[np.ndarray], tp: int) -> np.ndarray:
    """Splits each part into `tp` equal pieces and joins them so that the pieces of one rank stand together."""
    return np.concatenate([np.split(part, tp)[rank] for rank in range(tp) for part in parts])


def replicate_heads(num_heads: int, head_dim: int, tp: int) -> np.ndarray:
    """Rows of kv heads, each held by tp / num_heads neighbouring ranks where tp exceeds num_heads."""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim)
    return np.repeat(rows, max(1, tp // num_heads), axis=0).reshape(-1)


def pad_rows(size: int, padded_size: int) -> np.ndarray:
    """All rows in order, then padding."""
    return np.concatenate([np.arange(size), np.full(padded_size - size, PADDING)])


def ungroup(num_groups: int, widths: Sequence[int]) -> list[np.ndarray]:
    """The rows of each part of [part 0, part 1, ... of group 0 | part 0, part 1, ... of group 1 | ...].

    `widths` are the rows of the parts within a group; the result has one index vector a part, over all groups.
    """
    rows = np.arange(num_groups * sum(widths)).reshape(num_groups, sum(widths))
    return [part.reshape(-1) for part in np.split(rows, np.cumsum(widths)[:-1], axis=1)]


def _vocabulary(cfg: ModelConfig, tp: int) -> Rows:
    return Rows(index=pad_rows(cfg.vocab_size, cfg.padded_vocab_size(tp)), stored_size=cfg.vocab_size)


def _kv_heads(cfg: ModelConfig, tp: int) -> Rows:
    assert isinstance(cfg.attention, AttentionConfig), "only an attention layer has this parameter"
    heads, width = cfg.attention.num_kv_heads, cfg.attention.head_dim
    return Rows(index=replicate_heads(heads, width, tp), stored_size=heads * width)


def _delta_of(cfg: ModelConfig) -> DeltaConfig:
    assert isinstance(cfg.delta, DeltaConfig), "only a Gated DeltaNet layer has this parameter"
    return cfg.delta


def _delta_channels(cfg: ModelConfig, tp: int) -> Rows:
    widths = list(_delta_widths(cfg).values())
    parts = np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1])
    return Rows(index=rank_major(parts, tp), stored_size=sum(widths))


def _expert_gate_up(cfg: ModelConfig, tp: int) -> Rows:
    assert cfg.moe is not None, "only a mixture of experts has this parameter"
    size = 2 * cfg.moe.intermediate_size
    if cfg.expert_parallel:
        return Rows(index=np.arange(size), stored_size=size, axis=1)
    return Rows(index=rank_major(np.split(np.arange(size), 2), tp), stored_size=size, axis=1)


def _grouped_qkvz(cfg: ModelConfig) -> list[np.ndarray]:
    delta = _delta_of(cfg)
    values = delta.value_dim // delta.num_key_heads
    return ungroup(delta.num_key_heads, (delta.key_head_dim, delta.key_head_dim, values, values))


def _grouped_ba(cfg: ModelConfig) -> list[np.ndarray]:
    delta = _delta_of(cfg)
    heads = delta.num_value_heads // delta.num_key_heads
    return ungroup(delta.num_key_heads, (heads, heads))


def _interleaved_qkv(cfg: ModelConfig, tp: int) -> Rows:
    q, k, v, z = _grouped_qkvz(cfg)
    stored_size = len(q) + len(k) + len(v) + len(z)
    return Rows(index=rank_major([q, k, v], tp), stored_size=stored_size, stored_as="in_proj_qkvz")


def _interleaved_z(cfg: ModelConfig, tp: int) -> Rows:
    q, k, v, z = _grouped_qkvz(cfg)
    return Rows(index=z, stored_size=len(q) + len(k) + len(v) + len(z), stored_as="in_proj_qkvz")


def _interleaved_b(cfg: ModelConfig, tp: int) -> Rows:
    b, a = _grouped_ba(cfg)
    return Rows(index=b, stored_size=len(b) + len(a), stored_as="in_proj_ba")


def _interleaved_a(cfg: ModelConfig, tp: int) -> Rows:
    b, a = _grouped_ba(cfg)
    return Rows(index=a, stored_size=len(b) + len(a), stored_as="in_proj_ba")


def _latent_of(cfg: ModelConfig) -> LatentAttentionConfig:
    assert isinstance(cfg.attention, LatentAttentionConfig), "only latent attention has this parameter"
    return cfg.attention


def _rotary_rows(attention: LatentAttentionConfig) -> np.ndarray:
    """The rows of the rotated part of a head, its pairs (i, i + half)."""
    rows = np.arange(attention.qk_rope_head_dim)
    return np.concatenate([rows[::2], rows[1::2]]) if attention.interleaved_rotary else rows


def _latent_queries(cfg: ModelConfig, tp: int) -> Rows:
    attention = _latent_of(cfg)
    head = np.concatenate([np.arange(attention.qk_nope_head_dim), attention.qk_nope_head_dim + _rotary_rows(attention)])
    rows = np.arange(attention.num_heads)[:, None] * attention.qk_head_dim + head
    return Rows(index=rows.reshape(-1), stored_size=rows.size)


def _latents(cfg: ModelConfig, tp: int) -> Rows:
    attention = _latent_of(cfg)
    rows = np.concatenate([np.arange(attention.kv_lora_rank), attention.kv_lora_rank + _rotary_rows(attention)])
    return Rows(index=rows, stored_size=len(rows))


def _expansion(cfg: ModelConfig) -> list[np.ndarray]:
    attention = _latent_of(cfg)
    return ungroup(attention.num_heads, (attention.qk_nope_head_dim, attention.v_head_dim))


def _latent_keys(cfg: ModelConfig, tp: int) -> Rows:
    keys, values = _expansion(cfg)
    return Rows(index=keys, stored_size=len(keys) + len(values), stored_as="kv_b_proj")


def _latent_values(cfg: ModelConfig, tp: int) -> Rows:
    keys, values = _expansion(cfg)
    return Rows(index=values, stored_size=len(keys) + len(values), stored_as="kv_b_proj")


def _delta_widths(cfg: ModelConfig) -> dict[str, int]:
    """Channels of the convolution that are queries, keys and values."""
    delta = cfg.delta
    assert delta is not None, "only a layer of the delta rule has this parameter"
    return {"q": delta.key_dim, "k": delta.key_dim, "v": delta.value_dim}


def _separate_qkv(cfg: ModelConfig, tp: int) -> Rows:
    joined = tuple((f"{part}_proj", size) for part, size in _delta_widths(cfg).items())
    return dataclasses.replace(_delta_channels(cfg, tp), joined=joined)


def _separate(stored_as: str, size_of: Callable[[ModelConfig, DeltaConfig], int]) -> RowsOf:
    """Rows as they are, under another name."""

    def rows(cfg: ModelConfig, tp: int) -> Rows:
        size = size_of(cfg, _delta_of(cfg))
        return Rows(index=np.arange(size), stored_size=size, stored_as=stored_as)

    return rows


def _whole_q_norm(cfg: ModelConfig, tp: int) -> Rows:
    assert isinstance(cfg.attention, AttentionConfig), "only an attention layer has this parameter"
    size = cfg.attention.num_heads * cfg.attention.head_dim
    return Rows(index=np.arange(size), stored_size=size, stored_as="q_norm")


def _whole_k_norm(cfg: ModelConfig, tp: int) -> Rows:
    return dataclasses.replace(_kv_heads(cfg, tp), stored_as="k_norm")


# Parameters whose rows are not simply those of the checkpoint; the first match counts.
TABLE: tuple[tuple[str, RowsOf], ...] = (
    (r"(embed_tokens|lm_head)\.weight", _vocabulary),
    (r".*self_attn\.(k_proj|v_proj)\.weight", _kv_heads),
    (r".*self_attn\.q_heads_norm\.weight", _whole_q_norm),
    (r".*self_attn\.k_heads_norm\.weight", _whole_k_norm),
    (r".*self_attn\.kv_a_proj_with_mqa\.weight", _latents),
    (r".*self_attn\.q_b_proj\.weight", _latent_queries),
    (r".*self_attn\.k_b_proj\.weight", _latent_keys),
    (r".*self_attn\.v_b_proj\.weight", _latent_values),
    (r".*linear_attn\.(in_proj_qkv|conv1d)\.weight", _delta_channels),
    (r".*mlp\.experts\.gate_up_proj", _expert_gate_up),
)

# Before TABLE, where attention is over latents: with no latent of the queries, q_proj is theirs.
LATENT_TABLE: tuple[tuple[str, RowsOf], ...] = ((r".*self_attn\.q_proj\.weight", _latent_queries),)

# Before TABLE, where the decay is one of channels.
KIMI_TABLE: tuple[tuple[str, RowsOf], ...] = ((r".*linear_attn\.in_proj_qkv\.weight", _separate_qkv),)

# Before TABLE, where cfg.interleaved_projections.
INTERLEAVED_TABLE: tuple[tuple[str, RowsOf], ...] = (
    (r".*linear_attn\.in_proj_qkv\.weight", _interleaved_qkv),
    (r".*linear_attn\.in_proj_z\.weight", _interleaved_z),
    (r".*linear_attn\.in_proj_b\.weight", _interleaved_b),
    (r".*linear_attn\.in_proj_a\.weight", _interleaved_a),
)


# Before TABLE, where cfg.separate_projections.
SEPARATE_TABLE: tuple[tuple[str, RowsOf], ...] = (
    (r".*linear_attn\.in_proj_qkv\.weight", _separate_qkv),
    (r".*linear_attn\.in_proj_z\.weight", _separate("g_proj", lambda cfg, delta: delta.value_dim)),
    (r".*linear_attn\.in_proj_b\.weight", _separate("b_proj", lambda cfg, delta: delta.num_value_heads)),
    (r".*linear_attn\.in_proj_a\.weight", _separate("a_proj", lambda cfg, delta: delta.num_value_heads)),
    (r".*linear_attn\.norm\.weight", _separate("o_norm", lambda cfg, delta: delta.value_head_dim)),
    (r".*linear_attn\.out_proj\.weight", _separate("o_proj", lambda cfg, delta: cfg.hidden_size)),
)


def rows_of(name: str, shape: tuple[int, ...], cfg: ModelConfig, tp: int) -> Rows:
    """The index vector of a parameter of global `shape`. ValueError where `shape` is not that of `cfg` and `tp`."""
    table = (*INTERLEAVED_TABLE, *TABLE) if cfg.interleaved_projections else TABLE
    table = (*SEPARATE_TABLE, *table) if cfg.separate_projections else table
    table = (*LATENT_TABLE, *table) if isinstance(cfg.attention, LatentAttentionConfig) else table
    table = (*KIMI_TABLE, *table) if isinstance(cfg.delta, KimiDeltaConfig) else table
    for pattern, function in table:
        if re.fullmatch(pattern, name):
            rows = function(cfg, tp)
            break
    else:
        rows = Rows(index=np.arange(shape[0]), stored_size=shape[0])
    if shape[rows.axis] != len(rows.index):
        raise ValueError(
            f"{name}: the parameter tree has {shape[rows.axis]} rows along axis {rows.axis}, the model "
            f"configuration with tensor_parallel_size={tp} has {len(rows.index)}"
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Part:
    """One checkpoint tensor, and the box of the parameter (in the checkpoint's order) that it fills.

    start   where the box begins, one entry for each axis of the parameter
    shape   of the tensor; it may lack the parameter's first axis, of which it then fills a single row
    """

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> tuple[int, ...]:
        """The extent of the box, one entry for each axis of the parameter."""
        return (1,) * (len(self.start) - len(self.shape)) + self.shape


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the values of one parameter lie: the tensors that hold it, and the order of its rows in them."""

    parts: tuple[Part, ...]
    rows: Rows


@dataclasses.dataclass(frozen=True)
class Copy:
    """One read: `source` slices of a checkpoint tensor, and the `target` slices of the block that they fill."""

    tensor: str
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def origin_of(
    name: str,
    shape: tuple[int, ...],
    cfg: ModelConfig,
    tp: int,
    *,
    experts_apart: bool,
    convolutions: Mapping[str, int] = MappingProxyType({}),
) -> Origin:
    """The origin of a parameter, in module names. `experts_apart`: the checkpoint stores each expert by itself;
    `convolutions`: rows of the tensors of `apart_convolutions`, empty where there are none.

    shape   global, as in the parameter tree
    """
    rows = rows_of(name, shape, cfg, tp)
    stored = (*shape[: rows.axis], rows.stored_size, *shape[rows.axis + 1 :])
    expert = re.fullmatch(r"(.*mlp\.experts)\.(gate_up_proj|down_proj)", name)
    if expert and experts_apart:
        return Origin(expert_parts(expert[1], expert[2], stored), rows)
    joined = rows.joined
    path, leaf = name.rpartition(".")[::2]
    path = path.rpartition(".")[0]
    if convolutions and re.fullmatch(r".*linear_attn\.conv1d\.weight", name):
        joined = _convolutions(path, cfg, convolutions)
    if joined:
        starts = np.cumsum([0, *(size for _, size in joined)]).tolist()
        return Origin(
            tuple(
                Part(f"{path}.{module}.{leaf}", (start, *(0 for _ in stored[1:])), (size, *stored[1:]))
                for (module, size), start in zip(joined, starts, strict=False)
            ),
            rows,
        )
    if rows.stored_as:
        name = f"{path}.{rows.stored_as}.{leaf}"
    return Origin((Part(name, (0,) * len(stored), stored),), rows)


def expert_parts(path: str, kind: str, stored: tuple[int, ...]) -> tuple[Part, ...]:
    """The tensors of all experts of a layer that stores each by itself: gate and up, which are stacked along axis 1 of
    a parameter of the shape `stored`, or down alone.
    """
    projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    num_experts, size, width = stored
    size //= len(projections)
    return tuple(
        Part(f"{path}.{expert}.{projection}.weight", (expert, i * size, 0), (size, width))
        for expert in range(num_experts)
        for i, projection in enumerate(projections)
    )


def stores_experts_apart(names: Sequence[str]) -> bool:
    """Whether a checkpoint (its module names) stores each expert by itself. ValueError where it does both."""
    apart = [name for name in names if re.fullmatch(r".*mlp\.experts\.\d+\..+", name)]
    fused = [name for name in names if re.fullmatch(r".*mlp\.experts\.(gate_up_proj|down_proj)", name)]
    if apart and fused:
        raise ValueError(f"experts are stored both one by one ({apart[0]}) and together ({fused[0]})")
    return bool(apart)


def _convolutions(path: str, cfg: ModelConfig, rows: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The tensors of a layer that are joined to its convolution. Published files have the channels of q, k and v in
    them; transformers writes three of the same size, which are the same joined.
    """
    published = {f"{part}_conv1d": size for part, size in _delta_widths(cfg).items()}
    stored = {module: rows.get(f"{path}.{module}.weight", 0) for module in published}
    fits = all(stored.values()) and sum(stored.values()) == sum(published.values())
    return tuple((stored if fits else published).items())


def apart_convolutions(names: Sequence[str]) -> list[str]:
    """Of a checkpoint's module names those of the taps of q, k and v, where they are tensors of their own."""
    return [name for name in names if re.fullmatch(r".*linear_attn\.[qkv]_conv1d\.weight", name)]


def runs(index: np.ndarray) -> list[tuple[int, int, int]]:
    """The consecutive stretches of an index vector, as (position in the vector, checkpoint row, length).

    Padding is left out.
    """
    # Within a stretch of consecutive rows, row - position is constant. Padding is cut from what precedes it.
    breaks = np.flatnonzero((np.diff(index) != 1) | (index[:-1] == PADDING)) + 1
    starts = [0, *breaks.tolist()] if len(index) else []
    ends = [*breaks.tolist(), len(index)]
    return [
        (start, int(index[start]), end - start)
        for start, end in zip(starts, ends, strict=False)
        if index[start] != PADDING
    ]


def copies(origin: Origin, block: tuple[slice, ...]) -> list[Copy]:
    """The reads that fill one block of the parameter; rows of padding are covered by none.

    block   slices of the global array, with start and stop given
    """
    axis = origin.rows.axis
    result = []
    for offset, row, length in runs(origin.rows.index[block[axis]]):
        # The stretch as a box of the parameter in the checkpoint's order, and what to add to get to the block.
        wanted = [(part.start, part.stop) for part in block]
        wanted[axis] = (row, row + length)
        shift = [-part.start for part in block]
        shift[axis] = offset - row
        for part in origin.parts:
            low = [max(a, start) for (a, _), start in zip(wanted, part.start, strict=True)]
            high = [min(b, start + size) for (_, b), start, size in zip(wanted, part.start, part.box, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            source = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, part.start, strict=True))
            target = tuple(slice(a + s, b + s) for a, b, s in zip(low, high, shift, strict=True))
            result.append(Copy(part.tensor, source[len(part.start) - len(part.shape) :], target))
    return result
