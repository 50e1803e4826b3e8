"""docs/results.md: every result, as a trend where there are several of a kind, and as a table with its commit."""

import html
import pathlib
from typing import Any

from site_pages import plots, results

HEAD = """\
# Results

<!-- Made by scripts/make_docs.py from docs/results/; add a result with scripts/add_result.py. -->

What was measured, by date and commit. A plot is of figures of the same name on the same hardware that have been
measured more than once, and have changed. Point at a figure to read it.

Figures of one day and one machine may be compared. Between days, machines differ: [Benchmarks](benchmarks.md) says what
stood beside each.
"""


def page(directory: pathlib.Path = results.DIRECTORY) -> str:
    """The whole page."""
    found = results.read_all(directory)
    lines = [HEAD]
    for kind, heading in results.KINDS.items():
        trends = _trends(found, kind)
        if not trends:
            continue
        pictures = _plots(trends)
        lines += [f"## {heading}", "", *pictures, *_table(trends, folded=bool(pictures)), ""]
    lines += [
        "## Where they are from",
        "",
        "| Commit | Hardware | Versions | Command | File |",
        "|---|---|---|---|---|",
    ]
    for path, result in reversed(found):
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        file = path.relative_to(directory.parent).as_posix()
        note = f" {result['note']}" if result.get("note") else ""
        cells = [
            f"`{result['commit'][:10]}`",
            result["hardware"],
            versions,
            f"`{result['command']}`{note}",
            f"[{path.parent.name}]({file})",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).rstrip() + "\n"


def _trends(found: list[tuple[pathlib.Path, dict[str, Any]]], kind: str) -> dict[tuple[str, str, str], list[tuple]]:
    """(name, unit, hardware) -> its points, oldest first: (time, value, commit)."""
    trends: dict[tuple[str, str, str], list[tuple]] = {}
    for _, result in found:
        for name, figure in result["figures"].get(kind, {}).items():
            key = (name, figure["unit"], result["hardware"])
            trends.setdefault(key, []).append((result["time"], figure["value"], result["commit"]))
    return trends


def _plots(trends: dict[tuple[str, str, str], list[tuple]]) -> list[str]:
    """One figure for each trend of two points or more that are not all the same."""
    several = {key: points for key, points in trends.items() if len({value for _, value, _ in points}) > 1}
    if not several:
        return []
    lines = ['<div class="plots">']
    for (name, unit, hardware), points in several.items():
        picture = plots.trend([(time, value) for time, value, _ in points], f"{name}, {unit}")
        caption = f"<b>{html.escape(name)}</b>, {html.escape(unit)}<br>{html.escape(hardware)}"
        lines.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return [*lines, "</div>", ""]


def _table(trends: dict[tuple[str, str, str], list[tuple]], folded: bool) -> list[str]:
    """The newest of each, with its commit; folded behind plots, which say more."""
    lines = [f'<details markdown="1"{"" if folded else " open"}>', "<summary>The newest of each</summary>", ""]
    lines += ["| Figure | Newest | Hardware | Commit |", "|---|---:|---|---|"]
    for (name, unit, hardware), points in trends.items():
        time, value, commit = points[-1]
        lines.append(f"| {name} | {plots.number(value)} {unit} | {hardware} | {time[:10]} `{commit[:10]}` |")
    return [*lines, "", "</details>"]
