"""How experts are chosen."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a token's experts are chosen by their scores; static.

    Fields:
      top         experts of a token.
      scoring     "softmax" over all experts, or "sigmoid" of each.
      normalised  weights of a token are divided by their sum,
      scaling     and then multiplied by this.
      groups      of neighbours: those of the `top_groups` whose two best have the largest sum are chosen from.
    """

    top: int
    scoring: str = "softmax"
    normalised: bool = True
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1
