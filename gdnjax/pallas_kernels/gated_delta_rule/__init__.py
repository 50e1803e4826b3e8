"""The gated delta rule, its recurrent state kept in the slot pool."""

from gdnjax.pallas_kernels.gated_delta_rule.api import Gates, StateOrder, decode, fold, prefill, verify
from gdnjax.pallas_kernels.gated_delta_rule.rounding import Rounding

__all__ = ["Gates", "Rounding", "StateOrder", "decode", "fold", "prefill", "verify"]
