"""How many kernels a decode step launches: which steps are compiled for it, and how many each may. No jax."""

import dataclasses
from collections.abc import Sequence

LAYERS = 4
"""Of a period of a model, the last of which is of attention."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """Decode steps of Qwen3.5-9B, and how many kernels they launch at most: for a GDN layer, for one of attention, and
    for all else.
    """

    rows: int
    drafts: int
    fp8: bool
    delta: int
    attention: int
    rest: int

    @property
    def name(self) -> str:
        return f"{'FP8 blocks' if self.fp8 else 'bfloat16'}, {self.rows} rows, {self.drafts} drafts"

    def of(self, kind: str) -> str:
        """The name of what is compiled: one of COUNTED_LAYERS."""
        return f"launches, {self.name}, {kind}"

    def most(self, layers: Sequence[int]) -> int:
        attention = sum(layer == LAYERS - 1 for layer in layers)
        return self.rest + attention * self.attention + (len(layers) - attention) * self.delta


COUNTED = (
    Counted(1, 0, False, 9, 9, 33),
    Counted(16, 0, False, 9, 9, 24),
    Counted(128, 0, False, 9, 8, 23),
    Counted(1, 3, False, 12, 9, 115),
    Counted(16, 3, False, 11, 9, 106),
    Counted(128, 3, False, 16, 14, 105),
    Counted(1, 0, True, 9, 9, 33),
    Counted(16, 0, True, 9, 9, 24),
    Counted(128, 0, True, 9, 8, 23),
    Counted(1, 3, True, 12, 9, 115),
    Counted(16, 3, True, 11, 9, 106),
    Counted(128, 3, True, 20, 21, 114),
)
"""What they have, over both chips: a kernel more is refused, and who adds one says here what it gives. For one row
gfx950 has six more than gfx942 beside the layers.
"""

COUNTED_LAYERS = {"one of each": (0, 3), "a GDN layer more": (0, 1, 3), "an attention layer more": (0, 3, 3)}
"""The layers whose steps are compiled for it: differences are what a layer costs, whatever is fused with what."""

STANDING = {
    "gfx942": ("bfloat16, 16 rows, 0 drafts", "bfloat16, 128 rows, 0 drafts"),
    "gfx950": ("FP8 blocks, 16 rows, 0 drafts",),
}
"""Those of COUNTED that are compiled where nobody names them, each for one chip."""
