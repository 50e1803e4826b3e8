"""scripts/train_tiny.py: what it packs, that it trains what is served, that it resumes, and what it leaves behind."""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny.batches
import tiny.data
import tiny.export
import tiny.learning
import tiny.tokenizer
import tokenizers
import train_tiny
from tiny.batches import CHUNK, BatchShape

import gdnjax
from gdnjax import ModelConfig, sharding
from gdnjax.generation import draft_logits
from gdnjax.loading import load_model
from gdnjax.models import abstract_params, build_model, random_params

pytestmark = [pytest.mark.usefixtures("quickly_compiled"), pytest.mark.thorough]

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = ROOT / "gdnjax" / "assets" / "tiny"
SHAPES = (tiny.batches.short_shape(8192), tiny.batches.long_shape(8192))

# One layer of each kind, narrow: the real step compiles for most of a minute on a CPU.
CONFIG = tiny.learning.model_config([2, 0])
CONFIG |= {
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": CONFIG["rope_parameters"] | {"mrope_section": [2, 1, 1]},
}
SETTINGS = train_tiny.Settings(tokens=4 * 2048, batch_tokens=2048, seed=0, workers=2)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return build_model(ModelConfig.from_hf(CONFIG), "float32", mtp=True)


def named(tree):
    return {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


# Packing.


@pytest.fixture(scope="module", params=SHAPES, ids=["short", "long"])
def packed(request, tokenizer):
    """Documents as they went into the sequences of a batch, the batch, and its shape."""
    shape, rng = request.param, random.Random(0)
    sequences = [tiny.batches._Sequence(shape) for _ in range(shape.sequences)]
    for sequence in sequences:
        # Fill until one does not fit any more; the last sequence keeps a single document.
        while not sequence.documents or sequence is not sequences[-1]:
            document = tiny.data.document(rng, rng.choices(list(shape.mixture), list(shape.mixture.values()))[0])
            ids, learn = tiny.tokenizer.encode(tokenizer, document)
            if not sequence.takes(ids):
                break
            sequence.add(document.kind, ids, learn)
    return [sequence.documents for sequence in sequences], tiny.batches.pack(sequences, shape, rng), shape


def rows(batch):
    return [{name: array[i] for name, array in batch.items()} for i in range(len(batch["tokens"]))]


def test_packing_loses_and_repeats_no_token(packed):
    sequences, batch, shape = packed
    for documents, row in zip(sequences, rows(batch), strict=True):
        count = len(documents)
        spans = [slice(s, s + n) for s, n in zip(row["start"], row["length"], strict=True)]
        assert [row["tokens"][span].tolist() for span in spans[:count]] == [ids for _, ids, _ in documents]
        assert [tiny.data.KINDS[row["kind"][span.start]] for span in spans[:count]] == [kind for kind, *_ in documents]
        # What belongs to a document is that, and nothing else counts.
        covered = np.full(shape.tokens, -1)
        for d, span in enumerate(spans[:count]):
            assert (covered[span] == -1).all()
            covered[span] = d
        assert row["token_valid"].tolist() == (covered >= 0).tolist()
        assert (row["token_row"] == np.maximum(covered, 0)).all()
        assert not row["length"][count:].any()
        assert not row["attends"][count:].any()


def test_chunks_cover_each_document_at_multiples_of_64(packed):
    sequences, batch, _ = packed
    for documents, row in zip(sequences, rows(batch), strict=True):
        blocks = []
        for d in range(len(documents)):
            chunks = np.flatnonzero((row["chunk_row"] == d) & (row["chunk_length"] > 0))
            offsets = row["chunk_start"][chunks] - row["start"][d]
            assert offsets.tolist() == list(range(0, row["length"][d], CHUNK))
            assert row["chunk_length"][chunks].tolist() == [min(CHUNK, row["length"][d] - offset) for offset in offsets]
            assert row["block_table"][d][: len(chunks)].tolist() == (1 + chunks).tolist()
            assert not row["block_table"][d][len(chunks) :].any()
            blocks += row["block_table"][d][: len(chunks)].tolist()
        # No two documents share a block, none has the null block, and chunks that nobody has are empty.
        assert len(blocks) == len(set(blocks)) == (row["chunk_length"] > 0).sum()
        assert 0 not in blocks


def test_weights_are_those_of_the_next_token(packed):
    sequences, batch, shape = packed
    for documents, row in zip(sequences, rows(batch), strict=True):
        expected = []
        for _, _, learn in documents:
            expected += [1.0 if learned else tiny.batches.PROMPT_WEIGHT for learned in learn[1:]] + [0.0]
        expected += [0.0] * (shape.tokens - len(expected))
        assert (row["weight"] == np.asarray(expected, np.float32)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=["short", "long"])
def test_batch_is_a_function_of_its_seed(tokenizer, shape):
    one, same, other = (tiny.batches.make_batch(tokenizer, shape, seed) for seed in ("0/1", "0/1", "0/2"))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one["tokens"], other["tokens"])
    assert one["tokens"].shape == (shape.sequences, shape.tokens)
    # Most of a batch is text, and most documents are seen by attention.
    assert one["token_valid"].mean() > 0.75
    documents = one["length"] > 0
    assert 0.6 < one["attends"][documents].mean() <= 1.0


def test_shapes_are_long_at_their_share():
    settings = dataclasses.replace(SETTINGS, tokens=2000 * 2048)
    shapes = train_tiny.shapes_of(settings)
    assert len(shapes) == 2000
    assert shapes == train_tiny.shapes_of(settings) != train_tiny.shapes_of(dataclasses.replace(settings, seed=1))
    assert sum(shape.longest == 2048 for shape in shapes) / 2000 == pytest.approx(train_tiny.LONG_SHARE, abs=0.03)


# Worker processes.


@pytest.fixture
def small_shapes():
    return [dataclasses.replace(tiny.batches.short_shape(2048), sequences=n) for n in (1, 2, 3, 1, 2, 3, 1, 2, 3, 4)]


def test_stream_gives_the_batches_in_order_and_ends_its_workers(tokenizer, small_shapes):
    seeds = [f"7/{step}" for step in range(len(small_shapes))]
    stream = tiny.batches.stream(tokenizer, small_shapes, seeds, workers=2)
    first = next(stream)
    assert len(multiprocessing.active_children()) == 2
    rest = list(stream)
    for shape, seed, batch in zip(small_shapes, seeds, [first, *rest], strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, tiny.batches.make_batch(tokenizer, shape, seed))
    assert not multiprocessing.active_children()


def test_dead_worker_is_an_error_that_says_so(tokenizer, small_shapes):
    stream = tiny.batches.stream(tokenizer, small_shapes * 50, ["x"] * 500, workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="a process that makes data was killed"):
        list(stream)


STREAMING = """
import dataclasses, multiprocessing, signal, time, tiny.batches, tokenizers

if __name__ == "__main__":
    # Whoever runs the tests in the background may have it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tokenizer = tokenizers.Tokenizer.from_file({tokenizer!r})
    shape = dataclasses.replace(tiny.batches.short_shape(2048), sequences=1)
    for batch in tiny.batches.stream(tokenizer, [shape] * 9, ["x"] * 9, 1):
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, end):
    """Ctrl-C reaches the workers too, a kill does not: neither leaves one behind, and none adds to what is said."""
    script = tmp_path / "streaming.py"
    script.write_text(STREAMING.format(tokenizer=str(SHIPPED / "tokenizer.json")))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, str(script)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as it:
        assert it.stdout is not None
        (worker,) = map(int, it.stdout.readline().split())
        os.killpg(it.pid, end) if end == signal.SIGINT else it.kill()
        # Also waits for the worker, which holds the pipe.
        _, err = it.communicate(timeout=30)
    assert it.returncode == -end
    assert err.count("Traceback") == (end == signal.SIGINT)
    until = time.monotonic() + 10
    while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# The model over packed sequences.

BOUND = 2e-5
"""Of the largest logit: float32 sums of at most 96 terms in another order, through two layers and the MTP head."""


@pytest.fixture(scope="module")
def sequence(tokenizer):
    """Three documents of several chunks packed into one sequence, with padding behind; not seen is the second."""
    shape = BatchShape(1, tokens=320, documents=4, chunks=7, longest=192, mixture=tiny.data.SHORT_MIXTURE)
    packing, rng = tiny.batches._Sequence(shape), random.Random(5)
    for kind, size in (("recall", 70), ("problem_chat", 129), ("copy", 64)):
        ids, learn = [], []
        while len(ids) < size:
            ids, learn = tiny.tokenizer.encode(tokenizer, tiny.data.document(rng, kind))
        packing.add(kind, ids[:size], learn[:size])
    arrays = tiny.batches.pack([packing], shape, rng)
    arrays["attends"][0] = [True, False, True, False]
    return arrays, shape


@pytest.fixture(scope="module")
def params():
    """Parameters under which state and keys matter."""
    return random_params(ModelConfig.from_hf(CONFIG), 1, "float32", jax.random.key(1), mtp=True)


@pytest.fixture(scope="module")
def hidden_states(model, sequence):
    arrays, shape = sequence
    compiled = jax.jit(functools.partial(tiny.learning.hidden_states, model, longest=shape.longest))

    def run(params, **changed):
        return compiled(params, sequence={name: array[0] for name, array in (arrays | changed).items()})

    return run


def existing(states):
    """The hidden states of a document that exist, [n, d]: no draft is made at its first token."""
    return jnp.concatenate([states[0], *states[1:, 1:]])


def documents(arrays):
    return [slice(s, s + n) for s, n in zip(arrays["start"][0], arrays["length"][0], strict=True) if n]


def test_packed_logits_are_those_of_each_document_alone(model, params, sequence, hidden_states):
    arrays, shape = sequence
    hidden, position = hidden_states(params, attends=np.ones_like(arrays["attends"]))
    packed = model.logits(params, hidden[:2].reshape(-1, hidden.shape[-1])).reshape(2, shape.tokens, -1)
    alone = jax.jit(lambda tokens, length: draft_logits(model, params, tokens, 1, length))
    served = jax.jit(lambda tokens, length: gdnjax.full_logits(model, params, tokens, length))
    for span in documents(arrays):
        size = span.stop - span.start
        tokens = np.pad(arrays["tokens"][0][span], (0, shape.longest - size))
        target, draft = alone(tokens, size)
        bound = BOUND * float(jnp.abs(target[:size]).max())
        np.testing.assert_allclose(packed[0, span], served(tokens, size)[:size], atol=bound, rtol=0)
        np.testing.assert_allclose(packed[0, span], target[:size], atol=bound, rtol=0)
        # Nothing lies before the first token that could draft.
        np.testing.assert_allclose(packed[1, span][1:], draft[0, 1:size], atol=bound, rtol=0)
        assert position[span].tolist() == list(range(size))


def test_unseen_document_has_no_use_for_attention(params, sequence, hidden_states):
    """Other queries, keys and values change every output of a document that attention sees, none of another."""
    arrays, _ = sequence
    projections = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    other = jax.tree_util.tree_map_with_path(
        lambda path, leaf: -leaf if sharding.path_name(path).endswith(projections) else leaf, params
    )
    before, after = hidden_states(params)[0], hidden_states(other)[0]
    for span, seen in zip(documents(arrays), arrays["attends"][0], strict=False):
        changed = existing(before[:, span] != after[:, span])
        assert (changed.any(axis=-1) == seen).all()


def test_documents_ignore_their_neighbours(params, sequence, hidden_states):
    arrays, _ = sequence
    first, *others = documents(arrays)
    tokens = arrays["tokens"].copy()
    tokens[0, first] = 1
    before, after = hidden_states(params)[0], hidden_states(params, tokens=tokens)[0]
    assert (before[:, first] != after[:, first]).any()
    for span in others:
        np.testing.assert_array_equal(existing(before[:, span]), existing(after[:, span]))


@pytest.fixture(scope="module")
def gradient_and_counts(model, params, sequence):
    arrays, shape = sequence
    abstract = abstract_params(model.config, 1, "float32", mtp=True)
    loss = functools.partial(tiny.learning.loss_and_counts, model, abstract, shape.longest)
    return jax.jit(jax.grad(loss, has_aux=True))(params, arrays)


def test_loss_is_the_weighted_mean_over_learned_and_prompt(model, params, sequence, hidden_states, gradient_and_counts):
    arrays, _ = sequence
    counts = jax.device_get(gradient_and_counts[1])
    logits = np.float64(jax.vmap(functools.partial(model.logits, params))(hidden_states(params)[0]))
    entropy = np.log(np.exp(logits).sum(-1))
    losses, learned, right = [], np.zeros_like(counts["learned"]), np.zeros_like(counts["right"])
    for depth in range(1 + tiny.learning.MTP_DEPTH):
        total = weights = 0.0
        for span in documents(arrays):
            for i in range(span.start + depth, span.stop - 1):
                target, weight = arrays["tokens"][0, i + 1], float(arrays["weight"][0, i])
                total += weight * (entropy[depth, i] - logits[depth, i, target])
                weights += weight
                if weight == 1.0:
                    learned[depth, arrays["kind"][0, i]] += 1
                    right[depth, arrays["kind"][0, i]] += logits[depth, i].argmax() == target
        losses.append(total / weights)
    # Float32 sums of 263 terms.
    np.testing.assert_allclose(counts["losses"], losses, rtol=1e-5)
    np.testing.assert_array_equal(counts["learned"], learned)
    np.testing.assert_array_equal(counts["right"], right)
    assert counts["tokens"] == 70 + 129 + 64
    assert learned.sum() > 100


def test_every_parameter_has_a_finite_gradient(gradient_and_counts):
    for name, gradient in named(gradient_and_counts[0]).items():
        assert np.isfinite(gradient).all(), name
        assert gradient.any(), name


# Start and optimizer.


def test_shipped_configuration_is_that_of_the_script(tokenizer):
    eos = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert json.loads((SHIPPED / "config.json").read_text()) == tiny.learning.model_config(eos)


@pytest.fixture(scope="module")
def initial_params():
    """The start of the small model, as a function of the seed."""
    abstract = abstract_params(ModelConfig.from_hf(CONFIG), 1, "bfloat16", mtp=True)
    compiled = jax.jit(functools.partial(tiny.learning.initial_params, abstract))
    return lambda seed: compiled(jax.random.key(seed))


def test_half_lives_start_between_7_and_700_tokens(initial_params):
    lives = []
    for seed in range(50):
        leaves = named(initial_params(seed))
        rate = np.exp(leaves["layers.0.linear_attn.A_log"]) * np.logaddexp(0, leaves["layers.0.linear_attn.dt_bias"])
        lives += (math.log(2) / rate).tolist()
    assert 6.9 < min(lives) < 10
    assert 500 < max(lives) < 700
    assert 50 < np.median(lives) < 100


def test_start_is_a_function_of_the_seed_in_float32(initial_params):
    one, same, other = map(initial_params, (0, 0, 1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(one))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one["embed_tokens"]["weight"], other["embed_tokens"]["weight"])


def test_muon_gets_the_matrices_of_the_layers():
    """In the shipped model's own shapes."""
    config = ModelConfig.from_hf(tiny.learning.model_config([2, 0]))
    start = abstract_params(config, 1, "float32", mtp=True)
    state = jax.eval_shape(tiny.learning.optimizer(start, 100).init, start)
    groups = {group: set(named(inner.inner_state[0].mu)) for group, inner in state[1].inner_states.items()}
    matrices = r"linear_attn.in_proj_qkv linear_attn.in_proj_z linear_attn.out_proj self_attn.q_proj self_attn.k_proj "
    matrices += "self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj mtp.fc"
    suffixes = tuple(f"{matrix}.weight" for matrix in matrices.split())
    assert groups["muon"] == {name for name in named(start) if name.endswith(suffixes)}
    assert groups["adam"] == set(named(start)) - groups["muon"]
    assert len(groups["muon"]) == 6 * 3 + 2 * 4 + 8 * 3 + (1 + 4 + 3)


# Whole runs.


@dataclasses.dataclass
class Trained:
    run: train_tiny.Run
    work: pathlib.Path
    export: pathlib.Path


@pytest.fixture(scope="module")
def train(tokenizer):
    """train_tiny.train with less to compile: one shape of batches, one draft, and that once for all runs."""
    compiled = {}
    compile_steps = train_tiny.compile_steps

    def compile_once(train_step, run, shapes, examples):
        if not compiled.keys() >= set(shapes):
            compiled.update(compile_steps(train_step, run, shapes, examples))
        return {shape: compiled[shape] for shape in shapes}

    def run(work, settings=SETTINGS):
        checkpoints = train_tiny.Checkpoints(work, settings)
        with pytest.MonkeyPatch.context() as patch, contextlib.closing(checkpoints):
            patch.setattr(train_tiny, "LONG_SHARE", 0.0)
            patch.setattr(tiny.learning, "MTP_DEPTH", 1)
            if train_tiny.compile_steps is compile_steps:
                patch.setattr(train_tiny, "compile_steps", compile_once)
            return train_tiny.train(settings, tokenizer, CONFIG, checkpoints, every=2)

    return run


@pytest.fixture(scope="module")
def trained(train, tokenizer, tmp_path_factory):
    """Four steps with a checkpoint after two, and what is left behind."""
    directory = tmp_path_factory.mktemp("train-tiny")
    work, export = directory / "work", directory / "model"
    export.mkdir()
    run = train(work)
    tiny.export.export(run.params, tokenizer, CONFIG, export)
    tiny.export.report(train_tiny.record(run, SETTINGS, 1.5), train_tiny.last_accuracy(run.history), export)
    return Trained(run, work, export)


def test_training_changes_every_parameter(trained):
    abstract = abstract_params(ModelConfig.from_hf(CONFIG), 1, "float32", mtp=True)
    start = named(tiny.learning.initial_params(abstract, jax.random.key(SETTINGS.seed)))
    for name, leaf in named(trained.run.params).items():
        assert np.isfinite(leaf).all(), name
        assert not np.array_equal(leaf, start[name]), name


def test_resumed_run_equals_the_uninterrupted_one(trained, train, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained.work, work)
    shutil.rmtree(work / "4")
    resumed = train(work)
    assert resumed.step == trained.run.step == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.params, trained.run.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, trained.run.state)
    whole, parts = (json.loads(json.dumps(run.history)) for run in (trained.run, resumed))
    for entry in (*whole, *parts):
        del entry["seconds"]
    assert parts == whole
    assert [entry["step"] for entry in whole] == [2, 4]


def test_finished_run_is_not_trained_again(trained, train, monkeypatch):
    monkeypatch.setattr(tiny.batches, "make_batch", None)
    again = train(trained.work)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.run.params)
    assert again.history == trained.run.history


def test_checkpoint_of_other_settings_is_refused(trained):
    other = dataclasses.replace(SETTINGS, seed=1)
    error = pytest.raises(ValueError, match=r"of another run.*'seed': 0.*'seed': 1")
    with contextlib.closing(train_tiny.Checkpoints(trained.work, other)) as checkpoints, error:
        checkpoints.restore(trained.run)


def test_number_of_workers_may_change(trained):
    other = dataclasses.replace(SETTINGS, workers=1)
    with contextlib.closing(train_tiny.Checkpoints(trained.work, other)) as checkpoints:
        assert checkpoints.restore(trained.run).step == 4


def test_loss_that_is_not_finite_ends_the_run(train, monkeypatch):
    def step(params, state, batch):
        kinds = np.zeros((1 + tiny.learning.MTP_DEPTH, len(tiny.data.KINDS)))
        return params, state, {"learned": kinds, "right": kinds, "losses": np.array([np.nan] * 4), "tokens": 1}

    monkeypatch.setattr(
        train_tiny, "compile_steps", lambda function, run, shapes, examples: dict.fromkeys(shapes, step)
    )
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        train(None)
    assert not multiprocessing.active_children()


def test_report_is_small_and_sums_up(trained):
    written = json.loads((trained.export / "training.json").read_text())
    assert written["settings"] == dataclasses.asdict(SETTINGS)
    assert written["steps"] == 4
    assert written["seconds"] == 1.5
    assert written["tokens"] == sum(entry["tokens"] for entry in trained.run.history) <= SETTINGS.tokens
    assert written["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(trained.run.params))
    assert all(list(entry) == ["step", "tokens", "losses", "seconds"] for entry in written["history"])
    for kind, accuracy in written["accuracy_of_the_last_200_steps"].items():
        assert kind in tiny.data.KINDS
        assert len(accuracy) == 2
    assert (trained.export / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_card_says_what_the_model_was_made_of(trained):
    written = json.loads((trained.export / "training.json").read_text())
    card = (trained.export / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "synthetic" in card
    for value in (
        f"{written['parameters']:,}",
        f"{written['tokens']:,}",
        f"| seed | {SETTINGS.seed} |",
        jax.__version__,
    ):
        assert value in card
    for kind, shares in train_tiny.last_accuracy(trained.run.history).items():
        assert f"| {kind} | " + " | ".join(f"{share:.4f}" for share in shares) + " |" in card


def test_last_accuracy_is_that_of_the_last_200_steps():
    def entry(step, **accuracy):
        return {"step": step, "accuracy": {kind: [value] * 4 for kind, value in accuracy.items()}}

    history = [entry(20, copy=0.1), entry(40, copy=0.2), entry(130, copy=0.6, json=0.8), entry(230, copy=0.7)]
    # The second entry begins before the last 200 steps.
    assert train_tiny.last_accuracy(history) == {"copy": [0.65] * 4, "json": [0.8] * 4}
    assert list(train_tiny.last_accuracy(history)) == ["copy", "json"]
    assert train_tiny.last_accuracy(history[:1]) == {"copy": [0.1] * 4}


def test_shipped_report_is_of_this_form(trained):
    shipped = json.loads((SHIPPED / "training.json").read_text())
    assert list(shipped) == list(json.loads((trained.export / "training.json").read_text()))
    assert shipped["settings"]["tokens"] == train_tiny.TOKENS
    assert all(list(entry) == ["step", "tokens", "losses", "seconds"] for entry in shipped["history"])


def test_export_loads_with_its_head(trained):
    _, params = load_model(trained.export, mtp=True)
    jax.tree.map(np.testing.assert_array_equal, params, trained.run.params)


def test_export_has_the_files_of_the_shipped_model(trained, tokenizer):
    # Beside these stand what others measured and wrote of it.
    made = {file.name for file in trained.export.iterdir()}
    assert made - {file.name for file in SHIPPED.iterdir()} == {"loss.png"}
    for name in ("tokenizer.json", "tokenizer_config.json", "problems.jsonl", "shots.jsonl", "generation_config.json"):
        assert (trained.export / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_interrupted_export_passes_for_no_checkpoint(trained, tokenizer, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    directory = tmp_path / "model"
    shutil.copytree(trained.export, directory)
    monkeypatch.setattr(tiny.export, "write_problems", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.export.export(trained.run.params, tokenizer, CONFIG, directory)
    with pytest.raises(FileNotFoundError):
        load_model(directory)


def test_transformers_computes_the_same_from_the_export(trained):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    reference, loading = AutoModelForCausalLM.from_pretrained(
        trained.export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(reference).__name__ == "Qwen3_5ForCausalLM"
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in loading["unexpected_keys"])
    model, params = load_model(trained.export)
    tokens = np.random.default_rng(0).integers(3, 1024, 100).astype(np.int32)
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor(tokens[None]).long(), use_cache=False).logits[0].numpy()
    logits = jax.jit(functools.partial(gdnjax.full_logits, model))(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=BOUND * np.abs(expected).max(), rtol=0)


# The command line.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "1000"], "--tokens must be at least one batch of 32768, got 1000"),
        (["--tokens", "inf"], "--tokens must be a number, got inf"),
        (["--tokens", "nan"], "--tokens must be a number, got nan"),
        (["--batch-tokens", "3000"], "--batch-tokens must be a multiple of 2048, got 3000"),
        (["--batch-tokens", "0"], "--batch-tokens must be a multiple of 2048, got 0"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be in 0 to 2**32 - 1, got -1"),
        (["--seed", "4294967296"], "--seed must be in 0 to 2**32 - 1, got 4294967296"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        (["--work", "{file}"], "{file} is not a directory"),
        (["--work", "{file}/work"], "Not a directory"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_slow(capsys, tmp_path, monkeypatch, flags, message):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(tiny.tokenizer, "train_tokenizer", None)
    assert train_tiny.main([str(tmp_path / "out"), *(flag.format(file=file) for flag in flags)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("train_tiny.py: error: ")
    assert err.count("\n") == 1
    assert message.format(file=file) in err


def test_place_that_cannot_be_written_is_refused_first(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tiny.tokenizer, "train_tokenizer", None)
    for directory in ("file", "file/inside"):
        assert train_tiny.main([str(tmp_path / directory)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_missing_libraries_are_told_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny.importlib.util, "find_spec", lambda name: None)
    assert train_tiny.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        'train_tiny.py: error: matplotlib and optax must be installed: pip install -e ".[train]"\n'
    )


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "\ninterrupted"),
        (ChildProcessError("a process died"), 1, "train_tiny.py: training failed: a process died"),
        (FloatingPointError("the loss is nan"), 1, "train_tiny.py: training failed: the loss is nan"),
    ],
)
def test_run_that_fails_leaves_no_checkpoint(capsys, tmp_path, tokenizer, monkeypatch, end, status, message):
    def train(*_):
        raise end

    monkeypatch.setattr(tiny.tokenizer, "train_tokenizer", lambda seed, size: tokenizer)
    monkeypatch.setattr(train_tiny, "train", train)
    assert train_tiny.main([str(tmp_path / "out")]) == status
    assert capsys.readouterr().err == f"{message}\n"
    assert not list((tmp_path / "out").iterdir())
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"


def test_help_says_how_to_resume_and_imports_no_jax():
    code = "import sys, train_tiny\ntry: train_tiny.main(['--help'])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.endswith("False\n")
    for word in ("--work", "goes on from the newest checkpoint", "XLA_PYTHON_CLIENT_MEM_FRACTION", "130"):
        assert word in done.stdout
