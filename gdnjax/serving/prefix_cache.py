"""What has been computed, by its tokens: a radix tree over KV blocks whose nodes may own a state. Plain ints, no jax.

Attention needs the KV of every token before it, a recurrent layer only the state behind the last of them. So a sequence
can go on from a position where both are there: a node that has a checkpoint, all of whose blocks up to the root are in
the tree. The two are evicted apart. A node whose state is gone is a tombstone: its KV shows where sequences have been,
so that the next one that comes by leaves a checkpoint there.

Where there is a host tier, what is evicted goes there, and `look_on_host` and `bring_back` make it a part of the tree
again, as if it had never left.

Where the model has no state (`needs_state`), a sequence can go on from behind every whole block: nobody brings a
checkpoint then, and blocks are read by the very step that writes them.
"""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from gdnjax.serving.allocator import Allocator
from gdnjax.serving.host_tier import Entry, HostTier
from gdnjax.serving.radix_tree import NO_TOKENS, Digest, Key, Node, digest_after, digests_to
from gdnjax.serving.request import Request

NOTHING_CACHED = "nothing cached begins like it"
NO_CHECKPOINT = "its blocks are cached, but no state at their end"
TOO_SHORT = "shorter than a block"
BYPASSED = "prompt_logprobs need every position"
DISABLED = "the prefix cache is off"


@dataclasses.dataclass(frozen=True)
class Match:
    """The deepest place at which a sequence can go on.

    position  tokens behind it, all of `seen` where no state is needed; 0: it starts afresh.
    slot      the checkpoint to read, 0 for a fresh start.
    seen      tokens whose KV is there in whole blocks, with a state behind them or not.
    node      the node in which these end.
    depth     how many of the node's blocks are among them.
    tail      the block to copy where the checkpoint stands within a block that is not among them; 0: none.
    pending   the state is written by the turn being planned, and can be read from the next one on.
    """

    position: int
    slot: int
    seen: int
    node: Node
    depth: int
    tail: int
    pending: bool


@dataclasses.dataclass(frozen=True)
class HostMatch:
    """What of a sequence is on the host and lets it go on deeper than the device's tree does.

    position  tokens behind the place at which it can go on then.
    keys, blocks   of whole blocks that follow those of the tree.
    tail      tokens and entry of a block that is filled in part, behind the whole ones; None: there is none.
    state     the state at `position`; None where none is needed.
    """

    position: int
    keys: list[Key]
    blocks: list[Entry]
    tail: tuple[Key, Entry] | None
    state: Entry | None

    @property
    def num_blocks(self) -> int:
        return len(self.blocks) + (self.tail is not None)


@dataclasses.dataclass
class CacheCounters:
    """What the cache has done since it was built. Tokens are of first admissions, not of resumed requests.

    queried_tokens    prompt tokens of admitted requests.
    hit_tokens        of those, tokens that needed no computing.
    lost_tokens       of those, tokens whose KV was there, but no state that goes with it.
    evicted_blocks, evicted_states   given up for want of room.
    orphaned_states   states given up because blocks before them were.
    kept_states       checkpoints taken over.
    skipped_states    checkpoints that were wanted and found no slot.
    """

    queried_tokens: int = 0
    hit_tokens: int = 0
    lost_tokens: int = 0
    evicted_blocks: int = 0
    evicted_states: int = 0
    orphaned_states: int = 0
    kept_states: int = 0
    skipped_states: int = 0


class PrefixCache:
    """Owns blocks and slots of the allocator's pools that no request holds, and gives them back when asked."""

    def __init__(self, block_size: int, allocator: Allocator, needs_state: bool = True, host: HostTier | None = None):
        self.block_size: int = block_size
        self.needs_state: bool = needs_state
        self.host: HostTier | None = host
        self.counters: CacheCounters = CacheCounters()
        self.turn: int = 0
        self.num_blocks: int = 0
        self.num_evictable_blocks: int = 0
        # Blocks that have come to be evictable since the beginning, never fewer: whoever lacks some looks again when
        # there are enough of them.
        self.num_loosened_blocks: int = 0
        self._blocks, self._slots = allocator.blocks, allocator.slots
        self._ticks = itertools.count(1)
        self.root: Node = self._new_root()
        self._nodes: set[Node] = set()
        # Owners of checkpoints by slot, the one that was of use longest ago first: those that nobody has asked for yet,
        # and those that somebody has. The former go first, or the ends of requests would push out what they share.
        self._untried: collections.OrderedDict[int, Node] = collections.OrderedDict()
        self._proven: collections.OrderedDict[int, Node] = collections.OrderedDict()
        # Slots that the turn being planned reads or writes, and their owners in the tree, locked for as long.
        self._busy: dict[int, Node | None] = {}
        # Slots that this turn writes for nothing.
        self._surplus: list[int] = []
        # Leaves that may be evicted, oldest first; entries that no longer hold are skipped.
        self._leaves: list[tuple[int, int, Node]] = []

    @staticmethod
    def _new_root() -> Node:
        return Node(parent=None, keys=[], blocks=[], end=0)

    @property
    def num_states(self) -> int:
        return len(self._untried) + len(self._proven)

    @property
    def num_tombstones(self) -> int:
        """Runs of cached blocks without the state behind them, where such a state is needed."""
        return len(self._nodes) - self.num_states if self.needs_state else 0

    @property
    def num_busy_states(self) -> int:
        """Checkpoints that the turn being planned reads or writes."""
        return len(self._busy)

    def begin_turn(self) -> None:
        """Another turn is planned. What the last one reads and writes happens before it, in the device's order."""
        self.turn += 1
        self._end_turn()

    def _end_turn(self) -> None:
        if self.host is not None:
            self.host.begin_turn()
        for slot in list(self._busy):
            self.let_go(slot)
        self._slots.give(self._surplus)
        self._surplus.clear()

    # Looking up.

    def match(self, request: Request, limit: int) -> Match:
        """The deepest place within the first `limit` tokens of a request. Changes nothing."""
        keys = request.block_keys(limit // self.block_size, self.block_size)
        node = best = self.root
        index, depth = 0, 0
        while True:
            best = self._longest_tail(node, request, limit) or (node if node.slot else best)
            child = node.children.get(keys[index]) if index < len(keys) else None
            if child is None:
                break
            common = _common(child.keys, keys, index)
            node, depth, index = child, common, index + common
            if common < len(child.keys):
                break
        seen = index * self.block_size
        return Match(
            position=best.end if self.needs_state else seen,
            slot=best.slot,
            seen=seen,
            node=node,
            depth=depth,
            tail=best.blocks[0] if best.end > seen else 0,
            pending=best is not self.root and best.written == self.turn,
        )

    def _longest_tail(self, node: Node, request: Request, limit: int) -> Node | None:
        if not node.tails:
            return None
        rest = tuple(request.tokens(node.end, min(limit, node.end + self.block_size - 1)))
        found = [tail for key, tail in node.tails.items() if rest[: len(key)] == key]
        return max(found, key=lambda tail: tail.end, default=None)

    def hold(self, slot: int) -> bool:
        """The turn being planned reads or writes this checkpoint, so it stays for as long, and the blocks before it.
        False if it did already.
        """
        if not slot or slot in self._busy:
            return False
        node = self._untried.pop(slot, None) or self._proven.pop(slot, None)
        self._busy[slot] = node
        if node is not None:
            self._prove(slot, node)
            self.lock(node)
        return True

    def _prove(self, slot: int, node: Node) -> None:
        """A checkpoint is of use. At most half of all slots are kept apart for such, so that none stays for ever."""
        self._proven[slot] = node
        if len(self._proven) > max(1, self._slots.size // 2):
            oldest, owner = self._proven.popitem(last=False)
            self._untried[oldest] = owner

    def is_held(self, slot: int) -> bool:
        """Whether the turn being planned reads or writes this checkpoint."""
        return slot in self._busy

    def let_go(self, slot: int) -> None:
        """Takes a `hold` back."""
        node = self._busy.pop(slot)
        if node is not None:
            self.unlock(node)

    def share(self, match: Match) -> tuple[Node, list[int]]:
        """Locks the blocks that a match has seen. Returns the node that ends with the last of them, and all of them."""
        node = match.node
        if 0 < match.depth < len(node.keys):
            node = self._split(node, match.depth)
        self.lock(node)
        return node, _path_blocks(node)

    def node_at(self, node: Node, position: int) -> Node:
        """The node on the way to `node` that ends at a multiple of blocks, parted from what follows if need be."""
        while node.parent is not None and node.parent.end >= position:
            node = node.parent
        return (
            self._split(node, len(node.keys) - (node.end - position) // self.block_size)
            if node.end > position
            else node
        )

    # Locks.

    def lock(self, node: Node, above: Node | None = None) -> None:
        """A request's blocks go through `node` and all nodes above it, up to but without `above`."""
        while node is not above and node.parent is not None:
            if node.locks == 0:
                self.num_evictable_blocks -= len(node.blocks)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """The opposite of `lock`, up to the root."""
        tick = next(self._ticks)
        while node.parent is not None:
            node.locks -= 1
            node.used = tick
            if node.locks == 0:
                self.num_evictable_blocks += len(node.blocks)
                self.num_loosened_blocks += len(node.blocks)
                self._offer(node)
            node = node.parent

    def num_blocks_before(self, nodes: Iterable[Node], match: Match) -> int:
        """Blocks on the ways to these nodes and of what a match has seen, each counted once."""
        passed, count = set(), 0
        for node in nodes:
            while node.parent is not None and node not in passed:
                passed.add(node)
                count += len(node.blocks)
                node = node.parent
        node, depth = match.node, match.depth
        while node.parent is not None and node not in passed:
            count += depth
            node = node.parent
            depth = len(node.blocks)
        return count

    # Taking over.

    def has_child(self, node: Node, key: Key) -> bool:
        """Whether somebody's block with these tokens already follows `node`."""
        return key in node.children

    def insert(self, node: Node, keys: Sequence[Key], blocks: Sequence[int]) -> tuple[Node, int]:
        """Takes over blocks that follow `node`. Returns the node that ends with the last of them, and how many of the
        first blocks the tree had already: those stay the caller's.
        """
        index = 0
        while index < len(keys):
            child = node.children.get(keys[index])
            if child is None:
                return self._add(node, list(keys[index:]), list(blocks[index:])), index
            common = _common(child.keys, keys, index)
            node = child if common == len(child.keys) else self._split(child, common)
            index += common
        return node, index

    def _add(self, parent: Node, keys: list[Key], blocks: list[int]) -> Node:
        length = sum(map(len, keys))
        node = Node(parent=parent, keys=keys, blocks=blocks, end=parent.end + length, used=next(self._ticks))
        siblings = parent.children if length % self.block_size == 0 else parent.tails
        siblings[keys[0]] = node
        self._nodes.add(node)
        self.num_blocks += len(blocks)
        self.num_evictable_blocks += len(blocks)
        self.num_loosened_blocks += len(blocks)
        self._offer(node)
        return node

    def _split(self, node: Node, count: int) -> Node:
        """Parts a node after `count` blocks and returns the upper part. The lower one stays what it is to others: it
        keeps its state, its children, and the requests that hold it.
        """
        upper = Node(
            parent=node.parent,
            keys=node.keys[:count],
            blocks=node.blocks[:count],
            end=node.end - (len(node.keys) - count) * self.block_size,
            locks=node.locks,
            used=node.used,
        )
        assert upper.parent is not None
        upper.parent.children[upper.keys[0]] = upper
        if node.digests is not None:
            upper.digests = node.digests[:count]
            del node.digests[:count]
        del node.keys[:count], node.blocks[:count]
        node.parent = upper
        upper.children[node.keys[0]] = node
        self._nodes.add(upper)
        return upper

    def keep_state(self, node: Node, slot: int) -> None:
        """Takes over a slot whose state stands at the node's end. One that is there already is kept, the slot freed.

        Where others have gone on already, more are likely to come by.
        """
        if node.slot:
            if slot in self._busy:
                # This turn writes it still, so nobody else may have it before the next.
                self._surplus.append(slot)
            else:
                self._slots.give([slot])
            return
        node.written = self.turn
        self.counters.kept_states += 1
        self._own_state(node, slot)

    def _own_state(self, node: Node, slot: int) -> None:
        node.slot = slot
        if node.children:
            self._prove(slot, node)
        else:
            self._untried[slot] = node

    def keep_tail(self, node: Node, key: Key, block: int, slot: int) -> bool:
        """Takes over a state that stands within a block, and that block. False if it is there already."""
        if key in node.tails:
            return False
        self.keep_state(self._add(node, [key], [block]), slot)
        return True

    # From the host.

    def look_on_host(self, request: Request, limit: int, match: Match) -> HostMatch | None:
        """The deepest place within the first `limit` tokens that the host's entries lead to, beside what of them the
        tree has: `match`. None where that saves less than a block of tokens. Changes nothing.
        """
        host, size = self.host, self.block_size
        if host is None or not (host.num_blocks or host.num_states):
            return None
        keys = request.block_keys(limit // size, size)
        # Behind each block of the tree, and behind those of the host that follow.
        path = _path_digests(match.node, match.depth)
        first, blocks = len(path) - 1, []
        while len(path) <= len(keys):
            digest = digest_after(path[-1], keys[len(path) - 1])
            entry = host.block(digest)
            if entry is None:
                break
            path.append(digest)
            blocks.append(entry)
        if not self.needs_state:
            behind = len(path) - 1
            return HostMatch(behind * size, keys[first:behind], blocks, None, None) if blocks else None
        for count in range(len(path) - 1, -1, -1):
            start, fewest = count * size, match.position + size
            if start + size <= fewest:
                break
            behind = max(first, count)
            whole = (keys[first:behind], blocks[: behind - first])
            rest = tuple(request.tokens(start, min(limit, start + size - 1)))
            tail = host.longest_tail(path[count], rest)
            if tail is not None and start + len(tail[0]) >= fewest:
                key, digest = tail
                block, state = host.block(digest), host.state(digest)
                assert block is not None
                return HostMatch(start + len(key), *whole, (key, block), state)
            state = host.state(path[count])
            if state is not None and start >= fewest:
                return HostMatch(start, *whole, None, state)
        return None

    def bring_back(self, node: Node, found: HostMatch, slot: int) -> None:
        """Makes a match of the host a part of the tree, behind the locked node in which the tree's part of it ends, and
        its state that of `slot`. There has to be room for its blocks. The turn being planned copies them before any of
        its steps reads them, and holds the state.
        """
        assert self.host is not None
        self.make_room(found.num_blocks)
        taken = self._blocks.take(found.num_blocks)
        assert taken is not None, "what comes back from the host needs more blocks than there are"
        end, _ = self.insert(node, found.keys, taken[: len(found.blocks)])
        # The blocks nearest to the root are those that were of use last.
        for entry, block in reversed([*zip(found.blocks, taken, strict=False)]):
            self.host.bring_back(entry, block)
        if found.state is not None:
            if found.tail is not None:
                key, entry = found.tail
                at = self._add(self.node_at(end, found.position - len(key)), [key], taken[-1:])
                self.host.bring_back(entry, taken[-1])
            else:
                at = self.node_at(end, found.position)
            self._own_state(at, slot)
            self.hold(slot)
            self.host.bring_back(found.state, slot)

    # Giving back.

    def make_room(self, count: int) -> bool:
        """Evicts blocks until `count` are free. False, and nothing evicted, where that cannot be."""
        if self._blocks.num_free + self.num_evictable_blocks < count:
            return False
        while self._blocks.num_free < count:
            entry = heapq.heappop(self._leaves)
            if self._may_evict(entry):
                self._shorten(entry[2], count - self._blocks.num_free)
        return True

    def _shorten(self, node: Node, count: int) -> None:
        """Gives back up to `count` blocks from the end of a leaf, and the state that stood behind them."""
        if node.slot:
            self.counters.orphaned_states += 1
            self._spill_state(node)
            self._give_slot(node)
        count = min(count, len(node.blocks))
        self._spill_blocks(node, count)
        self._blocks.give(node.blocks[-count:])
        self.num_blocks -= count
        self.num_evictable_blocks -= count
        self.counters.evicted_blocks += count
        if count == len(node.blocks):
            self._remove(node)
            return
        del node.blocks[-count:], node.keys[-count:]
        if node.digests is not None:
            del node.digests[-count:]
        node.end -= count * self.block_size
        self._offer(node)

    def _spill_blocks(self, node: Node, count: int) -> None:
        """The last `count` blocks of a node go to the host, from their end."""
        if self.host is None or not self._is_known(node):
            return
        digests, tail = digests_to(node), None
        if node.end % self.block_size:
            assert node.parent is not None
            tail = ((digests_to(node.parent) or [NO_TOKENS])[-1], node.keys[0])
        for index in range(len(node.blocks) - 1, len(node.blocks) - 1 - count, -1):
            self.host.keep_block(digests[index], node.blocks[index], tail)

    def _spill_state(self, node: Node) -> None:
        if self.host is not None and self._is_known(node):
            self.host.keep_state(digests_to(node)[-1], node.slot)

    def _is_known(self, node: Node) -> bool:
        """Whether what a node holds can still be found: not since a reset that running requests have outlived."""
        return _root_of(node) is self.root

    def take_slot(self) -> int:
        """A free slot, or that of the state that is given up first; 0 where every one is needed."""
        taken = self._slots.take(1)
        if taken is None and self._evict_state():
            taken = self._slots.take(1)
        return taken[0] if taken else 0

    def _evict_state(self) -> bool:
        for slot, node in itertools.chain(self._untried.items(), self._proven.items()):
            if slot not in self._busy:
                self.counters.evicted_states += 1
                self._spill_state(node)
                self._give_slot(node)
                if node.end % self.block_size:
                    # A tail is of no use without its state.
                    self._shorten(node, 1)
                return True
        return False

    def _give_slot(self, node: Node) -> None:
        if self._untried.pop(node.slot, None) is None:
            del self._proven[node.slot]
        self._slots.give([node.slot])
        node.slot = 0

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        siblings = parent.children if node.end % self.block_size == 0 else parent.tails
        siblings.pop(node.keys[0])
        self._nodes.remove(node)
        self._offer(parent)

    def _offer(self, node: Node) -> None:
        """Puts a node that may be evicted in line."""
        if node.parent is None or node.locks or not node.is_leaf:
            return
        heapq.heappush(self._leaves, (node.used, id(node), node))
        if len(self._leaves) > 4 * len(self._nodes) + 64:
            # Where nothing is evicted, entries that no longer hold would pile up.
            self._leaves = [entry for entry in self._leaves if self._may_evict(entry)]
            heapq.heapify(self._leaves)

    def _may_evict(self, entry: tuple[int, int, Node]) -> bool:
        used, _, node = entry
        return node in self._nodes and node.used == used and node.locks == 0 and node.is_leaf

    def reset(self) -> None:
        """Forgets everything. What running requests share is found no more, and given back for want of room."""
        self._end_turn()
        if self.host is not None:
            self.host.reset()
        for node in [*self._untried.values(), *self._proven.values()]:
            self._give_slot(node)
        kept = {node for node in self._nodes if node.locks}
        for node in self._nodes - kept:
            self._blocks.give(node.blocks)
            self.num_blocks -= len(node.blocks)
            # Parent and child know each other, and nobody else knows them: apart, they go at once.
            node.parent = None
        # What is not locked has nothing locked below it.
        for node in (self.root, *kept, *(node.parent for node in kept if node.parent is not None)):
            for siblings in (node.children, node.tails):
                for key in [key for key, child in siblings.items() if child not in kept]:
                    del siblings[key]
        self._nodes, self._leaves, self.num_evictable_blocks = kept, [], 0
        self.root = self._new_root()

    # Saving and restoring.

    def record(self, held: Iterable[Node]) -> tuple[dict[str, Any], dict[Node, int]]:
        """The tree as plain data for `restore`, between two turns, and the number of each of its nodes. `held` are
        those in which requests hold their places. What is on the host is not among it.
        """
        self._end_turn()
        # Who runs since before a reset holds his place in a tree that is found no more.
        roots = dict.fromkeys([self.root, *map(_root_of, [*held, *self._nodes])])
        numbers = {node: number for number, node in enumerate([*roots, *sorted(self._nodes, key=lambda n: n.end)])}
        nodes = [
            {
                "parent": numbers[node.parent] if node.parent is not None else None,
                "keys": node.keys,
                "blocks": node.blocks,
                "slot": node.slot,
                "locks": node.locks,
                "used": node.used,
            }
            for node in numbers
        ]
        states = {"untried": list(self._untried), "proven": list(self._proven)}
        return {"nodes": nodes, "tick": next(self._ticks), **states}, numbers

    def restore(self, record: dict[str, Any]) -> list[Node]:
        """Makes a cache that holds nothing what another was. Returns the nodes by their numbers."""
        nodes: list[Node] = []
        for entry in record["nodes"]:
            keys = [tuple(key) for key in entry["keys"]]
            parent = None if entry["parent"] is None else nodes[entry["parent"]]
            node = self._new_root() if parent is None else Node(parent, keys, list(entry["blocks"]), 0)
            nodes.append(node)
            if parent is None:
                continue
            length = sum(map(len, keys))
            node.end = parent.end + length
            node.slot, node.locks, node.used = entry["slot"], entry["locks"], entry["used"]
            siblings = parent.children if length % self.block_size == 0 else parent.tails
            siblings[keys[0]] = node
            self._nodes.add(node)
            self.num_blocks += len(node.blocks)
            self.num_evictable_blocks += len(node.blocks) if node.locks == 0 else 0
        self.root = nodes[0]
        self._ticks = itertools.count(record["tick"])
        owners = {node.slot: node for node in self._nodes if node.slot}
        for name, states in (("untried", self._untried), ("proven", self._proven)):
            states.update((slot, owners[slot]) for slot in record[name])
        for node in self._nodes:
            self._offer(node)
        return nodes

    def check_integrity(self) -> tuple[list[int], list[int]]:
        """Returns the blocks and the slots that the cache owns. Raises AssertionError for a broken tree."""
        evictable, locks = 0, collections.Counter()
        assert self.num_blocks == sum(len(node.blocks) for node in self._nodes)
        states = self._untried | self._proven
        assert len(states) == self.num_states
        for node in self._nodes:
            assert node.blocks, "a node without blocks"
            assert len(node.blocks) == len(node.keys)
            assert node.parent is not None
            assert node.parent.parent is None or node.parent in self._nodes
            siblings = node.parent.tails if node.end % self.block_size else node.parent.children
            assert siblings.get(node.keys[0]) is node, "a node that its parent does not know"
            assert node.end == node.parent.end + sum(map(len, node.keys))
            assert all(len(key) == self.block_size for key in node.keys) or (len(node.keys) == 1 and node.is_leaf)
            assert not node.slot or states.get(node.slot) is node
            evictable += len(node.blocks) if node.locks == 0 else 0
            locks[node.parent] += node.locks
            if node.locks == 0 and node.is_leaf:
                assert any(entry[2] is node and entry[0] == node.used for entry in self._leaves), "a leaf out of line"
        for slot, node in self._busy.items():
            assert node is None or (node in self._nodes and node.slot == slot and node.locks), "a held state is loose"
        for node in self._nodes:
            assert node.locks >= locks[node], "a node that is locked less than those below it"
        assert evictable == self.num_evictable_blocks, f"{evictable} blocks may be evicted"
        assert all(node in self._nodes and node.slot == slot for slot, node in states.items())
        assert all(node.digests is None or len(node.digests) == len(node.keys) for node in self._nodes)
        if self.host is not None:
            self.host.check_integrity()
        return [block for node in self._nodes for block in node.blocks], [*states, *self._surplus]


def _common(run: Sequence[Key], keys: Sequence[Key], start: int) -> int:
    """How many blocks of a run are those of `keys` from `start` on."""
    most = min(len(run), len(keys) - start)
    return next((count for count in range(most) if run[count] != keys[start + count]), most)


def _root_of(node: Node) -> Node:
    while node.parent is not None:
        node = node.parent
    return node


def _path_digests(node: Node, depth: int) -> list[Digest]:
    """Behind no block, and behind each from the root to the first `depth` of a node."""
    runs: list[Iterable[Digest]] = [digests_to(node)[:depth]]
    while node.parent is not None:
        node = node.parent
        runs.append(digests_to(node))
    return [NO_TOKENS, *(digest for run in reversed(runs) for digest in run)]


def _path_blocks(node: Node) -> list[int]:
    """The blocks from the root to the end of a node."""
    runs: list[Iterable[int]] = []
    while node.parent is not None:
        runs.append(node.blocks)
        node = node.parent
    return [block for run in reversed(runs) for block in run]


__all__ = ["CacheCounters", "HostMatch", "Match", "PrefixCache"]
