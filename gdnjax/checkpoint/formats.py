"""Which kind of checkpoint a directory holds, opening it, and rewriting it as the other kind."""

import enum
import hashlib
import pathlib
import shutil

import numpy as np

from gdnjax.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE, SafetensorsSource, write_safetensors
from gdnjax.checkpoint.sources import ORBAX_FOLDER, TensorSource

# What stands beside the weights: configuration, tokenizer, chat template, licence.
SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
SIDE_NAMES = ("LICENSE",)


class Format(enum.Enum):
    """The kinds of checkpoint directory, as the command line spells them."""

    HUGGING_FACE = "hf"
    ORBAX = "orbax"


def format_of(directory: str | pathlib.Path) -> Format:
    """The kind of a checkpoint directory. FileNotFoundError where it holds none, ValueError where it holds both."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; expected a checkpoint directory")
    # Shards without their index count too: SafetensorsSource then says what is missing.
    has_safetensors = (directory / INDEX_FILE).is_file() or any(directory.glob("*.safetensors"))
    has_orbax = (directory / ORBAX_FOLDER).is_dir()
    if has_safetensors and has_orbax:
        raise ValueError(
            f"{directory}: both safetensors files and {ORBAX_FOLDER}/ are here; keep the one that is meant"
        )
    if has_safetensors:
        return Format.HUGGING_FACE
    if has_orbax:
        return Format.ORBAX
    raise FileNotFoundError(
        f"{directory}: no checkpoint here; expected a Hugging Face one ({SINGLE_FILE}, or {INDEX_FILE} and its "
        f"shards) or one written by gdnjax convert ({ORBAX_FOLDER}/)"
    )


def open_source(directory: str | pathlib.Path) -> TensorSource:
    """Opens the checkpoint of a directory, whatever its kind. Raises what `format_of` and the sources raise."""
    match format_of(directory):
        case Format.HUGGING_FACE:
            return SafetensorsSource(directory)
        case Format.ORBAX:
            # Imported where it is needed: most starts need none of it, and it takes a quarter of a second.
            from gdnjax.checkpoint.orbax import OrbaxSource

            return OrbaxSource(directory)


SAMPLED_TENSORS = 16
"""Tensors of a checkpoint that its fingerprint looks into."""


def fingerprint(directory: str | pathlib.Path) -> str:
    """A digest that tells checkpoints apart: of all names, shapes and dtypes, and of the first row of a few tensors.
    What fine-tuning leaves alone in those rows it does not see.
    """
    digest = hashlib.sha256()
    with open_source(directory) as source:
        names = sorted(source.names())
        for name in names:
            digest.update(f"{name} {source.shape(name)} {source.dtype(name)}\n".encode())
        for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
            first, *others = source.shape(name) or (1,)
            if source.shape(name):
                row = source.read(name, (slice(0, min(1, first) if others else first), *map(slice, others)))
                digest.update(np.ascontiguousarray(row).tobytes())
    return digest.hexdigest()


def convert(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    *,
    to: Format | None = None,
    shard_bytes: int = 5 << 30,
    progress: bool = True,
) -> Format:
    """Rewrites a checkpoint directory as the other kind, every tensor bit for bit, and returns that kind.

    `to` only confirms the direction. Files beside the weights are copied as they are. Host memory holds one shard of
    `shard_bytes` when Hugging Face is written, the model once when Orbax is. Raises FileExistsError where the target
    is not a new or empty directory, FileNotFoundError where the source is no checkpoint or lacks a config.json, and
    ValueError for a damaged source, a direction that changes nothing, or a `shard_bytes` below 1.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    found = format_of(source)
    wanted = Format.ORBAX if found is Format.HUGGING_FACE else Format.HUGGING_FACE
    if to not in (None, wanted):
        raise ValueError(f"{source}: is already of the kind {found.value!r}; allowed: to {wanted.value!r}")
    check_paths(source, target, shard_bytes)
    with open_source(source) as tensors:
        write_tensors(tensors, target, wanted, shard_bytes=shard_bytes, progress=progress)
    # Last, so that an interrupted conversion has no config.json and is not taken for a checkpoint.
    for file in side_files(source):
        shutil.copyfile(file, target / file.name)
    return wanted


def check_paths(source: pathlib.Path, target: pathlib.Path, shard_bytes: int) -> None:
    """Raises what `convert` says of a source without a config.json, a target that is taken, and the size of shards."""
    if shard_bytes < 1:
        raise ValueError(f"the size of a shard must be positive, got {shard_bytes} bytes")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: no config.json beside the weights")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists and is not an empty directory; name a new one or empty it")


def write_tensors(
    tensors: TensorSource, target: pathlib.Path, form: Format, *, shard_bytes: int, progress: bool
) -> None:
    """Writes tensors into a directory of either kind, which is made, but nothing that stands beside the weights."""
    target.mkdir(parents=True, exist_ok=True)
    match form:
        case Format.ORBAX:
            from gdnjax.checkpoint.orbax import write_orbax

            write_orbax(tensors, target, progress=progress)
        case Format.HUGGING_FACE:
            write_safetensors(tensors, target, shard_bytes=shard_bytes, progress=progress)


def side_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that belong to a checkpoint besides its weights."""
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file() and file.name != INDEX_FILE and (file.suffix in SIDE_SUFFIXES or file.name in SIDE_NAMES)
    ]
