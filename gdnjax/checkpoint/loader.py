"""From a checkpoint directory to sharded parameters, each rank reading its own part."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import mmap
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gdnjax import sharding
from gdnjax.checkpoint import coded
from gdnjax.checkpoint.formats import open_source
from gdnjax.checkpoint.mapping import Copy, Origin, apart_convolutions, copies, origin_of, stores_experts_apart
from gdnjax.checkpoint.names import Names, renaming, sort_names, stored_name
from gdnjax.checkpoint.quantised import QuantisedSource, weights_of
from gdnjax.checkpoint.sources import TensorSource, abbreviate, read_whole
from gdnjax.config import ModelConfig
from gdnjax.models import partition
from gdnjax.progress import Progress
from gdnjax.quantized import CodeFormat, Quantized
from gdnjax.shapes import Params

log = logging.getLogger("gdnjax")

Slices = tuple[slice, ...]
Read = Callable[[str, Slices], np.ndarray]
"""A slice of a tensor of the checkpoint."""

IN_FLIGHT_BYTES = 4 << 30
"""Host memory of the parameters that are on their way to the devices; a larger one travels alone."""

TIED_ROWS = 4096
"""Rows of a stored head that are compared with the embedding at once."""

THREADS = min(8, max(2, os.cpu_count() or 1))
"""Parameters on their way at once: one is read while others are transferred, and a single thread does neither as fast
as memory and bus allow. More than a few gain nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of the tensors of a checkpoint. Counts are of checkpoint tensors.

    loaded            became parameters, those of the MTP head included
    mtp_loaded        belong to the multi-token-prediction head, and became parameters
    mtp_shared        modules of the target that the loaded MTP head uses in place of its own; empty without a head
    quantised         weights that were stored as codes and scales, by what the codes are; each counts once
    dequantised       those of them that became numbers of the model's dtype; the others are codes on the devices, too
    mtp_quantised     those of the MTP head among the quantised
    made_fp8          weights that were made float8_e4m3fn with a scale for each row, and how far that moved them: the
                      root mean square of the difference by that of the weights; None where none were
    skipped_vision    belong to the vision tower, which the engine does not run
    skipped_mtp       belong to the multi-token-prediction head, which `abstract` does not have
    skipped_tied      the lm_head of a model whose lm_head is its embedding, and equal to it; copies of embedding and
                      lm_head that the loaded MTP head brings, equal to them
    parameter_bytes   size of all parameters, all ranks together, replicated ones counted once
    seconds           from the opened checkpoint to the last parameter on its device; reports are equal without it
    """

    loaded: int
    mtp_loaded: int
    mtp_shared: tuple[str, ...]
    quantised: dict[str, int]
    dequantised: int
    mtp_quantised: int
    made_fp8: tuple[int, float] | None
    skipped_vision: int
    skipped_mtp: int
    skipped_tied: int
    parameter_bytes: int
    seconds: float = dataclasses.field(compare=False)

    @property
    def gib_per_second(self) -> float:
        """Of parameters, as they are on the devices."""
        return self.parameter_bytes / (1 << 30) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        head = ""
        if self.mtp_shared:
            head = f"; {self.mtp_loaded} of them are the MTP head, which shares {' and '.join(self.mtp_shared)}"
        codes = ""
        if self.quantised:
            counts = " and ".join(f"{count} of {kind}" for kind, count in self.quantised.items())
            codes = (
                f"; quantised: {counts}, {self.mtp_quantised} of them of the MTP head, {self.dequantised} of them "
                "dequantised as they were read"
            )
        if self.made_fp8 is not None:
            codes += f"; made float8_e4m3fn by row: {self.made_fp8[0]}, of a relative error of {self.made_fp8[1]:.4f}"
        return (
            f"{self.loaded} tensors, {self.parameter_bytes / (1 << 30):.2f} GiB of parameters in {self.seconds:.1f} s "
            f"({self.gib_per_second:.2f} GiB/s){head}{codes}; skipped: "
            f"{self.skipped_vision} of the vision tower, {self.skipped_mtp} of the MTP head, "
            f"{self.skipped_tied} tied to the embedding"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint that is open, and whose tensors are those of a model: names, shapes and dtypes have been read.

    directory   of the checkpoint
    cfg         of the model
    abstract    its parameters, nothing of them as codes
    mesh        of the devices that are to have them
    source      its tensors, weights as numbers whatever they are in the file
    names       which of them are for what
    origins     where each parameter lies in them, by name
    """

    directory: pathlib.Path
    cfg: ModelConfig
    abstract: Params
    mesh: Mesh
    source: TensorSource
    names: Names
    origins: dict[str, Origin]

    @property
    def tp(self) -> int:
        """Ranks."""
        return self.mesh.shape[sharding.AXIS]

    @functools.cached_property
    def formats(self) -> dict[str, CodeFormat]:
        """How the parameters may be held that are codes in the checkpoint, by name."""
        if not isinstance(self.source, QuantisedSource):
            return {}
        shapes = {name: tuple(leaf.shape) for name, leaf in _named(self.abstract).items()}
        whole = self.cfg.expert_parallel
        return coded.formats_of(self.source, self.names.language, self.origins, shapes, self.tp, expert_parallel=whole)


@contextlib.contextmanager
def opened(directory: str | pathlib.Path, cfg: ModelConfig, abstract: Params, mesh: Mesh) -> Iterator[OpenCheckpoint]:
    """Opens a checkpoint for as long as the context lasts, once for `coded_formats` and `load_params`.

    abstract    nested dict of jax.ShapeDtypeStruct with global shapes, under the modules' names; the MTP head is
                wanted if it is a part of this tree

    Names, shapes and dtypes of all tensors are checked, and nothing else is read. Raises FileNotFoundError where the
    directory is no checkpoint, and ValueError that names the tensors where some are missing, unexpected, of another
    shape or dtype, where a file is damaged, where the MTP head is wanted and not stored, or has an embedding or a head
    of its own, or where the ranks of `mesh` do not divide the model.
    """
    directory = pathlib.Path(directory)
    # For its errors: what the ranks cannot divide is named before any index vector is cut.
    cfg.shard(mesh.shape[sharding.AXIS])
    with open_source(directory) as stored:
        try:
            source = weights_of(stored, cfg.quantization)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        names, origins = _resolve(source, directory, _named(abstract), cfg, mesh.shape[sharding.AXIS])
        yield OpenCheckpoint(
            directory=directory, cfg=cfg, abstract=abstract, mesh=mesh, source=source, names=names, origins=origins
        )


def coded_formats(stored: OpenCheckpoint, quantization: str) -> dict[str, CodeFormat]:
    """Which parameters are held as codes and scales, by name, for `abstract_params` and `load_params`.

    quantization    as EngineConfig has it: "auto", those that the checkpoint has so; "dequantized", none;
                    "fp8_per_channel", all that may be
    """
    if quantization == "fp8_per_channel":
        whole = stored.cfg.expert_parallel
        return coded.usual_formats(stored.abstract, stored.tp, quantization, expert_parallel=whole)
    return {} if quantization == "dequantized" else stored.formats


def load_params(stored: OpenCheckpoint, abstract: Params, *, progress: bool = True) -> tuple[Params, LoadReport]:
    """Reads the parameters of a model into the tree `abstract`, cast to its dtypes and sharded over the mesh.

    abstract    as `opened` was given it, or with a `Quantized` for some parameters, which are loaded as codes and
                scales: those of the checkpoint, where it has them on this grid (`coded_formats`), else made of its
                weight if they are float8_e4m3fn with a scale for each row
    progress    say how far it is (gdnjax.progress)

    Up to THREADS parameters are read and transferred at a time, and host memory holds IN_FLIGHT_BYTES of them, or the
    one that is larger; of an Orbax checkpoint also a tensor for each thread. Raises ValueError where a file is damaged,
    or where a stored head differs from the embedding that is to be the head. What fails on the way names the parameter,
    and is raised when the others under way have ended; so is a KeyboardInterrupt.
    """
    directory, cfg, mesh = stored.directory, stored.cfg, stored.mesh
    source, names, origins = stored.source, stored.names, stored.origins
    parameters, treedef = _named(abstract), jax.tree_util.tree_structure(abstract, is_leaf=_is_coded)
    for head in names.tied:
        _check_tied(source, directory, head, names.language["embed_tokens.weight"])
    for copy, of in names.copies.items():
        _check_copy(source, directory, copy, names.language[of])
    formats = stored.formats
    made = [name for name, leaf in parameters.items() if _is_coded(leaf) and formats.get(name) != _format_of(leaf)]
    _check_made({name: parameters[name] for name in made})
    began = time.monotonic()
    errors: list[tuple[float, float]] = []

    def load(name: str) -> Any:
        placement = NamedSharding(mesh, partition.spec_of(name, expert_parallel=cfg.expert_parallel))
        leaf, origin = parameters[name], origins[name]
        if not _is_coded(leaf):
            return _load_parameter(_reader(source.read, names, origin, leaf, placement), leaf, placement)
        if name in made:
            values, error = _make_codes(
                _reader(source.read, names, origin, leaf.codes, placement, np.float32), leaf, placement
            )
            errors.append(error)
            return values
        assert isinstance(source, QuantisedSource), "only such a checkpoint has codes"
        codes = _reader(source.codes, names, origin, leaf.codes, placement)
        scales = functools.partial(coded.read_scales, source, names.language, origin, leaf.grid, tuple(leaf.shape))
        return dataclasses.replace(
            leaf,
            codes=_load_parameter(codes, leaf.codes, placement),
            scale=_load_parameter(scales, leaf.scale, placement),
        )

    sizes = {
        name: sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(leaf))
        for name, leaf in parameters.items()
    }
    with Progress("loading", len(sizes), "parameter", enabled=progress) as bar:
        arrays = _side_by_side(load, sizes, bar.update)
    quantised = _quantised(source, names)
    held = {
        part.tensor for name in set(formats) - set(made) if _is_coded(parameters[name]) for part in origins[name].parts
    }
    seconds = time.monotonic() - began
    mtp_loaded = sum(map(_is_of_head, names.language))
    tables = ("embed_tokens",) if cfg.tie_word_embeddings else ("embed_tokens", "lm_head")
    report = LoadReport(
        loaded=len(names.language),
        mtp_loaded=mtp_loaded,
        mtp_shared=tables if mtp_loaded else (),
        quantised=dict(collections.Counter(quantised.values())),
        dequantised=len(set(quantised) - held),
        mtp_quantised=sum(map(_is_of_head, quantised)),
        made_fp8=(len(made), coded.relative_error(errors)) if made else None,
        skipped_vision=len(names.vision),
        skipped_mtp=len(names.mtp),
        skipped_tied=len(names.tied) + len(names.copies),
        parameter_bytes=sum(array.nbytes for array in jax.tree.leaves(arrays)),
        seconds=seconds,
    )
    log.info("loaded %s: %s", directory, report)
    return jax.tree_util.tree_unflatten(treedef, arrays), report


def _quantised(source: TensorSource, names: Names) -> dict[str, str]:
    """What the codes are of each weight that was loaded from such, by its name in the modules."""
    if not isinstance(source, QuantisedSource):
        return {}
    kinds = {module: source.kind(name) for module, name in names.language.items()}
    return {module: kind for module, kind in kinds.items() if kind is not None}


def _named(tree: Params) -> dict[str, Any]:
    """The leaves of a tree of parameters by name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_coded)[0]
    return {sharding.path_name(path): leaf for path, leaf in leaves}


def _is_coded(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _format_of(leaf: Quantized) -> CodeFormat:
    return CodeFormat(str(leaf.codes.dtype), leaf.grid)


def _check_made(parameters: Mapping[str, Quantized]) -> None:
    """Raises ValueError for codes that the checkpoint does not have so, and that are not made here."""
    other = [
        f"{name} ({leaf.codes.dtype}, {leaf.grid[0]} x {leaf.grid[1]})"
        for name, leaf in parameters.items()
        if leaf.codes.dtype != coded.FLOAT8 or leaf.grid[0] != 1
    ]
    if other:
        raise ValueError(
            "the checkpoint has other codes or another grid; made of weights are only float8_e4m3fn with a scale for "
            f"each row. Parameters: {abbreviate(other)}"
        )


def has_mtp(stored: Iterable[str], cfg: ModelConfig) -> bool:
    """Whether tensors of these names are a checkpoint with an MTP head that the engine runs."""
    names = sort_names(
        stored,
        tied_lm_head=cfg.tie_word_embeddings,
        mtp_wanted=True,
        mtp_layers=cfg.mtp_layer_names,
        rename=renaming(cfg),
    )
    try:
        cfg.require_mtp()
    except ValueError:
        return False
    return not names.mtp_tables and any(map(_is_of_head, names.language))


def _resolve(
    source: TensorSource,
    directory: str | pathlib.Path,
    parameters: Mapping[str, Any],
    cfg: ModelConfig,
    tp: int,
) -> tuple[Names, dict[str, Origin]]:
    """Finds every parameter in the checkpoint. Raises one ValueError that names all that does not fit."""
    try:
        mtp_wanted = any(map(_is_of_head, parameters))
        names = sort_names(
            source.names(),
            tied_lm_head=cfg.tie_word_embeddings,
            mtp_wanted=mtp_wanted,
            mtp_layers=cfg.mtp_layer_names,
            rename=renaming(cfg),
        )
        # Either part may store its experts one by one or together, whatever the other does.
        experts_apart = {
            head: stores_experts_apart([name for name in names.language if _is_of_head(name) == head])
            for head in (False, True)
        }
        _check_head(names, mtp_wanted, cfg)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    convolutions = {
        name: sum(source.shape(names.language[name])[:1]) for name in apart_convolutions(list(names.language))
    }
    origins = {
        name: origin_of(
            name,
            leaf.shape,
            cfg,
            tp,
            experts_apart=experts_apart[_is_of_head(name)],
            convolutions=convolutions,
        )
        for name, leaf in parameters.items()
    }
    expected = {part.tensor: part.shape for origin in origins.values() for part in origin.parts}
    missing = [name for name in expected if name not in names.language]
    surplus = [name for name in names.language if name not in expected]
    unexpected = [*names.unknown, *(names.language[name] for name in surplus)]
    absent = [stored_name(name, cfg.mtp_layer_names) for name in missing]
    misshaped = [
        f"{names.language[name]} is {source.shape(names.language[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in names.language and source.shape(names.language[name]) != shape
    ]
    problems = [
        f"{len(found)} {what}: {abbreviate(found)}"
        for what, found in (("missing", absent), ("unexpected", unexpected), ("misshaped", misshaped))
        if found
    ]
    if problems:
        # The rest may be a whole model.
        if any(_is_of_head(name) for name in (*missing, *surplus)):
            problems.append(
                f"Without the MTP head (num_speculative_tokens=0) nothing that {_place_of_head(cfg)} is read"
            )
        raise ValueError(f"{directory}: the tensors do not fit the model's config.json. {'. '.join(problems)}")
    return names, origins


def _check_tied(source: TensorSource, directory: str | pathlib.Path, head: str, embedding: str) -> None:
    """Raises ValueError where a stored head is not the embedding that the model is configured to use as its head."""
    if _equal(source, head, embedding):
        return
    raise ValueError(
        f"{directory}: {head} differs from {embedding}, and tie_word_embeddings=true makes that the head; set it to "
        f"false in config.json to use the stored head, or leave {head} out"
    )


def _check_copy(source: TensorSource, directory: str | pathlib.Path, copy: str, of: str) -> None:
    """Raises ValueError where a table that an MTP head brings is not the one of the target, which it is to share."""
    if not _equal(source, copy, of):
        raise ValueError(
            f"{directory}: {copy} differs from {of}. Supported are MTP heads that share the embedding and the head of "
            "the model; num_speculative_tokens=0 does without the MTP head"
        )


def _equal(source: TensorSource, one: str, other: str) -> bool:
    if source.shape(one) != source.shape(other):
        return False
    # Of a file these are views, and what is read of them is on its way to the device anyway.
    first, second = read_whole(source, one), read_whole(source, other)
    parts = (slice(start, start + TIED_ROWS) for start in range(0, len(first), TIED_ROWS))
    return all(np.array_equal(first[part], second[part]) for part in parts)


def _is_of_head(name: str) -> bool:
    """Whether a parameter or a tensor, in module names, belongs to the MTP head."""
    return name.startswith("mtp.")


def _place_of_head(cfg: ModelConfig) -> str:
    """How a checkpoint marks a tensor of the MTP head, as the end of a sentence."""
    layers = cfg.mtp_layer_names
    return "begins with mtp." if layers is None else f"is of the layers from {layers.start} on"


def _check_head(names: Names, mtp_wanted: bool, cfg: ModelConfig) -> None:
    """Raises ValueError where the MTP head is wanted and not stored, or brings tables that should be the target's."""
    if names.mtp_tables:
        raise ValueError(
            f"the MTP head has an embedding or a head of its own: {abbreviate(list(names.mtp_tables))}. Supported are "
            "heads that share those of the model; num_speculative_tokens=0 does without the MTP head"
        )
    if mtp_wanted and not any(map(_is_of_head, names.language)):
        raise ValueError(
            f"num_speculative_tokens above 0 needs the MTP head, and no tensor here {_place_of_head(cfg)}; "
            "allowed: num_speculative_tokens=0"
        )


def _side_by_side(load: Callable[[str], Any], sizes: Mapping[str, int], done: Callable[[int], object]) -> list[Any]:
    """`load` of each name, in order, by THREADS threads, with at most IN_FLIGHT_BYTES of `sizes` begun and not ended.

    `done` is told how many have ended since it was told last. An error is that of `load`, with the name before it.
    """
    futures: dict[str, Future[Any]] = {}
    under_way: dict[Future[Any], int] = {}

    def wait() -> None:
        ended, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ended:
            del under_way[future]
            future.result()
        done(len(ended))

    with ThreadPoolExecutor(THREADS, thread_name_prefix="gdnjax-load") as pool:
        try:
            for name, size in sizes.items():
                while under_way and sum(under_way.values()) + size > IN_FLIGHT_BYTES:
                    wait()
                futures[name] = future = pool.submit(_naming, load, name)
                under_way[future] = size
            while under_way:
                wait()
        except BaseException:
            # Leaving the pool waits for its threads: for what they have begun, and no more.
            for future in under_way:
                future.cancel()
            raise
    return [future.result() for future in futures.values()]


def _naming(load: Callable[[str], Any], name: str) -> Any:
    try:
        return load(name)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        # Of the same type, since callers tell a device that is full from a file that is damaged by it.
        raise type(error)(f"loading {name}: {error}") from error


def _reader(
    read: Read,
    names: Names,
    origin: Origin,
    leaf: jax.ShapeDtypeStruct,
    placement: NamedSharding,
    dtype: Any = None,
) -> Callable[[Slices], np.ndarray]:
    """What reads a block of a parameter's global array, in its own dtype or another one."""
    # A CPU device would keep what it is given where that is aligned, and a file may change under it.
    in_memory = any(device.platform == "cpu" for device in placement.device_set)

    def block(slices: Slices) -> np.ndarray:
        shape = tuple(part.stop - part.start for part in slices)
        form = np.dtype(dtype or leaf.dtype)
        return _block(read, names.language, copies(origin, slices), shape, form, in_memory=in_memory)

    return block


def _load_parameter(
    read: Callable[[Slices], np.ndarray], leaf: jax.ShapeDtypeStruct, placement: NamedSharding
) -> jax.Array:
    def block(index: Any) -> np.ndarray:
        bounds = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
        return read(tuple(slice(start, stop) for start, stop, _ in bounds))

    # Waited for, so that the host buffers of a parameter are gone before another takes its place.
    return jax.make_array_from_callback(leaf.shape, placement, block).block_until_ready()


def _make_codes(
    read: Callable[[Slices], np.ndarray], leaf: Quantized, placement: NamedSharding
) -> tuple[Quantized, tuple[float, float]]:
    """A weight by rows in float8_e4m3fn, and the squares of its error and of itself. Rows are made whole, whatever
    ranks have of them, so that codes do not depend on how many there are.
    """
    codes, scale, error = coded.make_codes(read, tuple(leaf.shape))
    scale = np.broadcast_to(scale, leaf.scale.shape)
    # Not by device_put: where several processes share the mesh, it compares what they bring, in a step of the devices.
    placed = [
        jax.make_array_from_callback(values.shape, placement, values.__getitem__)
        for values in (codes, np.ascontiguousarray(scale))
    ]
    jax.block_until_ready(placed)
    return dataclasses.replace(leaf, codes=placed[0], scale=placed[1]), error


def _block(
    read: Read,
    stored_names: dict[str, str],
    reads: list[Copy],
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    in_memory: bool,
) -> np.ndarray:
    """One rank's values: in memory of their own, or, where they stand so in the checkpoint, what the source reads."""
    size = math.prod(shape)
    filled = sum(math.prod(part.stop - part.start for part in copy.target) for copy in reads)
    if len(reads) == 1 and filled == size and not in_memory:
        values = read(stored_names[reads[0].tensor], reads[0].source)
        if values.dtype == dtype and values.flags.c_contiguous and values.flags.aligned:
            return values.reshape(shape)
    values = _zeros(shape, dtype)
    for copy in reads:
        values[copy.target] = read(stored_names[copy.tensor], copy.source)
    return values


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros, in pages of their own.

    They begin where a page does, so a CPU device takes them over without a copy; and all of them go back to the system
    at once, whoever allocated what in between. What no read covers is padding, and stays zero.
    """
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Most of the time would go into small pages. A kernel that was built without large ones says EINVAL.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.ndarray(shape, dtype, buffer=memory)
