"""What was measured as tables, also in the marked places of a model card."""

import functools
import re
from collections.abc import Callable
from typing import Any

from gdnjax.cli.bench.tables import Table

Result = dict[str, Any]
SHIPPED = "shipped"
"""The run whose model lies in the package."""


def half_lives(result: Result) -> Table:
    part = result["half_lives"]

    def numbers(values):
        return ", ".join(f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" for value in values)

    columns = [part[name] for name in ("layers", "at_zero", "at_median", "at_mean")]
    return Table(
        "Half-lives in tokens, head by head",
        ("layer", "at a = 0", "at the median decay", "at the mean decay"),
        [[str(layer), *map(numbers, values)] for layer, *values in zip(*columns, strict=True)],
    )


def drafts(result: Result) -> Table:
    rows = []
    for domain, found in result["drafts"].items():
        for d, (argmax, acceptance, overlap) in enumerate(
            zip(found["argmax"], found["acceptance"], found["overlap"], strict=True), start=1
        ):
            head = [domain, str(found["tokens"])] if d == 1 else ["", ""]
            rows.append([*head, str(d), f"{argmax:.4f}", f"{acceptance:.4f}", f"{overlap:.4f}"])
    columns = ("text", "learned tokens", "draft", "argmax agrees", "accepted at T = 1", "1 - TV")
    return Table("The MTP head against the model, teacher-forced", columns, rows)


def faults(domain: str, of: str, result: Result) -> Table:
    part = result["faults"][domain]
    rows = []
    for name, found in part["faults"].items():
        row = [name, str(found["exact"]), str(found["changed"])]
        row += [f"{found[kind]:.2g}" for kind in ("mean_shift", "max_shift")]
        rows.append([*row, f"{found['drafts_accepted']:.4f}", f"{found['mean_draft_shift']:.2g}"])
    columns = ("fault", f"right of {part[of]}", "changed", "mean shift", "max shift", "drafts agree", "their shift")
    return Table(f"Faults between a prompt and what follows it: {domain}", columns, rows)


def recall(result: Result) -> Table:
    part = result["recall"]
    rows = []
    for with_it, without in zip(part["with_attention"], part["without_attention"], strict=True):
        count = with_it["values"]
        shares = [f"{found['right'] / count:.3f}" for found in (with_it, without)]
        rows.append([f"{with_it['from']} to {with_it['to'] - 1}", str(count), *shares])
    return Table("Values recalled exactly", ("tokens before", "values", "whole model", "without attention"), rows)


def evaluation(result: Result) -> Table:
    rows = [
        [cell["name"], f"{cell['matches']} of {cell['of']}", "{:.3f} to {:.3f}".format(*cell["wilson_95"])]
        for cell in result["evaluation"]
    ]
    return Table("Held-out problems, greedy", ("way to run it", "exact match", "95% interval"), rows)


def runs(content: dict[str, Result]) -> Table:
    """The headline of every run, one below the other."""

    def headline(result):
        exact = next((cell for cell in result.get("evaluation", []) if cell["name"] == "f32-batched"), None)
        yield f"{exact['matches']} of {exact['of']}" if exact else "-"
        for domain in ("problems", "story"):
            found = result["drafts"][domain]
            yield f"{found['argmax'][0]:.4f}"
            yield f"{found['acceptance'][0]:.4f}"
        for name in ("with_attention", "without_attention"):
            rows = result["recall"][name]
            yield f"{sum(row['right'] for row in rows) / sum(row['values'] for row in rows):.3f}"
        yield f"{result['training']['seconds']:.0f} s"

    columns = [headline(result) for result in content.values()]
    names = (
        "exact match, held-out problems",
        "draft 1, problems: argmax agrees",
        "draft 1, problems: accepted at T = 1",
        "draft 1, stories: argmax agrees",
        "draft 1, stories: accepted at T = 1",
        "values recalled",
        "values recalled without attention",
        "seconds of training",
    )
    rows = [list(row) for row in zip(names, *columns, strict=True)]
    return Table("Runs with the same seed", ("", *content), rows)


OF_A_RUN: dict[str, Callable[[Result], Table]] = {
    "half_lives": half_lives,
    "drafts": drafts,
    "faults_problems": functools.partial(faults, "problems", "count"),
    "faults_recall": functools.partial(faults, "recall", "values"),
    "recall": recall,
    "evaluation": evaluation,
}


def _part(table: str) -> str:
    """The part of a result that a table shows."""
    return "faults" if table.startswith("faults") else table


def of_result(result: Result) -> dict[str, Table]:
    """The tables of what one run has."""
    return {name: make(result) for name, make in OF_A_RUN.items() if _part(name) in result}


MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def render_card(card: str, content: dict[str, Result]) -> str:
    """A model card with its marked tables written anew. Raises ValueError for a table that is not there."""
    tables = of_result(content[SHIPPED]) | {"runs": runs(content)}

    def write(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise ValueError(f"the card asks for the table {match[2]!r}; measured: {', '.join(tables)}")
        return f"{match[1]}\n{tables[match[2]].markdown()}\n\n{match[3]}"

    return MARKED.sub(write, card)
