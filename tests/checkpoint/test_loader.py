"""Loaded parameters, compared with arrays built head by head."""

import dataclasses
import errno
import itertools
import mmap
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from gdnjax import sharding
from gdnjax.checkpoint import convert, load_params, loader, opened
from gdnjax.checkpoint.huggingface import SafetensorsSource
from gdnjax.checkpoint.mapping import copies, origin_of
from gdnjax.models import abstract_params, partition
from tests.checkpoint import tiny

PREFIX = "model.language_model."


def _load(directory, cfg, model, tp, dtype=np.float32):
    abstract = tiny.abstract_of(tiny.global_tensors(model, cfg, tp), dtype)
    with opened(directory, cfg, abstract, sharding.make_mesh(tp)) as stored:
        return load_params(stored, abstract, progress=False)


def _assert_equal(params, expected, *, expert_parallel=False):
    tree = tiny.tree_of(expected)
    assert jax.tree_util.tree_structure(params) == jax.tree_util.tree_structure(tree)
    for path, array in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = sharding.path_name(path)
        np.testing.assert_array_equal(np.asarray(array), expected[name], err_msg=name)
        assert array.dtype == expected[name].dtype
        assert array.sharding.spec == partition.spec_of(name, expert_parallel=expert_parallel)


@pytest.mark.short_cases
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("cfg", "prefix", "fused"),
    [
        (tiny.DENSE, PREFIX, True),
        (tiny.MOE, PREFIX, True),
        (tiny.MOE, PREFIX, False),
        (tiny.WHOLE_EXPERTS, PREFIX, True),
        (tiny.WHOLE_EXPERTS, PREFIX, False),
        (tiny.NEXT, "model.", False),
        (tiny.NEXT, "model.", True),
    ],
    ids=["dense", "moe-fused", "moe-apart", "whole-fused", "whole-apart", "next-apart", "next-fused"],
)
def test_every_rank_holds_its_part(tmp_path, cfg, prefix, fused, tp):
    model = tiny.model_tensors(cfg)
    tiny.write_sharded(tmp_path, tiny.stored_tensors(model, cfg, prefix=prefix, fused=fused))
    params, _ = _load(tmp_path, cfg, model, tp)
    _assert_equal(params, tiny.global_tensors(model, cfg, tp), expert_parallel=cfg.expert_parallel)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_ranks_hold_whole_experts_of_the_file(tmp_path, fused):
    """Bit for bit and in order, of a Hugging Face directory and of an Orbax one, and no rank reads another's."""
    cfg = tiny.WHOLE_EXPERTS
    model = tiny.model_tensors(cfg)
    tiny.write_single(tmp_path / "hf", tiny.stored_tensors(model, cfg, fused=fused))
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    for directory in ("hf", "orbax"):
        params, _ = _load(tmp_path / directory, cfg, model, 2)
        for i, name in itertools.product(range(2), ("gate_up_proj", "down_proj")):
            array, stored = params["layers"][i]["mlp"]["experts"][name], model[f"layers.{i}.mlp.experts.{name}"]
            for shard, wanted in zip(array.addressable_shards, np.split(stored, 2), strict=True):
                assert shard.index[0] == slice(2 * shard.device.id, 2 * shard.device.id + 2)
                np.testing.assert_array_equal(np.asarray(shard.data), wanted)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cfg", [tiny.DENSE, tiny.TIED, tiny.MOE, tiny.NEXT], ids=["dense", "tied", "moe", "next"])
def test_modules_ask_for_the_global_arrays(cfg, tp):
    expected = tiny.abstract_of(tiny.global_tensors(tiny.model_tensors(cfg), cfg, tp))
    abstract = abstract_params(cfg, tp, "float32")
    assert jax.tree_util.tree_map(lambda leaf: leaf.shape, abstract) == jax.tree_util.tree_map(
        lambda leaf: leaf.shape, expected
    )


@pytest.mark.parametrize("tp", [1, 4])
def test_orbax_loads_as_hugging_face_does(tmp_path, tp):
    model = tiny.model_tensors(tiny.NEXT)
    tiny.write_single(tmp_path / "hf", tiny.stored_tensors(model, tiny.NEXT, prefix="model.", fused=False))
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    params, report = _load(tmp_path / "orbax", tiny.NEXT, model, tp)
    _assert_equal(params, tiny.global_tensors(model, tiny.NEXT, tp))
    assert report == _load(tmp_path / "hf", tiny.NEXT, model, tp)[1]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_values_are_cast_to_the_tree_s_dtype(tmp_path, dtype):
    model = tiny.model_tensors(tiny.DENSE)
    stored = tiny.mixed_dtypes(tiny.stored_tensors(model, tiny.DENSE))
    tiny.write_single(tmp_path, stored)
    params, _ = _load(tmp_path, tiny.DENSE, model, 2, dtype)
    _assert_equal(
        params, {n: t.astype(dtype) for n, t in tiny.global_tensors(tiny.mixed_dtypes(model), tiny.DENSE, 2).items()}
    )


@pytest.mark.parametrize("cfg", [tiny.MOE, tiny.WHOLE_EXPERTS], ids=["cut", "whole"])
def test_a_rank_reads_only_its_own_part(tmp_path, monkeypatch, cfg):
    model = tiny.model_tensors(cfg)
    stored = tiny.stored_tensors(model, cfg)
    tiny.write_single(tmp_path, stored)
    elements = dict.fromkeys(stored, 0)
    read = SafetensorsSource.read

    def count(self, name, index):
        values = read(self, name, index)
        elements[name] += values.size
        return values

    monkeypatch.setattr(SafetensorsSource, "read", count)
    _load(tmp_path, cfg, model, 4)
    # Two kv heads on four ranks: each is read twice. All else is read once, replicated parameters too.
    for name, tensor in stored.items():
        assert elements[name] == tensor.size * (2 if "k_proj" in name or "v_proj" in name else 1), name


def test_report_counts_what_is_loaded_and_what_is_skipped(tmp_path, caplog):
    model = tiny.model_tensors(tiny.TIED)
    stored = tiny.stored_tensors(model, tiny.TIED)
    tied = {"lm_head.weight": model["embed_tokens.weight"]}
    tiny.write_single(tmp_path, stored | tied | tiny.other_tensors())
    with caplog.at_level("INFO", logger="gdnjax"):
        params, report = _load(tmp_path, tiny.TIED, model, 1)
    assert "lm_head" not in params
    assert (report.loaded, report.skipped_vision, report.skipped_mtp, report.skipped_tied) == (len(stored), 2, 1, 1)
    assert report.parameter_bytes == sum(tensor.nbytes for tensor in model.values())
    assert [record.getMessage() for record in caplog.records if record.name == "gdnjax"] == [
        f"loaded {tmp_path}: {report}"
    ]


@pytest.mark.short_cases
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize(
    ("cfg", "prefix", "fused", "mtp_fused"),
    [
        (tiny.DENSE, PREFIX, True, True),
        (tiny.TIED, "model.", True, True),
        (tiny.MOE, PREFIX, True, False),
        (tiny.MOE, PREFIX, True, True),
        (tiny.MOE, "model.", False, True),
        (tiny.NEXT, "model.", False, False),
    ],
    ids=["dense", "tied", "moe-head-apart", "moe-fused", "moe-head-fused", "next-apart"],
)
def test_every_rank_holds_its_part_of_the_head(tmp_path, cfg, prefix, fused, mtp_fused, tp):
    """Its modules have the checkpoint's own names, whatever the prefix of the others. A tree without it skips it."""
    model = tiny.model_tensors(cfg, mtp=True)
    stored = tiny.stored_tensors(model, cfg, prefix=prefix, fused=fused, mtp_fused=mtp_fused)
    tiny.write_sharded(tmp_path, stored)
    params, report = _load(tmp_path, cfg, model, tp)
    _assert_equal(params, tiny.global_tensors(model, cfg, tp))
    of_head = sum(name.startswith("mtp.") for name in stored)
    shared = ("embed_tokens",) if cfg.tie_word_embeddings else ("embed_tokens", "lm_head")
    assert (report.loaded, report.mtp_loaded, report.skipped_mtp) == (len(stored), of_head, 0)
    assert report.mtp_shared == shared
    assert f"; {of_head} of them are the MTP head, which shares {' and '.join(shared)}; skipped: " in str(report)

    without = {name: tensor for name, tensor in model.items() if not name.startswith("mtp.")}
    params, report = _load(tmp_path, cfg, without, tp)
    _assert_equal(params, tiny.global_tensors(without, cfg, tp))
    assert (report.loaded, report.mtp_loaded, report.skipped_mtp) == (len(stored) - of_head, 0, of_head)
    assert report.mtp_shared == ()
    assert "shares" not in str(report)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cfg", [tiny.DENSE, tiny.TIED, tiny.MOE, tiny.NEXT], ids=["dense", "tied", "moe", "next"])
def test_modules_of_the_head_ask_for_the_global_arrays(cfg, tp):
    cfg = dataclasses.replace(cfg, mtp_layers=1)
    expected = tiny.abstract_of(tiny.global_tensors(tiny.model_tensors(cfg, mtp=True), cfg, tp))
    abstract = abstract_params(cfg, tp, "float32", mtp=True)
    assert jax.tree_util.tree_map(lambda leaf: leaf.shape, abstract) == jax.tree_util.tree_map(
        lambda leaf: leaf.shape, expected
    )


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(self, name, index):
        raise AssertionError(f"{name} was read before the checkpoint was found good")

    monkeypatch.setattr(SafetensorsSource, "read", read)


def _assert_rejected(directory, cfg, model, stored, match):
    tiny.write_single(directory, stored)
    with pytest.raises(ValueError, match=match):
        _load(directory, cfg, model, 1)


@pytest.mark.usefixtures("nothing_is_read")
def test_unexpected_tensor_is_named(tmp_path):
    model = tiny.model_tensors(tiny.DENSE)
    stored = tiny.stored_tensors(model, tiny.DENSE)
    extra = {PREFIX + "layers.0.linear_attn.in_proj_qkv.bias": np.zeros(4, np.float32), "odd": np.zeros(1, np.float32)}
    match = r"2 unexpected: odd, model\.language_model\.layers\.0\.linear_attn\.in_proj_qkv\.bias"
    _assert_rejected(tmp_path, tiny.DENSE, model, stored | extra, match)


@pytest.mark.usefixtures("nothing_is_read")
def test_missing_tensor_is_named(tmp_path):
    model = tiny.model_tensors(tiny.DENSE)
    stored = tiny.stored_tensors(model, tiny.DENSE)
    del stored[PREFIX + "layers.1.self_attn.q_norm.weight"], stored["lm_head.weight"]
    match = r"2 missing: layers\.1\.self_attn\.q_norm\.weight, lm_head\.weight"
    _assert_rejected(tmp_path, tiny.DENSE, model, stored, match)


@pytest.mark.parametrize("orbax", [False, True])
def test_stored_head_that_differs_from_a_tied_embedding_is_refused(tmp_path, orbax, monkeypatch):
    """Equal in another dtype is equal; a single number that differs, in the last rows compared, is not."""
    monkeypatch.setattr(loader, "TIED_ROWS", 5)
    model = tiny.model_tensors(tiny.TIED)
    model["embed_tokens.weight"] = model["embed_tokens.weight"].astype(tiny.BFLOAT16).astype(np.float32)
    stored = tiny.stored_tensors(model, tiny.TIED)
    head = model["embed_tokens.weight"].astype(tiny.BFLOAT16)

    def write(name, head):
        directory = tmp_path / name
        directory.mkdir()
        tiny.write_single(directory, stored | {"lm_head.weight": head})
        (directory / "config.json").write_text("{}")
        if orbax:
            convert(directory, directory / "orbax", progress=False)
        return directory / "orbax" if orbax else directory

    assert _load(write("equal", head), tiny.TIED, model, 1)[1].skipped_tied == 1
    head[-1, -1] += 1
    match = r"lm_head\.weight differs from model\.language_model\.embed_tokens\.weight.*tie_word_embeddings=true"
    for name, other in (("changed", head), ("shorter", head[:-1])):
        with pytest.raises(ValueError, match=match):
            _load(write(name, other), tiny.TIED, model, 1)


@pytest.mark.usefixtures("nothing_is_read")
def test_misshaped_tensor_is_named_with_both_shapes(tmp_path):
    model = tiny.model_tensors(tiny.DENSE)
    stored = tiny.stored_tensors(model, tiny.DENSE) | {PREFIX + "embed_tokens.weight": np.zeros((12, 6), np.float32)}
    match = r"model\.language_model\.embed_tokens\.weight is \(12, 6\), expected \(13, 6\)"
    _assert_rejected(tmp_path, tiny.DENSE, model, stored, match)


@pytest.mark.usefixtures("nothing_is_read")
def test_wrong_dtype_is_named(tmp_path):
    model = tiny.model_tensors(tiny.DENSE)
    stored = tiny.stored_tensors(model, tiny.DENSE) | {PREFIX + "norm.weight": np.zeros(6, np.float16)}
    _assert_rejected(tmp_path, tiny.DENSE, model, stored, r"allowed: float32, bfloat16.*norm\.weight \(float16\)")


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("cfg", [tiny.DENSE, tiny.MOE], ids=["dense", "moe"])
def test_head_that_is_wanted_and_not_stored_is_an_error(tmp_path, cfg):
    model = tiny.model_tensors(cfg, mtp=True)
    stored = {n: tensor for n, tensor in tiny.stored_tensors(model, cfg).items() if not n.startswith("mtp.")}
    _assert_rejected(tmp_path, cfg, model, stored, "num_speculative_tokens above 0 needs the MTP head, and no tensor")


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("missing", ["mtp.fc.weight", "mtp.layers.0.mlp.experts.2.up_proj.weight"])
def test_missing_tensor_of_the_head_is_named(tmp_path, missing):
    model = tiny.model_tensors(tiny.MOE, mtp=True)
    stored = tiny.stored_tensors(model, tiny.MOE)
    del stored[missing]
    match = rf"1 missing: {missing}\. Without the MTP head \(num_speculative_tokens=0\)"
    _assert_rejected(tmp_path, tiny.MOE, model, stored, match)


@pytest.mark.usefixtures("nothing_is_read")
def test_layer_too_many_in_the_head_is_named(tmp_path):
    model = tiny.model_tensors(tiny.DENSE, mtp=True)
    extra = {"mtp.layers.1.input_layernorm.weight": np.zeros(6, np.float32)}
    stored = tiny.stored_tensors(model, tiny.DENSE) | extra
    match = r"1 unexpected: mtp\.layers\.1\.input_layernorm\.weight\. Without the MTP head"
    _assert_rejected(tmp_path, tiny.DENSE, model, stored, match)


@pytest.mark.usefixtures("nothing_is_read")
def test_tables_of_the_head_s_own_are_an_error_that_names_them(tmp_path):
    model = tiny.model_tensors(tiny.DENSE, mtp=True)
    own = {f"mtp.{name}.weight": model["embed_tokens.weight"] for name in ("embed_tokens", "lm_head")}
    stored = tiny.stored_tensors(model, tiny.DENSE) | own
    match = r"of its own: mtp\.embed_tokens\.weight, mtp\.lm_head\.weight\. Supported are heads that share"
    _assert_rejected(tmp_path, tiny.DENSE, model, stored, match)


AS_LAYER = dataclasses.replace(tiny.MOE, model_type="deepseek_v3", mtp_layers=1)
"""Of a family whose head is stored as the layer behind the last one: here the third."""


def _head_as_layer(model):
    stored = tiny.stored_tensors(model, AS_LAYER, prefix="model.", fused=False)
    names = {
        "mtp.fc.": "model.layers.2.eh_proj.",
        "mtp.pre_fc_norm_embedding.": "model.layers.2.enorm.",
        "mtp.pre_fc_norm_hidden.": "model.layers.2.hnorm.",
        "mtp.norm.": "model.layers.2.shared_head.norm.",
        "mtp.layers.0.": "model.layers.2.",
    }
    for old, new in names.items():
        stored = {name.replace(old, new): tensor for name, tensor in stored.items()}
    copies = {"embed_tokens": model["embed_tokens.weight"], "shared_head.head": model["lm_head.weight"]}
    return stored | {f"model.layers.2.{name}.weight": tensor.copy() for name, tensor in copies.items()}


@pytest.mark.parametrize("tp", [1, 2])
def test_head_that_is_stored_as_a_layer_is_loaded_whole_or_skipped_whole(tmp_path, tp):
    model = tiny.model_tensors(AS_LAYER, mtp=True)
    stored = _head_as_layer(model)
    tiny.write_sharded(tmp_path, stored)
    of_head = sum(name.startswith("model.layers.2.") for name in stored)
    params, report = _load(tmp_path, AS_LAYER, model, tp)
    _assert_equal(params, tiny.global_tensors(model, AS_LAYER, tp))
    assert (report.loaded, report.mtp_loaded, report.skipped_mtp) == (len(stored) - 2, of_head - 2, 0)
    assert report.skipped_tied == 2
    without = {name: tensor for name, tensor in model.items() if not name.startswith("mtp.")}
    params, report = _load(tmp_path, AS_LAYER, without, tp)
    _assert_equal(params, tiny.global_tensors(without, AS_LAYER, tp))
    assert (report.mtp_loaded, report.skipped_mtp, report.skipped_tied) == (0, of_head, 0)


@pytest.mark.parametrize("table", ["embed_tokens", "shared_head.head"])
def test_copy_that_differs_from_the_target_s_is_refused(tmp_path, table):
    model = tiny.model_tensors(AS_LAYER, mtp=True)
    stored = _head_as_layer(model)
    stored[f"model.layers.2.{table}.weight"][7, 3] += 1
    match = rf"model\.layers\.2\.{table}\.weight differs from .*Supported are MTP heads that share"
    _assert_rejected(tmp_path, AS_LAYER, model, stored, match)
    tiny.write_single(tmp_path, stored)
    _load(tmp_path, AS_LAYER, {name: one for name, one in model.items() if not name.startswith("mtp.")}, 1)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"eh_proj.weight": None},
            r"1 missing: layers\.2\.eh_proj\.weight\. Without .* is of the layers from 2 on is",
        ),
        ({"mlp.gate.weight": None}, r"1 missing: layers\.2\.mlp\.gate\.weight\. Without the MTP head"),
        ({"other.weight": (3,)}, r"1 unexpected: model\.layers\.2\.other\.weight\. Without the MTP head"),
    ],
)
def test_tensors_of_a_head_that_is_stored_as_a_layer_are_named_as_they_are_stored(tmp_path, changes, match):
    model = tiny.model_tensors(AS_LAYER, mtp=True)
    stored = _head_as_layer(model)
    for name, shape in changes.items():
        if shape is None:
            del stored[f"model.layers.2.{name}"]
        else:
            stored[f"model.layers.2.{name}"] = np.zeros(shape, np.float32)
    _assert_rejected(tmp_path, AS_LAYER, model, stored, match)


@pytest.mark.usefixtures("nothing_is_read")
def test_missing_expert_is_named(tmp_path):
    model = tiny.model_tensors(tiny.MOE)
    stored = tiny.stored_tensors(model, tiny.MOE, fused=False)
    del stored[PREFIX + "layers.1.mlp.experts.2.up_proj.weight"]
    _assert_rejected(tmp_path, tiny.MOE, model, stored, r"1 missing: layers\.1\.mlp\.experts\.2\.up_proj\.weight")


@pytest.mark.usefixtures("nothing_is_read")
def test_one_expert_too_many_is_named(tmp_path):
    model = tiny.model_tensors(tiny.MOE)
    stored = tiny.stored_tensors(model, tiny.MOE, fused=False)
    extra = {PREFIX + "layers.1.mlp.experts.3.up_proj.weight": np.zeros((4, 6), np.float32)}
    _assert_rejected(tmp_path, tiny.MOE, model, stored | extra, r"1 unexpected: .*experts\.3\.up_proj")


@pytest.mark.usefixtures("nothing_is_read")
def test_experts_stored_both_ways_are_an_error(tmp_path):
    model = tiny.model_tensors(tiny.MOE)
    stored = tiny.stored_tensors(model, tiny.MOE) | tiny.stored_tensors(model, tiny.MOE, fused=False)
    _assert_rejected(tmp_path, tiny.MOE, model, stored, r"both one by one .* and together")


def test_many_problems_are_abbreviated(tmp_path):
    model = tiny.model_tensors(tiny.DENSE)
    stored = {"norm.weight": model["norm.weight"]}
    _assert_rejected(tmp_path, tiny.DENSE, model, stored, r"\d+ missing: .*, and \d+ more")


def test_ranks_that_do_not_divide_the_heads_are_an_error(tmp_path):
    model = tiny.model_tensors(tiny.DENSE)
    tiny.write_single(tmp_path, tiny.stored_tensors(model, tiny.DENSE))
    abstract = tiny.abstract_of(model)
    with (
        pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide"),
        opened(tmp_path, tiny.DENSE, abstract, sharding.make_mesh(3)),
    ):
        pass


def test_copies_of_a_block_never_touch_padding():
    origin = origin_of("embed_tokens.weight", (16, 6), tiny.DENSE, 4, experts_apart=False)
    (last,) = copies(origin, (slice(12, 16), slice(0, 6)))
    assert (last.source, last.target) == ((slice(12, 13), slice(0, 6)), (slice(0, 1), slice(0, 6)))


@pytest.mark.parametrize("error", [OSError, ValueError, MemoryError, RuntimeError])
def test_failure_on_the_way_names_the_parameter(tmp_path, monkeypatch, error):
    model = tiny.model_tensors(tiny.DENSE)
    tiny.write_single(tmp_path, tiny.stored_tensors(model, tiny.DENSE))
    read = SafetensorsSource.read

    def failing(self, name, index):
        if name.endswith("layers.1.self_attn.q_norm.weight"):
            raise error("it is gone")
        return read(self, name, index)

    monkeypatch.setattr(SafetensorsSource, "read", failing)
    with pytest.raises(error, match=r"^loading layers\.1\.self_attn\.q_norm\.weight: it is gone$"):
        _load(tmp_path, tiny.DENSE, model, 2)


def test_what_is_under_way_stays_within_its_bound(monkeypatch):
    monkeypatch.setattr(loader, "IN_FLIGHT_BYTES", 10)
    sizes = {f"p{i}": size for i, size in enumerate([3, 3, 20, 4, 4, 1, 1, 9, 2, 10, 1])}
    lock, held, most = threading.Lock(), [], []

    def load(name):
        with lock:
            held.append(sizes[name])
            most.append(list(held))
        time.sleep(0.01)
        with lock:
            held.remove(sizes[name])
        return jax.numpy.asarray(sizes[name])

    ended = []
    assert list(map(int, loader._side_by_side(load, sizes, ended.append))) == list(sizes.values())
    assert sum(ended) == len(sizes)
    assert max(len(sizes) for sizes in most) > 1
    # What is larger than the bound goes alone.
    assert all(sum(sizes) <= 10 or sizes == [20] for sizes in most)


def test_interrupted_load_begins_nothing_more(monkeypatch):
    monkeypatch.setattr(loader, "THREADS", 2)
    begun = []

    def load(name):
        begun.append(name)
        time.sleep(0.01)
        return jax.numpy.zeros(())

    def interrupted(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loader._side_by_side(load, {f"p{i}": 1 for i in range(1000)}, interrupted)
    assert len(begun) < 100
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gdnjax-load")]


def test_kernel_without_large_pages_loads_all_the_same(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(loader.mmap, "mmap", Refusing)
    zeros = loader._zeros((3, 5), np.dtype(np.float32))
    assert isinstance(zeros.base, Refusing)
    np.testing.assert_array_equal(zeros, np.zeros((3, 5), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_block_for_a_device_with_its_own_memory_is_a_view_where_the_file_has_it_so(tmp_path, dtype):
    """And memory of its own, of the same values, for a CPU device, and where rows are gathered, padded or cast."""
    model = tiny.model_tensors(tiny.DENSE)
    stored = tiny.stored_tensors(model, tiny.DENSE)
    stored = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in stored.items()}
    tiny.write_single(tmp_path, stored)
    expected = tiny.global_tensors(model, tiny.DENSE, 4)
    views = set()
    with SafetensorsSource(tmp_path) as source:
        for name, values in expected.items():
            origin = origin_of(name, values.shape, tiny.DENSE, 4, experts_apart=False)
            names = {part.tensor: next(full for full in stored if full.endswith(part.tensor)) for part in origin.parts}
            reads = copies(origin, tuple(slice(0, size) for size in values.shape))
            for in_memory in (True, False):
                block = loader._block(source.read, names, reads, values.shape, np.dtype(dtype), in_memory=in_memory)
                np.testing.assert_array_equal(block, values.astype(ml_dtypes.bfloat16).astype(dtype), err_msg=name)
                if block.flags.writeable:
                    # A CPU device takes it over as it is.
                    assert block.ctypes.data % 64 == 0
                else:
                    assert not in_memory
                    views.add(name)
    assert ("norm.weight" in views) == (dtype is ml_dtypes.bfloat16)
    # Its rows are padded.
    assert "embed_tokens.weight" not in views


@pytest.mark.parametrize("tp", [1, 2])
def test_parameters_from_views_of_the_files_are_the_same(tmp_path, monkeypatch, tp):
    """As devices with memory of their own get them."""
    model = tiny.model_tensors(tiny.MOE)
    tiny.write_sharded(tmp_path, tiny.stored_tensors(model, tiny.MOE, fused=False))
    block = loader._block

    def of_another_platform(*arguments, in_memory):
        assert in_memory
        return block(*arguments, in_memory=False)

    monkeypatch.setattr(loader, "_block", of_another_platform)
    params, _ = _load(tmp_path, tiny.MOE, model, tp)
    _assert_equal(params, tiny.global_tensors(model, tiny.MOE, tp))
