"""A step's batch as one array of 32-bit words, and steps that take it so.

What a call of a jitted function costs the host grows with its arrays: each is found in its tree and compared with what
the call before had, and each that comes from the host is a transfer of its own. So an engine hands over a batch as one
array, which the step takes apart, and parameters as a flat tuple.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from gdnjax.shapes import Array, Leaf, Params

WORD = np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Form:
    """What batches of one class and shape have in common, and all that is needed to read their words.

    fields   (name, dtype, shape) of each field that is not None, in order.
    """

    kind: type
    fields: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, batch: Any) -> "Form":
        """The form of a batch of numpy arrays."""
        found = []
        for name, array in _arrays(batch):
            if array.dtype.itemsize > WORD.itemsize:
                raise ValueError(
                    f"{type(batch).__name__}.{name} is {array.dtype}; allowed in a batch: numbers of up to 32 bits"
                )
            found.append((name, array.dtype.str, array.shape))
        return cls(type(batch), tuple(found))

    def pack(self, batch: Any) -> np.ndarray:
        """The words [w] int32 of a batch of this form: the bits of numbers of 32 bits, the value of smaller ones."""
        parts = [
            (array if array.dtype.itemsize == WORD.itemsize else array.astype(WORD)).reshape(-1).view(WORD)
            for _, array in _arrays(batch)
        ]
        return np.concatenate(parts)

    def unpack(self, words: Array) -> Any:
        """The batch of these words, within a step."""
        return self._unpacked(words, lambda part, dtype: lax.bitcast_convert_type(part, dtype))

    def views(self, words: np.ndarray) -> Any:
        """The batch of these words on the host, of views where bits stay as they are."""
        return self._unpacked(words, lambda part, dtype: part.view(dtype))

    def _unpacked(self, words: Any, as_bits: Callable[[Any, np.dtype], Any]) -> Any:
        place, fields = 0, {}
        for name, dtype, shape in self.fields:
            size, dtype = math.prod(shape), np.dtype(dtype)
            part = words[place : place + size].reshape(shape)
            fields[name] = as_bits(part, dtype) if dtype.itemsize == WORD.itemsize else part.astype(dtype)
            place += size
        return self.kind(**fields)


def _arrays(batch: Any) -> list[tuple[str, np.ndarray]]:
    fields = vars(batch).items()
    return [(name, np.asarray(value)) for name, value in fields if value is not None]


@dataclasses.dataclass(frozen=True)
class FlatParams:
    """Parameters taken out of their tree once, for all calls: most of what a call costs is else to do it again."""

    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, params: "Params | FlatParams") -> "FlatParams":
        return params if isinstance(params, FlatParams) else cls(tuple(jax.tree.leaves(params)))


class WordStep:
    """A jitted step that is called as any other, `([params,] state, batch)`, and dispatched with few arrays.

    `params` may be FlatParams; `batch` is of numpy arrays. `make` jits the step for batches of a form: `([leaves,]
    state, words)`.
    """

    def __init__(self, make: Callable[[Form], Any]):
        self._jitted = functools.cache(make)

    def __call__(self, *given: Any) -> Any:
        step, arguments = self._flattened(given)
        return step(*arguments)

    def lower(self, *given: Any) -> Any:
        """As `lower` of what jax.jit returns; parameters and state may be shapes."""
        step, arguments = self._flattened(given)
        return step.lower(*arguments)

    def trace(self, *given: Any) -> Any:
        """As `trace` of what jax.jit returns; parameters and state may be shapes."""
        step, arguments = self._flattened(given)
        return step.trace(*arguments)

    def _flattened(self, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        *params, state, batch = given
        form = Form.of(batch)
        return self._jitted(form), (*(FlatParams.of(each).leaves for each in params), state, form.pack(batch))
