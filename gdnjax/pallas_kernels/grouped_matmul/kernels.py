"""Products of sorted rows with their group's matrix: a program makes a tile of outputs of one group, or several.

Bytes at decode: the matrices of the groups that have rows, once (512 experts of 2 x 512 x 2048 in bfloat16 with 128
tokens of 10 experts each: 2.1 GB of gate and up; half of that as codes). Operations in prefill: 2 d f a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import codes, row_forms
from gdnjax.pallas_kernels.codes import Operand
from gdnjax.pallas_kernels.grouped_matmul import tiles
from gdnjax.pallas_kernels.launch import LEAST, bounded, launch, power_of_two
from gdnjax.pallas_kernels.normed import GateUp, Prepared, numbers
from gdnjax.quantized import Weight
from gdnjax.shapes import Array

TABLED = 16
"""Groups whose tiles are one program's to find."""


def grouped_matmul(
    x: Array | GateUp | Prepared,
    weight: Weight,
    group_sizes: Array,
    places: Array | None,
    expected_rows: int,
    backend: Backend,
) -> Array:
    depth = x.shape[1]
    rows = (x if places is None else places).shape[0]
    groups, width, _ = weight.shape
    tile = tiles.of(backend, expected_rows / groups, x.dtype, weight)
    steps = codes.depth_of(min(tile.depth, power_of_two(depth, LEAST)), depth, weight)
    assert steps is not None, "the reference takes what has no depth"
    arrays, (grid,) = codes.flat(weight)
    if isinstance(x, Prepared) and x.form != tile.form:
        x = numbers(x)
    operands = row_forms.rows_of(x, tile.form, backend, wide=False)
    group, start, end, used = tile_table(group_sizes, rows, tile.rows, backend)
    # As many programs as the expected rows need, whatever their groups: the others would mostly find no tile. Where
    # more rows come, programs go on with further tiles.
    programs = min(group.shape[0], most_tiles(groups, expected_rows, tile.rows)) * -(-width // tile.columns)
    (out,) = launch(
        _grouped_matmul,
        backend,
        name="grouped_matmul",
        programs=programs,
        args=(used, group, start, end, *([] if places is None else [places]), *operands, *arrays),
        out=[jax.ShapeDtypeStruct((rows, width), x.dtype)],
        warps=tile.warps,
        stages=tile.stages,
        rows=tile.rows,
        columns=tile.columns,
        depth=steps,
        grid=grid,
        form=tile.form,
        elsewhere=places is not None,
        stride=programs,
    )
    return out


def most_tiles(groups: int, rows: int, size: int) -> int:
    """Of at most `size` rows, none over two groups, whatever the groups' sizes."""
    return -(-rows // size) + min(groups, rows)


def tile_table(group_sizes: Array, rows: int, size: int, backend: Backend) -> tuple[Array, Array, Array, Array]:
    """Group, first row and end of each tile of at most `size` rows, none over two groups; and [1] how many are used:
    those come first, and what is said of the others is unspecified. Rows past the groups' are in none.
    """
    groups = group_sizes.shape[0]
    count = most_tiles(groups, rows, size)
    group, start, end, used = launch(
        _tile_table,
        backend,
        name="grouped_matmul_tiles",
        programs=-(-groups // TABLED),
        args=(group_sizes,),
        out=[jax.ShapeDtypeStruct((length,), jnp.int32) for length in (count, count, count, 1)],
        warps=4,
        size=size,
    )
    return group, start, end, used


def _tile_table(program, sizes_ref, group_ref, start_ref, end_ref, used_ref, *, size):
    """Of TABLED groups, behind the tiles of all that stand before them."""
    groups, count = sizes_ref.shape[0], group_ref.shape[0]
    other = jnp.arange(power_of_two(groups), dtype=jnp.int32)
    sizes = plgpu.load(sizes_ref.at[other], mask=other < groups, other=0)
    tiles_of = pl.cdiv(sizes, size)
    mine = program * TABLED + jnp.arange(TABLED, dtype=jnp.int32)
    before = other[None, :] < mine[:, None]
    first_row = jnp.sum(jnp.where(before, sizes[None, :], 0), axis=1)
    first_tile = jnp.sum(jnp.where(before, tiles_of[None, :], 0), axis=1)
    of_mine = plgpu.load(sizes_ref.at[mine], mask=mine < groups, other=0)

    def store(i, _):
        start, real = first_row + i * size, i * size < of_mine
        # There are never so many that the last one is used.
        tile = jnp.where(real, bounded(first_tile + i, count), count - 1)
        plgpu.store(group_ref.at[tile], mine, mask=real)
        plgpu.store(start_ref.at[tile], start, mask=real)
        plgpu.store(end_ref.at[tile], jnp.minimum(start + size, first_row + of_mine), mask=real)

    lax.fori_loop(0, pl.cdiv(jnp.max(of_mine), size), store, None)

    @pl.when(program == 0)
    def _():
        used_ref[0] = jnp.sum(tiles_of)


def _grouped_matmul(
    program, used_ref, group_ref, start_ref, end_ref, *refs, rows, columns, depth, grid, form, elsewhere, stride
):
    place_ref, refs = (refs[0], refs[1:]) if elsewhere else (None, refs)
    x_ref, *refs = refs
    factor_ref, refs = (None, refs) if form == row_forms.WIDE else (refs[0], refs[1:])
    (weight,), (out_ref,) = Operand.taken(refs, (grid,))
    total, width = x_ref.shape[1], weight.shape[1]
    # Programs of one group are neighbours, so that its rows and its matrix stay in the cache for all of them.
    blocks = -(-width // columns)
    parts = row_forms.PARTS[form]
    step = jnp.arange(depth, dtype=jnp.int32)
    even = total % depth == 0

    def run(number):
        tile, block = number // blocks, number % blocks
        group, start, end = (
            bounded(group_ref[tile], weight.shape[0]),
            bounded(start_ref[tile], out_ref.shape[0]),
            end_ref[tile],
        )
        row = start + jnp.arange(rows, dtype=jnp.int32)
        row_of_x = parts * start + jnp.arange(parts * rows, dtype=jnp.int32)
        real_of_x = row_of_x < parts * end
        if place_ref is not None:
            place = plgpu.load(place_ref.at[row_of_x // parts], mask=real_of_x, other=0)
            row_of_x = parts * bounded(place, x_ref.shape[0] // parts) + row_of_x % parts
        column = block * columns + jnp.arange(columns, dtype=jnp.int32)
        # Rows behind the end are other programs', which run before this one or after: what is stored there would stay
        # in some orders, as tests/pallas_kernels/test_program_order.py sees.
        real, there = row < end, column < width

        def step_of(i):
            d = i * depth + step
            within = d < total
            x_mask = real_of_x[:, None] if even else real_of_x[:, None] & within[None, :]
            w_mask = there[:, None] if even else there[:, None] & within[None, :]
            x = codes.load(x_ref, (row_of_x[:, None], d[None, :]), x_mask)
            # The matrix is the left operand: few rows are the short side of the product.
            return [(codes.load(weight.refs[0], (group, column[:, None], d[None, :]), w_mask), x)]

        of_group = dataclasses.replace(weight, lead=(jnp.full(column.shape, group, jnp.int32),))
        steps = (0, pl.cdiv(total, depth))
        (out,) = codes.summed([of_group], step_of, steps, depth, column, [there], [row_of_x.size])
        if factor_ref is not None:
            out = row_forms.joined(out, codes.load(factor_ref, (row_of_x,), real_of_x), form)
        mask = there[:, None] & real[None, :]
        plgpu.store(out_ref.at[row[None, :], column[:, None]], out.astype(out_ref.dtype), mask=mask)

    tiles = bounded(used_ref[0], group_ref.shape[0] + 1) * blocks
    # A program's tiles are as far apart as there are programs.
    count = pl.cdiv(jnp.maximum(tiles - program, 0), stride)
    lax.fori_loop(0, count, lambda i, _: run(program + i * stride), None)
