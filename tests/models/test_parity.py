"""The engine computes what transformers computes: live where torch is installed, from stored goldens everywhere."""

import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gdnjax import LLM, EngineConfig, SamplingParams, draft_logits, full_logits, load_model
from tests import checkpoints
from tests.make_tokenizer import write_tokenizer

pytestmark = pytest.mark.usefixtures("quickly_compiled")

GOLDENS = pathlib.Path(__file__).parents[1] / "golden" / "parity"
STORED_FAMILIES = ("qwen3_5", "qwen3_5_moe_text", "qwen3_next")

LENGTHS = (1, 2, 63, 64, 65, 200)
GREEDY_LENGTHS = (1, 7, 64, 65, 130)
"""One more than the engine below runs at once."""

GREEDY_STEPS = 64

LOGIT_BOUND = 2e-4
"""Of max|difference| / max|reference| at each position. Two orders of float32 summation in transformers itself (one
pass, or resumed from a cache) differ by up to 1.1e-5 on these checkpoints; the smallest fault that they are built to
show (one layer's state lost) moves the logits by more than 1e-2."""

NEAR_TIE = 1e-3
"""Gap of the two largest logits, relative to the largest absolute one, below which rounding may swap them: five times
the bound on logits. Random weights meet such a gap about once in 64 steps, and rounding decides few of those."""

MAX_NEAR_TIES = 2
"""Prompts of all families together that may part from the reference, each at a near tie."""


@pytest.fixture(scope="module")
def near_ties():
    """The (family, prompt length, step) at which rounding has chosen another token, over the whole module."""
    return set()


@pytest.fixture(scope="module", params=checkpoints.PARITY_FAMILIES)
def live(request, tmp_path_factory):
    """(family, checkpoint directory, engine) of a checkpoint that transformers has just written."""
    pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp(request.param)
    checkpoints.write_checkpoint(request.param, directory)
    write_tokenizer(directory, vocab_size=400)
    return request.param, directory, _engine(directory)


@pytest.fixture(scope="module", params=STORED_FAMILIES)
def stored(request, tmp_path_factory):
    """(family, stored reference, engine) of a stored golden."""
    source = GOLDENS / request.param
    directory = tmp_path_factory.mktemp(request.param)
    shutil.copytree(source, directory, dirs_exist_ok=True)
    write_tokenizer(directory, vocab_size=300)
    with np.load(source / "reference.npz") as arrays:
        reference = dict(arrays)
    return request.param, reference, _engine(directory)


def _engine(directory, ranks=1, **options):
    # 128 tokens a step: the longer prompts are prefilled in pieces. One bucket each, since compiling is the cost here.
    config = EngineConfig(
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=128,
        block_size=16,
        max_model_len=512,
        prefill_buckets=(128,),
        decode_buckets=(4,),
        tensor_parallel_size=ranks,
        warmup=False,
        **options,
    )
    return LLM(directory, config)


@functools.lru_cache(maxsize=1)
def _logits_function(llm):
    """One compilation for all lengths."""
    return jax.jit(functools.partial(full_logits, llm.model))


def _logits(llm, token_ids):
    padded = np.zeros((max(LENGTHS),), np.int32)
    padded[: len(token_ids)] = token_ids
    logits = _logits_function(llm)(llm.params, padded, jnp.int32(len(token_ids)))
    return np.asarray(logits)[: len(token_ids)]


def _generate_greedily(llm, prompts, steps=GREEDY_STEPS):
    """Tokens [prompts, steps] of the prompts, given to the engine together."""
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return np.array([output.outputs[0].token_ids for output in outputs])


def _check_live(family, directory, prompts, actual, steps, near_ties):
    """`_check_greedy` against transformers. It follows the tokens that it is to have chosen, which takes one pass for a
    prompt in place of one for each step: up to the first that it would not choose they are its own.
    """
    assert actual.shape == (len(prompts), steps)
    reference = [
        checkpoints.reference_along(directory, prompt, tokens.tolist())
        for prompt, tokens in zip(prompts, actual, strict=True)
    ]
    _check_greedy(family, prompts, actual, reference, near_ties)


def _check_greedy(family, prompts, actual, reference, near_ties):
    """Tokens equal the reference's up to a first near tie, of which there are few over all families."""
    assert actual.shape == (len(prompts), len(reference[0].tokens))
    for prompt, tokens, expected in zip(prompts, actual, reference, strict=True):
        steps = np.flatnonzero(tokens != expected.tokens)
        if not len(steps):
            continue
        # From here on the two continue different texts.
        step = steps[0]
        where = f"{family}, prompt of {len(prompt)} tokens, step {step}"
        assert expected.gaps[step] < NEAR_TIE, where
        assert tokens[step] == expected.runners_up[step], where
        near_ties.add((family, len(prompt), int(step)))
    assert len(near_ties) <= MAX_NEAR_TIES, sorted(near_ties)


def _stored_greedy(reference):
    prompts = [reference["prompt"][:length].tolist() for length in reference["greedy_lengths"]]
    rows = zip(reference["greedy_tokens"], reference["greedy_runners_up"], reference["greedy_gaps"], strict=True)
    return prompts, [
        checkpoints.Greedy(tokens=tokens, runners_up=runners_up, gaps=gaps) for tokens, runners_up, gaps in rows
    ]


# Architectures of which nothing is stored: what is stored of the others comes in each length.
@pytest.mark.short_cases("deepseek_v3-64", "kimi_linear-65", "olmo_hybrid-200")
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal_transformers(live, length):
    _, directory, llm = live
    prompt = checkpoints.prompt_tokens(length)
    reference = checkpoints.reference_logits(directory, prompt)
    actual = _logits(llm, prompt)
    assert actual.shape == reference.shape
    assert checkpoints.relative_error(actual, reference) < LOGIT_BOUND


# Of the others greedy tokens are stored, or it is the same text model by other names, whose logits are compared above.
@pytest.mark.thorough
@pytest.mark.parametrize("live", ["qwen3_5_text", "deepseek_v3", "kimi_linear", "olmo_hybrid"], indirect=True)
def test_greedy_tokens_equal_transformers(live, near_ties):
    family, directory, llm = live
    prompts = [checkpoints.prompt_tokens(length) for length in GREEDY_LENGTHS]
    one_by_one = np.concatenate([_generate_greedily(llm, [prompt]) for prompt in prompts])
    _check_live(family, directory, prompts, one_by_one, GREEDY_STEPS, near_ties)
    _check_live(family, directory, prompts, _generate_greedily(llm, prompts), GREEDY_STEPS, near_ties)


@pytest.mark.thorough
@pytest.mark.parametrize("live", ["deepseek_v3"], indirect=True)
def test_prefix_is_gone_on_from_at_any_block_without_a_state(live, near_ties):
    """No request has ended or been cut where they part: of 83 tokens in common the five whole blocks of 16 are hit."""
    family, directory, llm = live
    first = checkpoints.prompt_tokens(130, seed=5)
    second = [*first[:83], *checkpoints.prompt_tokens(40, seed=6)]
    outputs = []
    for prompt in (first, second):
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        outputs += llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [0, 80]
    assert not llm.model.cache_spec(block_size=16, ssm_dtype="float32").slots
    tokens = np.array([output.outputs[0].token_ids for output in outputs])
    _check_live(f"{family}, a hit", directory, [first, second], tokens, 16, near_ties)


@pytest.mark.thorough
@pytest.mark.parametrize("live", ["olmo_hybrid"], indirect=True)
def test_conversation_that_goes_on_hits_the_state_at_its_end(live, near_ties):
    """Prompt and output but for the last token are in the cache: they are sealed in the middle of a block."""
    family, directory, llm = live
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    first = checkpoints.prompt_tokens(130, seed=5)
    (one,) = llm.generate([{"prompt_token_ids": first}], params, use_tqdm=False)
    second = [*first, *one.outputs[0].token_ids, *checkpoints.prompt_tokens(40, seed=6)]
    (other,) = llm.generate([{"prompt_token_ids": second}], params, use_tqdm=False)
    assert (one.num_cached_tokens, other.num_cached_tokens) == (0, 130 + 15)
    tokens = np.array([output.outputs[0].token_ids for output in (one, other)])
    _check_live(f"{family}, a hit", directory, [first, second], tokens, 16, near_ties)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("qwen3_5_moe_tp", 4),
        ("qwen3_next_tp", 2),
        ("deepseek_v3_tp", 4),
        ("kimi_linear_tp", 4),
        ("olmo_hybrid_tp", 4),
    ],
)
def test_greedy_tokens_of_ranks_equal_transformers(family, ranks, tmp_path, near_ties):
    """From the disk straight into shards, through a padded vocabulary and replicated kv heads, or latents."""
    pytest.importorskip("torch")
    if len(jax.devices()) < ranks:
        pytest.skip(f"needs {ranks} devices")
    checkpoints.write_checkpoint(family, tmp_path)
    write_tokenizer(tmp_path, vocab_size=400)
    # Few steps: the ranks of a test share the cores of one machine.
    prompts = [checkpoints.prompt_tokens(length) for length in (1, 65, 130)]
    with _engine(tmp_path, ranks) as llm:
        tokens = _generate_greedily(llm, prompts, 16)
    _check_live(f"{family}, {ranks} ranks", tmp_path, prompts, tokens, 16, near_ties)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_logits_of_an_fp8_checkpoint_equal_those_of_transformers_dequantised_model(family, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    checkpoints.write_checkpoint(family, tmp_path)
    # transformers wants whole blocks.
    assert checkpoints.quantise_in_place(tmp_path, (8, 8)) > 40
    model, params = load_model(tmp_path, dtype="float32")
    tokens = checkpoints.prompt_tokens(130)
    logits = full_logits(model, params, jnp.array(tokens, jnp.int32))
    error = checkpoints.relative_error(np.asarray(logits), checkpoints.reference_logits(tmp_path, tokens))
    print(f"{family}: {error:.1e}")
    assert error < LOGIT_BOUND


@pytest.mark.thorough
def test_greedy_tokens_of_an_fp8_checkpoint_on_ranks_equal_transformers(tmp_path, near_ties):
    """Its codes stay codes. Ranks cut blocks of 8 x 8."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    checkpoints.write_checkpoint("qwen3_5_moe_text", tmp_path)
    write_tokenizer(tmp_path, vocab_size=400)
    checkpoints.quantise_in_place(tmp_path, (8, 8))
    prompts = [checkpoints.prompt_tokens(length) for length in (1, 65, 130)]
    with _engine(tmp_path, 2) as llm:
        assert llm.load_report is not None
        assert llm.load_report.dequantised == 0
        tokens = _generate_greedily(llm, prompts, 16)
    _check_live("qwen3_5_moe_text in FP8, 2 ranks", tmp_path, prompts, tokens, 16, near_ties)


@pytest.mark.thorough
def test_head_that_is_stored_as_a_layer_drafts_what_transformers_drafts(tmp_path, near_ties):
    """Its logits, and then an engine that speculates with it: over latents, without a state to fold, and past a hit.

    A random head is right about nothing but noise, so that drafts are accepted only where much of it is in the draw.
    """
    pytest.importorskip("torch")
    checkpoints.write_checkpoint_with_head("deepseek_v3", tmp_path)
    write_tokenizer(tmp_path, vocab_size=400)
    prompt = checkpoints.prompt_tokens(130)
    with _engine(tmp_path, num_speculative_tokens=2) as llm:
        target, drafts = jax.jit(functools.partial(draft_logits, llm.model), static_argnums=2)(
            llm.params, np.array(prompt, np.int32), 1
        )
        reference = checkpoints.reference_draft_logits(tmp_path, prompt)
        assert checkpoints.relative_error(np.asarray(drafts)[0, 1:], reference) < LOGIT_BOUND
        logits = checkpoints.reference_logits(tmp_path, prompt)
        assert checkpoints.relative_error(np.asarray(target), logits) < LOGIT_BOUND
        prompts = [prompt, [*prompt[:83], *checkpoints.prompt_tokens(40, seed=6)]]
        tokens = np.concatenate([_generate_greedily(llm, [prompt], 32) for prompt in prompts])
        # The last token of a hit is fed again: nobody has kept its hidden state.
        assert llm.stats()["prefix_cache"]["hit_tokens"] == 79
        noisy = [
            llm.generate(
                [{"prompt_token_ids": prompts[1]}],
                SamplingParams(temperature=4.0, seed=3, max_tokens=48, ignore_eos=True, speculate=speculate),
                use_tqdm=False,
            )[0]
            for speculate in (False, True)
        ]
        stats = llm.stats()
    _check_live("deepseek_v3, drafts", tmp_path, prompts, tokens, 32, near_ties)
    assert noisy[0].outputs[0].token_ids == noisy[1].outputs[0].token_ids
    assert stats["num_accepted_draft_tokens"] > 20


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal_stored(stored, length):
    _, reference, llm = stored
    kept = reference["positions"] < length
    actual = _logits(llm, reference["prompt"][:length])
    assert actual.shape == (length, reference["logits"].shape[1])
    error = checkpoints.relative_error(actual[reference["positions"][kept]], reference["logits"][kept])
    assert error < LOGIT_BOUND


@pytest.mark.short_cases("qwen3_5_moe_text")
def test_greedy_tokens_equal_stored(stored, near_ties):
    family, arrays, llm = stored
    prompts, reference = _stored_greedy(arrays)
    one_by_one = np.concatenate([_generate_greedily(llm, [prompt]) for prompt in prompts])
    _check_greedy(f"stored {family}", prompts, one_by_one, reference, near_ties)
    _check_greedy(f"stored {family}", prompts, _generate_greedily(llm, prompts), reference, near_ties)


@pytest.mark.short_cases("qwen3_5_moe_text", "deepseek_v3")
@pytest.mark.parametrize("family", checkpoints.PARITY_FAMILIES)
def test_checkpoint_state_matters(family, tmp_path):
    """A layer's lost state moves the logits far beyond the bound, recurrent ones and latents 50 tokens later, too."""
    pytest.importorskip("torch")
    checkpoints.write_checkpoint(family, tmp_path)
    prompt = checkpoints.prompt_tokens(200)
    kept = checkpoints.reference_logits_resumed(tmp_path, prompt, 100)
    assert checkpoints.relative_error(kept, checkpoints.reference_logits(tmp_path, prompt)[100:]) < LOGIT_BOUND
    text = checkpoints.FAMILIES[family].text
    layer_types = text.get("layer_types", ["latent"] * text["num_hidden_layers"])
    for layer in [i for i, kind in enumerate(layer_types) if kind == "latent"]:
        no_latents = checkpoints.reference_logits_resumed(tmp_path, prompt, 100, [(layer, "keys")])
        assert checkpoints.relative_error(no_latents[50:], kept[50:]) > 1e-2, layer
    for layer in [i for i, kind in enumerate(layer_types) if kind == "linear_attention"]:
        no_conv = checkpoints.reference_logits_resumed(tmp_path, prompt, 100, [(layer, "conv")])
        no_state = checkpoints.reference_logits_resumed(tmp_path, prompt, 100, [(layer, "recurrent")])
        assert checkpoints.relative_error(no_conv, kept) > 1e-2, layer
        assert checkpoints.relative_error(no_state[50:], kept[50:]) > 1e-2, layer


@pytest.mark.parametrize("family", STORED_FAMILIES)
def test_stored_reference_equals_transformers(family):
    pytest.importorskip("torch")
    with np.load(GOLDENS / family / "reference.npz") as arrays:
        logits = checkpoints.reference_logits(GOLDENS / family, arrays["prompt"])
        assert checkpoints.relative_error(logits[arrays["positions"]], arrays["logits"]) < LOGIT_BOUND


@pytest.mark.parametrize("family", STORED_FAMILIES)
def test_stored_half_lives_span_1_to_200_tokens(family):
    weights = safetensors.numpy.load_file(GOLDENS / family / "model.safetensors")
    layers = [name.removesuffix("A_log") for name in weights if name.endswith("A_log")]
    assert layers
    for layer in layers:
        decay = np.exp(weights[f"{layer}A_log"]) * np.log1p(np.exp(weights[f"{layer}dt_bias"]))
        half_lives = np.log(2.0) / decay
        np.testing.assert_allclose([half_lives.min(), half_lives.max()], checkpoints.HALF_LIVES, rtol=1e-4)
