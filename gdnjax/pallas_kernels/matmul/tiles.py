"""Tile tables of the op's kernels: by architecture and dtype, for the rows of a step, rounded up."""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import codes
from gdnjax.pallas_kernels.matmul import fp8
from gdnjax.pallas_kernels.normed import Rows
from gdnjax.pallas_kernels.row_forms import FLOAT16, HALVES, WIDE
from gdnjax.quantized import LARGEST, Weight


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program makes `columns` outputs of all rows, `depth` inputs at a time.

    Where fewer than `programs` would run, the inputs are split between several, whose sums XLA adds up. `form`: that of
    the rows that codes meet (see `gdnjax.pallas_kernels.codes`).
    """

    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0
    form: str = WIDE


@dataclasses.dataclass(frozen=True)
class Tiles:
    """For products with many outputs, with few, and with gate and up in one program; None: they are faster apart. Many
    are those of which the tile for many makes `enough` programs: fewer leave a part of the device without one.
    """

    wide: Tile
    narrow: Tile
    gated: Tile | None
    enough: int

    def of_outputs(self, outputs: Iterable[int]) -> Tile:
        """The tile for matrices of so many outputs, side by side."""
        programs = sum(-(-count // self.wide.columns) for count in outputs)
        return self.wide if programs >= self.enough else self.narrow

    def of_gated(self, outputs: int) -> Tile | None:
        """The tile for gate and up of so many outputs each; None: there is none, or they are too few, and the inputs
        have to be split, too.

        A split costs a pass over the sums besides, so a third of the programs are enough.
        """
        if self.gated is None or 3 * -(-outputs // self.gated.columns) < self.enough:
            return None
        return self.gated


# dtype of numbers, or of codes -> {most rows: tiles}
TILES = {
    "cuda": {
        "bfloat16": {
            16: Tiles(Tile(64, 256, 4, 4), Tile(64, 128, 4, 4, programs=264), Tile(64, 256, 4, 3), 96),
            64: Tiles(Tile(64, 128, 4, 3), Tile(64, 128, 4, 3, programs=132), Tile(64, 128, 4, 3), 96),
            128: Tiles(Tile(64, 64, 4, 4), Tile(64, 128, 4, 3, programs=132), Tile(64, 64, 8, 3), 96),
        },
        "float8_e4m3fn": {
            8: Tiles(
                Tile(64, 128, 2, 5, form=HALVES),
                # Not the fastest alone: but the kernel behind it has four sums to add up, not 16.
                Tile(32, 128, 2, 5, programs=528, form=HALVES),
                Tile(32, 128, 2, 4, form=HALVES),
                96,
            ),
            16: Tiles(
                Tile(64, 128, 2, 5, form=HALVES),
                Tile(64, 128, 2, 3, programs=528, form=HALVES),
                Tile(32, 128, 2, 4, form=HALVES),
                96,
            ),
            32: Tiles(
                Tile(64, 128, 4, 4, form=HALVES),
                Tile(64, 128, 4, 4, programs=132, form=HALVES),
                Tile(64, 128, 4, 3, form=FLOAT16),
                96,
            ),
            128: Tiles(
                # Casts and products cannot overlap in a program. Small ones do so with their neighbours.
                Tile(64, 64, 4, 3, form=FLOAT16),
                Tile(64, 128, 4, 3, programs=132, form=FLOAT16),
                None,
                96,
            ),
        },
        "int8": {
            16: Tiles(Tile(64, 128, 4, 3), Tile(64, 64, 8, 3, programs=264), Tile(64, 128, 4, 3), 96),
            128: Tiles(Tile(64, 128, 4, 3), Tile(64, 128, 4, 3, programs=132), Tile(64, 64, 4, 3), 96),
        },
    },
    "rocm": {
        "bfloat16": {
            16: Tiles(Tile(64, 128, 4, 1), Tile(64, 128, 4, 1, programs=304), Tile(32, 128, 4, 1), 152),
            128: Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1, programs=304), Tile(32, 64, 4, 1), 152),
        },
        **{
            kind: {
                16: Tiles(Tile(64, 128, 4, 1), Tile(64, 128, 4, 1, programs=304), Tile(32, 128, 4, 1), 152),
                # Codes beside numbers in one launch: eight warps hold both in the registers that four have too few of.
                128: Tiles(Tile(64, 64, 8, 1), Tile(64, 64, 4, 1, programs=304), Tile(32, 64, 4, 1), 152),
            }
            for kind in LARGEST
        },
    },
    "interpret": {
        dtype: {128: Tiles(Tile(64, 64, 1, 1), Tile(32, 64, 1, 1, programs=8), Tile(32, 64, 1, 1), 4)}
        for dtype in ("bfloat16", "float32", "int8")
    }
    | {
        "float8_e4m3fn": {
            16: Tiles(
                Tile(64, 64, 1, 1, form=HALVES),
                Tile(32, 64, 1, 1, programs=8, form=HALVES),
                Tile(32, 64, 1, 1, form=HALVES),
                4,
            ),
            128: Tiles(
                Tile(64, 64, 1, 1, form=FLOAT16),
                Tile(32, 64, 1, 1, programs=8, form=FLOAT16),
                Tile(32, 64, 1, 1, form=FLOAT16),
                4,
            ),
        }
    },
}


def of(backend: Backend, x: Rows, *weights: Weight) -> Tiles | None:
    """The tiles for the rows of x and such weights; None: XLA's product.

    Codes meet bfloat16; in the interpreter, where models are of float32, also that, widened.
    """
    if backend.is_reference or not codes.can_meet(backend, x.shape[1], *weights):
        return None
    if any(fp8.form(x, weight, backend) for weight in weights):
        return None
    kind = codes.type_of(*weights)
    if kind is not None and x.dtype != jnp.bfloat16:
        if not backend.interpret:
            return None
        # Widened, as those are.
        kind = "int8"
    table = backend.tiles(TILES).get(kind or str(x.dtype), {})
    return next((tiles for most, tiles in sorted(table.items()) if x.shape[0] <= most), None)
