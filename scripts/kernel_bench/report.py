"""Lines, the table, JSON and the roofline of what was measured."""

import dataclasses
import math
import pathlib
from typing import Any

from kernel_bench.measure import Row
from kernel_bench.timing import Ceilings


def line(row: Row, ceilings: Ceilings | None) -> str:
    text = f"{row.name:44} "
    if math.isnan(row.error) and row.fault:
        return f"{text}FAILED: {row.fault}"
    text += f"error {row.error:.1e}" + (f", state {row.state_error:.1e}" if row.limits[1] else "")
    if not row.right:
        return f"{text}  WRONG: allowed {row.limits[0]:g} and {row.limits[1]:g}"
    if row.fault:
        return f"{text}  FAULT OF THE MEASUREMENT: {row.fault}"
    if row.median is None or ceilings is None:
        return text
    text += f"  {row.median * 1e6:9.1f} us  {row.bytes / row.median / 1e12:5.2f} TB/s"
    share = ceilings.least_seconds(row.bytes, row.flops) / row.median
    text += f"  {row.flops / row.median / 1e12:6.1f} TFLOP/s  {share:4.0%} of the ceiling"
    return text + "".join(f"  | {name} {_peer(row, peer)}" for name, peer in row.peers.items())


def _peer(row: Row, peer: dict[str, Any]) -> str:
    if "fault" in peer:
        return f"FAULT OF THE MEASUREMENT: {peer['fault']}"
    if "failed" in peer:
        return f"failed: {peer['failed']}"
    text = f"{peer['median'] * 1e6:.1f} us ({peer['median'] / row.median:.2f}x)" if row.median else ""
    return text + (f", error {peer['error']:.1e}" if "error" in peer else "")


def table(rows: list[Row], ceilings: Ceilings) -> str:
    """Markdown."""
    lines = [
        "| Workload | us | of the ceiling | error | peer | us | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.median is None:
            why = "FAULT" if row.fault else "not timed" if row.right else "WRONG"
            lines.append(f"| {row.name} | {why} | | {row.error:.1e} | | | |")
            continue
        share = ceilings.least_seconds(row.bytes, row.flops) / row.median
        start = f"| {row.name} | {row.median * 1e6:.1f} | {share:.0%} | {row.error:.1e} |"
        measured = {name: peer for name, peer in row.peers.items() if "median" in peer}
        for name, peer in measured.items():
            lines.append(f"{start} {name} | {peer['median'] * 1e6:.1f} | {peer['median'] / row.median:.2f}x |")
        if not measured:
            lines.append(f"{start} | | |")
    return "\n".join(lines)


def as_json(head: dict, ceilings: Ceilings | None, rows: list[Row], not_run: list[str]) -> dict:
    """`not_run` has the workloads that there is no row of: yet, or for want of time."""
    return {
        **head,
        "ceilings": ceilings and dataclasses.asdict(ceilings),
        "workloads": [dataclasses.asdict(row) for row in rows],
        "not_run": not_run,
    }


def plot(rows: list[Row], ceilings: Ceilings, head: dict, file: str) -> None:
    """FLOP/s over FLOP per byte, with the two ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    timed = [(row, row.median) for row in rows if row.median]
    low, high = 0.1, 3e4
    knee = ceilings.matmul / ceilings.copy
    axes.loglog([low, knee, high], [low * ceilings.copy, ceilings.matmul, ceilings.matmul], color="black")
    kinds = sorted({"-".join(row.name.split("-")[:2]) for row, _ in timed})
    for kind in kinds:
        here = [(row, median) for row, median in timed if row.name.startswith(kind)]
        axes.scatter([r.flops / r.bytes for r, _ in here], [r.flops / median for r, median in here], label=kind, s=24)
    axes.set_xlim(low, high)
    axes.set_ylim(10 ** math.floor(math.log10(low * ceilings.copy)), 2 * ceilings.matmul)
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("FLOP/s")
    axes.set_title(f"{head['device']}: {ceilings.copy / 1e12:.2f} TB/s, {ceilings.matmul / 1e12:.0f} TFLOP/s")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(pathlib.Path(file), dpi=150)
    plt.close(figure)
