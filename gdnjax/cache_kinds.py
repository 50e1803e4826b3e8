"""What a model keeps of its requests, as data: the kinds of cache, their pools' names, shapes and dtypes. No jax.

  Paged   entries for each token, or for each few tokens, in blocks that requests with the same prefix share
  Slot    a state of fixed size for each request, which decides where a cached prefix may be gone on from
  Ring    a Slot of the last few tokens of each request, each in a row of its own

Each kind of layer says which kind it needs (`gdnjax.config`), and everything else follows from that: the pools and how
ranks share them, the bytes of a slot and of a block, what a fork reads, what a seal folds, whether a hit needs a state.
The names are those of vLLM's and SGLang's cache specifications.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import TypeAlias

ITEMSIZE = {"float32": 4, "uint32": 4, "int32": 4, "bfloat16": 2, "uint16": 2, "int8": 1, "uint8": 1, "fp8": 1}

JAX_NAMES = {"fp8": "float8_e4m3fn"}
"""What jax calls a dtype, where it has another name."""

BITS = {"bfloat16": "uint16", "fp8": "uint8"}
"""Dtypes that pools may hold as their bits, and the dtype of those bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """One pool of one rank: `[layers, slots, *shape]` of a Slot, `[layers, blocks, entries, *shape]` of a Paged.

    `split` is the axis of `shape` that ranks share; None: it is whole on every rank.
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    dtype: str
    split: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"the pool {self.name} has the dtype {self.dtype!r}; allowed: {', '.join(ITEMSIZE)}")
        if self.split is not None and not 0 <= self.split < len(self.shape):
            raise ValueError(f"the pool {self.name} is split along axis {self.split} of {self.shape}")

    @property
    def row_bytes(self) -> int:
        """What one slot, or one entry, takes in one layer."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def bytes(self) -> int:
        """The same in all layers."""
        return self.layers * self.row_bytes

    def global_shape(self, ranks: int) -> tuple[int, ...]:
        """`shape` over all ranks together."""
        return tuple(size * ranks if axis == self.split else size for axis, size in enumerate(self.shape))

    def as_bits(self) -> "LeafSpec":
        """The same bytes, of integers: see `pallas_kernels/pools.py`."""
        return dataclasses.replace(self, dtype=BITS.get(self.dtype, self.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
    """Entries in blocks: one for each `tokens_per_entry` tokens, written once and never changed."""

    name: str
    leaves: tuple[LeafSpec, ...]
    tokens_per_entry: int = 1

    def entries(self, block_size: int) -> int:
        """Entries of a block. Raises ValueError where they do not come out even."""
        if block_size % self.tokens_per_entry:
            raise ValueError(
                f"block_size={block_size} is no multiple of {self.tokens_per_entry}, "
                f"the tokens of an entry of {self.name}"
            )
        return block_size // self.tokens_per_entry

    def block_bytes(self, block_size: int) -> int:
        return self.entries(block_size) * sum(leaf.bytes for leaf in self.leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """A request's state: what its layers have made of all tokens so far.

    A prefix can be gone on from where the state behind it was kept, in a slot of the prefix cache. With speculation a
    step may leave tokens pending (`SlotTable.pending`), for which there are rows in `leaves`.

    `ordered`: a step may store a row in one of two orders (see `gated_delta_rule.StateOrder`), and a pool `layout`
    [slots] int8 says in which it did, for all layers at once. It goes with the row in every copy.
    """

    name: str
    leaves: tuple[LeafSpec, ...]
    ordered: bool = False

    @property
    def slot_bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Slot):
    """The last tokens of a request: each sees itself and the `window - 1` before it. See `gdnjax.models.ring`.

    A token's entry stands in row `position` modulo the number of rows, the first axis of every leaf. It is written when
    the token is fed, drafts like others, so that there is nothing to fold. A step that feeds T tokens of a request
    needs `window + T - 1` rows: then what a rejected draft has overwritten is out of sight of all that may come.
    """

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"the window of {self.name} is {self.window} tokens; allowed: 1 or more")
        if self.ordered:
            raise ValueError(f"rows of the ring {self.name} have one order")
        for leaf in self.leaves:
            if not leaf.shape or leaf.shape[0] < self.window or leaf.shape[0] != self.leaves[0].shape[0]:
                raise ValueError(
                    f"the pool {leaf.name} has the shape {leaf.shape}: all of {self.name} need rows for {self.window} "
                    "tokens or more, equally many"
                )
            if leaf.split == 0:
                raise ValueError(f"the rows of the pool {leaf.name} cannot be split over ranks")

    @classmethod
    def of(cls, *, name: str, entries: tuple[LeafSpec, ...], window: int, pending_rows: int = 0) -> "Ring":
        """A ring of such `entries`, whose shape is that of one token, for steps of up to `pending_rows` tokens of a
        request.
        """
        rows = window + max(pending_rows, 1) - 1
        leaves = tuple(
            dataclasses.replace(
                entry, shape=(rows, *entry.shape), split=None if entry.split is None else entry.split + 1
            )
            for entry in entries
        )
        return cls(name=name, leaves=leaves, window=window)


CacheKind: TypeAlias = Paged | Slot


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """All kinds of one rank of a model, for blocks of `block_size` tokens. Hashed once: it is part of every pytree."""

    kinds: tuple[CacheKind, ...]
    block_size: int

    def __post_init__(self) -> None:
        names = [kind.name for kind in self.kinds]
        if len(set(names)) != len(names):
            raise ValueError(f"two kinds of cache have one name: {', '.join(names)}")

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kinds, self.block_size))

    @property
    def paged(self) -> tuple[Paged, ...]:
        return tuple(kind for kind in self.kinds if isinstance(kind, Paged))

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(kind for kind in self.kinds if isinstance(kind, Slot))

    @property
    def needs_state(self) -> bool:
        """Whether a prefix can be gone on from only where a state was kept: what scheduler and prefix cache ask."""
        return bool(self.slots)

    @property
    def slot_bytes(self) -> int:
        """One request's state."""
        return sum(kind.slot_bytes for kind in self.slots)

    @property
    def block_bytes(self) -> int:
        """One block of every paged kind."""
        return sum(kind.block_bytes(self.block_size) for kind in self.paged)

    def leaves(self) -> Iterator[tuple[CacheKind, LeafSpec]]:
        return ((kind, leaf) for kind in self.kinds for leaf in kind.leaves)

    def as_bits(self) -> "CacheSpec":
        """The same bytes in pools of bits."""
        kinds = tuple(
            dataclasses.replace(kind, leaves=tuple(leaf.as_bits() for leaf in kind.leaves)) for kind in self.kinds
        )
        return dataclasses.replace(self, kinds=kinds)
