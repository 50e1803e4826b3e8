"""JAX's persistent compilation cache: where it is, and that what is in it can be read.

JAX never replaces an entry. One that a killed process or a full disk has left in part is compiled anew by every later
run, with a warning. So entries are read through once, before JAX does, and those that cannot be are removed.
"""

import contextlib
import logging
import pathlib
import zlib
from typing import Any

import jax

from gdnjax.config import EngineConfig

log = logging.getLogger("gdnjax")

JAX_CACHE_THRESHOLD = 1.0
"""JAX's own least compile time, in seconds, of what it caches: it would leave the small steps out."""

CHECKED = ".gdnjax-checked"
"""An empty file in the cache's directory. Entries that are older than it have been read through."""

PIECE = 1 << 20
"""Bytes that are read at once."""

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def configure(config: EngineConfig) -> None:
    """Switches JAX's persistent cache on, in the place that the config or JAX's own settings name; "" switches it off.

    These are settings of the process, as the cache is. On GPUs of several processes it is on only where a place is
    named, which must be one for all of them: they share the search for the fastest kernels as they compile, and where
    one finds a step in its cache, another that does not would wait for it.
    """
    # Any: jax makes the attributes of its configuration at run time, and a type checker knows none of them.
    settings: Any = jax.config
    if config.compilation_cache_dir == "":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    named = config.compilation_cache_dir or settings.jax_compilation_cache_dir
    if named is None and jax.distributed.is_initialized() and jax.default_backend() != "cpu":
        log.info("compilation cache off: several processes on GPUs need compilation_cache_dir, a place that all share")
        return
    place = str(named or pathlib.Path.home() / ".cache" / "gdnjax")
    if "://" not in place:
        remove_damaged(pathlib.Path(place))
    jax.config.update("jax_compilation_cache_dir", place)
    if settings.jax_persistent_cache_min_compile_time_secs == JAX_CACHE_THRESHOLD:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def remove_damaged(directory: pathlib.Path) -> list[pathlib.Path]:
    """Removes entries that do not decompress to their end, among those that nobody has read through, and returns them.

    An entry that another process is about to write may be taken for one: that process loses nothing, and a later one
    compiles once more. Where nothing can be changed, nothing is: JAX will say of what it cannot read.
    """
    if not directory.is_dir():
        return []
    removed = []
    checked, begun = directory / CHECKED, directory / f"{CHECKED}.new"
    try:
        # Its time is the file system's, as those of the entries are.
        begun.unlink(missing_ok=True)
        begun.touch()
        since = checked.stat().st_mtime_ns if checked.exists() else 0
        for entry in directory.glob("*-cache"):
            if entry.stat().st_mtime_ns >= since and not _is_whole(entry):
                entry.unlink()
                removed.append(entry)
        begun.replace(checked)
    except OSError as error:
        # Read-only, or another process has been quicker.
        log.debug("%s was not read through: %s", directory, error)
    if removed:
        log.warning(
            "%s: %d damaged entries of the compilation cache removed; they are compiled anew", directory, len(removed)
        )
    return removed


def _is_whole(entry: pathlib.Path) -> bool:
    """Whether an entry can be decompressed to its end. JAX writes zstd's format where it finds a module for it, else
    zlib's.
    """
    with entry.open("rb") as file:
        if file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC:
            return _zstd_ends(file, entry.stat().st_size)
        file.seek(0)
        reader = zlib.decompressobj()
        with contextlib.suppress(zlib.error):
            while not reader.eof and (piece := file.read(PIECE)):
                reader.decompress(piece)
        return reader.eof


def _zstd_ends(file: Any, size: int) -> bool:
    """Whether the blocks of a frame reach its end, by their headers (RFC 8878): a module for zstd is not needed."""
    try:
        (descriptor,) = file.read(1)
        single_segment, has_checksum = bool(descriptor & 0x20), bool(descriptor & 0x04)
        dictionary = (0, 1, 2, 4)[descriptor & 0x03]
        content = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
        file.seek((0 if single_segment else 1) + dictionary + content, 1)
        last = False
        while not last:
            header = file.read(3)
            if len(header) < 3:
                return False
            number = int.from_bytes(header, "little")
            last, kind, length = bool(number & 1), number >> 1 & 3, number >> 3
            # One byte, repeated, is stored once.
            file.seek(1 if kind == 1 else length, 1)
    except ValueError:
        return False
    return file.tell() + (4 if has_checksum else 0) <= size
