"""Damaged entries of JAX's compilation cache are removed, once, and nothing else is."""

import os
import zlib

import pytest

from gdnjax.serving import compilation_cache
from gdnjax.serving.compilation_cache import CHECKED, ZSTD_MAGIC, remove_damaged

CONTENT = bytes(range(256)) * 20_000
ZLIB = zlib.compress(CONTENT)


def _zstd(blocks, *, checksum=b""):
    """A frame of raw and repeated blocks, by the format's description."""
    frame = ZSTD_MAGIC + bytes([0x04 if checksum else 0x00, 0x58])
    for index, (kind, content, length) in enumerate(blocks):
        header = (index == len(blocks) - 1) | kind << 1 | length << 3
        frame += header.to_bytes(3, "little") + content
    return frame + checksum


ZSTD = _zstd([(0, b"abcdef", 6), (1, b"x", 100_000), (0, b"gh", 2)], checksum=b"sumx")

DAMAGED = {
    "empty": b"",
    "zlib": ZLIB[:-1],
    "half of zlib": ZLIB[: len(ZLIB) // 2],
    "changed": ZLIB[:-4] + b"0000",
    "something else": b"not an entry",
    "zstd": ZSTD[:-1],
    "zstd in a block": ZSTD[:12],
    "zstd at a header": _zstd([(0, b"abcdef", 6)])[:7],
    "zstd without an end": ZSTD_MAGIC,
}


def _write(directory, name, content):
    entry = directory / f"{name}-cache"
    entry.write_bytes(content)
    return entry


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_entry_is_removed_and_whole_ones_stay(tmp_path, name):
    whole = [_write(tmp_path, "zlib", ZLIB), _write(tmp_path, "zstd", ZSTD)]
    other = tmp_path / "notes.txt"
    other.write_text("not an entry")
    damaged = _write(tmp_path, "damaged", DAMAGED[name])
    assert remove_damaged(tmp_path) == [damaged]
    assert sorted(tmp_path.iterdir()) == sorted([*whole, other, tmp_path / CHECKED])


def test_each_entry_is_read_once(tmp_path, monkeypatch):
    old = _write(tmp_path, "old", ZLIB)
    os.utime(old, ns=(0, 10**18))
    read = []
    is_whole = compilation_cache._is_whole
    monkeypatch.setattr(compilation_cache, "_is_whole", lambda entry: read.append(entry) or is_whole(entry))
    assert remove_damaged(tmp_path) == []
    assert remove_damaged(tmp_path) == []
    new = _write(tmp_path, "new", ZLIB[:-1])
    assert remove_damaged(tmp_path) == [new]
    assert read == [old, new]


def test_no_directory_is_no_cache(tmp_path):
    assert remove_damaged(tmp_path / "none") == []
