"""What a training run leaves behind: a Hugging Face checkpoint, its model card, and the record of the training."""

import json
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    import tiny.data

HELD_OUT_PROBLEMS = 500
SHOTS = 8

CARD = """\
---
license: apache-2.0
library_name: gdnjax
pipeline_tag: text-generation
language: [en]
tags: [qwen3_5, gated-deltanet, multi-token-prediction, synthetic-data]
---

# A small Qwen3.5-style model with its MTP head

Made by scripts/train_tiny.py of gdnjax to try and test an inference engine. It solves simple word problems, tells short
stories, recalls facts from a text, and is no general language model.

All text that it was trained on is synthetic and the project's own, written by scripts/tiny/ from word lists and
templates. No other text, data set or model was used. `problems.jsonl` holds {problems} word problems that training
never writes, `shots.jsonl` {shots} that may be shown.

| | |
|---|---|
| parameters | {parameters:,} |
| tokens | {tokens:,} in {steps} steps of {batch_tokens:,}, padding left out |
| seed | {seed} |
| device | {device} |
| seconds | {seconds} |
| versions | {versions} |
| licence | Apache-2.0, for weights, text and code |

Share of the tokens to be learned that the model and its drafts predict, over the last steps (text that was new to it):

| kind | model | {drafts} |
|---|---:|{rules}
{rows}

Exact match on the held-out problems: `python scripts/eval.py --model DIRECTORY --form plain --data
DIRECTORY/problems.jsonl --matrix`. What is inside: `python scripts/measure_tiny.py --model DIRECTORY`.
"""


def export(params: Any, tokenizer: "Tokenizer", config: dict[str, Any], directory: pathlib.Path) -> None:
    """Writes the Hugging Face checkpoint into a directory that exists, weights rounded to the model's dtypes."""
    import jax
    import numpy as np

    import tiny.data
    import tiny.tokenizer
    from gdnjax import ModelConfig, sharding
    from gdnjax.checkpoint.huggingface import write_file
    from gdnjax.models import abstract_params

    abstract = abstract_params(ModelConfig.from_hf(config), 1, config["dtype"], mtp=True)
    rounded = jax.tree.map(lambda p, shape: np.asarray(p.astype(shape.dtype)), params, abstract)
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(rounded)[0]:
        name = sharding.path_name(path)
        tensors[name if name.startswith("mtp.") else f"model.{name}"] = leaf
    # Written last, so that an interrupted export leaves nothing that passes for a checkpoint.
    (directory / "config.json").unlink(missing_ok=True)
    write_file(tensors, directory / "model.safetensors")
    tiny.tokenizer.write_tokenizer(tokenizer, directory)
    # What the model is asked later; training never sees a held-out question.
    write_problems(tiny.data.problems("held_out", HELD_OUT_PROBLEMS, seed=0), directory / "problems.jsonl")
    write_problems(tiny.data.problems("train", SHOTS, seed=0), directory / "shots.jsonl")
    sampling = {"do_sample": True, "temperature": 0.7, "eos_token_id": config["eos_token_id"]}
    _write_json(directory / "generation_config.json", sampling)
    _write_json(directory / "config.json", config)


def write_problems(problems: "list[tiny.data.Problem]", file: pathlib.Path) -> None:
    """GSM8K's own format: one object with question and answer a line."""
    lines = (json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def plot_losses(history: list[dict[str, Any]], file: pathlib.Path) -> None:
    """The loss of the model and of each draft over tokens, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    tokens = np.cumsum([entry["tokens"] for entry in history]) / 1e6
    losses = np.array([entry["losses"] for entry in history])
    figure, axes = plt.subplots(figsize=(7, 4), dpi=100, layout="constrained")
    for i, name in enumerate(["model", *(f"draft {d}" for d in range(1, losses.shape[1]))]):
        axes.plot(tokens, losses[:, i], label=name, linewidth=1)
    axes.set(xlabel="million tokens", ylabel="loss per token (nats, prompts weighted 0.1)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    plt.close(figure)


def report(content: dict[str, Any], accuracy: dict[str, list[float]], directory: pathlib.Path) -> None:
    """Writes training.json, loss.png and the model card README.md.

    content    what training.json says: settings, steps, tokens, parameters, device, versions, seconds, history
    accuracy   for each kind of document the shares that the model and each of its drafts got right
    """
    _write_json(directory / "training.json", content)
    plot_losses(content["history"], directory / "loss.png")
    (directory / "README.md").write_text(card(content, accuracy), encoding="utf-8")


def card(content: dict[str, Any], accuracy: dict[str, list[float]]) -> str:
    """The model card of a run."""
    settings = content["settings"]
    depth = len(next(iter(accuracy.values())))
    rows = [f"| {kind} | " + " | ".join(f"{share:.4f}" for share in shares) + " |" for kind, shares in accuracy.items()]
    return CARD.format(
        **{name: content[name] for name in ("parameters", "tokens", "steps", "device", "seconds")},
        problems=HELD_OUT_PROBLEMS,
        shots=SHOTS,
        seed=settings["seed"],
        batch_tokens=settings["batch_tokens"],
        versions=", ".join(f"{name} {version}" for name, version in content["versions"].items()),
        drafts=" | ".join(f"draft {d}" for d in range(1, depth)),
        rules="---:|" * (depth - 1),
        rows="\n".join(rows),
    )
