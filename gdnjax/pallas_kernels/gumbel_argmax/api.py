"""Contract of the op."""

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.gumbel_argmax import kernels, reference
from gdnjax.shapes import Array, Float32, Int32, UInt32


def gumbel_argmax(
    logits: Float32[Array, "n V"],
    temperature: Float32[Array, "n"],
    least: Float32[Array, "n"] | None,
    seed: UInt32[Array, "n 2"],
    position: Int32[Array, "n"],
    *,
    first: Array | int = 0,
    stream: int = 0,
    backend: Backend = REFERENCE,
) -> tuple[Int32[Array, "n"], Float32[Array, "n"], Float32[Array, "n"]]:
    """Each row's token with the largest logit / temperature + noise, that sum, and the largest logit / temperature.

    The noise is `gumbel(seed, position, token, stream)`; rows of temperature 0 have none, and are not scaled. Of those
    that tie the lowest is taken. Tokens are numbered from `first` on for the noise, and from 0 in the result.

    With `least` only tokens whose scaled logit is at least that count, and rows where it is -inf are left out: theirs
    are 0, -inf and -inf.
    """
    run = reference.gumbel_argmax if backend.is_reference else kernels.gumbel_argmax
    token, value, top = run(logits, temperature, least, seed, position, first, stream, backend)
    return token, value, top
