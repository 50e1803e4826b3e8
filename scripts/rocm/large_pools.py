"""Small cases moved into pools of more than 2^32 bytes, of which only the pages that are touched exist.

Triton's compiler for AMD cuts the offset of an unbounded number times a large stride to 32 bits in some of them
(`launch.bounded` has why), which no small pool shows.
"""

import dataclasses
import functools
import math
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from rocm.cases import Case, attention, chunked, conv, delta, kv_write, latent, latent_write

PAGE = 4096

REACH = 1 << 32
"""Bytes of a pool up to which Pallas uses offsets of 32 bits, which stay with their sign what they are."""


@dataclasses.dataclass(frozen=True)
class Large:
    """A case in larger pools.

    Fields:
      small    what is moved, and what the outputs are compared with.
      pools    the arrays [L, s, ...] or [L, b, ...] that grow.
      numbers  the arrays that number slots or blocks.
      layers   of the pools, of which the last is addressed.
      count    slots or blocks of a layer.
      places   number in `small` -> number here. The null slot or block stays 0.
    """

    small: Case
    pools: tuple[str, ...]
    numbers: tuple[str, ...]
    layers: int
    count: int
    places: Mapping[int, int]

    @property
    def name(self) -> str:
        return f"large-{self.small.name}-{self.layers}x{self.count}"

    @property
    def nbytes(self) -> int:
        """Of the largest pool."""
        return max(self._shape(name)[1] for name in self.pools)

    @property
    def wrong_unbounded(self) -> bool:
        """Whether the compiler takes the offsets for small where the layer has no bound.

        Found by looking: it multiplies the largest offset by the bits of an element, which overflows 64 bits. Where
        that is negative, "it is small".
        """
        found = False
        for name in self.pools:
            shape, nbytes = self._shape(name)
            stride = math.prod(shape[1:])
            bits = 8 * self.small.arrays[name].dtype.itemsize
            found |= nbytes > REACH and stride < 1 << 31 and bool(stride * bits >> 31 & 1)
        return found

    def _shape(self, name: str) -> tuple[tuple[int, ...], int]:
        pool = self.small.arrays[name]
        shape = (self.layers, self.count, *pool.shape[2:])
        return shape, math.prod(shape) * pool.dtype.itemsize

    def case(self) -> Case:
        """The call. Its pools are new, and zero where nothing was moved."""
        arrays = dict(self.small.arrays)
        for name in self.pools:
            pool = arrays[name]
            arrays[name] = sparse(self._shape(name)[0], pool.dtype)
            for here, there in self.places.items():
                arrays[name][-1, there] = pool[self.small.layer, here]
        for name in self.numbers:
            # What a table has no block for is null.
            numbers = [self.places.get(int(number), 0) for number in arrays[name].reshape(-1)]
            arrays[name] = np.array(numbers, np.int32).reshape(arrays[name].shape)
        return dataclasses.replace(self.small, name=self.name, arrays=arrays, layer=self.layers - 1)

    def moved_back(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs as those of the small case."""
        found = dict(outputs)
        for name in set(self.pools) & set(outputs):
            found[name] = self.small.arrays[name].copy()
            for here, there in self.places.items():
                found[name][self.small.layer, here] = outputs[name][-1, there]
        return found

    def pages(self, pool: np.ndarray) -> set[int]:
        """Those that the numbered slots or blocks of the addressed layer stand on, in one of the pools."""
        size = pool.nbytes // (self.layers * self.count)
        found = set()
        for number in self.places.values():
            begin = ((self.layers - 1) * self.count + number) * size
            found |= set(range(begin // PAGE, -(-(begin + size) // PAGE)))
        return found


def sparse(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Zeros, whose pages exist once they are written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    unreserved = 0x4000  # MAP_NORESERVE, which Python has no name for
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def slots(small: Case, pool: str, layers: int, count: int) -> Large:
    places = {0: 0, 1: count - 2, 2: count - 1, 4: count // 2 + 1}
    return Large(small, (pool,), ("read", "write"), layers, count, places)


def blocks(small: Case, layers: int, count: int) -> Large:
    """Spread over the pool, the last block among them."""
    pools = tuple(name for name in ("k", "v", "k_scale", "v_scale", "c") if name in small.arrays)
    used = small.arrays[pools[0]].shape[1] - 1
    places = {0: 0} | {block: count - 1 - (block - 1) * (count // (used + 1)) for block in range(1, used + 1)}
    return Large(small, pools, ("table",), layers, count, places)


def written(small: Case, layers: int, count: int) -> Large:
    pools = tuple(name for name in ("k_blocks", "v_blocks", "k_scales", "v_scales", "c_blocks") if name in small.arrays)
    return Large(small, pools, ("block",), layers, count, {0: 0, 1: count - 1, 3: count * 5 // 7, 4: 13})


def large_cases() -> list[Large]:
    """Every kind of kernel that indexes a pool by layer, where its offsets were cut and where they were not."""
    states = functools.partial(slots, pool="ssm")
    windows = functools.partial(slots, pool="conv", layers=24)
    recurrent = [delta("decode"), delta("decode", ("kv", "kv")), delta("verify", old=2, new=2)]
    recurrent += [delta("fold", old=3, new=0), chunked()]
    mixed = delta("decode", ("mixed", "vk"))
    channels = conv("decode", 1024)
    attends = [attention("decode"), attention("split", blocks=32), attention("prefill", queries=64)]
    eight, nine_b = attention("decode", kv=np.int8), attention("decode", kv_heads=4, width=256)
    return [
        # Less than 2^32 bytes.
        states(delta("decode"), layers=8, count=3800),
        states(chunked(), layers=8, count=3800),
        blocks(attends[0], 8, 60000),
        blocks(attends[2], 8, 60000),
        windows(channels, count=28000),
        written(kv_write(), 4, 500000),
        # 9.4 GB, where offsets were cut, and 18.9 GB, where they were not.
        *(states(small, layers=24, count=3000) for small in (*recurrent, mixed)),
        *(states(small, layers=8, count=18000) for small in recurrent),
        # 22 and 15 GB.
        *(windows(channels, count=count) for count in (150000, 100000)),
        # Keys and values of as many bytes as 28,000 and 33,000 blocks of Qwen3.5-9B, 7.3 and 8.7 GB, and its own.
        *(blocks(small, 8, count) for count in (112000, 132000) for small in attends[1:]),
        *(blocks(nine_b, 8, count) for count in (28000, 33000)),
        *(blocks(eight, 4, count) for count in (350000, 300000)),
        # Of 2^31 to 2^32 elements of a byte the op takes no pool.
        *(written(kv_write(), 4, count) for count in (1000000, 1100000)),
        written(kv_write(np.int8), 4, 1400000),
        # Latents, 6.5 and 6.6 GB, and 5.5 to write.
        blocks(latent("decode"), 8, 44000),
        blocks(latent("prefill", queries=64, heads=3, value_dim=48, rest=16, blocks=5, past=90), 8, 400000),
        written(latent_write(), 4, 300000),
    ]


def standing_controls() -> list[Large]:
    """What must be found wrong where the bound is switched off, each time that the stage runs."""
    wanted = ("gdn-decode-vk-vk", "attention-prefill", "kv-write-bfloat16")
    return [
        next(large for large in large_cases() if large.wrong_unbounded and large.small.name.startswith(name))
        for name in wanted
    ]
