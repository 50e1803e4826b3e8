"""A case: one small call of an op, what its definition makes of it, and how far a kernel may be from that."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gdnjax.backend import REFERENCE, Backend

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

Arrays = Mapping[str, Any]
Op = Callable[[Arrays, int, Backend], dict[str, Any]]
"""(arrays, layer, backend) -> outputs. Cases that share an op and shapes share their definition's compilation."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """How far an output may be from the definition's, which is computed in float32 of the same, rounded inputs.

    Fields:
      norm   of the error, relative to the norm of what is wanted.
      place  the error of any one place, relative to its magnitude plus the median magnitude of all that are not 0.
      flips  share of the places, beside FEW of them, that may be other than what is wanted, rounded to the output's
             dtype: a sum in another order now and then falls to the other side of a half, but what is wrong by 1e-5
             does so everywhere.
    """

    norm: float
    place: float
    flips: float = 1.0


HARDLY_OPTIMISED = {"xla_backend_optimization_level": 1}
"""A definition runs once or a few times, and of all its time LLVM took nine tenths. At this level results have the same
bits as at the usual one, but for an ulp in one of 177 cases, in a third of it. At none products and sums are rounded
one by one, and bounds are for roundings.
"""

EXACT = Bound(0.0, 0.0, 0.0)

FEW = 3


@dataclasses.dataclass(frozen=True)
class Error:
    """What an output's Bound is held against; here `flips` is a number of places. And the largest absolute error."""

    norm: float
    place: float
    flips: int
    largest: float


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Fields:
      arrays   the op's, numpy; pools have NaN, or bytes that nothing sane is made of, wherever nothing may be read.
      bounds   output -> its bound. "kernel[i]" is output i of a launch, which the emulator sees.
      seen     output -> mask of the places that mean something; all, where an output is not named.
      kept     output -> mask of the places that nobody addresses: they stay as they are in `arrays`, to the bit.
      padding  output -> mask of the places of padded rows in which a kernel leaves zeros, whatever it was given.
      clean    arrays that the definition gets in place of poisoned ones, where it is XLA that reads them.
      rounded  arrays that the definition gets as they are. All others of bfloat16 it gets widened to float32, so that
               nothing is rounded on its way to the result.
      exact    what is wanted, in place of the definition, of `arrays` and `clean`: in float64, by numpy.
    """

    name: str
    op: Op
    arrays: dict[str, Any]
    layer: int
    bounds: dict[str, Bound]
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)
    padding: dict[str, Any] = dataclasses.field(default_factory=dict)
    clean: dict[str, Any] = dataclasses.field(default_factory=dict)
    rounded: frozenset[str] = frozenset()
    exact: Callable[[Arrays], dict[str, np.ndarray]] | None = None

    def call(self, arrays: Arrays, backend: Backend) -> dict[str, Any]:
        return self.op(arrays, self.layer, backend)

    def wanted(self) -> dict[str, np.ndarray]:
        """The definition's outputs, or what `exact` says."""
        if self.exact is not None:
            return self.exact(self.arrays | self.clean)
        arrays = {
            name: jnp.asarray(x, jnp.float32 if x.dtype == BFLOAT16 and name not in self.rounded else None)
            for name, x in (self.arrays | self.clean).items()
        }
        return {name: np.asarray(x) for name, x in _definition(self.op, self.layer)(arrays).items()}

    def compare(self, outputs: Arrays, wanted: Arrays) -> tuple[dict[str, Error], list[str]]:
        """(errors by output, what is wrong): right, where the list is empty. Only what is in `outputs` is compared."""
        errors, wrong = {}, []
        for name, bound in self.bounds.items():
            if name not in outputs:
                continue
            mask = np.broadcast_to(self.seen.get(name, True), outputs[name].shape)
            error = difference(np.asarray(outputs[name])[mask], np.asarray(wanted[name])[mask])
            if error is None:
                wrong.append(f"{name}: not finite where the definition is, or the other way")
                continue
            errors[name] = error
            flips = int(bound.flips * mask.sum()) + FEW
            for part, most in (("norm", bound.norm), ("place", bound.place), ("flips", flips)):
                if getattr(error, part) > most:
                    wrong.append(f"{name}: {part} {getattr(error, part):.3g}, at most {most:.3g}")
        for name, mask in self.kept.items():
            if name not in outputs:
                continue
            changed = ~same_bits(outputs[name], self.arrays[name])[mask]
            if changed.any():
                wrong.append(f"{name}: {int(changed.sum())} places changed that nobody addresses")
        for name, mask in self.padding.items():
            if name not in outputs:
                continue
            filled = np.asarray(outputs[name])[np.broadcast_to(mask, outputs[name].shape)] != 0
            if filled.any():
                wrong.append(f"{name}: {int(filled.sum())} places of padding are not 0")
        return errors, wrong


@functools.cache
def _definition(op: Op, layer: int) -> Callable:
    return jax.jit(lambda arrays: op(arrays, layer, REFERENCE), compiler_options=HARDLY_OPTIMISED)


def difference(found: np.ndarray, wanted: np.ndarray) -> Error | None:
    """None where one is finite and the other is not."""
    with np.errstate(invalid="ignore"):
        x, y = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(np.isfinite(x), finite) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return None
    x, y = x[finite], y[finite]
    gap = np.abs(x - y)
    size = np.abs(y) + (np.median(np.abs(y[y != 0])) if y.any() else 0.0)
    flips = found[finite].astype(np.float64) != wanted[finite].astype(found.dtype).astype(np.float64)
    return Error(
        norm=float(np.linalg.norm(gap) / max(np.linalg.norm(y), 1e-30)),
        place=float(np.max(gap / np.where(size > 0, size, 1e-30), initial=0.0)),
        flips=int(flips.sum()),
        largest=float(np.max(gap, initial=0.0)),
    )


def same_bits(x, y) -> np.ndarray:
    """Of each place, whether the two arrays have the same bytes there."""
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    width = x.dtype.itemsize
    return (x.view(np.uint8) == y.view(np.uint8)).reshape(*x.shape, width).all(-1)


def poison(shape: tuple[int, ...], dtype) -> np.ndarray:
    """NaN where the dtype has one, else 0x7b in every byte."""
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        return np.full(shape, 0x7B7B7B7B7B7B7B7B & (1 << 8 * dtype.itemsize) - 1, dtype)
    return np.full(shape, np.nan, dtype)


def poisoned(x: np.ndarray) -> np.ndarray:
    """Mask of the places that hold poison."""
    return same_bits(x, poison(x.shape, x.dtype))
