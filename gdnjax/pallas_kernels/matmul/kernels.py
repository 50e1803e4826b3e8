"""A program streams some rows of a matrix past all rows of x: x stays in the cache, the matrix is read once.

Bytes: the matrices (9B: 100 MB for the inputs of a GDN layer, 201 MB for gate and up): the ceiling is that of reading
memory. Several matrices of one x are one launch, and gate and up meet in registers. Matrices of codes are half as many
bytes, and may stand beside those of numbers: see `gdnjax.pallas_kernels.codes`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import codes
from gdnjax.pallas_kernels.codes import Operand
from gdnjax.pallas_kernels.launch import LEAST, launch, power_of_two, sigmoid
from gdnjax.pallas_kernels.matmul.tiles import Tile
from gdnjax.quantized import Weight
from gdnjax.shapes import Array


def project(x: Array, weights: Sequence[Weight], tile: Tile, backend: Backend) -> tuple[Array, ...]:
    blocks = [-(-weight.shape[0] // tile.columns) for weight in weights]
    depth = _depth(x, weights, tile)
    splits = _splits(sum(blocks), x.shape[1], depth, tile) if len(weights) == 1 else 1
    dtype = x.dtype if splits == 1 else jnp.float32
    arrays, grids = codes.flat(*weights)
    rows = codes.rows_of(x, tile.form)
    out = launch(
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
    return tuple(part[0] if splits == 1 else jnp.sum(part, axis=0).astype(x.dtype) for part in out)


def _splits(programs: int, inputs: int, depth: int, tile: Tile) -> int:
    """Parts of the inputs, a power of two, of at least four steps each."""
    most = max(1, min(tile.programs // programs, inputs // (4 * depth)))
    return 1 << (most.bit_length() - 1)


def _depth(x: Array, weights: Sequence[Weight], tile: Tile) -> int:
    depth = codes.depth_of(min(tile.depth, power_of_two(x.shape[1], LEAST)), x.shape[1], *weights)
    assert depth is not None, "tiles.of gives none where there is no depth"
    return depth


def _project(program, *refs, blocks, grids, splits, columns, depth, form):
    count = 1 if form == codes.WIDE else 3
    rows, refs = refs[:count], refs[count:]
    operands, out_refs = Operand.taken(refs, grids)
    product, split = program // splits, program % splits
    first = 0
    for size, operand, out_ref in zip(blocks, operands, out_refs, strict=True):

        def make(first=first, operand=operand, out_ref=out_ref):
            block = (product - first) * columns
            (out,) = _products(rows, [operand], block, columns, depth, form, split, splits)
            _store(out_ref, (split,), out, block)

        pl.when((product >= first) & (product < first + size))(make)
        first += size


def swiglu(x: Array, gate: Weight, up: Weight, tile: Tile, backend: Backend) -> Array:
    arrays, grids = codes.flat(gate, up)
    (out,) = launch(
        _swiglu,
        backend,
        name="matmul_swiglu",
        programs=-(-gate.shape[0] // tile.columns),
        args=(*codes.rows_of(x, tile.form), *arrays),
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
    count = 1 if form == codes.WIDE else 3
    rows, refs = refs[:count], refs[count:]
    operands, (out_ref,) = Operand.taken(refs, grids)
    block = program * columns
    gate, up = _products(rows, operands, block, columns, depth, form, 0, 1)
    _store(out_ref, (), gate * sigmoid(gate) * up, block)


def _products(
    row_refs: Sequence, operands: Sequence[Operand], block, columns: int, depth: int, form: str, split, splits: int
) -> tuple[Array, ...]:
    """[columns, rows] of each matrix from row `block` on, over one of `splits` parts of the inputs."""
    x_ref, *formed_refs = row_refs
    rows, inputs = x_ref.shape
    of_codes = [bool(formed_refs) and operand.grid is not None for operand in operands]
    row, real = _rows(rows, codes.padded(rows, codes.WIDE))
    parts = codes.PARTS[form]
    formed, formed_real = _rows(parts * rows, parts * codes.padded(rows, form))
    column = block + jnp.arange(columns, dtype=jnp.int32)
    step = jnp.arange(depth, dtype=jnp.int32)
    steps = pl.cdiv(inputs, depth)
    even = inputs % depth == 0

    def load(ref, at, mask, within):
        if not even:
            mask = within[None, :] if mask is None else mask[:, None] & within[None, :]
        elif mask is not None:
            mask = mask[:, None]
        return codes.load(ref, at, mask)

    def one_step(i, sums):
        place = i * depth + step
        within = place < inputs
        x = {}
        if not all(of_codes):
            x[False] = load(x_ref, (row[:, None], place[None, :]), real, within)
        if any(of_codes):
            x[True] = load(formed_refs[0], (formed[:, None], place[None, :]), formed_real, within)
        products = []
        for operand, total, coded in zip(operands, sums, of_codes, strict=True):
            there = None if operand.shape[0] % columns == 0 else column < operand.shape[0]
            weight = load(operand.refs[0], (column[:, None], place[None, :]), there, within)
            # The matrix is the left operand: few rows are the short side of the product.
            products.append(total + operand.product(weight, x[coded], column, i * depth, there))
        return tuple(products)

    begin, end = split * steps // splits, (split + 1) * steps // splits
    sizes = [formed.size if coded else row.size for coded in of_codes]
    sums = lax.fori_loop(begin, end, one_step, tuple(jnp.zeros((columns, size), jnp.float32) for size in sizes))
    if not any(of_codes):
        return sums
    factor = codes.load(formed_refs[1], (formed,), formed_real)
    return tuple(
        codes.joined(total, factor, parts) if coded else total for total, coded in zip(sums, of_codes, strict=True)
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
