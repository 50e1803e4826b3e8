"""Tile table of the op's kernel, a row per architecture: entries by rows a group, and by what the weights are."""

import dataclasses

import jax.numpy as jnp

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.row_forms import FLOAT16, HALVES, WIDE
from gdnjax.quantized import Quantized, Weight


@dataclasses.dataclass(frozen=True)
class Grouped:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    form: str = WIDE


# "few" and "many": rows a group. "fewest": bfloat16 rows that meet float8_e4m3fn in halves; for a platform without such
# matrix units there are none. "few_float8", "many_float8": such rows that meet such codes as float16.
TILES = {
    "cuda": {
        "fewest": Grouped(8, 64, 128, 2, 3, form=HALVES),
        "few": Grouped(16, 64, 128, 4, 4),
        "few_float8": Grouped(16, 128, 128, 2, 3, form=FLOAT16),
        "many": Grouped(128, 128, 64, 8, 3),
        "many_float8": Grouped(64, 128, 128, 4, 3, form=FLOAT16),
    },
    "rocm": {"few": Grouped(16, 64, 128, 4, 1), "many": Grouped(64, 64, 64, 4, 1)},
    "interpret": {
        "fewest": Grouped(8, 32, 64, 1, 1, form=HALVES),
        "few": Grouped(16, 32, 64, 1, 1),
        "few_float8": Grouped(16, 32, 64, 1, 1, form=FLOAT16),
        "many": Grouped(32, 32, 64, 1, 1),
        "many_float8": Grouped(32, 32, 64, 1, 1, form=FLOAT16),
    },
}
FEWEST, FEW = 8, 32


def of(backend: Backend, rows_per_group: float, dtype, weight: Weight) -> Grouped:
    table = backend.tiles(TILES)
    fp8 = isinstance(weight, Quantized) and weight.codes.dtype == jnp.float8_e4m3fn
    name = "few" if rows_per_group <= FEW else "many"
    own = name
    if fp8 and dtype == jnp.bfloat16:
        own = "fewest" if rows_per_group <= FEWEST else f"{name}_float8"
    # A platform without such an entry has that of numbers.
    return table.get(own, table[name])
