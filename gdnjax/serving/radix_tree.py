"""The nodes of the prefix cache's radix tree, in which requests hold their places. Plain ints, no jax."""

import dataclasses

Key = tuple[int, ...]
"""The tokens of a block."""


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A run of whole blocks below its parent, or a tail: one block that is filled in part and has no children.

    keys      the tokens of each block.
    end       tokens from the root to the end of the run.
    slot      the checkpoint of the state at `end`; 0: none.
    written   the turn whose steps write that state.
    locks     running requests whose blocks go through this node; what is locked stays.
    used      when it was last of use, in ticks of the cache.
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

    @property
    def is_leaf(self) -> bool:
        return not self.children and not self.tails
