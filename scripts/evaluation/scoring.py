"""Answers out of completions, exact match, and how sure a share is: the rules of lm-eval's gsm8k task (version 3)."""

import math
import re
from collections.abc import Sequence

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
"""Removed on both sides before they are compared, one after another."""

Z_95 = 1.959963984540054
"""The quantile of the normal distribution that leaves 2.5% on either side."""


def strict_answer(completion: str) -> str | None:
    """What stands behind the first "#### "; None where no number does."""
    found = STRICT.search(completion)
    return found.group(1) if found else None


def flexible_answer(completion: str) -> str | None:
    """The last thing in a completion that looks like a number."""
    found = [match.group(0) for match in FLEXIBLE.finditer(completion)]
    return found[-1] if found else None


def normalise(answer: str) -> str:
    """An answer as it is compared: without commas, dollars, what leads up to "#### ", and a closing full stop."""
    for pattern in IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def is_match(answer: str | None, reference: str) -> bool:
    """Whether an extracted answer is that of the reference, which may be a whole worked solution."""
    return answer is not None and normalise(answer) == normalise(reference)


def wilson(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share; it stays inside [0, 1] and means something at 0 and at 1.

    Wilson 1927, J. Am. Stat. Assoc. 22:209. Raises ValueError without trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials have no share")
    share = successes / trials
    centre = share + z * z / (2 * trials)
    width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Rounding must not push the ends past what a share can be.
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def share(flags: Sequence[bool]) -> float:
    """The share of what is true."""
    return sum(flags) / len(flags)
