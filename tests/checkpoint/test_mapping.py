"""Index vectors and the reads that follow from them."""

import dataclasses
import itertools
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdnjax.checkpoint import mapping
from tests.checkpoint import tiny

indices = st.lists(st.integers(-1, 9), max_size=30).map(lambda rows: np.array(rows, np.int64))


@given(indices)
def test_runs_reproduce_the_index_vector(index):
    rebuilt = np.full(len(index), mapping.PADDING)
    for position, row, length in mapping.runs(index):
        assert length > 0
        assert (rebuilt[position : position + length] == mapping.PADDING).all()
        rebuilt[position : position + length] = np.arange(row, row + length)
    np.testing.assert_array_equal(rebuilt, index)


@given(indices)
def test_runs_are_as_long_as_can_be(index):
    found = mapping.runs(index)
    for (position, row, length), (next_position, next_row, _) in itertools.pairwise(found):
        assert (position + length, row + length) != (next_position, next_row)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cfg", [tiny.DENSE, tiny.MOE, tiny.NEXT], ids=["dense", "moe", "next"])
def test_rows_reach_every_checkpoint_row(cfg, tp):
    stored: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for name, tensor in tiny.global_tensors(tiny.model_tensors(cfg), cfg, tp).items():
        rows = mapping.rows_of(name, tensor.shape, cfg, tp)
        key = name.rsplit(".", 2)[0] + rows.stored_as if rows.stored_as else name
        stored.setdefault(key, set()).update(rows.index[rows.index != mapping.PADDING].tolist())
        sizes[key] = rows.stored_size
    assert stored == {key: set(range(size)) for key, size in sizes.items()}


@pytest.mark.parametrize(("num_heads", "tp", "held"), [(2, 1, [0, 1]), (2, 2, [0, 1]), (2, 4, [0, 0, 1, 1])])
def test_kv_heads_are_replicated_to_neighbouring_ranks(num_heads, tp, held):
    rows = mapping.replicate_heads(num_heads, 3, tp).reshape(-1, 3)
    np.testing.assert_array_equal(rows[:, 0] // 3, held)


def test_rank_major_keeps_the_parts_of_a_rank_together():
    index = mapping.rank_major([np.arange(4), np.arange(4, 12)], tp=2)
    np.testing.assert_array_equal(index, [0, 1, 4, 5, 6, 7, 2, 3, 8, 9, 10, 11])


def test_interleaved_rows_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    delta = tiny.NEXT.delta
    module = types.SimpleNamespace(
        num_k_heads=delta.num_key_heads,
        num_v_heads=delta.num_value_heads,
        head_k_dim=delta.key_head_dim,
        head_v_dim=delta.value_head_dim,
    )
    # Row numbers in the place of activations: what comes out says which row each output came from.
    qkvz = torch.arange(2 * delta.key_dim + 2 * delta.value_dim)[None, None]
    ba = torch.arange(2 * delta.num_value_heads)[None, None]
    reorder = Qwen3NextGatedDeltaNet.fix_query_key_value_ordering
    q, k, v, z, b, a = (part.reshape(-1).numpy() for part in reorder(module, qkvz, ba))

    def index(name):
        shape = tiny.model_tensors(tiny.NEXT)[f"layers.0.linear_attn.{name}.weight"].shape
        return mapping.rows_of(f"layers.0.linear_attn.{name}.weight", shape, tiny.NEXT, 1).index

    np.testing.assert_array_equal(index("in_proj_qkv"), np.concatenate([q, k, v]))
    np.testing.assert_array_equal(index("in_proj_z"), z)
    np.testing.assert_array_equal(index("in_proj_b"), b)
    np.testing.assert_array_equal(index("in_proj_a"), a)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("module", "parts", "sizes"),
    [
        ("in_proj_qkv", "{}_proj", (12, 12, 40)),
        ("conv1d", "{}_conv1d", (12, 12, 40)),
        # Not at the bounds of q, k and v, as transformers cuts them.
        ("conv1d", "{}_conv1d", (21, 21, 22)),
    ],
)
def test_separate_tensors_are_joined(module, parts, sizes, tp):
    cfg = dataclasses.replace(tiny.DENSE, separate_projections=True)
    path = "layers.0.linear_attn"
    whole = np.random.default_rng(0).standard_normal((64, 6))
    names = [f"{path}.{parts.format(part)}.weight" for part in "qkv"]
    stored = dict(zip(names, np.split(whole, np.cumsum(sizes)[:-1]), strict=True))
    convolutions = {name: len(stored[name]) for name in mapping.apart_convolutions(names)}
    assert bool(convolutions) == (module == "conv1d")
    name = f"{path}.{module}.weight"
    origin = mapping.origin_of(name, whole.shape, cfg, tp, experts_apart=False, convolutions=convolutions)
    assert {part.tensor: part.shape for part in origin.parts} == {name: part.shape for name, part in stored.items()}
    found = np.full_like(whole, np.nan)
    for copy in mapping.copies(origin, (slice(0, 64), slice(0, 6))):
        found[copy.target] = stored[copy.tensor][copy.source]
    np.testing.assert_array_equal(found, tiny.global_tensors({name: whole}, cfg, tp)[name])


def test_convolutions_of_another_size_are_expected_as_published():
    cfg = dataclasses.replace(tiny.DENSE, separate_projections=True)
    convolutions = {f"layers.0.linear_attn.{part}_conv1d.weight": 20 for part in "qkv"}
    name = "layers.0.linear_attn.conv1d.weight"
    origin = mapping.origin_of(name, (64, 1, 4), cfg, 1, experts_apart=False, convolutions=convolutions)
    assert [part.shape for part in origin.parts] == [(12, 1, 4), (12, 1, 4), (40, 1, 4)]


def test_a_tree_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: the parameter tree has 13 rows .* has 14"):
        mapping.rows_of("embed_tokens.weight", (13, 6), tiny.DENSE, 2)


def test_experts_stored_both_ways_are_an_error():
    names = ["layers.0.mlp.experts.0.up_proj.weight", "layers.1.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj\.weight.*layers\.1\.mlp\.experts\.down_proj"):
        mapping.stores_experts_apart(names)
