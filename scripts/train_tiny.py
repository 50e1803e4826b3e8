"""Trains the small model that gdnjax ships, on text that it makes itself, and exports it for Hugging Face readers."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from tiny.learning import VOCABULARY, initial_params, make_step, model_config, optimizer

from gdnjax.cli.command import exit_status, prepare_environment, run_as_process

if TYPE_CHECKING:
    from tiny.batches import BatchShape

DESCRIPTION = """\
Trains a Qwen3.5-style model of 4.7 million parameters with its MTP head on synthetic text: word problems, stories,
recall, chats, tool calls. Muon for matrices, AdamW for the rest, warm-up, a constant rate, a decay.

Writes DIRECTORY as a Hugging Face checkpoint (weights, configuration, tokenizer, model card), with training.json and
loss.png beside it. The same seed gives the same data and the same start.

With --work, the run is stored under that directory every --checkpoint-every steps and at its end. The same command
goes on from the newest checkpoint there, and gives what an uninterrupted run would have given; another --tokens,
--batch-tokens or --seed is refused.

On a GPU, JAX takes a fixed share of the memory when it starts: 0.9, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another.
"""

EXAMPLES = """\
examples:
  python scripts/train_tiny.py tiny                                    what ships: about 10 minutes on one H200
  python scripts/train_tiny.py tiny-cpu --tokens 3e6 --batch-tokens 8192   a smaller budget, for a CPU
  python scripts/train_tiny.py tiny --work tiny-work                   resumes where tiny-work has a checkpoint

Exit status: 0 done, 1 training failed, 2 a bad argument (the reason is on stderr), 130 interrupted (with --work, run it
again to resume).
"""

TOKENS = 102e6
LONG_SHARE = 0.2
"""Share of the batches that hold long documents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run depends on. `tokens` are trained on in all, padding included, `batch_tokens` of them in a step."""

    tokens: int
    batch_tokens: int
    seed: int
    workers: int

    def __post_init__(self):
        if self.batch_tokens < 2048 or self.batch_tokens % 2048:
            raise ValueError(f"--batch-tokens must be a multiple of 2048, got {self.batch_tokens}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"--tokens must be at least one batch of {self.batch_tokens}, got {self.tokens}")
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if not 0 <= self.seed < 2**32:
            # A JAX key takes no more bits.
            raise ValueError(f"--seed must be in 0 to 2**32 - 1, got {self.seed}")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


@dataclasses.dataclass
class Run:
    """What a run carries from step to step.

    `history` has one entry for every REPORT_STEPS steps, and one for what is left at a checkpoint or at the end.
    """

    params: Any
    state: Any
    step: int
    history: list[dict[str, Any]]


REPORT_STEPS = 20
SUMMARY_STEPS = 200


class Checkpoints:
    """Orbax checkpoints of a run under a directory, or none where there is no directory."""

    def __init__(self, directory: pathlib.Path | None, settings: Settings):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._settings = dataclasses.asdict(settings) | {"workers": None}
        self._manager = None
        if directory is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

    def restore(self, run: Run) -> Run:
        """The newest checkpoint, or `run` where there is none. ValueError where it is of other settings."""
        import jax

        if self._manager is None or self._manager.latest_step() is None:
            return run
        args, step = self._ocp.args, self._manager.latest_step()
        assert step is not None
        # First what it is a checkpoint of, since arrays of other settings would not fit.
        about = self._manager.restore(step, args=args.Composite(about=args.JsonRestore()))["about"]
        if about["settings"] != self._settings:
            raise ValueError(f"the checkpoint in --work is of another run: {about['settings']}, not {self._settings}")
        target = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, {"params": run.params, "state": run.state})
        arrays = self._manager.restore(step, args=args.Composite(arrays=args.StandardRestore(target)))["arrays"]
        return Run(arrays["params"], arrays["state"], step, about["history"])

    def save(self, run: Run) -> None:
        if self._manager is None:
            return
        args = self._ocp.args
        about = {"settings": self._settings, "history": run.history}
        arrays = {"params": run.params, "state": run.state}
        self._manager.save(run.step, args=args.Composite(arrays=args.StandardSave(arrays), about=args.JsonSave(about)))

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()


def shapes_of(settings: Settings) -> "list[BatchShape]":
    """The shape of every step's batch: long ones spread among the short ones by the seed."""
    import random

    from tiny.batches import long_shape, short_shape

    rng = random.Random(f"shapes of {settings.seed}")
    short, long = short_shape(settings.batch_tokens), long_shape(settings.batch_tokens)
    return [long if rng.random() < LONG_SHARE else short for _ in range(settings.steps)]


def compile_steps(train_step: Any, run: Run, shapes: "list[BatchShape]", examples: list[Any]) -> dict[Any, Any]:
    """One compiled step for each shape, side by side: compiling is a large part of a run on a GPU."""
    import concurrent.futures

    def compiled(shape, example):
        return train_step(shape.longest).lower(run.params, run.state, example).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        steps = list(pool.map(compiled, shapes, examples))
    return dict(zip(shapes, steps, strict=True))


def summary_of(counts: list[dict[str, Any]], seconds: float, step: int) -> dict[str, Any]:
    """One entry of the history: mean losses, and the share of learned targets that were right, by kind and draft."""
    import numpy as np
    import tiny.data

    learned, right = (np.array([c[name] for c in counts], float).sum(axis=0) for name in ("learned", "right"))
    losses = np.mean([c["losses"] for c in counts], axis=0)
    accuracy = {
        kind: [round(float(r / n), 5) for r, n in zip(right[:, i], learned[:, i], strict=True)]
        for i, kind in enumerate(tiny.data.KINDS)
        if learned[:, i].min() > 0
    }
    return {
        "step": step,
        "tokens": sum(int(c["tokens"]) for c in counts),
        "losses": [round(float(x), 5) for x in losses],
        "accuracy": accuracy,
        "seconds": round(seconds, 2),
    }


def train(settings: Settings, tokenizer: Any, config: dict[str, Any], checkpoints: Checkpoints, every: int) -> Run:
    """Trains to the end, from the newest checkpoint if there is one."""
    import jax
    import tiny.batches
    from tqdm import tqdm

    from gdnjax import ModelConfig
    from gdnjax.models import abstract_params, build_model

    cfg = ModelConfig.from_hf(config)
    model = build_model(cfg, cfg.dtype, mtp=True)
    abstract = abstract_params(cfg, 1, cfg.dtype, mtp=True)
    params = jax.jit(functools.partial(initial_params, abstract))(jax.random.key(settings.seed))
    transform = optimizer(params, settings.steps)
    run = checkpoints.restore(Run(params, jax.jit(transform.init)(params), 0, []))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size / 1e6:.2f} million parameters, {settings.steps} steps on {jax.devices()[0].device_kind}", flush=True)

    every_shape = shapes_of(settings)
    left = range(run.step, settings.steps)
    shapes = sorted({every_shape[step] for step in left}, key=lambda shape: shape.longest)
    began = time.perf_counter()
    examples = [tiny.batches.make_batch(tokenizer, shape, "example") for shape in shapes]
    steps = compile_steps(functools.partial(make_step, model, abstract, transform), run, shapes, examples)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)

    seeds = [f"{settings.seed}/{step}" for step in left]
    batches = tiny.batches.stream(tokenizer, [every_shape[step] for step in left], seeds, settings.workers)
    counts, began = [], time.perf_counter()
    bar = tqdm(total=settings.steps, initial=run.step, desc="training", unit="step", mininterval=5)
    with bar, contextlib.closing(batches):
        for step, batch in zip(left, batches, strict=True):
            run.params, run.state, step_counts = steps[every_shape[step]](run.params, run.state, batch)
            counts.append(step_counts)
            run.step = step + 1
            saves = run.step % every == 0 or run.step == settings.steps
            if run.step % REPORT_STEPS == 0 or saves:
                entry = summary_of(jax.device_get(counts), time.perf_counter() - began, run.step)
                if not math.isfinite(entry["losses"][0]):
                    raise FloatingPointError(f"the loss is {entry['losses'][0]} at step {run.step}")
                run.history.append(entry)
                bar.set_postfix(loss=entry["losses"][0], refresh=False)
                counts, began = [], time.perf_counter()
            if saves:
                checkpoints.save(run)
            bar.update()
    return run


def last_accuracy(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The accuracies of the last SUMMARY_STEPS steps, each kind's averaged over the entries that have it."""
    import tiny.data

    starts = [0, *(entry["step"] for entry in history)]
    last = [e["accuracy"] for start, e in zip(starts, history, strict=False) if start >= starts[-1] - SUMMARY_STEPS]
    found = {kind: [accuracy[kind] for accuracy in last if kind in accuracy] for kind in tiny.data.KINDS}
    return {kind: [round(sum(x) / len(x), 5) for x in zip(*rows, strict=True)] for kind, rows in found.items() if rows}


def record(run: Run, settings: Settings, seconds: float) -> dict[str, Any]:
    """What training.json says. `seconds` are those of this process."""
    import flax
    import jax
    import optax

    return {
        "settings": dataclasses.asdict(settings),
        "steps": run.step,
        "tokens": sum(entry["tokens"] for entry in run.history),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
        "seconds": round(seconds, 1),
        f"accuracy_of_the_last_{SUMMARY_STEPS}_steps": last_accuracy(run.history),
        "history": [{key: entry[key] for key in ("step", "tokens", "losses", "seconds")} for entry in run.history],
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path, help="where the checkpoint goes")
    parser.add_argument("--tokens", type=float, default=TOKENS, help="to train on, padding included (default: 102e6)")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="of one step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and start (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=None, help="processes that make data (default: cores - 1)")
    parser.add_argument(
        "--work", type=pathlib.Path, default=None, help="keep Orbax checkpoints here, and resume from them"
    )
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="steps, with --work (default: %(default)s)")
    return parser.parse_args(argv)


def checked_settings(arguments: argparse.Namespace) -> Settings:
    """The settings, once everything is known to be there that the end of a run needs. Makes the directories."""
    if not math.isfinite(arguments.tokens):
        raise ValueError(f"--tokens must be a number, got {arguments.tokens}")
    cores = os.cpu_count() or 2
    settings = Settings(
        tokens=int(arguments.tokens),
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        workers=max(1, cores - 1) if arguments.workers is None else arguments.workers,
    )
    if arguments.checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every must be at least 1, got {arguments.checkpoint_every}")
    missing = [name for name in ("matplotlib", "optax") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{" and ".join(missing)} must be installed: pip install -e ".[train]"')
    for directory in filter(None, (arguments.directory, arguments.work)):
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        directory.mkdir(parents=True, exist_ok=True)
    return settings


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = parse_arguments(argv)
    return exit_status("train_tiny.py", lambda: run(arguments), patience_s=60.0)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    settings = checked_settings(arguments)
    prepare_environment()
    began = time.perf_counter()
    import tiny.data
    import tiny.export
    import tiny.tokenizer

    tokenizer = tiny.tokenizer.train_tokenizer(settings.seed, VOCABULARY)
    vocabulary = tokenizer.get_vocab()
    config = model_config([vocabulary[token] for token in (tiny.data.END_OF_TURN, tiny.data.END_OF_TEXT)])
    checkpoints = Checkpoints(arguments.work, settings)
    try:
        trained = train(settings, tokenizer, config, checkpoints, arguments.checkpoint_every)
    except (ChildProcessError, FloatingPointError) as error:
        print(f"train_tiny.py: training failed: {error}", file=sys.stderr)
        return 1
    finally:
        checkpoints.close()
    tiny.export.export(trained.params, tokenizer, config, arguments.directory)
    content = record(trained, settings, time.perf_counter() - began)
    tiny.export.report(content, last_accuracy(trained.history), arguments.directory)
    print(f"wrote {arguments.directory}")
    return 0


if __name__ == "__main__":
    # Orbax tells of every save.
    logging.getLogger("absl").setLevel(logging.ERROR)
    run_as_process(main)
