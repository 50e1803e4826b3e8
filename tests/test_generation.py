"""Whole generations inside jit: what the engine gives, as one pure function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import (
    LLM,
    SamplingParams,
    abstract_params,
    batch_generate,
    build_model,
    draft_logits,
    full_logits,
    generation,
)
from gdnjax.config import MlpKind
from gdnjax.models import HybridModel
from tests.micro import MICRO, A, D, made

pytestmark = pytest.mark.usefixtures("quickly_compiled")

# One layer of each kind: every choice of sampling parameters is another compilation.
CONFIG = dataclasses.replace(MICRO, layer_kinds=(D, A), mlp_kinds=(MlpKind.DENSE, MlpKind.MOE))
MODEL = build_model(CONFIG, "float32")
LENGTHS = (5, 70, 64, 1)
"""True lengths of the prompts, padded to the longest."""

STEPS = 7

NEAR_TIE = 1e-4
"""Gap of the two largest logits below which two orders of float32 summation (1e-5 of the logits) could part."""


@functools.cache
def random() -> dict:
    """The parameters of MODEL. Not made where modules are collected."""
    return made(CONFIG, 3)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in LENGTHS]


def padded(fill=0):
    """[n, longest] with `fill` past each prompt, and the lengths."""
    tokens = np.full((len(LENGTHS), max(LENGTHS)), fill, np.int32)
    for row, prompt in zip(tokens, prompts(), strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(LENGTHS, jnp.int32)


@dataclasses.dataclass(frozen=True)
class CountingModel(HybridModel):
    """Counts the times that a forward pass runs on the device."""

    runs: list = dataclasses.field(default_factory=list, compare=False)

    def forward(self, *arguments):
        jax.debug.callback(lambda: self.runs.append(None))
        return super().forward(*arguments)


def counting(model):
    return CountingModel(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)})


COUNTED = counting(MODEL)


@functools.partial(jax.jit, static_argnames=("sampling", "stop_token_ids"))
def generate(params, tokens, lengths, key, sampling=None, stop_token_ids=()):
    """Inside the user's own jit, with more than the generation in it."""
    output = batch_generate(
        COUNTED, params, tokens, lengths, key, max_new_tokens=STEPS, sampling=sampling, stop_token_ids=stop_token_ids
    )
    return output, output.lengths.sum()


def run(**options):
    """(tokens, lengths, forward passes) of the prompts."""
    COUNTED.runs.clear()
    key = options.pop("key", jax.random.key(0))
    tokens, lengths = padded(options.pop("fill", 0))
    output, total = generate(random(), tokens, lengths, key, **options)
    jax.effects_barrier()
    assert int(total) == int(output.lengths.sum())
    return np.asarray(output.tokens), np.asarray(output.lengths), len(COUNTED.runs)


@pytest.fixture(scope="module")
def greedy():
    return run()


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, length):
    return full_logits(model, params, tokens, length)


def logits_of(token_ids, model=MODEL, params=None):
    """Logits at every position, of one compilation for all lengths."""
    tokens = np.zeros((96,), np.int32)
    tokens[: len(token_ids)] = token_ids
    found = _logits(model, random() if params is None else params, tokens, jnp.int32(len(token_ids)))
    return np.asarray(found, np.float64)[: len(token_ids)]


def test_greedy_tokens_are_the_models_best(greedy):
    """Each token is the argmax of the logits after everything before it, and never a near tie here."""
    tokens, lengths, _ = greedy
    assert (lengths == STEPS).all()
    for prompt, row in zip(prompts(), tokens, strict=True):
        logits = logits_of([*prompt, *row])[len(prompt) - 1 : -1]
        second, first = np.sort(logits, axis=1)[:, -2:].T
        assert ((first - second) / np.abs(logits).max(1) > NEAR_TIE).all(), "choose other prompts"
        np.testing.assert_array_equal(logits.argmax(1), row)


def test_greedy_tokens_equal_the_engines(greedy):
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "prefill_buckets": (64,), "decode_buckets": (4,)}
    with LLM.from_model(MODEL, random(), max_model_len=128, warmup=False, **options) as llm:
        outputs = llm.generate(prompts(), params, use_tqdm=False)
    np.testing.assert_array_equal(greedy[0], [output.outputs[0].token_ids for output in outputs])


def test_tokens_past_a_prompt_are_never_looked_at(greedy):
    tokens, lengths, _ = run(fill=77)
    np.testing.assert_array_equal(tokens, greedy[0])
    np.testing.assert_array_equal(lengths, greedy[1])


def test_loop_runs_once_a_token(greedy):
    """The first token comes with the prompts."""
    assert greedy[2] == STEPS


def test_stop_ids_end_rows_and_the_loop(greedy):
    """Each row up to its stop token, which counts; the loop ends with the last row."""
    whole = greedy[0]
    stops = (int(whole[0, 2]), int(whole[1, 1]), int(whole[2, 3]), int(whole[3, 0]))
    tokens, lengths, passes = run(stop_token_ids=stops)
    expected = [1 + min(np.flatnonzero(np.isin(row, stops))) for row in whole]
    np.testing.assert_array_equal(lengths, expected)
    for row, length, before in zip(tokens, lengths, whole, strict=True):
        np.testing.assert_array_equal(row[:length], before[:length])
        assert (row[length:] == -1).all()
    assert passes == max(expected) < STEPS


def test_key_decides_the_tokens():
    sampling = SamplingParams(temperature=1.0)
    first, again, other = (run(sampling=sampling, key=jax.random.key(key))[0] for key in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()


def test_rows_draw_with_noise_of_their_own():
    """The same prompt in every row."""
    tokens = jnp.asarray([prompts()[0]] * 4, jnp.int32)
    tokens = jnp.pad(tokens, ((0, 0), (0, max(LENGTHS) - 5)))
    output, _ = generate(
        random(), tokens, jnp.full((4,), 5, jnp.int32), jax.random.key(3), sampling=SamplingParams(temperature=1.0)
    )
    assert len({row.tobytes() for row in np.asarray(output.tokens)}) == 4


@pytest.mark.thorough
def test_sampled_tokens_obey_the_filters():
    tokens, _, _ = run(sampling=SamplingParams(temperature=1.0, top_k=3, top_p=0.99, min_p=0.01))
    for prompt, row in zip(prompts(), tokens, strict=True):
        logits = logits_of([*prompt, *row])[len(prompt) - 1 : -1]
        ranks = (logits > logits[np.arange(STEPS), row][:, None] + NEAR_TIE).sum(1)
        assert (ranks < 3).all()


@pytest.mark.thorough
def test_bfloat16_tokens_are_near_the_best():
    """bfloat16 may choose another token than float32 where it cannot tell them apart: a few percent of the logits."""
    model = build_model(CONFIG, "bfloat16")
    abstract = abstract_params(CONFIG, 1, "bfloat16")
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), random(), abstract)
    tokens, lengths = padded()
    run = jax.jit(functools.partial(batch_generate, model, max_new_tokens=STEPS))
    output = run(params, tokens, lengths, jax.random.key(0))
    assert (np.asarray(output.lengths) == STEPS).all()
    for prompt, row in zip(prompts(), np.asarray(output.tokens), strict=True):
        logits = logits_of([*prompt, *row])[len(prompt) - 1 : -1]
        behind = (logits.max(1) - logits[np.arange(STEPS), row]) / np.abs(logits).max(1)
        assert behind.max() < 0.1


def call(model=MODEL, **options):
    tokens, lengths = padded()
    options = {"max_new_tokens": 2} | options
    return batch_generate(model, random(), tokens, lengths, jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {1: 1.0}}, "logit_bias"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"stop": "x"}, "stop="),
        ({"stop_token_ids": [1]}, "stop_token_ids"),
        ({"min_tokens": 1}, "min_tokens=1"),
        ({"n": 2}, "n=2"),
        ({"logprobs": 1}, "logprobs=1"),
        ({"prompt_logprobs": 1}, "prompt_logprobs=1"),
        ({"ignore_eos": True}, "ignore_eos=True"),
        ({"seed": 3}, "seed=3"),
        ({"max_tokens": 99}, "max_tokens=99"),
    ],
)
def test_parameters_that_are_not_applied_are_refused(params, named):
    with pytest.raises(ValueError, match=f"batch_generate does not apply {named}.*it applies temperature"):
        call(sampling=SamplingParams(**params))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        call(max_new_tokens=0)
    with pytest.raises(ValueError, match="at most 16 stop_token_ids are allowed, got 17"):
        call(stop_token_ids=tuple(range(17)))
    with pytest.raises(
        ValueError, match=r"batch_generate runs on one rank, the model was built for 2; use LLM\.generate"
    ):
        call(build_model(CONFIG, "float32", tp=2))


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[1, 2]], None, r"tokens must be an integer array \[prompts, width\], .* got a list"),
        (np.array([1, 2]), None, r"got int64 \[2\]"),
        (np.ones((1, 2), np.float32), None, r"got float32 \[1, 2\]"),
        (np.ones((0, 2), np.int32), None, r"got int32 \[0, 2\]"),
        (np.ones((2, 3), np.int32), [1, 2], r"lengths must be an integer array \[2\], one for each prompt, got a list"),
        (np.ones((2, 3), np.int32), np.ones(3, np.int32), r"got int32 \[3\]"),
        (
            np.ones((2, 3), np.int32),
            np.array([1, 4]),
            r"lengths\[1\] must be between 1 and the width .* 3, got 4",
        ),
        (
            np.ones((2, 3), np.int32),
            np.array([0, 3]),
            r"lengths\[0\] must be between 1 and the width .* 3, got 0",
        ),
        (np.array([[1, 2], [3, 99]]), None, r"tokens\[1, 1\] is 99, outside the vocabulary; allowed: 0 to 9"),
        (np.array([[1, 2], [-1, 3]]), np.array([1, 2]), r"tokens\[1, 0\] is -1, outside the vocabulary"),
    ],
)
def test_prompts_that_cannot_be_are_named(tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        generation._checked_lengths(tokens, lengths, 10)


def test_lengths_default_to_the_width_and_padding_may_hold_anything():
    tokens = np.array([[1, 2], [3, -1]])
    np.testing.assert_array_equal(generation._checked_lengths(tokens[:1], None, 10), [2])
    np.testing.assert_array_equal(generation._checked_lengths(tokens, np.array([2, 1]), 10), [2, 1])
    # What is traced has shapes and types alone.
    with pytest.raises(ValueError, match="lengths must be an integer array"):
        jax.eval_shape(lambda t, n: generation._checked_lengths(t, n, 10), tokens, np.ones(3, np.int32))
    jax.eval_shape(lambda t, n: generation._checked_lengths(t, n, 10), tokens, np.array([0, 9]))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("tokens", [np.ones((1, 5), np.int32), np.ones(5, np.float32), np.ones(0, np.int32)], ids=str)
def test_tokens_that_are_no_sequence_are_named(tokens):
    model, params = build_model(dataclasses.replace(CONFIG, mtp_layers=1), "float32", mtp=True), {}
    for scores in (full_logits, functools.partial(draft_logits, depth=1)):
        with pytest.raises(ValueError, match=r"tokens must be one sequence of integers, \[t\] .* got (int|float)32 \["):
            scores(model, params, tokens)


def test_full_logits_of_a_shorter_sequence_are_a_prefix():
    """Padding to one compiled length changes nothing, bit for bit; what follows a token never reaches it."""
    token_ids = prompts()[1]
    whole = logits_of(token_ids)
    for length in (1, 2, 63, 64, 65):
        np.testing.assert_array_equal(logits_of(token_ids[:length]), whole[:length])


@pytest.mark.thorough
def test_full_logits_have_a_derivative():
    """That of the log-likelihood along a random direction is the slope between two points of it, and padding has no
    part in it.
    """
    tokens = jnp.asarray(prompts()[1], jnp.int32)

    def log_likelihood(params, tokens):
        scores = jax.nn.log_softmax(full_logits(MODEL, params, tokens, 66)[:65])
        return jnp.sum(jnp.take_along_axis(scores, tokens[1:66, None], axis=-1))

    leaves, structure = jax.tree.flatten(random())
    keys = jax.random.split(jax.random.key(5), len(leaves))
    direction = [x * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    value_and_grad = jax.jit(jax.value_and_grad(log_likelihood))

    def at(step):
        moved = structure.unflatten([x + step * d for x, d in zip(leaves, direction, strict=True)])
        return value_and_grad(moved, tokens)

    step = 1e-3
    _, grads = at(0.0)
    slope = sum(jnp.vdot(d, g) for d, g in zip(direction, jax.tree.leaves(grads), strict=True))
    np.testing.assert_allclose((at(step)[0] - at(-step)[0]) / (2 * step), slope, rtol=1e-2)
