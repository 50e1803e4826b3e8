"""Trains the small model that gdnjax ships, on text that it makes itself, and exports it for Hugging Face readers."""

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

if TYPE_CHECKING:
    import jax
    from tiny_batches import BatchShape

    from gdnjax.models import HybridModel

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

WIDTH = 192
HEAD_DIM = 64
LAYERS = 8
VOCABULARY = 1024
MTP_DEPTH = 3
MTP_WEIGHT = 0.3
TOKENS = 102e6
LONG_SHARE = 0.2
"""Share of the batches that hold long documents."""

MUON_RATE = 0.01
ADAM_RATE = 0.003
WARMUP_STEPS = 100
DECAY_SHARE = 0.35
"""Share of the steps at the end over which the learning rate falls to zero."""


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


def model_config(eos_token_ids: list[int]) -> dict[str, Any]:
    """config.json, as the published text models spell it."""
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(LAYERS)],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "linear_conv_kernel_dim": 4,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": eos_token_ids,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    }


def initial_params(abstract: Any, key: "jax.Array") -> Any:
    """Float32 parameters to start from. Decays are slow, so that the state has something to remember with.

    With A = 1 a token's decay is exp(-dt), dt = softplus(dt_bias) log-uniform in 0.001 to 0.1: half-lives of 7 to 700
    tokens. The usual initialisation (A up to 16) makes them forget within a few.
    """
    import jax
    import jax.numpy as jnp

    from gdnjax import sharding

    def leaf(path, shape, key):
        name = sharding.path_name(path)
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        size = shape.shape
        normal = jax.random.normal(key, size)
        if kind == "A_log":
            return jnp.zeros(size)
        if kind == "dt_bias":
            dt = jnp.exp(jax.random.uniform(key, size, minval=math.log(0.001), maxval=math.log(0.1)))
            return jnp.log(jnp.expm1(dt))
        if name.endswith("linear_attn.norm.weight"):
            return jnp.ones(size)
        if len(size) == 1:
            return jnp.zeros(size)
        if kind == "embed_tokens":
            return 0.05 * normal
        if kind == "conv1d":
            return 0.5 * normal
        scale = {"in_proj_a": 0.1, "o_proj": 0.25, "out_proj": 0.25, "down_proj": 0.25}.get(kind, 1.0)
        return scale * size[-1] ** -0.5 * normal

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(key, len(leaves))
    return jax.tree_util.tree_unflatten(tree, [leaf(path, x, k) for (path, x), k in zip(leaves, keys, strict=True)])


def optimizer(params: Any, steps: int) -> Any:
    """Muon for the matrices of the layers, AdamW for embedding, gates, convolutions and vectors."""
    import jax
    import optax
    from optax.contrib import MuonDimensionNumbers, muon

    from gdnjax import sharding

    def dimensions(path, leaf):
        name = sharding.path_name(path)
        by_adam = leaf.ndim != 2 or name.endswith(("embed_tokens.weight", "in_proj_a.weight", "in_proj_b.weight"))
        return None if by_adam else MuonDimensionNumbers(reduction_axis=1, output_axis=0)

    decay = max(1, int(DECAY_SHARE * steps))
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, warmup),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, decay),
        ],
        [warmup, steps - decay],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            learning_rate=lambda step: MUON_RATE * shape(step),
            adam_learning_rate=lambda step: ADAM_RATE * shape(step),
            adam_b2=0.98,
            weight_decay=0.1,
            muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(dimensions, params),
        ),
    )


def hidden_states(model: "HybridModel", params: Any, longest: int, sequence: dict[str, Any]) -> Any:
    """Final hidden states of one packed sequence, and those of the MTP head: [1 + MTP_DEPTH, t, d].

    The same layers as in serving, over pools of this sequence alone. A document that attention does not see has its
    queries masked, which makes the layers' outputs zero.
    """
    import jax.numpy as jnp
    from tiny_batches import CHUNK

    from gdnjax import step
    from gdnjax.batch import PrefillBatch
    from gdnjax.config import EngineConfig
    from gdnjax.memory import MemoryPlan
    from gdnjax.models.context import prefill_context
    from gdnjax.state import empty_state
    from gdnjax.step import StepOptions

    rows, chunks = sequence["start"].shape[0], sequence["chunk_row"].shape[0]
    # Gradients of keys and values that several queries read are summed in the pool's dtype.
    geometry = dataclasses.replace(model.geometry(CHUNK, "float32"), kv_dtype="float32")
    plan = MemoryPlan.of_counts(geometry, num_slots=rows, num_blocks=chunks, num_logit_rows=0)
    state = empty_state(geometry, plan, EngineConfig(max_num_seqs=rows, block_size=CHUNK), longest)
    table = jnp.pad(sequence["block_table"], ((1, 0), (0, 0)))
    state = dataclasses.replace(state, slots=dataclasses.replace(state.slots, block_table=table))
    names = ("tokens", "token_row", "token_valid", "start", "length", "chunk_row", "chunk_start", "chunk_length")
    batch = PrefillBatch(
        **{name: sequence[name] for name in names},
        slot=jnp.arange(1, rows + 1, dtype=jnp.int32),
        is_last=jnp.ones((rows,), bool),
        target=sequence["tokens"],
    )
    context = prefill_context(step.pools_of(state, StepOptions()), batch)
    seen = sequence["attends"][sequence["chunk_row"]][:, None]
    tiles = dataclasses.replace(context.tiles, position=jnp.where(seen, context.tiles.position, -1), longest=longest)
    context = dataclasses.replace(context, tiles=tiles)
    hidden, gdn, kv = model.forward(params, batch.tokens, context, state.gdn, state.kv)
    outputs, previous = [hidden], jnp.roll(hidden, 1, axis=0)
    for depth in range(MTP_DEPTH):
        drafted, kv = model.draft(params, batch.tokens, previous, context, gdn, kv)
        outputs.append(drafted)
        # The next draft feeds this one's output, where so many tokens lie before it.
        previous = jnp.where((context.position > depth + 1)[:, None], jnp.roll(drafted, 1, axis=0), previous)
    return jnp.stack(outputs), context.position


def loss_and_counts(model: "HybridModel", abstract: Any, longest: int, params: Any, batch: dict[str, Any]) -> Any:
    """The loss, and for each kind of document: learned targets, and how many the model and each draft got right."""
    import jax
    import jax.numpy as jnp
    import tiny_data

    rounded = jax.tree.map(lambda p, shape: p.astype(shape.dtype), params, abstract)
    hidden, position = jax.vmap(functools.partial(hidden_states, model, rounded, longest))(batch)
    # [1 + depth, sequences, tokens, V]
    logits = model.logits(rounded, hidden.swapaxes(0, 1).reshape(-1, hidden.shape[-1]))
    logits = logits.reshape(1 + MTP_DEPTH, *batch["tokens"].shape, -1)
    target = jnp.roll(batch["tokens"], -1, axis=1)
    chosen = jnp.take_along_axis(logits, target[None, ..., None], axis=-1)[..., 0]
    entropy = jax.nn.logsumexp(logits, axis=-1) - chosen
    # Draft d exists where d tokens lie before.
    depth = jnp.arange(1 + MTP_DEPTH)[:, None, None]
    weight = jnp.where(position >= depth, batch["weight"], 0.0)
    mean = jnp.sum(entropy * weight, axis=(1, 2)) / jnp.sum(weight, axis=(1, 2))
    loss = mean[0] + MTP_WEIGHT * jnp.mean(mean[1:])
    learned = weight == 1.0
    right = learned & (jnp.argmax(logits, axis=-1) == target)
    kinds = jax.nn.one_hot(batch["kind"], len(tiny_data.KINDS))
    counts = {
        "learned": jnp.einsum("dnt,ntk->dk", learned.astype(jnp.float32), kinds),
        "right": jnp.einsum("dnt,ntk->dk", right.astype(jnp.float32), kinds),
        "losses": mean,
        "tokens": jnp.sum(batch["token_valid"]),
    }
    return loss, counts


def make_step(model: "HybridModel", abstract: Any, transform: Any, longest: int) -> Any:
    """Jits one training step: (params, optimizer state, batch) -> the same two, donated, and the counts."""
    import jax
    import optax

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, batch):
        gradient_of = jax.grad(functools.partial(loss_and_counts, model, abstract, longest), has_aux=True)
        gradient, counts = gradient_of(params, batch)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, counts

    return train_step


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

    from tiny_batches import long_shape, short_shape

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
    import tiny_data

    learned, right = (np.array([c[name] for c in counts], float).sum(axis=0) for name in ("learned", "right"))
    losses = np.mean([c["losses"] for c in counts], axis=0)
    accuracy = {
        kind: [round(float(r / n), 5) for r, n in zip(right[:, i], learned[:, i], strict=True)]
        for i, kind in enumerate(tiny_data.KINDS)
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
    import tiny_batches
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
    examples = [tiny_batches.make_batch(tokenizer, shape, "example") for shape in shapes]
    steps = compile_steps(functools.partial(make_step, model, abstract, transform), run, shapes, examples)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)

    seeds = [f"{settings.seed}/{step}" for step in left]
    batches = tiny_batches.stream(tokenizer, [every_shape[step] for step in left], seeds, settings.workers)
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
    import tiny_data

    starts = [0, *(entry["step"] for entry in history)]
    last = [e["accuracy"] for start, e in zip(starts, history, strict=False) if start >= starts[-1] - SUMMARY_STEPS]
    found = {kind: [accuracy[kind] for accuracy in last if kind in accuracy] for kind in tiny_data.KINDS}
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
        raise ValueError(f'{" and ".join(missing)} must be installed: pip install "gdnjax[train]"')
    for directory in filter(None, (arguments.directory, arguments.work)):
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        directory.mkdir(parents=True, exist_ok=True)
    return settings


def prepare_environment() -> None:
    """What must be settled before jax and transformers are imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    # transformers advises to install PyTorch, of which nothing is used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        settings = checked_settings(arguments)
        prepare_environment()
        began = time.perf_counter()
        import tiny_data
        import tiny_export
        import tiny_tokenizer

        tokenizer = tiny_tokenizer.train_tokenizer(settings.seed, VOCABULARY)
        vocabulary = tokenizer.get_vocab()
        config = model_config([vocabulary[token] for token in (tiny_data.END_OF_TURN, tiny_data.END_OF_TEXT)])
        checkpoints = Checkpoints(arguments.work, settings)
        try:
            run = train(settings, tokenizer, config, checkpoints, arguments.checkpoint_every)
        finally:
            checkpoints.close()
        tiny_export.export(run.params, tokenizer, config, arguments.directory)
        content = record(run, settings, time.perf_counter() - began)
        tiny_export.report(content, last_accuracy(run.history), arguments.directory)
    except (ChildProcessError, FloatingPointError) as error:
        print(f"train_tiny.py: training failed: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"train_tiny.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_tiny.py: interrupted", file=sys.stderr)
        return 130
    print(f"wrote {arguments.directory}")
    return 0


if __name__ == "__main__":
    # Orbax tells of every save.
    logging.getLogger("absl").setLevel(logging.ERROR)
    sys.exit(main())
