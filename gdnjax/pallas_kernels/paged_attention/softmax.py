"""A softmax carried over pages of keys, cut into parts where contexts are long or few programs would run.

What attention over keys and values and attention over latents share: a program holds some rows (a query of a tile by a
head of those that read the same keys), walks over the keys that the tile can see, and keeps a softmax in float32. A
kernel of the op says in `for_parts` what it does with the rows of a part, and in `walk` what a page of keys gives them.

Where a context is cut depends on its own length, and on what a step is compiled for: its bits are the same whoever
stands beside it. A context of one part is stored as it is; a second kernel, in which it costs nothing, merges the
others. Where contexts may have more parts than programs were made for, each program takes the next of a list of all
parts, as far as there are any: so many short contexts have the programs that they had, and the parts of a long one run
beside them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.launch import LEAST, bounded, launch, layer_number, power_of_two, sigmoid
from gdnjax.pallas_kernels.paged_attention.tiles import LONG, MOST_PARTS, Attention
from gdnjax.shapes import Array

AT_ONCE = 8
"""Parts that the merging kernel holds."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a launch is cut into programs; static.

    Fields:
      together  heads of a program, all of one group.
      queries   of a tile in a program: all of them, or as many of one head as fit.
      rows      of a program, padded: its heads times its queries.
      page      keys of a turn.
      fill      parts that a context is cut into so that there are enough programs.
      longest   pages of a part, from which on there are more parts; None: there is no bound.
      splits    parts that a context has at most.
      listed    programs, where they take parts from a list; None: each has its part.
      first     keys at positions before it are masked.
      gated     outputs are multiplied by the sigmoid of a gate.
    """

    together: int
    queries: int
    rows: int
    page: int
    fill: int
    longest: int | None
    splits: int
    listed: int | None
    first: int
    gated: bool

    def pages_of(self, pages: Array) -> Array:
        """Pages of a part of a context of so many: at least one."""
        part = pl.cdiv(pages, self.fill)
        if self.longest is not None:
            part = jnp.maximum(jnp.minimum(part, self.longest), pl.cdiv(pages, self.splits))
        return jnp.maximum(part, 1)

    def parts_of(self, seen: Array) -> Array:
        """Parts of a context of so many keys: none, if it has no keys."""
        pages = pl.cdiv(seen, self.page)
        return pl.cdiv(pages, self.pages_of(pages))


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
    gate: Array | None = None,
    **static,
) -> Array:
    """Runs `kernel(program, layer_ref, position_ref, table_ref, *refs, plan, **static)`, the refs being those of
    `taken`: of `gate` if there is one, of q, of the pools, and of the outputs.

    `group` heads read the same keys; `width` is that of a value, and of the output. Blocks of a pool are its axis 1,
    and tokens of a block its axis 2. `gate` [g, q, 2 h, width] has that of head i in its row 2 i + 1.
    """
    count, queries, heads = q.shape[:3]
    # As many heads of a group as fit; each program reads the keys for all of them.
    together = max(h for h in range(1, group + 1) if group % h == 0 and (h == 1 or h * queries <= tile.rows))
    # And where not even one head's queries do, a part of them that makes equal programs.
    at_once = max(n for n in range(1, min(queries, tile.rows) + 1) if queries % n == 0)
    programs = count * (heads // together) * (queries // at_once)
    length = tiles.block_table.shape[1] * pools[0].shape[2]
    fill = _fill(programs, length, tile)
    long = tile.part > 0 and length > LONG * tile.part
    splits = max(fill, MOST_PARTS) if long else fill
    assert splits == 1 or at_once == queries, "a tile of several programs has one part"
    plan = Plan(
        together=together,
        queries=at_once,
        rows=power_of_two(together * at_once, LEAST),
        page=tile.keys,
        fill=fill,
        longest=tile.part // tile.keys if long else None,
        splits=splits,
        listed=programs * fill + tile.programs if splits > fill else None,
        first=tiles.first,
        gated=gate is not None,
    )
    shape = (count, queries, heads)
    out = [jax.ShapeDtypeStruct((*shape, width), q.dtype)]
    if splits > 1:
        sizes = ((*shape, splits, width), (*shape, splits), (*shape, splits))
        out += [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    gates = () if gate is None else (gate,)
    found, *parts = launch(
        kernel,
        backend,
        name=name if splits == 1 else f"{name}_split",
        programs=plan.listed or programs * splits,
        args=(
            layer_number(layer),
            tiles.position,
            tiles.block_table,
            *([_ends(plan, tiles.position, length)] if plan.listed else []),
            *gates,
            q,
            *pools,
        ),
        out=out,
        warps=tile.warps,
        stages=tile.stages,
        plan=plan,
        **static,
    )
    if splits == 1:
        return found
    (found,) = launch(
        _merge,
        backend,
        name=f"{name}_merge",
        programs=count * queries * heads,
        args=(tiles.position, *gates, *parts, found),
        out=out[:1],
        warps=tile.merge_warps,
        aliases={4 + len(gates): 0},
        length=length,
        plan=plan,
    )
    return found


def _fill(programs: int, length: int, tile: Attention) -> int:
    """Parts of the context that run beside each other: enough programs to fill the device, and no part too short."""
    return max(1, min(tile.programs // programs, length // tile.least_split))


def _seen(position: Array, length: int) -> Array:
    """Keys that a tile with queries at `position` [..., q] sees, behind a table of `length` of them at most."""
    return jnp.minimum(jnp.max(position, axis=-1) + 1, length)


def _ends(plan: Plan, position: Array, length: int) -> Array:
    """[g] int32: the parts of each tile and of those before it, at least one each. Layers have it in common."""
    parts = jnp.maximum(plan.parts_of(_seen(position, length)), 1)
    number = jnp.arange(parts.shape[0])
    return jnp.sum(jnp.where(number[None, :] <= number[:, None], parts[None, :], 0), axis=1, dtype=jnp.int32)


def taken(refs: Sequence, plan: Plan) -> tuple[Any, Any, list, list]:
    """A kernel's refs behind that of the table: of the list's ends and of the gate, None where there are none, those of
    q and of the pools, and those of the outputs.
    """
    refs = list(refs)
    ends = refs.pop(0) if plan.listed else None
    gate = refs.pop(0) if plan.gated else None
    outputs = 1 if plan.splits == 1 else 4
    return ends, gate, refs[:-outputs], refs[-outputs:]


def for_parts(program: Array, position_ref, ends_ref, heads: int, plan: Plan, run: Callable[["Rows"], None]) -> None:
    """Runs `run` with the rows of each part that is the program's."""
    of_tile = heads // plan.together
    if ends_ref is None:
        split, part = program % plan.splits, program // plan.splits % of_tile
        run(_rows_of(program // (plan.splits * of_tile), part, split, position_ref, plan))
        return
    count, listed = ends_ref.shape[0], plan.listed
    assert listed is not None, "there is a list"
    number = jnp.arange(power_of_two(count), dtype=jnp.int32)
    real = None if number.size == count else number < count
    ends = plgpu.load(ends_ref.at[number], mask=real, other=None if real is None else jnp.iinfo(jnp.int32).max)

    def one_part(i, carry):
        item = program + i * listed
        place = item // of_tile
        tile = bounded(jnp.sum((ends <= place).astype(jnp.int32)), count)
        before = jnp.where(tile > 0, ends_ref[jnp.maximum(tile - 1, 0)], 0)
        run(_rows_of(tile, item % of_tile, place - before, position_ref, plan))
        return carry

    mine = pl.cdiv(jnp.maximum(ends_ref[count - 1] * of_tile - program, 0), listed)
    lax.fori_loop(0, mine, one_part, 0)


def _merge(program, position_ref, *refs, length, plan):
    """Of one query and head: the softmax over all keys from those over parts, where there are several."""
    gate_ref, (total_ref, top_ref, weight_ref, _, o_ref) = refs[0] if plan.gated else None, refs[plan.gated :]
    queries, heads, _, width = total_ref.shape[1:]
    head, query, tile = program % heads, program // heads % queries, program // (heads * queries)
    number = jnp.arange(power_of_two(queries), dtype=jnp.int32)
    position = plgpu.load(position_ref.at[tile, number], mask=number < queries, other=-1)
    pages = pl.cdiv(_seen(position, length), plan.page)
    # Nothing is divided by it, which would take a program of such a size longer than all else.
    per_part = plan.pages_of(pages)
    lane, mask = columns(0, width)

    def run():
        at = tile, query, head
        everything = jnp.arange(power_of_two(plan.splits), dtype=jnp.int32)
        tops = plgpu.load(top_ref.at[*at, everything], mask=everything * per_part < pages, other=-jnp.inf)
        most = jnp.max(tops)
        # No part has seen a key of a query that is none.
        most = jnp.where(most == -jnp.inf, 0.0, most)

        def some(i, carry):
            total, weight = carry
            split = i * AT_ONCE + jnp.arange(AT_ONCE, dtype=jnp.int32)
            real = split * per_part < pages
            share = jnp.exp2(plgpu.load(top_ref.at[*at, split], mask=real, other=-jnp.inf) - most)
            weights = plgpu.load(weight_ref.at[*at, split], mask=real, other=0.0)
            both = real[:, None] if mask is None else real[:, None] & mask[None, :]
            totals = plgpu.load(total_ref.at[*at, split[:, None], lane[None, :]], mask=both, other=0.0)
            return total + jnp.sum(share[:, None] * totals, axis=0), weight + jnp.sum(share * weights)

        start = jnp.zeros((lane.size,), jnp.float32), jnp.zeros((), jnp.float32)
        total, weight = lax.fori_loop(0, pl.cdiv(plan.splits, AT_ONCE), some, start)
        o = total / jnp.where(weight > 0, weight, 1.0)
        _store(o_ref, gate_ref, at, o[None, :], lane, None if mask is None else mask[None, :])

    pl.when(per_part < pages)(run)


def _store(o_ref, gate_ref, at: tuple, o: Array, lane: Array, mask: Array | None) -> None:
    """Outputs [rows, columns] at their places, times the sigmoid of their gates."""
    tile, query, head = at
    o = o.astype(o_ref.dtype)
    if gate_ref is not None:
        place = tile, query, 2 * head + 1, lane[None, :]
        gate = plgpu.load(gate_ref.at[place], mask=mask, other=None if mask is None else 0)
        o = (o.astype(jnp.float32) * sigmoid(gate.astype(jnp.float32))).astype(o_ref.dtype)
    plgpu.store(o_ref.at[tile, query, head, lane[None, :]], o, mask=mask)


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


def _rows_of(tile: Array, part: Array, split: Array, position_ref, plan: Plan) -> Rows:
    row = jnp.arange(plan.rows, dtype=jnp.int32)
    query, head = row // plan.together, part * plan.together + row % plan.together
    real = row < plan.queries * plan.together
    cuts = position_ref.shape[1] // plan.queries
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
    gate_ref,
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
    page, first = plan.page, plan.first
    block_size, position = pool_ref.shape[2], rows.position
    # What no query of the tile sees is not loaded: it may be anything. Nor is what stands behind the table: whatever it
    # is would be taken for the number of a block.
    seen = jnp.minimum(jnp.max(position) + 1, table_ref.shape[1] * block_size)
    pages = pl.cdiv(seen, page)
    per_part = pages if plan.splits == 1 else plan.pages_of(pages)
    begin = jnp.maximum(rows.split * per_part, first // page)
    end = jnp.minimum((rows.split + 1) * per_part, pages)
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

    nothing = (jnp.full((plan.rows,), -jnp.inf), jnp.zeros((plan.rows,)), jnp.zeros((plan.rows, lane.size)))
    # Pages before the first whole one, whole ones, and those that the last queries see in part.
    head_end = jnp.maximum(begin, jnp.minimum(-(-first // page), end))
    least = jnp.minimum(jnp.min(jnp.where(rows.real, position, seen)) + 1, seen)
    whole_end = jnp.maximum(head_end, jnp.minimum(least // page, end))
    masked, whole = functools.partial(one_page, whole=False), functools.partial(one_page, whole=True)
    carry = lax.fori_loop(begin, head_end, masked, nothing) if first else nothing
    carry = lax.fori_loop(head_end, whole_end, whole, carry)
    top, weight, total = lax.fori_loop(whole_end, end, masked, carry)

    at = rows.tile, rows.query[:, None], rows.head[:, None]
    stored = rows.real[:, None] if mask is None else rows.real[:, None] & mask[None, :]

    def store_whole():
        _store(outputs[0], gate_ref, at, total / jnp.where(weight > 0, weight, 1.0)[:, None], lane, stored)

    def store_part():
        _, total_ref, top_ref, weight_ref = outputs
        of_row = rows.tile, rows.query, rows.head, rows.split
        plgpu.store(total_ref.at[*at, rows.split, lane[None, :]], total, mask=stored)
        plgpu.store(top_ref.at[of_row], top * scale, mask=rows.real)
        plgpu.store(weight_ref.at[of_row], weight, mask=rows.real)

    if plan.splits == 1:
        store_whole()
        return
    pl.when((pages <= per_part) & (rows.split == 0))(store_whole)
    pl.when((pages > per_part) & (rows.split * per_part < pages))(store_part)
