"""The head that drafts are drawn by: a copy of the target's in float8_e4m3fn, with a scale for each token.

Every draft reads a head of the vocabulary's size, which with 248k tokens is most of what it reads: of bfloat16 the copy
is half. It only proposes, and what keeps or refuses its drafts takes them for what they are (with rejection the scores
of drafts are made again by the copy). So what is emitted is as exact as with the target's own head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from gdnjax.quantized import CodeFormat, Quantized, quantise
from gdnjax.shapes import Array, Params

NAME = "draft_head"
"""Of the parameter, which no checkpoint has: it is made where the others are."""

CODES = "float8_e4m3fn"


def with_draft_head(params: Params) -> Params:
    """The parameters (global arrays) with the copy, on the devices and split as the head is."""
    head = _head_of(params)
    return {**params, NAME: {"weight": _maker(head.sharding, head.shape[1])(head)}}


def with_abstract_draft_head(params: Params) -> Params:
    """The same of parameters of which there are shapes alone."""
    shape = _head_of(params).shape
    return {**params, NAME: {"weight": CodeFormat(CODES, (1, shape[1])).abstract(shape)}}


def without_draft_head(params: Params) -> Params:
    """What a checkpoint has."""
    return {name: tree for name, tree in params.items() if name != NAME}


def _head_of(params: Params) -> Any:
    return params["lm_head" if "lm_head" in params else "embed_tokens"]["weight"]


@functools.cache
def _maker(sharding: Any, width: int) -> Callable[[Array], Quantized]:
    """One function for all heads that lie alike: new weights compile nothing."""
    return jax.jit(_coded, out_shardings=Quantized(sharding, sharding, (1, width)))


def _coded(head: Array) -> Quantized:
    codes, scale = quantise(head, CODES)
    return Quantized(codes, scale, (1, head.shape[1]))
