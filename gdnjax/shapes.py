"""The legend of axis letters, used in every annotation of the package, and the types that stand on them.

========  ==========================================================================================
letter    axis
========  ==========================================================================================
``n``     rows of a decode step (one request each, padded to the bucket)
``t``     packed tokens of a prefill step (the tokens of all rows, one after another, padded)
``r``     rows of a prefill step (one request each, padded)
``c``     chunks of a prefill step (at most 64 tokens of one row each, padded)
``q``     query tokens of one tile: 64 in prefill, T in decode
``T``     tokens of a request in a decode step: the last one and its drafts
``P``     pending rows of a slot: as many as T can be, 0 without speculation
``s``     slots of the per-request pools; slot 0 is null
``b``     KV blocks; block 0 is null
``p``     positions in a block (``block_size``)
``m``     entries of a block table (blocks that one request can have)
``L``     layers of one kind (GDN layers, or full-attention layers)
``d``     hidden size
``f``     width of an MLP or of one expert
``e``     experts
``hk hv`` key heads and value heads of a GDN layer
``k v``   width of a key head and of a value head
``x``     channels of the convolution: ``2 hk k + hv v``
``w``     rows of a convolution window: ``conv_kernel - 1``; of its pool, with speculation, ``w + P``; of a Ring the
          tokens that one sees
``R``     rows of a Ring
``h kh``  query heads and key/value heads of an attention layer
``hd``    width of an attention head
``lw``    width of a latent, what a token keeps for all heads: its value, and the rest of its key
``V``     vocabulary (of one rank, where it is sharded)
========  ==========================================================================================

All sizes are those of one tensor-parallel rank, except where a docstring says "global".
"""

from typing import Any, TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Float32, Int32, Shaped, UInt16, UInt32

# A leaf of one of our pytrees: an array, or what stands in its place in a tree of shapes, shardings or specs.
Leaf: TypeAlias = Any

# A nested dict of parameter arrays, in the shape of the module tree.
Params: TypeAlias = dict[Any, Any]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Int32",
    "Leaf",
    "Params",
    "Shaped",
    "UInt16",
    "UInt32",
]
