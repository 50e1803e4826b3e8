"""A head of eight bits for drafts: what it is made of, and that it only proposes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import LLM, EngineConfig, SamplingParams, build_model, full_logits
from gdnjax.backend import INTERPRET, REFERENCE
from gdnjax.memory.weights import weight_bytes
from gdnjax.models import abstract_params, draft_head
from gdnjax.quantized import dequantized
from gdnjax.serving import planning
from gdnjax.serving.opening import check_model
from tests.draws import IMPOSSIBLE, fit, softmax
from tests.ledger import LedgerModel
from tests.micro import MICRO, SHALLOW, shallow_params
from tests.serving.exactness import CACHED, build, build_shallow, prompt_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

DRAWS = 300

SEEDED = [
    SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, max_tokens=16, ignore_eos=True),
]


def tokens_of(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([prompt_of(0, 40), prompt_of(1, 7)], SEEDED, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def drafting() -> LLM:
    return build_shallow(**CACHED, num_speculative_tokens=2, draft_head="fp8")


def test_its_codes_are_the_heads_own_rounded_row_by_row():
    params = jax.tree.map(jnp.asarray, shallow_params(mtp=True))
    made = draft_head.with_draft_head(params)
    weight, head = made["draft_head"]["weight"], np.asarray(params["lm_head"]["weight"])
    assert weight.grid == (1, head.shape[1])
    scale = np.abs(head).max(1, keepdims=True) / 448
    np.testing.assert_allclose(weight.scale, scale, rtol=1e-6)
    # Three bits behind the first: half a place is 1/16.
    assert (np.abs(dequantized(weight, jnp.float32) - head) <= np.maximum(np.abs(head) / 16, scale * 2**-9)).all()
    assert draft_head.without_draft_head(made).keys() == params.keys()


@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("backend", [REFERENCE, INTERPRET], ids=["reference", "interpret"])
def test_drafts_are_scored_by_it_and_tokens_by_the_target(backend, rows):
    """Of more rows than a kernel takes, too."""
    plain = build_model(SHALLOW, "float32", mtp=True, backend=backend)
    params = draft_head.with_draft_head(jax.tree.map(jnp.asarray, shallow_params(mtp=True)))
    hidden = jax.random.normal(jax.random.key(0), (rows, SHALLOW.hidden_size))
    own, copy = (
        np.asarray(x) for x in (params["lm_head"]["weight"], dequantized(params["draft_head"]["weight"], "f4"))
    )
    model = plain.with_draft_head()
    np.testing.assert_allclose(model.draft_logits(params, hidden), hidden @ copy.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.logits(params, hidden), hidden @ own.T, rtol=1e-5, atol=1e-5)
    assert model.draft_logits(params, hidden).dtype == jnp.float32
    without = draft_head.without_draft_head(params)
    np.testing.assert_array_equal(plain.draft_logits(without, hidden), plain.logits(without, hidden))


@pytest.mark.parametrize("tp", [1, 2])
def test_it_is_planned_to_the_byte(tp):
    params = draft_head.with_abstract_draft_head(abstract_params(MICRO, tp, "bfloat16", mtp=True))
    held = planning.weight_bytes(params, tp)
    assert weight_bytes(MICRO, tp=tp, dtype="bfloat16", mtp=True, draft_head=True) == held


def test_tokens_are_those_of_a_run_without_drafts(drafting):
    with build_shallow(**CACHED) as llm:
        assert tokens_of(drafting) == tokens_of(llm)
    assert drafting.memory_plan.weight_bytes == planning.weight_bytes(drafting.engine.runner.params, 1)


@pytest.mark.thorough
def test_ranks_have_parts_of_it():
    """Each a copy of its own part of the head, padding included."""
    drafts = {"num_speculative_tokens": 2, "draft_head": "fp8"}
    with build(**CACHED, **drafts, tensor_parallel_size=2) as llm, build(**CACHED, **drafts) as one:
        weight = llm.engine.runner.params["draft_head"]["weight"]
        assert {shard.data.shape[0] for shard in weight.scale.addressable_shards} == {51}
        whole = one.engine.runner.params["draft_head"]["weight"]
        np.testing.assert_array_equal(dequantized(weight, "f4")[:101], dequantized(whole, "f4"))
        assert tokens_of(llm) == tokens_of(one)


def test_new_weights_make_a_new_one(drafting):
    old = {name: np.asarray(x) for name, x in drafting.params["lm_head"].items()}
    weight = drafting.engine.runner.params["draft_head"]["weight"]
    assert "draft_head" not in drafting.params
    drafting.update_weights(jax.tree.map(lambda x: x * np.float32(2), drafting.params))
    found = drafting.engine.runner.params["draft_head"]["weight"]
    np.testing.assert_array_equal(dequantized(found, "f4"), 2 * dequantized(weight, "f4"))
    drafting.update_weights({**drafting.params, "lm_head": old})


def test_rejection_gives_the_targets_distribution_whatever_the_head_proposes():
    """Its rows in another order: whoever took its drafts for the target's head's would be far off."""
    allowed = [3, 40, 77, 90]
    config = {"num_speculative_tokens": 2, "draft_head": "fp8", "draft_acceptance": "rejection"}
    with build_shallow(**config, max_num_seqs=16, decode_buckets=(16,)) as llm:
        params = llm.engine.runner.params
        weight = params["draft_head"]["weight"]
        shuffled = jax.tree.map(lambda x: jnp.roll(x, 37, axis=0), weight)
        llm.engine.runner.params = {**params, "draft_head": {"weight": shuffled}}
        prompt = prompt_of(0, 9)
        sampling = [
            SamplingParams(temperature=1.0, max_tokens=4, seed=i, allowed_token_ids=allowed, ignore_eos=True)
            for i in range(DRAWS)
        ]
        outputs = llm.generate([prompt] * len(sampling), sampling, use_tqdm=False)
        drawn = [tuple(output.outputs[0].token_ids[:3]) for output in outputs]
        target = build_model(SHALLOW, "float32", mtp=True)
        begun = [*itertools.product(allowed, repeat=2)]
        shares = [
            softmax(np.asarray(full_logits(target, llm.params, jnp.array([*prompt, *two])))[-3:, allowed])
            for two in begun
        ]
    # Of the first token, the second behind it, and the third behind both.
    places = [[allowed.index(token) for token in two] for two in begun]
    expected = [each[0, a] * each[1, b] * each[2] for each, (a, b) in zip(shares, places, strict=True)]
    numbers = {three: number for number, three in enumerate(itertools.product(allowed, repeat=3))}
    assert fit([numbers[three] for three in drawn], np.concatenate(expected)) > IMPOSSIBLE


def test_a_model_of_another_kind_has_none():
    config = EngineConfig(num_speculative_tokens=2, draft_head="fp8")
    with pytest.raises(ValueError, match="draft_head='fp8' is of a HybridModel, got a LedgerModel"):
        check_model(LedgerModel(mtp=True), config)
