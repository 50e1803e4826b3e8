"""What the gate says of what was executed. Pure Python: it reads the results of other processes."""

import collections
from collections.abc import Iterable
from typing import Any

LEAST_CAUGHT = 0.85
"""Share of the mutants that must be caught, in the kernels that own recurrent state."""

REASONS = ("numbers", "fault", "wait", "conflict")


def line(result: dict[str, Any]) -> str:
    """One line of a result, and one more for each thing that is wrong, or each mutant that was missed."""
    verdict = "ok   " if result["passed"] else "WRONG"
    text = f"{verdict} {result['arch']} {result['name']}"
    if result["fails"]:
        text += f" (known to be wrong: {result['wrong'][0]})" if result["passed"] else ""
    elif "tallies" in result:
        caught, total = _caught([result])
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
    caught, total = _caught(results)
    text = f"{len(executed)} executed, {wrong} wrong"
    return text + (f"; {caught} of {total} mutants caught ({caught / total:.0%})" if total else "")


def passed(results: list[dict[str, Any]], *, everything: bool) -> bool:
    """Whether nothing is wrong and, where everything was executed, enough mutants were caught."""
    caught, total = _caught(results)
    return all(result["passed"] for result in results) and (not everything or caught >= LEAST_CAUGHT * total > 0)


def _caught(results: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """(mutants that were caught, mutants)."""
    tallies = [tally for result in results for tally in result.get("tallies", [])]
    caught = sum(sum(tally["caught"].values()) for tally in tallies)
    return caught, caught + sum(len(tally["missed"]) for tally in tallies)
