"""What a benchmark has found: as tables, and as JSON."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gdnjax import memory
from gdnjax.cli.bench.serving import figures
from gdnjax.cli.bench.serving.driver import Log
from gdnjax.cli.bench.serving.engines import Arm, Pools
from gdnjax.cli.bench.serving.figures import Figures, Ratio
from gdnjax.cli.bench.tables import Table
from gdnjax.memory import StateGeometry
from gdnjax.serving.outputs import acceptance_rate

GIB = 1 << 30

LINES = {
    "request_throughput": "request throughput (req/s)",
    "goodput": "goodput: requests that keep the goals (req/s)",
    "input_throughput": "input throughput (tok/s)",
    "output_throughput": "output throughput (tok/s)",
    "total_token_throughput": "total throughput (tok/s)",
    **{
        f"{name}_{kind}_ms": f"{label} {kind.upper()} (ms)"
        for kind in ("ttft", "tpot", "itl")
        for name, label in (("mean", "mean"), ("median", "median"), ("p90", "P90"), ("p99", "P99"))
    },
    "mean_running": "requests running, mean",
    "max_running": "requests running, most",
    "preemptions": "preemptions",
    "hit_rate": "prompt tokens from the cache",
    "cached_share": "prompt tokens from the server's cache",
    "lost_rate": "cached KV without a state",
    "draft_acceptance": "drafts accepted",
    "tokens_per_step": "tokens of a row and decode step",
    **{f"{part}_step_ms": f"host: {part} (ms/step)" for part in figures.HOST_PARTS},
    "duration": "duration (s)",
}
"""Figures that the table shows, in order, and what it calls them. All others are in the JSON."""

RATIOS = tuple(name for name in LINES if name.endswith(("throughput", "ttft_ms", "tpot_ms", "itl_ms")))
"""Figures of which a ratio says something."""


@dataclasses.dataclass(frozen=True)
class ArmReport:
    """A setting, its pools, and its repetitions."""

    arm: Arm
    pools: Pools
    logs: Sequence[Log]

    @property
    def figures(self) -> list[Figures]:
        return [figures.of_log(log) for log in self.logs]

    def as_json(self) -> dict[str, Any]:
        """Medians, and every repetition with its requests."""
        return {
            **dataclasses.asdict(self.arm),
            "forced_acceptance": self.arm.forced_length is not None,
            **dataclasses.asdict(self.pools),
            "median": figures.medians(self.figures),
            "runs": [
                {**found, "stats": log.stats, "requests": [_request(trace) for trace in log.traces]}
                for found, log in zip(self.figures, self.logs, strict=True)
            ],
        }


def _request(trace: Any) -> dict[str, Any]:
    return {
        **{name: value for name, value in dataclasses.asdict(trace).items() if name != "times"},
        "ttft": figures.time_to_first_token(trace),
        "tpot": figures.time_per_output_token(trace),
        "finished": trace.times[-1],
    }


def ratios(arms: Sequence[ArmReport]) -> dict[str, Ratio]:
    """What the second setting is of the first; empty where there is one."""
    if len(arms) != 2:
        return {}
    found = figures.ratios(arms[0].figures, arms[1].figures)
    return {name: found[name] for name in RATIOS if name in found}


def table(arms: Sequence[ArmReport], title: str) -> str:
    """Medians of every setting, and their ratios."""
    medians = [figures.medians(arm.figures) for arm in arms]
    compared = ratios(arms)
    rows = []
    for name, label in LINES.items():
        values = [found.get(name) for found in medians]
        if any(value is not None for value in values):
            rows.append([label, *map(number, values), *([str(compared.get(name, ""))] if len(arms) == 2 else [])])
    columns = ["", *(arm.arm.name for arm in arms), *(["ratio"] if len(arms) == 2 else [])]
    return Table(title, columns, rows).text()


def server_table(logs: Sequence[Log], goals: figures.Goals, title: str) -> str:
    """Medians over runs on a server."""
    medians = figures.medians([figures.of_requests(log, goals) for log in logs])
    rows = [[label, number(medians[name])] for name, label in LINES.items() if medians.get(name) is not None]
    return Table(title, ["", "the server"], rows).text()


def server_json(logs: Sequence[Log], goals: figures.Goals) -> dict[str, Any]:
    """The same, and every run with its requests."""
    found = [figures.of_requests(log, goals) for log in logs]
    return {
        "median": figures.medians(found),
        "runs": [
            {**one, "requests": [_request(trace) for trace in log.traces]} for one, log in zip(found, logs, strict=True)
        ],
    }


def speculation_rows(arms: Sequence[ArmReport]) -> list[dict[str, Any]]:
    """What so many drafts bring, for each setting of a comparison of speculation; the first has none.

    num_drafts, forced_length (see Arm), medians of output_throughput, mean_tpot_ms, draft_acceptance and
    tokens_per_step, acceptance_per_position over all repetitions, and `ratio`, the output throughput over that without
    drafts.
    """
    found = []
    for arm in arms:
        medians = figures.medians(arm.figures)
        ratio = figures.ratios(arms[0].figures, arm.figures)["output_throughput"]
        found.append(
            {
                "num_drafts": arm.arm.num_drafts,
                "forced_length": arm.arm.forced_length,
                **{name: medians[name] for name in ("output_throughput", "mean_tpot_ms", "draft_acceptance")},
                # Nobody counts where nobody drafts.
                "tokens_per_step": medians["tokens_per_step"] if arm.arm.num_drafts else 1.0,
                "acceptance_per_position": _acceptance_per_position(arm.logs),
                "ratio": ratio.as_json(),
            }
        )
    return found


def _acceptance_per_position(logs: Sequence[Log]) -> list[float | None]:
    """Share of the first drafts that were kept, of the second, and so on."""

    def total(name: str) -> list[int]:
        return [sum(counts) for counts in itertools.zip_longest(*(log.stats[name] for log in logs), fillvalue=0)]

    pairs = itertools.zip_longest(total("accepted_at"), total("drafted_at"), fillvalue=0)
    return [acceptance_rate(accepted, drafted) for accepted, drafted in pairs]


def speculation_table(arms: Sequence[ArmReport], title: str) -> str:
    """The same as a table."""
    rows, forced = [], False
    for arm, found in zip(arms, speculation_rows(arms), strict=True):
        mark = "" if found["forced_length"] is None else f" (forced to {found['forced_length']:g})"
        forced = forced or bool(mark)
        rows.append(
            [
                arm.arm.name + mark,
                *map(number, (found["output_throughput"], found["mean_tpot_ms"])),
                "-" if found["draft_acceptance"] is None else f"{found['draft_acceptance']:.1%}",
                ", ".join("-" if rate is None else f"{rate:.0%}" for rate in found["acceptance_per_position"]) or "-",
                number(found["tokens_per_step"]),
                str(Ratio(**found["ratio"])),
            ]
        )
    columns = ("drafts", "output tok/s", "mean TPOT (ms)", "accepted", "by position", "tokens/step", "ratio to k = 0")
    text = Table(title, columns, rows).text()
    return f"{text}\n\nAcceptance was forced: the outputs are not the model's." if forced else text


def host_table(parts: Mapping[str, Figures], title: str) -> str:
    """Milliseconds of each part of a step on the host."""
    names = next(iter(parts.values()))
    rows = [[part, *(f"{found[name]:.3f}" for name in names)] for part, found in parts.items()]
    return Table(title, ["ms a step", *names], rows).text()


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """Blocks that a pool of some bytes has under both accountings, by arithmetic alone."""

    name: str
    pool_bytes: int
    slots: int
    slot_bytes: int
    block_bytes: int
    packed: int
    decoupled: int

    @property
    def ratio(self) -> float:
        return self.decoupled / self.packed

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def closed_form(name: str, geometry: StateGeometry, pool_bytes: int, slots: int) -> ClosedForm:
    """Both accountings of a geometry; the packed one needs no slots beside its blocks."""
    return ClosedForm(
        name,
        pool_bytes,
        slots,
        geometry.slot_bytes,
        geometry.block_bytes,
        memory.packed_blocks(geometry, pool_bytes),
        memory.decoupled_blocks(geometry, pool_bytes, slots),
    )


def closed_form_table(forms: Sequence[ClosedForm]) -> str:
    """Blocks at equal bytes."""
    rows = [
        [
            form.name,
            f"{form.pool_bytes / GIB:.2f}",
            f"{form.slot_bytes:,}",
            f"{form.block_bytes:,}",
            f"{form.packed:,}",
            f"{form.slots} + {form.decoupled:,}",
            f"{form.ratio:.1f}x",
        ]
        for form in forms
    ]
    columns = ("geometry of a rank", "GiB", "B/slot", "B/block", "packed blocks", "slots + blocks", "ratio")
    return Table("Blocks at equal bytes, by arithmetic", columns, rows).text()


def number(value: float | int | None) -> str:
    """Four digits or so; whole numbers whole."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
