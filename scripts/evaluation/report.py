"""What a run has found: per cell, as a table and as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from . import agreement, scoring
from .agreement import Difference
from .cells import CellRun, Completion
from .problems import Problem, Prompt

RIGHT = ("strict [95% CI]", "flexible [95% CI]", "same answers", "same tokens", "near ties", "differ")
"""Columns of the table of what was answered, behind the cell's name and dtype."""

RUN = ("cached", "preempted", "accepted", "tokens", "seconds", "tokens/s")
"""Columns of the table of how the cell ran."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The answers of one completion, as they were written, and whether they match."""

    strict: str | None
    flexible: str | None
    strict_match: bool
    flexible_match: bool

    @classmethod
    def of(cls, completion: str, reference: str) -> "Score":
        strict, flexible = scoring.strict_answer(completion), scoring.flexible_answer(completion)
        return cls(strict, flexible, scoring.is_match(strict, reference), scoring.is_match(flexible, reference))

    @property
    def answers(self) -> tuple[str | None, str | None]:
        return self.strict, self.flexible


@dataclasses.dataclass(frozen=True)
class CellReport:
    """A cell's run, its scores, and its differences from the reference cell (None: nothing to compare with).

    `judged` says that the differences must be near ties: the cell and the reference are both float32.
    """

    run: CellRun
    scores: list[Score]
    same_answers: int | None = None
    differences: list[Difference] | None = None
    judged: bool = False

    @property
    def name(self) -> str:
        return self.run.cell.name

    @property
    def strict(self) -> float:
        return scoring.share([score.strict_match for score in self.scores])

    @property
    def flexible(self) -> float:
        return scoring.share([score.flexible_match for score in self.scores])

    @property
    def near_ties(self) -> list[Difference]:
        return [difference for difference in self.differences or [] if difference.near_tie]

    @property
    def failures(self) -> list[Difference]:
        """Differences that rounding does not explain, where it would have to."""
        return [item for item in self.differences or [] if not item.near_tie] if self.judged else []

    def answers_row(self) -> list[str]:
        """The cell's line of the first table, in the order of RIGHT."""
        run, total = self.run, len(self.scores)
        same = ["-", "-", "-", "-"]
        if self.differences is not None:
            other = len(self.differences) - len(self.near_ties)
            same = [f"{self.same_answers}/{total}", f"{total - len(self.differences)}/{total}"]
            same += [str(len(self.near_ties)) if self.judged else "-", str(other)]
        return [
            self.name,
            run.dtype,
            _with_interval([score.strict_match for score in self.scores]),
            _with_interval([score.flexible_match for score in self.scores]),
            *same,
        ]

    def run_row(self) -> list[str]:
        """The cell's line of the second table, in the order of RUN."""
        run = self.run
        return [
            self.name,
            run.dtype,
            f"{run.hit_rate:.0%}",
            str(run.preemptions),
            f"{run.accepted / run.drafted:.1%}" if run.drafted else "-",
            str(run.output_tokens),
            f"{run.seconds:.2f}",
            f"{_rate(run):.1f}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, completions included."""
        run = self.run
        strict, flexible = (
            [getattr(score, f"{kind}_match") for score in self.scores] for kind in ("strict", "flexible")
        )
        return {
            "name": self.name,
            "driver": run.cell.driver,
            "dtype": run.dtype,
            "quantization": run.cell.quantization,
            "max_num_seqs": run.cell.max_num_seqs,
            "options": dict(run.cell.options),
            "repeat": run.cell.repeat,
            "scarce": run.cell.scarce,
            "hit_rate": run.hit_rate,
            "preemptions": run.preemptions,
            "drafted": run.drafted,
            "accepted": run.accepted,
            "strict_match": _share_json(strict),
            "flexible_extract": _share_json(flexible),
            "same_answers": self.same_answers,
            "same_tokens": None if self.differences is None else len(self.scores) - len(self.differences),
            "near_ties": len(self.near_ties) if self.judged else None,
            "failures": len(self.failures) if self.judged else None,
            "differences": [{**dataclasses.asdict(item), "near_tie": item.near_tie} for item in self.differences or []],
            "output_tokens": run.output_tokens,
            "seconds": run.seconds,
            "tokens_per_second": _rate(run),
            "outputs": [
                {**dataclasses.asdict(completion), **dataclasses.asdict(score)}
                for completion, score in zip(run.completions, self.scores, strict=True)
            ],
        }


def report_cell(
    run: CellRun, problems: Sequence[Problem], reference: CellReport | None, judge: agreement.Judge | None
) -> CellReport:
    """Scores a run, and compares it with the reference cell where there is one. A judge makes it a float32 cell."""
    scores = [
        Score.of(completion.text, problem.answer) for completion, problem in zip(run.completions, problems, strict=True)
    ]
    if reference is None:
        return CellReport(run, scores)
    differences = agreement.compare(_tokens(reference.run), _tokens(run), judge)
    same = sum(ours.answers == theirs.answers for ours, theirs in zip(scores, reference.scores, strict=True))
    return CellReport(run, scores, same, differences, judged=judge is not None)


def table(reports: Sequence[CellReport]) -> str:
    """Two tables, of what was answered and of how the cells ran: within 120 columns, names left, numbers right."""
    answers = _aligned(("cell", "dtype", *RIGHT), [report.answers_row() for report in reports])
    return f"{answers}\n\n{_aligned(('cell', 'dtype', *RUN), [report.run_row() for report in reports])}"


def _aligned(columns: Sequence[str], rows: Sequence[list[str]]) -> str:
    """Headings of several words take two lines."""
    above, below = zip(*(("", *column.split(" ", 1))[-2:] for column in columns), strict=True)
    lines = [list(above), list(below), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    adjusted = []
    for row in lines:
        fields = zip(row, widths, strict=True)
        adjusted.append([text.ljust(width) if i < 2 else text.rjust(width) for i, (text, width) in enumerate(fields)])
    return "\n".join("  ".join(row).rstrip() for row in adjusted if any(map(str.strip, row)))


def as_json(
    settings: dict[str, Any],
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    reports: Sequence[CellReport],
    *,
    brief: bool = False,
    partial: dict[str, Any] | None = None,
    not_run: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole result; outputs of every cell are in the order of the problems. `brief` has neither of these.

    `partial` is the cell that is running (see `partial_json`), `not_run` has the names of those that wait for it. The
    result is "complete" without either.
    """
    cells = [report.as_json() for report in reports]
    state = {"complete": partial is None and not not_run, "partial_cell": partial, "not_run": list(not_run)}
    if brief:
        for cell in (*cells, *([partial] if partial else [])):
            del cell["outputs"]
        return {"settings": settings, **state, "num_problems": len(problems), "cells": cells}
    return {
        "settings": settings,
        **state,
        "problems": [
            {**dataclasses.asdict(problem), "prompt": prompt.text}
            for problem, prompt in zip(problems, prompts, strict=True)
        ],
        "cells": cells,
    }


def partial_json(
    name: str, dtype: str, completions: Mapping[int, Completion], scores: Mapping[int, Score], of: int
) -> dict[str, Any]:
    """A cell that has not ended: its answers so far, by the numbers of their problems."""
    return {
        "name": name,
        "dtype": dtype,
        "answers": len(completions),
        "of": of,
        "strict_match": _share_json([score.strict_match for score in scores.values()]) if scores else None,
        "flexible_extract": _share_json([score.flexible_match for score in scores.values()]) if scores else None,
        "outputs": [
            {"problem": number, **dataclasses.asdict(completions[number]), **dataclasses.asdict(scores[number])}
            for number in sorted(completions)
        ],
    }


def _tokens(run: CellRun) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in run.completions]


def _rate(run: CellRun) -> float:
    return run.output_tokens / run.seconds if run.seconds > 0 else 0.0


def _with_interval(flags: Sequence[bool]) -> str:
    low, high = scoring.wilson(sum(flags), len(flags))
    return f"{scoring.share(flags):.3f} [{low:.3f}, {high:.3f}]"


def _share_json(flags: Sequence[bool]) -> dict[str, Any]:
    low, high = scoring.wilson(sum(flags), len(flags))
    return {"share": scoring.share(flags), "matches": sum(flags), "of": len(flags), "wilson_95": [low, high]}
