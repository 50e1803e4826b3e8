"""A program streams some rows of a matrix past all rows of x: x stays in the cache, the matrix is read once.

Bytes: the matrices (9B: 100 MB for the inputs of a GDN layer, 201 MB for gate and up): the ceiling is that of reading
memory. Several matrices of one x are one launch, and gate and up meet in registers. Matrices of codes are half as many
bytes, and may stand beside those of numbers: see `gdnjax.pallas_kernels.codes`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import codes, row_forms
from gdnjax.pallas_kernels.codes import Operand
from gdnjax.pallas_kernels.launch import LEAST, launch, power_of_two, sigmoid
from gdnjax.pallas_kernels.matmul.tiles import Tile
from gdnjax.pallas_kernels.normed import Rows, total
from gdnjax.pallas_kernels.row_forms import WIDE
from gdnjax.quantized import Weight
from gdnjax.shapes import Array


def project(
    x: Rows, weights: Sequence[Weight], tile: Tile, backend: Backend, out_dtype: DTypeLike
) -> tuple[Array, ...]:
    return tuple(total(parts, out_dtype) for parts in project_in_parts(x, weights, tile, backend, out_dtype))


def project_in_parts(
    x: Rows, weights: Sequence[Weight], tile: Tile, backend: Backend, out_dtype: DTypeLike
) -> list[Array]:
    """Sums of parts of the inputs in float32, and one alone in `out_dtype`."""
    blocks = [-(-weight.shape[0] // tile.columns) for weight in weights]
    depth = _depth(x, weights, tile)
    splits = _splits(sum(blocks), x.shape[1], depth, tile)
    dtype = out_dtype if splits == 1 else jnp.float32
    arrays, grids = codes.flat(*weights)
    rows = row_forms.rows_of(x, tile.form, backend, wide=None in grids)
    return launch(
        _project,
        backend,
        name="matmul_project",
        programs=sum(blocks) * splits,
        args=(*rows, *arrays),
        out=[jax.ShapeDtypeStruct((splits, x.shape[0], weight.shape[0]), dtype) for weight in weights],
        warps=tile.warps,
        stages=tile.stages,
        blocks=tuple(blocks),
        grids=grids,
        splits=splits,
        columns=tile.columns,
        depth=depth,
        form=tile.form,
    )


def _splits(programs: int, inputs: int, depth: int, tile: Tile) -> int:
    """Parts of the inputs, a power of two, of at least four steps each."""
    most = max(1, min(tile.programs // programs, inputs // (4 * depth)))
    return 1 << (most.bit_length() - 1)


def _depth(x: Rows, weights: Sequence[Weight], tile: Tile) -> int:
    depth = codes.depth_of(min(tile.depth, power_of_two(x.shape[1], LEAST)), x.shape[1], *weights)
    assert depth is not None, "tiles.of gives none where there is no depth"
    return depth


def _project(program, *refs, blocks, grids, splits, columns, depth, form):
    rows, refs = _row_refs(refs, grids, form)
    operands, out_refs = Operand.taken(refs, grids)
    product, split = program // splits, program % splits
    first = 0
    for size, operand, out_ref in zip(blocks, operands, out_refs, strict=True):

        def make(first=first, operand=operand, out_ref=out_ref):
            block = (product - first) * columns
            (out,) = _products(rows, out_ref.shape[1], [operand], block, columns, depth, form, split, splits)
            _store(out_ref, (split,), out, block)

        pl.when((product >= first) & (product < first + size))(make)
        first += size


def swiglu(x: Rows, gate: Weight, up: Weight, tile: Tile, backend: Backend) -> Array:
    arrays, grids = codes.flat(gate, up)
    (out,) = launch(
        _swiglu,
        backend,
        name="matmul_swiglu",
        programs=-(-gate.shape[0] // tile.columns),
        args=(*row_forms.rows_of(x, tile.form, backend, wide=None in grids), *arrays),
        out=[jax.ShapeDtypeStruct((x.shape[0], gate.shape[0]), x.dtype)],
        warps=tile.warps,
        stages=tile.stages,
        grids=grids,
        columns=tile.columns,
        depth=_depth(x, (gate, up), tile),
        form=tile.form,
    )
    return out


def _swiglu(program, *refs, grids, columns, depth, form):
    rows, refs = _row_refs(refs, grids, form)
    operands, (out_ref,) = Operand.taken(refs, grids)
    block = program * columns
    gate, up = _products(rows, out_ref.shape[0], operands, block, columns, depth, form, 0, 1)
    _store(out_ref, (), gate * sigmoid(gate) * up, block)


def _row_refs(refs: Sequence, grids: Sequence, form: str) -> tuple[dict[str, Any], Sequence]:
    """The refs that `row_forms.rows_of` made, by name, and those behind them."""
    names = ["wide"] * (form == WIDE or None in grids) + ["formed", "factor"] * (form != WIDE)
    return dict(zip(names, refs[: len(names)], strict=True)), refs[len(names) :]


def _products(
    row_refs: dict[str, Any],
    rows: int,
    operands: Sequence[Operand],
    block,
    columns: int,
    depth: int,
    form: str,
    split,
    splits,
) -> tuple[Array, ...]:
    """[columns, rows] of each matrix from row `block` on, over one of `splits` parts of the inputs."""
    parts, inputs = row_forms.PARTS[form], operands[0].shape[1]
    # Numbers meet rows as they are.
    formed = ["formed" in row_refs and operand.grid is not None for operand in operands]
    places = {
        False: _rows(rows, row_forms.padded(rows, WIDE)),
        True: _rows(parts * rows, parts * row_forms.padded(rows, form)),
    }
    column = block + jnp.arange(columns, dtype=jnp.int32)
    there = [None if operand.shape[0] % columns == 0 else column < operand.shape[0] for operand in operands]
    step = jnp.arange(depth, dtype=jnp.int32)
    even = inputs % depth == 0

    def load(ref, row, place, mask):
        if not even:
            within = (place < inputs)[None, :]
            mask = within if mask is None else mask[:, None] & within
        elif mask is not None:
            mask = mask[:, None]
        return codes.load(ref, (row[:, None], place[None, :]), mask)

    def step_of(i):
        place = i * depth + step
        x = {kind: load(row_refs["formed" if kind else "wide"], places[kind][0], place, places[kind][1])
             for kind in sorted(set(formed))}  # fmt: skip
        # The matrix is the left operand: few rows are the short side of the product.
        return [
            (load(operand.refs[0], column, place, real), x[kind])
            for operand, real, kind in zip(operands, there, formed, strict=True)
        ]

    steps = pl.cdiv(inputs, depth)
    part = (split * steps // splits, (split + 1) * steps // splits)
    sums = codes.summed(operands, step_of, part, depth, column, there, [places[kind][0].size for kind in formed])
    if not any(formed):
        return sums
    row, real = places[True]
    factor = codes.load(row_refs["factor"], (row,), real)
    return tuple(
        row_forms.joined(total, factor, form) if kind else total for total, kind in zip(sums, formed, strict=True)
    )


def _rows(rows: int, size: int) -> tuple[Array, Array | None]:
    """Numbers of the rows of a block of `size`, and which of them exist; None: all."""
    row = jnp.arange(size, dtype=jnp.int32)
    return row, None if size == rows else row < rows


def _store(out_ref, lead: tuple, out: Array, block) -> None:
    rows, width = out_ref.shape[-2:]
    row, real = _rows(rows, out.shape[1])
    column = block + jnp.arange(out.shape[0], dtype=jnp.int32)
    mask = None if width % out.shape[0] == 0 else jnp.broadcast_to((column < width)[:, None], out.shape)
    if real is not None:
        here = jnp.broadcast_to(real[None, :], out.shape)
        mask = here if mask is None else mask & here
    plgpu.store(out_ref.at[(*lead, row[None, :], column[:, None])], out.astype(out_ref.dtype), mask=mask)
