"""The gated delta rule, its recurrent state kept in the slot pool."""

from gdnjax.pallas_kernels.gated_delta_rule.api import Gates, StateOrder, decode, fold, prefill, verify

__all__ = ["Gates", "StateOrder", "decode", "fold", "prefill", "verify"]
