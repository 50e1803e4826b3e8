"""Contract of the ops. Of equal choices the expert of the lower number is the first, in both."""

from gdnjax.backend import REFERENCE, Backend
from gdnjax.pallas_kernels.expert_routing import kernels, reference, tiles
from gdnjax.pallas_kernels.expert_routing.rule import Rule
from gdnjax.shapes import Array, Bool, Float32, Int32


def choose_experts(
    logits: Float32[Array, "t e"],
    bias: Float32[Array, "e"] | None,
    valid: Bool[Array, "t"],
    rule: Rule,
    *,
    backend: Backend = REFERENCE,
) -> tuple[Float32[Array, "t top"], Int32[Array, "t top"]]:
    """Weights and numbers of each token's experts, the best first, as `rule` says. Who is chosen goes by scores and
    `bias`, weights by scores alone. A token that is not `valid` has the number past the last for all of its experts.
    """
    run = reference.choose_experts if backend.is_reference else kernels.choose_experts
    weight, expert = run(logits, bias, valid, rule, backend)
    return weight, expert


def sort_by_expert(
    expert: Int32[Array, "t top"], experts: int, *, backend: Backend = REFERENCE
) -> tuple[Int32[Array, "n"], Int32[Array, "t top"], Int32[Array, "e"]]:
    """All n = t * top pairs of a token and a choice, in the order of their experts, and of one expert as they stand:
    the token of each, the place of each pair in that order, and how many there are of each of the first `experts`
    experts. Numbers from `experts` on are none's: those pairs stand last.

    More pairs than a kernel counts are XLA's, which sorts them.
    """
    few = not backend.is_reference and expert.size <= tiles.of(backend).most_pairs
    token, place, sizes = (kernels if few else reference).sort_by_expert(expert, experts, backend)
    return token, place, sizes
