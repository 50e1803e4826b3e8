"""Which experts a token goes to, and its rows in the order of their experts."""

from gdnjax.pallas_kernels.expert_routing.api import choose_experts, sort_by_expert
from gdnjax.pallas_kernels.expert_routing.rule import Rule

__all__ = ["Rule", "choose_experts", "sort_by_expert"]
