"""The tables of memory in docs/recipes/: what `gdnjax memory` says of each size, for GPUs of several sizes."""

import functools

from gdnjax.assets import PRESETS
from gdnjax.memory.__main__ import build_parser, make_report

FAMILIES = {
    page: tuple(preset for preset in PRESETS if preset.startswith(page))
    for page in ("qwen3.5", "qwen3-next", "kimi-linear", "olmo-hybrid", "deepseek-v3")
}
"""Page -> the presets that its table has."""

GPUS = (24, 80, 192, 288)
"""GiB of a GPU: a consumer's, an H100, an MI300X, an MI355X."""

RANKS = (1, 2, 4, 8, 16)

MARK = "gdnjax memory"


@functools.cache
def fewest(preset: str, gib: int) -> int | None:
    """GPUs of so many GiB that the model needs with the engine's defaults; None where RANKS are not enough."""
    for ranks in RANKS:
        try:
            report = make_report(
                build_parser().parse_args(["--config", preset, "--gpu-memory", str(gib), "--tp", str(ranks)])
            )
        except ValueError as error:
            # Heads or experts that so many ranks cannot share out: more cannot, either.
            if "does not divide" not in str(error):
                raise
            return None
        if report.fit is not None and report.fit.plan is not None:
            return ranks
    return None


def table(family: str) -> str:
    """A row for each size: bytes of weights, of a slot and of a block of 16 tokens, and how many GPUs it needs."""
    gpus = " | ".join(f"{gib} GiB" for gib in GPUS)
    lines = [
        f"| `--config` | weights | a slot | a block | GPUs of {gpus} |",
        f"|---|{'---:|' * (3 + len(GPUS))}",
    ]
    for preset in FAMILIES[family]:
        report = make_report(build_parser().parse_args(["--config", preset]))
        needs = [fewest(preset, gib) for gib in GPUS]
        cells = [
            f"`{preset}`",
            f"{report.weight_bytes / 2**30:,.1f} GiB",
            f"{report.geometry.slot_bytes / 2**20:,.1f} MiB",
            f"{report.geometry.block_bytes / 2**10:,.0f} KiB",
            *("-" if ranks is None else str(ranks) for ranks in needs),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
