"""A program streams some rows of a matrix past all rows of x: x stays in the cache, the matrix is read once.

Bytes: the matrices (9B: 100 MB for the inputs of a GDN layer, 201 MB for gate and up): the ceiling is that of reading
memory. Several matrices of one x are one launch, and gate and up meet in registers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import LEAST, dot, launch, power_of_two, sigmoid
from gdnjax.pallas_kernels.matmul.tiles import Tile
from gdnjax.shapes import Array


def project(x: Array, weights: Sequence[Array], tile: Tile, backend: Backend) -> tuple[Array, ...]:
    blocks = [-(-weight.shape[0] // tile.columns) for weight in weights]
    splits = _splits(sum(blocks), x.shape[1], tile) if len(weights) == 1 else 1
    dtype = x.dtype if splits == 1 else jnp.float32
    out = launch(
        _project,
        backend,
        name="matmul_project",
        programs=sum(blocks) * splits,
        args=(x, *weights),
        out=[jax.ShapeDtypeStruct((splits, x.shape[0], weight.shape[0]), dtype) for weight in weights],
        warps=tile.warps,
        stages=tile.stages,
        blocks=tuple(blocks),
        splits=splits,
        columns=tile.columns,
        depth=_depth(x, tile),
    )
    return tuple(part[0] if splits == 1 else jnp.sum(part, axis=0).astype(x.dtype) for part in out)


def _splits(programs: int, inputs: int, tile: Tile) -> int:
    """Parts of the inputs, a power of two, of at least four steps each."""
    most = max(1, min(tile.programs // programs, inputs // (4 * tile.depth)))
    return 1 << (most.bit_length() - 1)


def _depth(x: Array, tile: Tile) -> int:
    return min(tile.depth, power_of_two(x.shape[1], LEAST))


def _project(program, x_ref, *refs, blocks, splits, columns, depth):
    weight_refs, out_refs = refs[: len(blocks)], refs[len(blocks) :]
    product, split = program // splits, program % splits
    first = 0
    for count, weight_ref, out_ref in zip(blocks, weight_refs, out_refs, strict=True):

        def make(first=first, weight_ref=weight_ref, out_ref=out_ref):
            block = (product - first) * columns
            (out,) = _products(x_ref, [weight_ref], block, columns, depth, split, splits)
            _store(out_ref, (split,), out, block)

        pl.when((product >= first) & (product < first + count))(make)
        first += count


def swiglu(x: Array, gate: Array, up: Array, tile: Tile, backend: Backend) -> Array:
    (out,) = launch(
        _swiglu,
        backend,
        name="matmul_swiglu",
        programs=-(-gate.shape[0] // tile.columns),
        args=(x, gate, up),
        out=[jax.ShapeDtypeStruct((x.shape[0], gate.shape[0]), x.dtype)],
        warps=tile.warps,
        stages=tile.stages,
        columns=tile.columns,
        depth=_depth(x, tile),
    )
    return out


def _swiglu(program, x_ref, gate_ref, up_ref, out_ref, *, columns, depth):
    block = program * columns
    gate, up = _products(x_ref, [gate_ref, up_ref], block, columns, depth, 0, 1)
    _store(out_ref, (), gate * sigmoid(gate) * up, block)


def _products(x_ref, weight_refs, block, columns: int, depth: int, split, splits: int) -> tuple[Array, ...]:
    """[columns, rows] of each matrix from row `block` on, over one of `splits` parts of the inputs."""
    rows, inputs = x_ref.shape
    row, real = _rows(rows)
    column = block + jnp.arange(columns, dtype=jnp.int32)
    step = jnp.arange(depth, dtype=jnp.int32)
    steps = pl.cdiv(inputs, depth)
    even = inputs % depth == 0

    def load(ref, at, mask, within):
        if not even:
            mask = within[None, :] if mask is None else mask[:, None] & within[None, :]
        elif mask is not None:
            mask = mask[:, None]
        return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else 0)

    def one_step(i, sums):
        place = i * depth + step
        within = place < inputs
        x = load(x_ref, (row[:, None], place[None, :]), real, within)
        products = []
        for ref, total in zip(weight_refs, sums, strict=True):
            there = None if ref.shape[0] % columns == 0 else column < ref.shape[0]
            weight = load(ref, (column[:, None], place[None, :]), there, within)
            # The matrix is the left operand: few rows are the short side of the product.
            products.append(total + dot(weight, x, contract=(1, 1)))
        return tuple(products)

    begin, end = split * steps // splits, (split + 1) * steps // splits
    start = tuple(jnp.zeros((columns, row.size), jnp.float32) for _ in weight_refs)
    return lax.fori_loop(begin, end, one_step, start)


def _rows(rows: int) -> tuple[Array, Array | None]:
    """Numbers of the rows of a block, and which of them exist; None: all."""
    row = jnp.arange(power_of_two(rows, LEAST), dtype=jnp.int32)
    return row, None if row.size == rows else row < rows


def _store(out_ref, lead: tuple, out: Array, block) -> None:
    rows, width = out_ref.shape[-2:]
    row, real = _rows(rows)
    column = block + jnp.arange(out.shape[0], dtype=jnp.int32)
    mask = None if width % out.shape[0] == 0 else jnp.broadcast_to((column < width)[:, None], out.shape)
    if real is not None:
        here = jnp.broadcast_to(real[None, :], out.shape)
        mask = here if mask is None else mask & here
    plgpu.store(out_ref.at[(*lead, row[None, :], column[:, None])], out.astype(out_ref.dtype), mask=mask)
