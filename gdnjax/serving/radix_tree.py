"""The nodes of the prefix cache's radix tree, in which requests hold their places. Plain ints, no jax."""

import array
import dataclasses
import hashlib

Key = tuple[int, ...]
"""The tokens of a block."""

Digest = bytes
"""Names the tokens from the root to the end of a block: 128 bits of BLAKE2b, so that equal ones are of equal tokens."""

NO_TOKENS: Digest = bytes(16)


def digest_after(before: Digest, key: Key) -> Digest:
    """The digest of the tokens of `before` and of a block behind them."""
    return hashlib.blake2b(before + array.array("i", key).tobytes(), digest_size=16).digest()


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A run of whole blocks below its parent, or a tail: one block that is filled in part and has no children.

    keys      the tokens of each block.
    end       tokens from the root to the end of the run.
    slot      the checkpoint of the state at `end`; 0: none.
    written   the turn whose steps write that state.
    locks     running requests whose blocks go through this node; what is locked stays.
    used      when it was last of use, in ticks of the cache.
    digests   behind each block, once somebody has asked for them; see `digests_to`.
    """

    parent: "Node | None"
    keys: list[Key]
    blocks: list[int]
    end: int
    children: dict[Key, "Node"] = dataclasses.field(default_factory=dict)
    tails: dict[Key, "Node"] = dataclasses.field(default_factory=dict)
    slot: int = 0
    written: int = 0
    locks: int = 0
    used: int = 0
    digests: list[Digest] | None = None

    @property
    def is_leaf(self) -> bool:
        return not self.children and not self.tails


def digests_to(node: Node) -> list[Digest]:
    """Behind each block of a node, and of nodes above it that lack theirs, computed once. Of the root: none."""
    lacking = []
    while node.parent is not None and node.digests is None:
        lacking.append(node)
        node = node.parent
    digests = node.digests or []
    for below in reversed(lacking):
        last = digests[-1] if digests else NO_TOKENS
        digests = [last := digest_after(last, key) for key in below.keys]
        below.digests = digests
    return digests
