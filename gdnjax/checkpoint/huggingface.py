"""Hugging Face checkpoints: `model.safetensors`, or shards beside `model.safetensors.index.json`."""

import json
import mmap
import pathlib
from collections.abc import Iterable

import numpy as np
import safetensors
import safetensors.numpy

from gdnjax.checkpoint.sources import DTYPES, TensorSource, abbreviate, check_dtypes, read_whole, tensor_bytes
from gdnjax.progress import Progress

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsSource:
    """The tensors of a Hugging Face directory. The files are mapped, and what is read are views of the mappings: they
    may not be written to, and cost nothing until they are looked at.

    Every header is read and checked at construction. Raises FileNotFoundError where the directory holds no
    checkpoint or lacks a shard, and ValueError that names the file where one is damaged, where index and shards
    disagree, or where a tensor is of a dtype that is not in `sources.DTYPES`.
    """

    def __init__(self, directory: str | pathlib.Path):
        self._directory = pathlib.Path(directory)
        weight_map = _read_index(self._directory)
        files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
        self._tensors: dict[str, np.ndarray] = {}
        self._files: dict[str, pathlib.Path] = {}
        for file in files:
            self._add(self._directory / file)
        if weight_map is not None:
            self._check_index(weight_map)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        assert isinstance(tensor.base, mmap.mmap), "tensors are views of mappings"
        _read_ahead(tensor[index], tensor.base)
        return tensor[index]

    def __enter__(self) -> "SafetensorsSource":
        return self

    def __exit__(self, *exception: object) -> None:
        # The mapping of a file ends with the last array that is a view of it.
        self._tensors.clear()

    def _add(self, file: pathlib.Path) -> None:
        """Maps one file. A tensor that an earlier file has too is an error: which of them is meant is unknown."""
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                # Known to be sound from here on: tensors lie within the file, and cover it without gaps.
                names = opened.keys()
                check_dtypes(str(file), {name: opened.get_slice(name).get_dtype() for name in names})
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: damaged or not a safetensors file: {error}") from error
        for name, tensor in _views(file, names).items():
            if name in self._tensors:
                raise ValueError(f"{file}: tensor {name} is also in {self._files[name]}")
            self._tensors[name] = tensor
            self._files[name] = file

    def _check_index(self, weight_map: dict[str, str]) -> None:
        absent = [
            f"{name} (in {file})"
            for name, file in weight_map.items()
            if self._files.get(name) != self._directory / file
        ]
        if absent:
            raise ValueError(
                f"{self._directory / INDEX_FILE}: tensors that are not in the shard it names: {abbreviate(absent)}"
            )
        unlisted = [f"{name} (in {self._files[name].name})" for name in self._tensors if name not in weight_map]
        if unlisted:
            raise ValueError(f"{self._directory / INDEX_FILE}: tensors that it does not list: {abbreviate(unlisted)}")


def _views(file: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The tensors of a sound file, as views of its mapping. safetensors itself gives copies only.

    The layout: the length of the header in 8 bytes, little-endian; the header, as JSON; then the tensors, each from
    one offset to another behind the header.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.ndarray(
            tuple(header[name]["shape"]),
            DTYPES[header[name]["dtype"]],
            buffer=mapping,
            offset=8 + size + header[name]["data_offsets"][0],
        )
        for name in names
    }


def _read_ahead(view: np.ndarray, mapping: mmap.mmap) -> None:
    """Has the file's part under a view come into memory in large pieces: page by page, a disk is slow."""
    if view.size:
        begin, end = np.lib.array_utils.byte_bounds(view)
        start = np.frombuffer(mapping, np.uint8).ctypes.data
        page = (begin - start) // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, page, end - start - page)


def _read_index(directory: pathlib.Path) -> dict[str, str] | None:
    """Tensor name -> shard, or None for a checkpoint of one file without an index."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and not index.is_file():
        return None
    if not index.is_file():
        shards = sorted(file.name for file in directory.glob("*.safetensors"))
        found = f"; found only {abbreviate(shards)}" if shards else ""
        raise FileNotFoundError(
            f"{directory}: no safetensors checkpoint; expected {SINGLE_FILE}, or {INDEX_FILE} and its shards{found}"
        )
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged, expected a JSON object with a weight_map: {error!r}") from error
    if single.is_file() and SINGLE_FILE not in shards:
        raise ValueError(
            f"{directory}: {SINGLE_FILE} is here, and {INDEX_FILE} names other files; keep what is meant of the two"
        )
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory}: shards named in {INDEX_FILE} are missing: {abbreviate(missing)}")
    return weight_map


def write_safetensors(source: TensorSource, directory: pathlib.Path, *, shard_bytes: int, progress: bool) -> None:
    """Writes all tensors of `source` bit for bit into `directory`: one file if they fit, else shards and an index.

    Host memory holds one shard at a time. A tensor larger than `shard_bytes` gets a shard of its own.
    """
    shards = plan_shards({name: tensor_bytes(source, name) for name in source.names()}, shard_bytes)
    if len(shards) == 1:
        files = [SINGLE_FILE]
    else:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with Progress("writing safetensors", len(source.names()), "tensor", enabled=progress) as bar:
        for file, names in zip(files, shards, strict=True):
            tensors = {}
            for name in names:
                # safetensors.numpy writes the bytes behind the pointer, so a strided view would be written wrong.
                tensors[name] = np.ascontiguousarray(read_whole(source, name))
                bar.update()
            write_file(tensors, directory / file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor_bytes(source, name) for name in source.names())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_file(tensors: dict[str, np.ndarray], file: pathlib.Path) -> None:
    """One safetensors file of contiguous arrays, readable by others."""
    # transformers refuses files that do not say which framework their layout is that of.
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    # safetensors gives the owner alone access.
    file.chmod(0o644)


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Divides tensors, in order, into shards of at most `shard_bytes`; a larger tensor is alone in its shard."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
