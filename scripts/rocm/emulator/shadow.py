"""Who read and wrote each place of memory: conflicts that right numbers hide.

Two waves of a workgroup conflict where no barrier stands between a write and another access of the same byte; two
workgroups always do. A write of the value that is there already is none.
"""

import math

import numpy as np

PAGE = 4096
DENSE = 1 << 24
"""Up to so many bytes a shadow is made at once; of more, page by page."""

NONE, WAVES, GROUPS = 0, 1, 2
"""`several` of a place: whether more than its last reader read it, of this workgroup or of others."""


class Shadow:
    """The shadow of `size` bytes. Waves are numbered from 0, `waves_per_group` to a workgroup.

    It is kept for units of as many bytes as all accesses had in common so far: 16 to begin with, and less as soon as a
    smaller access comes. So nothing is lost, and accesses of whole rows are cheap.
    """

    def __init__(self, size: int, waves_per_group: int):
        self.size, self.per_group = size, waves_per_group
        self.conflicts: dict[tuple[str, str], tuple[int, int]] = {}
        """(kind, instruction) -> (bytes, the first place)."""
        self._unit = 16
        self._paged = size > DENSE
        units = PAGE // self._unit if self._paged else -(-size // self._unit)
        self._rows = 1  # of pages; the first stays empty
        self._page_row = np.zeros(-(-size // PAGE) if self._paged else 0, np.int32)
        # last writer + 1, its epoch, last reader + 1, its epoch, several
        self._state = np.zeros((5, units), np.int32)

    def copy(self) -> "Shadow":
        other: Shadow = object.__new__(Shadow)
        other.__dict__.update(self.__dict__)
        other.conflicts = dict(self.conflicts)
        other._page_row, other._state = self._page_row.copy(), self._state.copy()
        return other

    def note_read(self, at: np.ndarray, size: int, wave: np.ndarray, epoch: int, what: str) -> None:
        """`size` bytes at each of `at` are read, by `wave`."""
        place, me, where = self._places(at, size, wave)
        writers, write_epochs, readers, read_epochs, several = self._state
        writer, reader = writers[place], readers[place]
        self._conflict("read after write", what, self._foreign(writer, me, write_epochs[place] == epoch), where)
        if reader.any() or not _uniform(me):
            seen, group = several[place], (me - 1) // self.per_group
            far = (reader > 0) & ((reader - 1) // self.per_group != group)
            near = (reader > 0) & ~far & (read_epochs[place] == epoch)
            now = np.where(far | (seen == GROUPS), GROUPS, np.where(near, np.maximum(seen, reader != me), NONE))
            several[place] = now
            readers[place] = me
            last = readers[place]
            # Of several at once the last one stays as reader; the others are told of here.
            if (beside := last != me).any():
                elsewhere = (last - 1) // self.per_group != group
                several[place[beside & (several[place] == NONE)]] = WAVES
                several[place[elsewhere]] = GROUPS
        else:
            readers[place] = me
            several[place] = NONE
        read_epochs[place] = epoch

    def note_write(
        self, at: np.ndarray, values: np.ndarray, old: np.ndarray, wave: np.ndarray, epoch: int, what: str
    ) -> None:
        """`values` ([place, byte]) are about to be written over `old`."""
        place, me, where = self._places(at, values.shape[1], wave)
        writers, write_epochs, readers, read_epochs, several = self._state
        changes = (old != values).reshape(*place.shape, -1)
        changed = changes.any(-1)
        foreign = self._foreign(writers[place], me, write_epochs[place] == epoch)
        self._conflict("write after write", what, foreign & changed, where, changes)
        reader = readers[place]
        if reader.any():
            seen = several[place]
            far = (seen == GROUPS) | ((reader - 1) // self.per_group != (me - 1) // self.per_group)
            near = (read_epochs[place] == epoch) & ((reader != me) | (seen == WAVES))
            self._conflict("write after read", what, (reader > 0) & (far | near) & changed, where, changes)
        writers[place], write_epochs[place] = me, epoch
        if (beside := writers[place] != me).any():
            # Two waves write one place with one instruction: a conflict unless they write the same.
            units = values.reshape(*place.shape, -1)
            flat, bytes_of = place.reshape(-1), units.reshape(-1, units.shape[-1])
            order = np.zeros(int(flat.max()) + 1, np.int64)
            order[flat] = np.arange(flat.size)
            differ = (bytes_of != bytes_of[order[flat]]).reshape(units.shape)
            self._conflict("write beside write", what, beside & differ.any(-1), where, differ)

    def _foreign(self, other, me, same_epoch):
        """Where another wave was, and nothing stands between."""
        foreign = (other > 0) & (other != me)
        if foreign.any():
            foreign &= ((other - 1) // self.per_group != (me - 1) // self.per_group) | same_epoch
        return foreign

    def _conflict(self, kind: str, what: str, wrong: np.ndarray, at: np.ndarray, which: np.ndarray | None = None):
        """Notes units that are wrong; `which` tells which of their bytes, if not all."""
        if wrong.any():
            count, first = self.conflicts.get((kind, what), (0, self.size))
            count += self._unit * int(wrong.sum()) if which is None else int(which[wrong].sum())
            self.conflicts[kind, what] = count, min(first, int(at[wrong].min()))

    def _places(self, at: np.ndarray, size: int, wave: np.ndarray):
        """[access, unit]: where in the state, who (+ 1), and which byte of the memory."""
        while math.gcd(self._unit, size) != self._unit or (at & self._unit - 1).any():
            self._refine()
        where = at[:, None] + np.arange(0, size, self._unit)
        me = np.broadcast_to(wave[:, None].astype(np.int32) + 1, where.shape)
        if not self._paged:
            return where // self._unit, me, where
        pages = where // PAGE
        if (new := np.unique(pages[self._page_row[pages] == 0])).size:
            self._page_row[new] = self._rows + np.arange(new.size)
            self._rows += new.size
            most = self._rows * (PAGE // self._unit)
            if most > self._state.shape[1]:
                grown = np.zeros((5, max(most, 2 * self._state.shape[1])), np.int32)
                grown[:, : self._state.shape[1]] = self._state
                self._state = grown
        return self._page_row[pages].astype(np.int64) * (PAGE // self._unit) + where % PAGE // self._unit, me, where

    def _refine(self) -> None:
        self._unit //= 2
        self._state = np.repeat(self._state, 2, axis=1)


def _uniform(me: np.ndarray) -> bool:
    return bool((me == me.flat[0]).all())
