"""Memory that knows its bounds."""

from collections.abc import Sequence

import numpy as np

from rocm.emulator.shadow import PAGE, Shadow

BASE = 1 << 40
APART = 1 << 33
"""Bytes between arrays, at least: an offset cut to 32 bits leads to none of them."""

ALIGNMENT = 256
"""Of arrays, as XLA has it of those that a kernel writes."""


class Fault(Exception):
    """The program did what it must not do."""


class Segment:
    """The bytes of one array, or of LDS. `written` tells which pages of 4,096 bytes were written."""

    def __init__(self, data: np.ndarray, waves_per_group: int, shadow: bool):
        self.data = data
        self.words = data[: data.size // 4 * 4].view(np.uint32)
        self.shadow = Shadow(data.size, waves_per_group) if shadow else None
        self.written = np.zeros(-(-data.size // PAGE), bool)

    def copy(self) -> "Segment":
        other: Segment = object.__new__(Segment)
        other.data = self.data.copy()
        other.words = other.data[: other.data.size // 4 * 4].view(np.uint32)
        other.shadow = self.shadow.copy() if self.shadow else None
        other.written = self.written.copy()
        return other

    def load(self, at: np.ndarray, size: int, wave: np.ndarray, epoch: int, what: str) -> np.ndarray:
        """[place] -> bytes [place, size]."""
        if self.shadow:
            self.shadow.note_read(at, size, wave, epoch, what)
        if size % 4 == 0 and not (at & 3).any():
            return self.words[(at >> 2)[:, None] + np.arange(size // 4)].view(np.uint8)
        return self.data[at[:, None] + np.arange(size)]

    def store(self, at: np.ndarray, values: np.ndarray, wave: np.ndarray, epoch: int, what: str) -> None:
        """bytes [place, size] to [place]."""
        size = values.shape[1]
        whole = size % 4 == 0 and not (at & 3).any()
        target, source = (self.words, np.ascontiguousarray(values).view(np.uint32)) if whole else (self.data, values)
        where = (at >> 2)[:, None] + np.arange(size // 4) if whole else at[:, None] + np.arange(size)
        if self.shadow:
            old = np.ascontiguousarray(target[where]).view(np.uint8)
            self.shadow.note_write(at, np.ascontiguousarray(values), old, wave, epoch, what)
        self.written[at // PAGE] = True
        self.written[(at + size - 1) // PAGE] = True
        target[where] = source


class Memory:
    """Global memory: arrays far apart, each used where it is.

    In the middle of each its addresses pass a multiple of 2^32, so that an addition without its carry is seen.
    """

    def __init__(self, arrays: Sequence[np.ndarray], waves_per_group: int, shadow: bool):
        self.segments = [Segment(_bytes_of(x), waves_per_group, shadow) for x in arrays]
        self.starts, at = [], BASE
        for x in arrays:
            half = -(-x.nbytes // 2 // APART) * APART
            at += half
            self.starts.append(at - x.nbytes // 2 // ALIGNMENT * ALIGNMENT)
            at += half + APART
        self._starts = np.array(self.starts, np.int64)
        self._ends = self._starts + np.array([x.nbytes for x in arrays])

    def copy(self) -> "Memory":
        """The same places, with bytes of their own."""
        other: Memory = object.__new__(Memory)
        other.__dict__.update(self.__dict__)
        other.segments = [segment.copy() for segment in self.segments]
        return other

    def load(self, address: np.ndarray, size: int, wave: np.ndarray, epoch: int, what: str) -> np.ndarray:
        at, which = self._places(address, size)
        if (which == which[0]).all():
            return self.segments[which[0]].load(at, size, wave, epoch, what)
        found = np.empty((at.size, size), np.uint8)
        for i in np.unique(which):
            mine = which == i
            found[mine] = self.segments[i].load(at[mine], size, wave[mine], epoch, what)
        return found

    def store(self, address: np.ndarray, values: np.ndarray, wave: np.ndarray, epoch: int, what: str) -> None:
        at, which = self._places(address, values.shape[1])
        for i in np.unique(which):
            mine = which == i
            self.segments[i].store(at[mine], values[mine], wave[mine], epoch, what)

    def _places(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """uint64 addresses -> (place in an array, which array)."""
        address = address.view(np.int64)
        which = np.searchsorted(self._starts, address, "right") - 1
        outside = (which < 0) | (address + size > self._ends[which])
        if outside.any():
            bad = int(address[outside][0])
            near = int(np.searchsorted(self._starts, bad, "right") - 1)
            if near < 0:
                raise Fault(f"out of bounds: address {bad:#x} is before all arrays")
            raise Fault(f"out of bounds by {bad + size - int(self._ends[near])} bytes behind array {near}")
        return address - self._starts[which], which


def _bytes_of(x: np.ndarray) -> np.ndarray:
    if not x.flags.c_contiguous:
        raise ValueError("an array whose elements do not stand one behind the other")
    return x.reshape(-1).view(np.uint8)
