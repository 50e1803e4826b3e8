"""What the gate says of what was executed. Pure Python: it reads the results of other processes."""

import collections
import math
from collections.abc import Iterable
from typing import Any

LEAST_CAUGHT = 0.82
"""Share of the mutants that cases catch, of all that there could be. A draw must not refute it: see `refuted`.

Of 864, in all groups on both chips, it was 83%; 13% changed no bit of any output. What those took away was, by looking:
low terms of log1p and exp, and steps of a division, which float32 rounds away; masks of loads whose values are selected
away later, or of zeros; extensions of signs that are never negative; NaN and infinity where there are none; copies onto
the same.
"""

LEAST_NOTICED = 0.945
"""The same of those that changed a bit of any output, or stopped: it was 95%. The rest is errors of an ulp or two."""

DEVIATIONS = 2.0
"""Standard deviations by which a draw may fall short. Each change of a kernel draws anew; of 432 one is 1.8%."""

REASONS = ("numbers", "fault", "wait", "conflict")


def line(result: dict[str, Any]) -> str:
    """One line of a result, and one more for each thing that is wrong, or each mutant that was missed."""
    verdict = "ok   " if result["passed"] else "WRONG"
    text = f"{verdict} {result['arch']} {result['name']}"
    if result["fails"]:
        text += f" (known to be wrong: {result['wrong'][0]})" if result["passed"] else ""
    elif "tallies" in result:
        caught, _, total = _counts([result])
        text += f": {caught} of {total} caught"
    else:
        errors = result.get("errors", {})
        text += "".join(f", {name} {e['largest']:.2g}/{e['norm']:.2g}" for name, e in errors.items())
    text += f" ({result['seconds']} s)"
    for tally in result.get("tallies", []):
        for missed in tally["missed"]:
            text += f"\n    missed in {tally['kernel']}: {missed['number']} {missed['text']}"
            text += "" if missed["equal"] else " (within the bounds)"
    if not result["passed"]:
        text += "".join(f"\n    {fault}" for fault in result["wrong"])
    return text


def table(results: list[dict[str, Any]]) -> str:
    """Of the mutants: how each kernel's were caught, and what the missed ones were. Empty without mutants."""
    tallies = [(result["arch"], tally) for result in results for tally in result.get("tallies", [])]
    if not tallies:
        return ""
    by_kernel: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for arch, tally in tallies:
        row = by_kernel[tally["kernel"], arch]
        row.update(tally["caught"])
        row["missed"] += len(tally["missed"])
        for missed in tally["missed"]:
            kinds[missed["kind"]]["equal" if missed["equal"] else "within"] += 1
    lines = [f"{'mutants of':<34}" + "".join(f"{reason:>10}" for reason in (*REASONS, "missed"))]
    for (kernel, arch), row in sorted(by_kernel.items()):
        lines.append(f"{f'{kernel}, {arch}':<34}" + "".join(f"{row[reason]:>10}" for reason in (*REASONS, "missed")))
    lines.append(f"{'missed, by what was taken away':<64}{'equal':>10}{'within':>10}")
    for kind, row in sorted(kinds.items(), key=lambda entry: -entry[1].total()):
        lines.append(f"{kind:<64}{row['equal']:>10}{row['within']:>10}")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    executed = [result for result in results if "tallies" not in result]
    wrong = sum(not result["passed"] for result in results)
    caught, changed, total = _counts(results)
    text = f"{len(executed)} executed, {wrong} wrong"
    if total:
        noticed = caught / max(changed, 1)
        text += f"; {caught} of {total} mutants caught ({caught / total:.0%}, {noticed:.0%} of what changes a bit)"
    return text


def refuted(caught: int, of: int, least: float) -> bool:
    """Whether that many caught say that cases catch less than the share `least`: by `DEVIATIONS` of a binomial draw."""
    return caught < least * of - DEVIATIONS * math.sqrt(least * (1 - least) * of)


def too_few(results: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the number of mutants that were caught, where everything was executed."""
    caught, changed, total = _counts(results)
    faults = [] if total else ["no mutant was executed"]
    for of, least, what in ((total, LEAST_CAUGHT, "all mutants"), (changed, LEAST_NOTICED, "what changes a bit")):
        if refuted(caught, of, least):
            faults.append(
                f"too few mutants are caught: {caught} of {of} are {caught / of:.1%} of {what}, and {least:.1%} is"
                f" wanted within {DEVIATIONS:g} standard deviations; 'mutants of *' as a name executes twice as many"
            )
    return faults


def _counts(results: Iterable[dict[str, Any]]) -> tuple[int, int, int]:
    """(mutants that were caught, those and the ones that changed a bit of an output, all)."""
    tallies = [tally for result in results for tally in result.get("tallies", [])]
    caught = sum(sum(tally["caught"].values()) for tally in tallies)
    missed = [one for tally in tallies for one in tally["missed"]]
    return caught, caught + sum(not one["equal"] for one in missed), caught + len(missed)
