"""Ranks: the table covers every leaf, what several hold is the same, and forks work as on one."""

import dataclasses
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from gdnjax import EngineConfig, LayerKind, SamplingParams, abstract_params
from gdnjax.memory import MemoryPlan
from gdnjax.models import engine_geometry, partition
from gdnjax.models.partition import EXPERT_PARALLEL_TABLE, TABLE, spec_of
from gdnjax.serving import packing
from gdnjax.serving.llm import LLM
from gdnjax.sharding import AXIS, P, make_mesh, path_name
from gdnjax.state import empty_state, shardings_of, specs_of
from tests.config.configurations import from_hf
from tests.driver import Admission, Driver, Piece
from tests.ledger import LedgerModel, Oracle
from tests.micro import MICRO, micro_model, micro_params
from tests.pools import pool_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def leaf_names(tree) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def abstract_state(tp: int):
    config = EngineConfig(
        max_num_seqs=2, tensor_parallel_size=tp, num_speculative_tokens=2, draft_acceptance="rejection"
    )
    geometry = engine_geometry(micro_model(tp), config)
    plan = MemoryPlan.of_counts(geometry, num_slots=2, num_blocks=5, num_logit_rows=2)
    return jax.eval_shape(lambda: empty_state(geometry, plan, config, 64))


def family_params(family: str):
    return abstract_params(from_hf(family), 1, "float32")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_leaf_has_a_place_and_is_divided(tp):
    mesh = make_mesh(tp)
    params, state = abstract_params(MICRO, tp, "float32"), abstract_state(tp)
    whole = abstract_params(MICRO.with_expert_parallel(), tp, "float32")
    assert jax.tree.map(lambda leaf: leaf.shape, whole) == jax.tree.map(lambda leaf: leaf.shape, params)
    for tree, specs in (
        (params, partition.specs_of(params)),
        (whole, partition.specs_of(whole, expert_parallel=True)),
        (state, specs_of(state)),
    ):
        names = leaf_names(tree)
        assert len(set(names)) == len(names)
        # Raises where the trees differ, or the ranks do not divide an axis.
        jax.tree.map(lambda leaf, spec: NamedSharding(mesh, spec).shard_shape(leaf.shape), tree, specs)


def test_ranks_share_what_the_kinds_say():
    """Heads and channels of states and pages; nothing else of the cache."""
    cache = specs_of(abstract_state(2)).cache
    assert cache.slots["delta"] == {
        "ssm": P(None, None, AXIS),
        "conv": P(None, None, None, AXIS),
        "pending_ab": P(None, None, None, AXIS),
        "layout": P(),
    }
    assert cache.pages["attention"] == dict.fromkeys(("k", "v"), P(None, None, None, AXIS))


def test_every_line_of_the_table_is_used():
    with_head = dataclasses.replace(MICRO, mtp_layers=1)
    names = leaf_names(abstract_params(with_head, 1, "float32", mtp=True))
    names += [
        name for family in ("deepseek_v3", "kimi_linear", "olmo_hybrid") for name in leaf_names(family_params(family))
    ]
    first = [next(pattern for pattern, _ in TABLE if re.fullmatch(pattern, name)) for name in names]
    assert {pattern for pattern, _ in TABLE} == set(first)
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern, _ in EXPERT_PARALLEL_TABLE)


@pytest.mark.parametrize("name", ["layers.0.linear_attn.in_proj_x.weight", "slots.hidden", "weight"])
def test_unknown_name_raises(name):
    with pytest.raises(KeyError, match="not in the sharding table"):
        spec_of(name)


def test_too_few_devices_raise():
    with pytest.raises(ValueError, match="needs 64 devices"):
        make_mesh(64)


def test_process_without_a_rank_raises():
    devices = [types.SimpleNamespace(platform="gpu", process_index=process) for process in (0, 0, 1, 1)]
    with pytest.raises(ValueError, match=r"=2 leaves process 1 without a rank; .* 3 to 4$"):
        make_mesh(2, devices)


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.thorough), 4])
def llm(request) -> LLM:
    """After a run of three requests that use logit rows, log-probabilities and sampling."""
    tp = request.param
    config = EngineConfig(
        tensor_parallel_size=tp, max_num_seqs=4, max_num_batched_tokens=128, prefill_buckets=(128,),
        decode_buckets=(4,), state_layout="mixed", max_logprobs=5, warmup=False,
    )  # fmt: skip
    llm = LLM.from_model(micro_model(tp), micro_params(tp), config, max_model_len=128)
    emitted: list = []
    read = llm.engine.runner.read

    def keep(turn):
        emitted.append((turn.prefill, turn.decode))
        return read(turn)

    llm.engine.runner.read = keep
    params = [
        SamplingParams(temperature=0.0, max_tokens=8, logprobs=5),
        SamplingParams(temperature=0.8, top_k=9, top_p=0.9, seed=3, max_tokens=8),
        SamplingParams(temperature=1.0, repetition_penalty=1.2, frequency_penalty=0.5, seed=4, max_tokens=8),
    ]
    prompts = [np.random.default_rng(i).integers(0, MICRO.vocab_size, 30 + i).tolist() for i in range(3)]
    llm.generate(prompts, params, use_tqdm=False)
    llm.emitted = emitted
    return llm


@pytest.mark.parametrize(("of_model", "of_engine"), [(True, False), (False, True)])
def test_engine_and_model_share_out_experts_alike_or_raise(of_model, of_engine):
    config = EngineConfig(tensor_parallel_size=2, enable_expert_parallel=of_engine)
    with pytest.raises(
        ValueError, match=f"enable_expert_parallel is {of_engine}, and the model was built with expert_"
    ):
        LLM.from_model(micro_model(2, expert_parallel=of_model), {}, config)


@pytest.fixture(scope="module")
def ledger() -> Driver:
    """Integers on two ranks, in a mixed pool."""
    model = LedgerModel(tp=2)
    return Driver(model, model.params(), "mixed")


@pytest.mark.thorough
def test_forks_on_two_ranks_equal_the_oracle(ledger):
    """From a checkpoint within a block that prefill wrote, and from a copy of what decode wrote."""
    prompt, suffix = (np.random.default_rng(i).integers(0, 61, 40).tolist() for i in range(2))
    oracle = Oracle(LedgerModel())
    ledger.admit(Admission(1))
    first = ledger.prefill(Piece(1, [1, 2, 3], prompt, checkpoints={23: 5})).tokens[0, 0]
    produced = [int(first), *ledger.decode(1)[0]]
    assert produced == oracle.solo_run(prompt, 2)
    ledger.seal((1, 6, 41))
    ledger.admit(Admission(2, length=23, copy=(2, 7)), Admission(3, length=41, copy=(3, 11)))
    emitted = ledger.prefill(
        Piece(2, [1, 7, 8, 9], suffix, 23, read_slot=5), Piece(3, [1, 2, 11, 12, 13, 14], suffix, 41, read_slot=6)
    )
    runs = [[int(token)] for token in emitted.tokens[:2, 0]]
    for run, tokens in zip(runs, ledger.decode(2, 3), strict=True):
        run += tokens
    assert runs[0] == oracle.solo_run(prompt[:23] + suffix, 2)
    assert runs[1] == oracle.solo_run([*prompt, produced[0], *suffix], 2)
    assert_equal_on_all_ranks(ledger.state.slots.hidden)


def test_rows_of_the_vocabulary_go_to_the_ranks_of_their_tokens(ledger):
    rows, tokens = ledger.state.token_counts.shape
    bias, counts = np.arange(tokens, dtype=np.float32), np.arange(1, 62, dtype=np.uint16)
    batch = dataclasses.replace(packing.pack_logit_row(None, 61, tokens), row=np.int32(1), bias=bias)
    ledger.state = ledger.steps.fill_logit_row(ledger.state, batch)
    np.testing.assert_array_equal([part[1] for part in rank_values(ledger.state.logit_rows.bias)], np.split(bias, 2))
    entries = (np.full(61, rows - 1), np.arange(61), counts)
    ledger.state = ledger.steps.fill_counts(ledger.state, packing.count_batch([rows - 1], entries, rows=2))
    found = [part[rows - 1] for part in rank_values(ledger.state.token_counts)]
    np.testing.assert_array_equal(found, np.split(np.pad(counts, (0, tokens - 61)), 2))


def rank_values(array: jax.Array) -> list[np.ndarray]:
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    return [np.asarray(shard.data) for shard in shards]


def assert_equal_on_all_ranks(array: jax.Array) -> None:
    first, *others = rank_values(array)
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_all_ranks_emit_the_same(llm):
    """Bit for bit: nothing in the step checks it, since shard_map runs without a check of varying types."""
    assert len(llm.emitted) >= 8
    for leaf in jax.tree.leaves(llm.emitted):
        assert len(leaf.addressable_shards) == llm.model.tp
        assert_equal_on_all_ranks(leaf)


def test_replicated_state_is_the_same_on_all_ranks(llm):
    specs = jax.tree.leaves(specs_of(llm.engine.runner.state), is_leaf=lambda x: isinstance(x, P))
    for leaf, spec in zip(jax.tree.leaves(llm.engine.runner.state), specs, strict=True):
        if AXIS not in spec:
            assert_equal_on_all_ranks(leaf)


def test_state_keeps_its_shardings(llm):
    wanted = shardings_of(llm.engine.runner.state, llm.mesh)
    jax.tree.map(lambda leaf, where: leaf.sharding.is_equivalent_to(where, leaf.ndim) or pytest.fail(str(where)),
                 llm.engine.runner.state, wanted)  # fmt: skip


def test_ranks_of_one_kv_head_hold_the_same_keys(llm):
    """With more ranks than kv heads, neighbours hold one head: weights, keys and values."""
    copies = max(1, llm.model.tp // MICRO.attention.num_kv_heads)
    attention = llm.params["layers"][MICRO.layer_kinds.index(LayerKind.ATTENTION)]["self_attn"]
    arrays = [pool_of(llm.engine.runner.state, "k"), pool_of(llm.engine.runner.state, "v")]
    arrays += [attention[name]["weight"] for name in ("k_proj", "v_proj")]
    for array in arrays:
        ranks = rank_values(array)
        for rank, values in enumerate(ranks):
            np.testing.assert_array_equal(values, ranks[rank - rank % copies])
        assert np.any(ranks[0] != ranks[copies]) if copies < llm.model.tp else True
