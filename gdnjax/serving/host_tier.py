"""What the prefix cache keeps in the host's memory: blocks and states that the device had no more room for. Plain ints
and bytes, no jax; the numbers themselves are `host_store`'s.

An entry is found by the digest of all tokens up to its end, whatever has become of the device's tree meanwhile. What is
evicted there comes here, unless it is here already, and what comes back stays: until the tree gives it up again, which
then costs no copy. Entries that leave together are a bundle, one set of arrays that is dropped as a whole, the bundle
that was of use longest ago first.

Within the plan of a turn nothing is dropped, and what leaves is not offered: both happen when the plan takes the moves.
"""

import collections
import dataclasses
import itertools

from gdnjax.memory import HOST_BUNDLES, HostSizes
from gdnjax.serving.plan import Moves, Restore, Spill
from gdnjax.serving.radix_tree import Digest, Key


@dataclasses.dataclass(eq=False, slots=True)
class Bundle:
    """Entries that left together, and what they take. One that is `pinned` is read by the turn being planned, or its
    contents are nowhere else for as long.
    """

    number: int
    is_state: bool
    size: int
    digests: list[Digest]
    pinned: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """A block or a state: its place in a bundle."""

    bundle: Bundle
    index: int


@dataclasses.dataclass
class HostCounters:
    """What the host tier has done since the engine was built.

    hits, hit_tokens               requests for which something came back, and tokens that need no computing for it.
    blocks_out, states_out         copied to the host.
    blocks_in, states_in           brought back.
    bytes_out, bytes_in            of one rank; whole bundles come back.
    dropped_blocks, dropped_states   given up for want of room on the host.
    """

    hits: int = 0
    hit_tokens: int = 0
    blocks_out: int = 0
    states_out: int = 0
    blocks_in: int = 0
    states_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    dropped_blocks: int = 0
    dropped_states: int = 0


@dataclasses.dataclass(frozen=True)
class _Leaving:
    """A block that was evicted. `tail`: the digest before it and its tokens, where it is filled in part."""

    block: int
    tail: tuple[Digest, Key] | None


class HostTier:
    """The entries of one engine. Owned by its prefix cache."""

    def __init__(self, sizes: HostSizes, counters: HostCounters | None = None):
        self.sizes: HostSizes = sizes
        self.counters: HostCounters = counters or HostCounters()
        self.used_bytes: int = 0
        # In the order of their use, the oldest first.
        self._bundles: collections.OrderedDict[int, Bundle] = collections.OrderedDict()
        self._numbers = itertools.count(1)
        self._blocks: dict[Digest, Entry] = {}
        self._states: dict[Digest, Entry] = {}
        # By the digest before them: the tokens of blocks that are filled in part, and their digests.
        self._tails: dict[Digest, dict[Key, Digest]] = {}
        self._tail_of: dict[Digest, tuple[Digest, Key]] = {}
        # What the next plan takes along.
        self._leaving_blocks: dict[Digest, _Leaving] = {}
        self._leaving_states: dict[Digest, int] = {}
        # By whether it is a state, and the row of the device.
        self._returning: dict[tuple[bool, int], Entry] = {}
        self._dropped: list[int] = []
        self._pinned: list[Bundle] = []

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_states(self) -> int:
        return len(self._states)

    def fresh(self) -> "HostTier":
        """One with nothing in it that goes on counting."""
        return HostTier(self.sizes, self.counters)

    # What leaves the device.

    def keep_block(self, digest: Digest, block: int, tail: tuple[Digest, Key] | None = None) -> None:
        """A block is evicted: its contents are copied before the turn's steps write there."""
        self._returning.pop((False, block), None)
        if not self._touch(self._blocks.get(digest)):
            self._leaving_blocks.setdefault(digest, _Leaving(block, tail))

    def keep_state(self, digest: Digest, slot: int) -> None:
        """A state is evicted."""
        self._returning.pop((True, slot), None)
        if not self._touch(self._states.get(digest)):
            self._leaving_states.setdefault(digest, slot)

    def _touch(self, entry: Entry | None) -> bool:
        """Whether there is such an entry; it was of use just now."""
        if entry is None:
            return False
        self._bundles.move_to_end(entry.bundle.number)
        return True

    # What may come back.

    def block(self, digest: Digest) -> Entry | None:
        return self._blocks.get(digest)

    def state(self, digest: Digest) -> Entry | None:
        return self._states.get(digest)

    def longest_tail(self, before: Digest, rest: Key) -> tuple[Key, Digest] | None:
        """The longest block with a state that is filled in part, follows `before`, and begins like `rest`."""
        tails = self._tails.get(before, {})
        found = [(key, digest) for key, digest in tails.items() if rest[: len(key)] == key and digest in self._states]
        return max(found, key=lambda tail: len(tail[0]), default=None)

    def bring_back(self, entry: Entry, row: int) -> None:
        """The next plan copies an entry to a row of the device's pool, and keeps it until then."""
        self._returning[entry.bundle.is_state, row] = entry
        self._touch(entry)
        if not entry.bundle.pinned:
            entry.bundle.pinned = True
            self._pinned.append(entry.bundle)

    # Turns.

    def begin_turn(self) -> None:
        """Another turn is planned: what was brought back by the last one is there. A plan that was given up has brought
        nothing back yet.
        """
        if self._returning:
            return
        for bundle in self._pinned:
            bundle.pinned = False
        self._pinned.clear()

    def take_moves(self) -> Moves | None:
        """What the turn has to copy, for which there is room now; None: nothing."""
        states = [([digest], (slot,), True) for digest, slot in self._leaving_states.items()]
        blocks = [
            (digests, tuple(self._leaving_blocks[digest].block for digest in digests), False)
            for digests in _in_bundles(list(self._leaving_blocks))
        ]
        # What was evicted last is nearest to the root, and of use to the most.
        kept = []
        for digests, rows, is_state in reversed(blocks + states):
            size = self.sizes.state_bytes if is_state else len(rows) * self.sizes.block_bytes
            if self._make_room(size):
                self.used_bytes += size
                kept.append((Bundle(next(self._numbers), is_state, size, digests), rows))
        spills = [self._own(bundle, rows) for bundle, rows in reversed(kept)]
        moves = Moves(dropped=tuple(self._dropped), spills=tuple(spills), restores=tuple(self._restores()))
        self._leaving_blocks.clear()
        self._leaving_states.clear()
        self._returning.clear()
        self._dropped.clear()
        return moves if moves.dropped or moves.spills or moves.restores else None

    def _own(self, bundle: Bundle, rows: tuple[int, ...]) -> Spill:
        """Takes up a bundle whose bytes are counted already."""
        self._bundles[bundle.number] = bundle
        for index, digest in enumerate(bundle.digests):
            (self._states if bundle.is_state else self._blocks)[digest] = Entry(bundle, index)
            tail = None if bundle.is_state else self._leaving_blocks[digest].tail
            if tail is not None:
                before, key = tail
                self._tails.setdefault(before, {})[key] = digest
                self._tail_of[digest] = tail
        if bundle.is_state:
            self.counters.states_out += 1
        else:
            self.counters.blocks_out += len(rows)
        self.counters.bytes_out += bundle.size
        return Spill(bundle.number, bundle.is_state, rows)

    def _restores(self) -> list[Restore]:
        """The rows of each bundle that somebody wants, 0 for the others."""
        rows: dict[Bundle, list[int]] = {}
        for (_, row), entry in self._returning.items():
            rows.setdefault(entry.bundle, [0] * len(entry.bundle.digests))[entry.index] = row
        for bundle, targets in rows.items():
            wanted = sum(map(bool, targets))
            if bundle.is_state:
                self.counters.states_in += wanted
            else:
                self.counters.blocks_in += wanted
            self.counters.bytes_in += bundle.size
        return [Restore(bundle.number, bundle.is_state, tuple(targets)) for bundle, targets in rows.items()]

    def _make_room(self, size: int) -> bool:
        """Drops bundles until so many bytes are free. False, and nothing dropped, where that cannot be."""
        free, victims = self.sizes.capacity_bytes - self.used_bytes, []
        for bundle in self._bundles.values():
            if free >= size:
                break
            if not bundle.pinned:
                victims.append(bundle)
                free += bundle.size
        if free < size:
            return False
        for bundle in victims:
            self._drop(bundle)
        return True

    def _drop(self, bundle: Bundle) -> None:
        del self._bundles[bundle.number]
        self.used_bytes -= bundle.size
        self._dropped.append(bundle.number)
        for digest in bundle.digests:
            del (self._states if bundle.is_state else self._blocks)[digest]
            if not bundle.is_state and digest in self._tail_of:
                before, key = self._tail_of.pop(digest)
                del self._tails[before][key]
                if not self._tails[before]:
                    del self._tails[before]
        if bundle.is_state:
            self.counters.dropped_states += len(bundle.digests)
        else:
            self.counters.dropped_blocks += len(bundle.digests)

    def reset(self) -> None:
        """Forgets everything; nothing of it counts as dropped for want of room."""
        self._dropped += self._bundles
        for entries in (self._bundles, self._blocks, self._states, self._tails, self._tail_of):
            entries.clear()
        self._leaving_blocks.clear()
        self._leaving_states.clear()
        self._returning.clear()
        self._pinned.clear()
        self.used_bytes = 0

    def check_integrity(self) -> None:
        """Raises AssertionError unless bytes and entries are those of the bundles."""
        assert self.used_bytes == sum(bundle.size for bundle in self._bundles.values()) <= self.sizes.capacity_bytes
        for entries, is_state in ((self._blocks, False), (self._states, True)):
            found = {
                digest: (bundle, index)
                for bundle in self._bundles.values()
                if bundle.is_state == is_state
                for index, digest in enumerate(bundle.digests)
            }
            assert {digest: (entry.bundle, entry.index) for digest, entry in entries.items()} == found
        assert {digest for keys in self._tails.values() for digest in keys.values()} == self._tail_of.keys()
        assert self._tail_of.keys() <= self._blocks.keys()
        assert all(bundle.number in self._bundles for bundle in self._pinned), "a bundle was dropped that is read"
        assert not self._leaving_blocks.keys() & self._blocks.keys()
        assert not self._leaving_states.keys() & self._states.keys()


def _in_bundles(digests: list[Digest]) -> list[list[Digest]]:
    """Parts of the sizes in HOST_BUNDLES, the largest first, nothing left."""
    parts, start = [], 0
    for size in HOST_BUNDLES:
        while len(digests) - start >= size:
            parts.append(digests[start : start + size])
            start += size
    return parts
