"""Small PNGs of what was measured."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from .faults import INTACT
from .tables import Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, DPI = (7.0, 3.6), 100
BLUE, ORANGE, GREY = "#1f5fa8", "#d9731a", "#888888"


def save(figure: Any, file: pathlib.Path) -> None:
    """With few colours, which is all that these have."""
    figure.savefig(file, pil_kwargs={"optimize": True})
    plt.close(figure)


def _axes(height: float = SIZE[1]) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(SIZE[0], height), dpi=DPI, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def half_lives(result: Result, file: pathlib.Path) -> None:
    part = result["half_lives"]
    figure, axes = _axes()
    heads = len(part["at_zero"][0])
    place = np.concatenate([i + np.linspace(-0.27, 0.27, heads) for i in range(len(part["layers"]))])
    for name, label, color, marker in (
        ("at_zero", "at a = 0", GREY, "o"),
        ("at_median", "at the median decay of text", BLUE, "o"),
        ("at_mean", "at the mean decay of text", ORANGE, "s"),
    ):
        axes.scatter(place, np.ravel(part[name]), s=22, color=color, marker=marker, label=label)
    axes.set_xticks(range(len(part["layers"])), [f"layer {layer}" for layer in part["layers"]])
    axes.set(yscale="log", ylabel="half-life (tokens)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    save(figure, file)


def faults(result: Result, file: pathlib.Path) -> None:
    part = result["faults"]
    names = [name for name in part["problems"]["faults"] if name != INTACT][::-1]
    # What moves no log-probability of the model is shown by what it does to its drafts.
    of_drafts = {name for name in names if not any(part[domain]["faults"][name]["mean_shift"] for domain in part)}
    figure, axes = _axes(5.4)
    height = 0.38
    for offset, domain, color in ((height / 2, "problems", BLUE), (-height / 2, "recall", ORANGE)):
        found = [part[domain]["faults"][name] for name in names]
        shifts = [
            one["mean_draft_shift" if name in of_drafts else "mean_shift"]
            for name, one in zip(names, found, strict=True)
        ]
        axes.barh(np.arange(len(names)) + offset, shifts, height, color=color, label=domain)
    labels = [f"{name} (drafts)" if name in of_drafts else name for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize="small")
    axes.set(xscale="log", xlabel="mean shift of a log-probability (nats)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    save(figure, file)


def recall(result: Result, file: pathlib.Path) -> None:
    part = result["recall"]
    figure, axes = _axes()
    for name, label, color in (
        ("with_attention", "whole model", BLUE),
        ("without_attention", "without attention", ORANGE),
    ):
        shares = [row["right"] / row["values"] for row in part[name]]
        axes.plot(range(len(shares)), shares, "o-", color=color, label=label)
    ticks = [f"{row['from']} to\n{row['to'] - 1}" for row in part["with_attention"]]
    axes.set_xticks(range(len(ticks)), ticks, fontsize="small")
    axes.set(xlabel="tokens before the value", ylabel="recalled exactly", ylim=(0, 1.03))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    save(figure, file)


def loss(history: Sequence[dict[str, Any]], file: pathlib.Path) -> None:
    """Of the model and of each draft over the tokens of the training."""
    tokens = np.cumsum([entry["tokens"] for entry in history]) / 1e6
    losses = np.array([entry["losses"] for entry in history])
    figure, axes = _axes()
    for i in range(losses.shape[1]):
        label = f"draft {i}" if i else "model"
        axes.plot(tokens, losses[:, i], label=label, linewidth=0.8)
    axes.set(xlabel="million tokens", ylabel="loss per token (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    save(figure, file)


def draw(result: Result, history: Sequence[dict[str, Any]] | None, directory: pathlib.Path) -> list[pathlib.Path]:
    """Every picture that there is something for."""
    files = []
    for name, picture in (("half_lives", half_lives), ("faults", faults), ("recall", recall)):
        if name in result:
            files.append(directory / f"tiny-{name.replace('_', '-')}.png")
            picture(result, files[-1])
    if history:
        files.append(directory / "tiny-loss.png")
        loss(history, files[-1])
    return files
