"""Other tiles for a workload, each as a context in which the op's table has it."""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator

from gdnjax.backend import Backend
from gdnjax.pallas_kernels import row_forms
from gdnjax.pallas_kernels.causal_conv1d import tiles as conv
from gdnjax.pallas_kernels.expert_routing import tiles as routing
from gdnjax.pallas_kernels.gated_delta_rule import tiles as delta
from gdnjax.pallas_kernels.grouped_matmul import tiles as grouped
from gdnjax.pallas_kernels.gumbel_argmax import tiles as draws
from gdnjax.pallas_kernels.matmul import tiles as products
from gdnjax.pallas_kernels.paged_attention import tiles as attention


def candidates(name: str, backend: Backend) -> Iterator[tuple[object, contextlib.AbstractContextManager]]:
    """Tiles for the workload of that name, and the context in which each is used."""
    table, key, tiles = _table(name)
    for tile in tiles:
        yield tile, _entry(table, backend, key, tile)


@contextlib.contextmanager
def _entry(table: dict, backend: Backend, key, tile):
    """The architecture's row with another entry, for as long as it lasts."""
    had = backend.architecture in table
    row = backend.tiles(table)
    table[backend.architecture] = tile if key is None else {**row, key: tile}
    try:
        yield
    finally:
        if had:
            table[backend.architecture] = row
        else:
            del table[backend.architecture]


class _Row(dict):
    """A row of the products' table with another tile, which is all of it that is printed."""

    def __init__(self, row: dict, most: int, kind: str, tile: products.Tile):
        super().__init__(row | {most: dataclasses.replace(row[most], **{kind: tile})})
        self.tile = tile

    def __str__(self) -> str:
        return str(self.tile)


def _products_table(name: str):
    """Of products with numbers, and with codes in float8_e4m3fn, for the rows that the name ends in."""
    rows, fp8 = int(name.rpartition("-")[2]), "float8" in name
    kind = "gated" if "gate-up" in name else "wide" if "delta" in name else "narrow"
    if "int8" in name:
        return products.TILES, "int8", []
    few = kind == "narrow"
    if fp8 and rows <= 16:
        columns = (32, 64) if kind == "gated" else (64, 128)
        depths, warps, stages, splits = (128,), (1, 2, 4), (3, 4, 5), (264, 528)
        forms = (row_forms.HALVES,)
    elif fp8:
        columns, depths, warps, stages, splits = (64, 128), (64, 128), (4, 8, 16), (2, 3, 4), (132,)
        forms = (row_forms.FLOAT16, row_forms.HALVES)
    elif rows <= 16:
        columns, depths, warps, stages, splits = (32, 64), (128, 256), (2, 4), (3, 4, 5), (264, 528)
        forms = (row_forms.WIDE,)
    else:
        columns, depths, warps, stages, splits = (64, 128), (64, 128, 256), (4, 8), (3, 4), (132, 264)
        forms = (row_forms.WIDE,)
    dtype = "float8_e4m3fn" if fp8 else "bfloat16"
    row = products.TILES["cuda"][dtype]
    most = next(most for most in sorted(row) if rows <= most)
    sizes = itertools.product(columns, depths, warps, stages, splits if few else (0,), forms)
    return products.TILES, dtype, [_Row(row, most, kind, products.Tile(*size)) for size in sizes]


def _table(name: str):
    if name.startswith(("gdn-prefill", "kda-prefill")):
        old = delta.CHUNKED["cuda"]["bfloat16"]
        tiles = [
            dataclasses.replace(old, columns=columns, walk_warps=warps, walk_stages=stages)
            for columns, warps, stages in itertools.product((16, 32, 64), (4, 8), (2, 3, 4))
        ]
        if name.startswith("kda"):
            sizes = ((32, 2), (32, 8), (64, 4), (64, 8))
            tiles += [dataclasses.replace(old, channels=channels, channel_warps=warps) for channels, warps in sizes]
        else:
            tiles += [dataclasses.replace(old, scores_warps=warps) for warps in (2, 8)]
        return delta.CHUNKED, "bfloat16", tiles
    if name.startswith(("gdn", "kda")):
        dtype = "bfloat16" if name.endswith("bf16state") else "float32"
        kv = "-kv" in name
        sizes = (
            ((32, 2), (32, 4), (64, 4), (64, 8), (128, 8))
            if kv
            else tuple(itertools.product((4, 8, 16, 32), (1, 2, 4)))
        )
        return delta.RECURRENT, (dtype, "kv" if kv else "vk"), [delta.Recurrent(*size) for size in sizes]
    if name.startswith("conv-prefill"):
        sizes = itertools.product((16, 32, 64), (256, 512, 1024), (2, 4))
        old = conv.TILES["cuda"]
        return conv.TILES, None, [dataclasses.replace(old, tokens=t, channels=c, warps=w) for t, c, w in sizes]
    if name.startswith("conv"):
        old, sizes = conv.TILES["cuda"], itertools.product((256, 512, 1024), (1, 2, 4))
        return conv.TILES, None, [dataclasses.replace(old, update_channels=c, update_warps=w) for c, w in sizes]
    if name.startswith("attention-prefill"):
        sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        return attention.TILES, "prefill", [attention.Attention(r, k, w, s) for r, k, w, s in sizes]
    if match := re.match(r"latent-(decode|prefill)-(\d+)x", name):
        kind = "prefill" if match[1] == "prefill" else "narrow" if int(match[2]) <= attention.NARROW else "wide"
        old = attention.LATENT["sm_90"]["bfloat16", kind]
        sizes = itertools.product((16, 32, 64), (16, 32, 64), (4, 8), (2, 3, 5))
        tiles = [dataclasses.replace(old, rows=r, keys=k, warps=w, stages=s) for r, k, w, s in sizes]
        if old.programs:
            tiles += [dataclasses.replace(old, programs=p) for p in (264, 528)]
        return attention.LATENT, ("bfloat16", kind), tiles
    if name.startswith("attention"):
        old = attention.TILES["cuda"]["decode"]
        sizes = itertools.product((16, 32, 64, 128), (2, 4, 8), (2, 3, 4))
        tiles = [dataclasses.replace(old, keys=k, warps=w, stages=s) for k, w, s in sizes]
        tiles += [dataclasses.replace(old, programs=p) for p in (132, 528, 1056)]
        fuller = itertools.product((32, 64, 128), (16, 32), (264, 528))
        tiles += [dataclasses.replace(old, least_split=n, keys=k, programs=p) for n, k, p in fuller]
        return attention.TILES, "decode", [*tiles, *(dataclasses.replace(old, part=p) for p in (0, 1024, 4096, 8192))]
    if name.startswith(("kv-write", "kv-enter", "latent-write")):
        # A program is one token, whatever the chip.
        return attention.TILES, "decode", []
    if name.startswith("draw"):
        sizes = itertools.product((512, 1024, 2048, 4096), (4, 8), (528, 1056, 2112))
        tiles = [draws.Tile(*size) for size in sizes]
        spared = itertools.product((128, 256, 512, 1024), (1, 2, 4), (1056, 2112), (True,))
        return draws.TILES, None, [*tiles, *(draws.Tile(*size) for size in spared)]
    if name.startswith("choose"):
        old = routing.TILES["cuda"]
        return routing.TILES, None, [dataclasses.replace(old, choose_warps=warps) for warps in (1, 2, 4, 8)]
    if name.startswith("sort"):
        old, sizes = routing.TILES["cuda"], itertools.product((2, 4, 8), (8, 16, 32), (256, 512, 1024))
        return (
            routing.TILES,
            None,
            [
                dataclasses.replace(old, sort_warps=warps, pairs=pairs, at_once=at_once)
                for warps, pairs, at_once in sizes
            ],
        )
    if name.startswith("normed"):
        return products.TILES, "bfloat16", []
    if name.startswith("matmul"):
        return _products_table(name)
    if "int8" in name:
        return grouped.TILES, "few", []
    few = name.endswith("-128")
    if few and "float8" in name:
        sizes = itertools.product((8,), (32, 64, 128), (64, 128), (2, 4), (2, 3, 4), (row_forms.HALVES,))
        return grouped.TILES, "fewest", [grouped.Grouped(*size) for size in sizes]
    if "float8" in name and name.endswith("-512"):
        forms = (row_forms.WIDE, row_forms.FLOAT16, row_forms.HALVES)
        sizes = itertools.chain(
            itertools.product((16,), (32, 64, 128), (128,), (2, 4), (3, 4), forms),
            itertools.product((32,), (64, 128), (128,), (4,), (3,), forms),
        )
        return grouped.TILES, "few_float8", [grouped.Grouped(*size) for size in sizes]
    if "float8" in name:
        forms = (row_forms.WIDE, row_forms.FLOAT16)
        sizes = itertools.chain(
            itertools.product((64,), (128,), (64, 128), (4, 8), (3, 4), forms),
            itertools.product((64,), (256,), (64, 128), (8,), (2, 3), forms),
            itertools.product((128,), (128,), (64, 128), (8,), (3,), forms),
            itertools.product((32, 64), (128,), (128,), (4, 8), (2, 3, 4), (row_forms.HALVES,)),
        )
        return grouped.TILES, "many_float8", [grouped.Grouped(*size) for size in sizes]
    sizes = (
        itertools.product((16,), (32, 64, 128), (64, 128, 256), (4,), (2, 3, 4, 5))
        if few
        else itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (3, 4))
    )
    return grouped.TILES, "few" if few else "many", [grouped.Grouped(*size) for size in sizes]
