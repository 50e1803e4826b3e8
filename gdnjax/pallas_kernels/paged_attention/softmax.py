"""A softmax carried over pages of keys, in one kernel, split over long contexts where few programs would run.

What attention over keys and values and attention over latents share: a program holds some rows (a query of a tile by a
head of those that read the same keys), walks over the keys that the tile can see, and keeps a softmax in float32. A
kernel of the op takes its rows from `rows_of`, and says in `walk` what a page of keys gives them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import LEAST, bounded, launch, layer_number, power_of_two
from gdnjax.pallas_kernels.paged_attention.tiles import Attention
from gdnjax.shapes import Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a launch is cut into programs; static.

    Fields:
      together  heads of a program, all of one group.
      queries   of a tile in a program: all of them, or as many of one head as fit.
      rows      of a program, padded: its heads times its queries.
      page      keys of a turn.
      splits    parts of the context.
      first     keys at positions before it are masked.
    """

    together: int
    queries: int
    rows: int
    page: int
    splits: int
    first: int


def attend(
    kernel: Callable,
    backend: Backend,
    *,
    name: str,
    tile: Attention,
    group: int,
    width: int,
    q: Array,
    pools: Sequence[Array],
    layer: int,
    tiles,
    **static,
) -> Array:
    """Runs `kernel(program, layer_ref, position_ref, table_ref, q_ref, *pool_refs, *output_refs, plan, **static)`.

    `group` heads read the same keys; `width` is that of a value, and of the output. Blocks of a pool are its axis 1,
    and tokens of a block its axis 2.
    """
    count, queries, heads = q.shape[:3]
    # As many heads of a group as fit; each program reads the keys for all of them.
    together = max(h for h in range(1, group + 1) if group % h == 0 and (h == 1 or h * queries <= tile.rows))
    # And where not even one head's queries do, a part of them that makes equal programs.
    at_once = max(n for n in range(1, min(queries, tile.rows) + 1) if queries % n == 0)
    programs = count * (heads // together) * (queries // at_once)
    splits = _splits(programs, tiles.block_table.shape[1] * pools[0].shape[2], tile)
    shape = (count, queries, heads)
    out = [jax.ShapeDtypeStruct((*shape, width), q.dtype)]
    if splits > 1:
        sizes = ((*shape, splits, width), (*shape, splits), (*shape, splits))
        out = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    found = launch(
        kernel,
        backend,
        name=name if splits == 1 else f"{name}_split",
        programs=programs * splits,
        args=(layer_number(layer), tiles.position, tiles.block_table, q, *pools),
        out=out,
        warps=tile.warps,
        stages=tile.stages,
        plan=Plan(together, at_once, power_of_two(together * at_once, LEAST), tile.keys, splits, tiles.first),
        **static,
    )
    return found[0] if splits == 1 else _merge(*found).astype(q.dtype)


def _splits(programs: int, length: int, tile: Attention) -> int:
    """Parts of the context that run beside each other: enough programs to fill the device, and no part too short."""
    return max(1, min(tile.programs // programs, length // tile.least_split))


def _merge(total: Array, top: Array, weight: Array) -> Array:
    """Softmaxes over parts to that over all: [..., splits, hd], [..., splits] twice -> [..., hd]. Few bytes: XLA's."""
    most = jnp.max(top, axis=-1, keepdims=True)
    share = jnp.where(weight > 0, jnp.exp2(top - jnp.where(jnp.isfinite(most), most, 0.0)), 0.0)
    sums = jnp.sum(share * weight, axis=-1)
    merged = jnp.sum(jnp.where(weight > 0, share, 0.0)[..., None] * total, axis=-2)
    return merged / jnp.where(sums > 0, sums, 1.0)[..., None]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a program, within its kernel.

    Fields:
      tile, part, split  of the program: part of the heads, split of the context.
      query, head        of each row, [rows].
      real               [rows] bool: the others are padding, and stored nowhere.
      position           [rows]: of the query, -1 for none.
    """

    tile: Array
    part: Array
    split: Array
    query: Array
    head: Array
    real: Array
    position: Array

    def load(self, q_ref, lane: Array, mask: Array | None = None) -> Array:
        """Columns `lane` of the rows' queries, 0 where `mask` is not. Where there is no query nothing is moved."""
        # Of places without a query only zeros are stored, and a tile of none has no keys.
        asked = self.real[:, None] & (self.position >= 0)[:, None]
        at = self.tile, self.query[:, None], self.head[:, None], lane[None, :]
        return plgpu.load(q_ref.at[at], mask=asked if mask is None else asked & mask[None, :], other=0)


def rows_of(program: Array, position_ref, heads: int, plan: Plan) -> Rows:
    queries, parts = position_ref.shape[1], heads // plan.together
    split, part = program % plan.splits, program // plan.splits % parts
    tile = program // (plan.splits * parts)
    row = jnp.arange(plan.rows, dtype=jnp.int32)
    query, head = row // plan.together, part * plan.together + row % plan.together
    real = row < plan.queries * plan.together
    cuts = queries // plan.queries
    if cuts > 1:
        query, tile = tile % cuts * plan.queries + query, tile // cuts
    position = plgpu.load(position_ref.at[tile, query], mask=real, other=-1)
    return Rows(tile, part, split, query, head, real, position)


def columns(start: int, width: int) -> tuple[Array, Array | None]:
    """`width` columns from `start` on, padded to a power of two, and which of them are there: None, if all are."""
    lane = start + jnp.arange(power_of_two(width, LEAST), dtype=jnp.int32)
    return lane, None if lane.size == width else lane < start + width


def load_keys(ref, at: tuple, lane: Array, mask: Array | None, there: Array | None) -> Array:
    """[keys, columns] of a pool, each key's place being `at`: numbers, or as many of them as there are keys. What is
    not `there`, or not a column, is 0.
    """
    place = tuple(number[:, None] if getattr(number, "ndim", 0) else number for number in at)
    both = None if mask is None else mask[None, :]
    if there is not None:
        both = there[:, None] if both is None else there[:, None] & both
    # Of the pool's kind: an integer is not converted to float8.
    zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
    return plgpu.load(ref.at[*place, lane[None, :]], mask=both, other=None if both is None else zero)


Page = Callable[[Array, Array, Array | None], tuple[Array, Callable[[Array], Array]]]
"""(block, offset, there) of a page's keys -> (scores of all rows, what sums the page's values by weights [rows, keys]).
`there` is None where all of the keys are, and may be read."""


def walk(
    rows: Rows,
    plan: Plan,
    table_ref,
    pool_ref,
    outputs: Sequence,
    page_of: Page,
    *,
    lane: Array,
    mask: Array | None,
    scale: float,
) -> None:
    """Softmax over the keys of `scale` times their scores, and the values' sum by it, stored: of a value's columns
    `lane`, where `mask` is.
    """
    page, first, splits = plan.page, plan.first, plan.splits
    block_size, position = pool_ref.shape[2], rows.position
    # What no query of the tile sees is not loaded: it may be anything. Nor is what stands behind the table: whatever it
    # is would be taken for the number of a block.
    seen = jnp.minimum(jnp.max(position) + 1, table_ref.shape[1] * block_size)
    pages = pl.cdiv(seen, page)
    per_split = pl.cdiv(pages, splits)
    begin = jnp.maximum(rows.split * per_split, first // page)
    end = jnp.minimum((rows.split + 1) * per_split, pages)
    scale = scale * math.log2(math.e)

    def one_page(i, carry, *, whole):
        """`whole`: every query sees all of the page, so that nothing is masked."""
        top, weight, total = carry
        key = i * page + jnp.arange(page, dtype=jnp.int32)
        there = None if whole else (key < seen) & (key >= first)
        block = plgpu.load(table_ref.at[rows.tile, key // block_size], mask=there, other=None if whole else 0)
        scores, summed = page_of(bounded(block, pool_ref.shape[1]), key % block_size, there)
        if there is not None:
            scores = jnp.where(there[None, :] & (key[None, :] <= position[:, None]), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # A row that has seen no key yet has top = -inf; its weights must be 0, not exp(-inf + inf).
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top * scale)
        # One multiply-add each: the scale is applied here, not to the scores.
        p = jnp.exp2(scores * scale - base[:, None])
        shrink = jnp.exp2(top * scale - base)
        weight = weight * shrink + jnp.sum(p, axis=1)
        return new_top, weight, total * shrink[:, None] + summed(p)

    start = (jnp.full((plan.rows,), -jnp.inf), jnp.zeros((plan.rows,)), jnp.zeros((plan.rows, lane.size)))
    # Pages before the first whole one, whole ones, and those that the last queries see in part.
    head_end = jnp.maximum(begin, jnp.minimum(-(-first // page), end))
    least = jnp.minimum(jnp.min(jnp.where(rows.real, position, seen)) + 1, seen)
    whole_end = jnp.maximum(head_end, jnp.minimum(least // page, end))
    masked, whole = functools.partial(one_page, whole=False), functools.partial(one_page, whole=True)
    carry = lax.fori_loop(begin, head_end, masked, start) if first else start
    carry = lax.fori_loop(head_end, whole_end, whole, carry)
    top, weight, total = lax.fori_loop(whole_end, end, masked, carry)

    at = rows.tile, rows.query[:, None], rows.head[:, None]
    stored = rows.real[:, None] if mask is None else rows.real[:, None] & mask[None, :]
    if splits == 1:
        (o_ref,) = outputs
        o = total / jnp.where(weight > 0, weight, 1.0)[:, None]
        plgpu.store(o_ref.at[*at, lane[None, :]], o.astype(o_ref.dtype), mask=stored)
        return
    total_ref, top_ref, weight_ref = outputs
    of_row = rows.tile, rows.query, rows.head, rows.split
    plgpu.store(total_ref.at[*at, rows.split, lane[None, :]], total, mask=stored)
    plgpu.store(top_ref.at[of_row], top * scale, mask=rows.real)
    plgpu.store(weight_ref.at[of_row], weight, mask=rows.real)
