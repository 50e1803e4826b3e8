"""Drawing tokens from logits: the best of log-weights plus Gumbel noise."""

from gdnjax.pallas_kernels.gumbel_argmax.api import gumbel_argmax
from gdnjax.pallas_kernels.gumbel_argmax.reference import gumbel, uniform

__all__ = ["gumbel", "gumbel_argmax", "uniform"]
