"""Writes a checkpoint anew with projections in FP8, a scale for each row: compressed-tensors' FP8_DYNAMIC.

Which tensors become codes, and their codes and scales to the bit, is what loading the old checkpoint with
quantization="fp8_per_channel" makes. Experts that are stored as one tensor are written one by one, as such files have
them.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Collection, Mapping

import jax
import numpy as np

from gdnjax import sharding
from gdnjax.checkpoint import coded
from gdnjax.checkpoint.formats import Format, check_paths, open_source, side_files, write_tensors
from gdnjax.checkpoint.loader import OpenCheckpoint, coded_formats, has_mtp, opened
from gdnjax.checkpoint.mapping import expert_parts
from gdnjax.checkpoint.quantised import FLOAT8, SCALES, QuantisedSource
from gdnjax.checkpoint.sources import TensorSource
from gdnjax.config import ModelConfig
from gdnjax.config.quantization import WHOLE, Quantization, without_quantization, write_quantization
from gdnjax.models import abstract_params

QUANTIZATION = "fp8_per_channel"
"""The name that EngineConfig has for such weights."""

SCALE = SCALES["compressed-tensors"]

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantiseReport:
    """What became of the tensors of a checkpoint. Counts are of the tensors that were written.

    format          the kind of directory that was written
    made            weights that became codes
    relative_error  how far that moved them: the root mean square of the difference by that of the weights
    kept            were copied bit for bit
    dequantised     were codes, and are numbers of the model's dtype now
    """

    format: Format
    made: int
    relative_error: float
    kept: int
    dequantised: int

    def __str__(self) -> str:
        return (
            f"{self.made} weights made float8_e4m3fn by row, of a relative error of {self.relative_error:.4f}; "
            f"{self.kept} tensors as they were, {self.dequantised} dequantised"
        )


def quantise(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    *,
    to: Format = Format.HUGGING_FACE,
    shard_bytes: int = 5 << 30,
    progress: bool = True,
) -> QuantiseReport:
    """Writes the checkpoint of a directory, in float32, bfloat16, or FP8 that has no scale for each row, into another.

    Host memory and the target are as `convert` has them, and an interrupted run leaves no config.json. Of the MTP head
    what the engine does not run stays numbers. Raises what `convert` and `opened` raise, and ValueError for a
    checkpoint whose weights are quantised in another way, or that has a number which is not finite.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    check_paths(source, target, shard_bytes)
    config = ModelConfig.from_hf(source)
    _check_stored(source, config.quantization)
    with open_source(source) as tensors:
        mtp = has_mtp(tensors.names(), config)
    abstract = abstract_params(config, 1, config.dtype, mtp=mtp)
    with opened(source, config, abstract, sharding.make_mesh(1)) as stored:
        made = PerChannelSource(stored.source, codes_of(stored), config.dtype)
        write_tensors(made, target, to, shard_bytes=shard_bytes, progress=progress)
        report = made.report(to)
        ignore = modules_left_alone({name: made.shape(name) for name in made.names()}, made.codes)
    for file in side_files(source):
        if file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    # Last: without it, nothing here is taken for a checkpoint.
    content = without_quantization(json.loads((source / "config.json").read_text(encoding="utf-8")))
    content["quantization_config"] = write_quantization(QUANTIZATION, ignore)
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report


def codes_of(stored: OpenCheckpoint) -> dict[str, str]:
    """The tensors of a checkpoint that loading it would make codes: its names -> the modules'."""
    of_modules = coded.tensors_of(stored.origins, coded_formats(stored, QUANTIZATION))
    return {name: module for module, name in stored.names.language.items() if module in of_modules}


def modules_left_alone(shapes: Mapping[str, tuple[int, ...]], codes: Collection[str]) -> list[str]:
    """Linear modules of a checkpoint's tensors of which `codes` are such; the head, even where it is the embedding."""
    linear = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name not in codes and "embed_tokens" not in name
    ]
    return list(dict.fromkeys([*linear, "lm_head"]))


def _check_stored(directory: pathlib.Path, stored: Quantization | None) -> None:
    """Raises ValueError for weights that are not to be rounded, or not once more."""
    if stored is None:
        return
    if stored.codes != "float8_e4m3fn":
        raise ValueError(
            f"{directory}: its weights are {stored.codes} ({stored.method}), and rounding them once more would lose "
            "twice; convert the bfloat16 or FP8 checkpoint that they were made of, or load this one as it is"
        )
    if (1, WHOLE) in stored.grids:
        raise ValueError(
            f"{directory}: its weights are FP8 with a scale for each row already ({stored.method}); load it as it is"
        )


class PerChannelSource:
    """The tensors of a checkpoint with some of them as codes and scales by row. A `TensorSource`.

    source      with its weights as numbers, whatever they are in the file
    codes       its tensors that become codes: its names -> the modules'
    dtype       what other tensors become that are codes in the file

    A weight's scales cost nothing where they are read behind its codes. Of each that was read the error is kept.
    """

    def __init__(self, source: TensorSource, codes: Mapping[str, str], dtype: str):
        self._source = source
        self._dtype = np.dtype(jax.numpy.dtype(dtype))
        self._pieces: dict[str, tuple[str, Slices]] = {}
        self._names: list[str] = []
        for name in source.names():
            if name not in codes:
                self._names.append(name)
                continue
            for piece, index in _pieces(name, codes[name], source.shape(name)):
                self._pieces[piece] = name, index
                self._names += [piece, piece + SCALE]
        self._errors: dict[str, tuple[float, float]] = {}
        self._last: tuple[str, np.ndarray, np.ndarray] | None = None

    @property
    def codes(self) -> Collection[str]:
        """The weights that are codes, each with a scale beside it."""
        return self._pieces.keys()

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if (weight := self._weight_of(name)) is None:
            return self._source.shape(name)
        rows, columns = (part.stop - part.start for part in self._pieces[weight][1][-2:])
        return (rows, columns) if weight == name else (rows, 1)

    def dtype(self, name: str) -> np.dtype:
        if (weight := self._weight_of(name)) is None:
            return self._dtype if self._dequantises(name) else self._source.dtype(name)
        return FLOAT8 if weight == name else np.dtype(np.float32)

    def read(self, name: str, index: Slices) -> np.ndarray:
        if (weight := self._weight_of(name)) is None:
            return self._dequantised(name, index) if self._dequantises(name) else self._source.read(name, index)
        # Taken once, since another thread may put its own there.
        last = self._last
        if last is None or last[0] != weight:
            # Dropped first, so that two are never held.
            self._last = None
            codes, scale = self._make(weight)
            self._last = last = (weight, codes, scale)
        _, codes, scale = last
        return codes[index] if weight == name else scale[index]

    def report(self, form: Format) -> QuantiseReport:
        """Of a checkpoint of which everything has been read."""
        other = [name for name in self._names if self._weight_of(name) is None]
        dequantised = sum(map(self._dequantises, other))
        return QuantiseReport(
            format=form,
            made=len(self._errors),
            relative_error=coded.relative_error(self._errors.values()),
            kept=len(other) - dequantised,
            dequantised=dequantised,
        )

    def __enter__(self) -> "PerChannelSource":
        self._source.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._last = None
        self._source.__exit__(*exception)

    def _weight_of(self, name: str) -> str | None:
        """The weight of which a tensor is codes or scales; None for any other."""
        return next((weight for weight in (name, name.removesuffix(SCALE)) if weight in self._pieces), None)

    def _dequantises(self, name: str) -> bool:
        return isinstance(self._source, QuantisedSource) and self._source.kind(name) is not None

    def _make(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        name, where = self._pieces[weight]
        *lead, _, _ = where

        def read(index: Slices) -> np.ndarray:
            rows, columns = (
                slice(part.start + whole.start, part.stop + whole.start)
                for part, whole in zip(index, where[-2:], strict=True)
            )
            values = self._source.read(name, (*lead, rows, columns))
            return np.asarray(values.reshape(values.shape[-2:]), np.float32)

        try:
            codes, scale, self._errors[weight] = coded.make_codes(read, self.shape(weight))
        except ValueError as error:
            raise ValueError(f"{weight}: {error}") from error
        return codes, scale

    def _dequantised(self, name: str, index: Slices) -> np.ndarray:
        """Some rows at a time, since they are float32 first."""
        rows, *others = index
        shape = tuple(part.stop - part.start for part in index)
        values = np.empty(shape, self._dtype)
        step = max(1, coded.MADE_AT_ONCE // max(1, values[:1].size))
        for start in range(0, len(values), step):
            part = slice(rows.start + start, min(rows.start + start + step, rows.stop))
            values[start : start + step] = self._source.read(name, (part, *others))
        return values


def _pieces(name: str, module: str, shape: tuple[int, ...]) -> list[tuple[str, Slices]]:
    """The weights that are written of a tensor, and which slices of it they are: each expert by itself."""
    if len(shape) == 2:
        return [(name, tuple(slice(0, size) for size in shape))]
    prefix = name.removesuffix(module)
    path, kind = module.rsplit(".", 1)
    return [
        (prefix + part.tensor, tuple(slice(a, a + size) for a, size in zip(part.start, part.box, strict=True)))
        for part in expert_parts(path, kind, shape)
    ]
