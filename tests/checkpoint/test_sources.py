"""Both kinds of source: the same tensors, and errors that say what is wrong."""

import json

import numpy as np
import pytest
import tensorstore
from safetensors.numpy import save_file

from gdnjax.checkpoint import convert, open_source
from gdnjax.checkpoint.huggingface import INDEX_FILE, SafetensorsSource
from gdnjax.checkpoint.sources import read_whole
from tests.checkpoint import tiny

TENSORS = tiny.mixed_dtypes(tiny.stored_tensors(tiny.model_tensors(tiny.DENSE), tiny.DENSE) | tiny.other_tensors())
NAME = "model.language_model.layers.0.linear_attn.in_proj_qkv.weight"


@pytest.fixture(params=["single", "sharded", "orbax"])
def directory(request, tmp_path):
    write = tiny.write_sharded if request.param == "sharded" else tiny.write_single
    write(tmp_path / "hf", TENSORS)
    if request.param != "orbax":
        return tmp_path / "hf"
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    return tmp_path / "orbax"


def test_source_gives_what_was_written(directory):
    with open_source(directory) as source:
        assert sorted(source.names()) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert source.shape(name) == tensor.shape
            assert source.dtype(name) == tensor.dtype
            read = source.read(name, tuple(slice(0, size) for size in tensor.shape))
            assert read.dtype == tensor.dtype
            assert read.tobytes() == tensor.tobytes()


def test_source_reads_slices(directory):
    index = (slice(3, 11), slice(1, 4))
    with open_source(directory) as source:
        np.testing.assert_array_equal(source.read(NAME, index), TENSORS[NAME][index])


def test_unknown_name_is_a_key_error(directory):
    with open_source(directory) as source, pytest.raises(KeyError, match="nothing"):
        source.read("nothing", ())


def test_no_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such directory"):
        open_source(tmp_path / "nowhere")


def test_no_checkpoint_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors, or model\.safetensors\.index\.json.*params/"):
        open_source(tmp_path)


def test_two_kinds_in_one_directory_are_ambiguous(tmp_path):
    tiny.write_single(tmp_path, TENSORS)
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match=r"both safetensors files and params/"):
        open_source(tmp_path)


def test_index_of_other_files_beside_single_file_is_ambiguous(tmp_path):
    tiny.write_single(tmp_path, TENSORS)
    tiny.write_sharded(tmp_path, TENSORS)
    with pytest.raises(ValueError, match=r"model\.safetensors is here, and model\.safetensors\.index\.json names"):
        open_source(tmp_path)


def test_index_that_names_the_single_file_is_held_to_it(tmp_path):
    tiny.write_single(tmp_path, TENSORS)
    index = {"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with open_source(tmp_path) as source:
        assert set(source.names()) == set(TENSORS)
    _change_weight_map(tmp_path, lambda names: names.pop(NAME))
    with pytest.raises(ValueError, match=r"does not list: .*in_proj_qkv"):
        open_source(tmp_path)


def test_shards_without_index_are_named(tmp_path):
    tiny.write_sharded(tmp_path, TENSORS)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"found only model-00001-of-00003\.safetensors"):
        open_source(tmp_path)


def test_missing_shard_is_named(tmp_path):
    tiny.write_sharded(tmp_path, TENSORS)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: model-00002-of-00003\.safetensors"):
        open_source(tmp_path)


def _change_weight_map(directory, change):
    index = json.loads((directory / INDEX_FILE).read_text())
    change(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


def test_tensor_absent_from_its_shard_is_named(tmp_path):
    tiny.write_sharded(tmp_path, TENSORS)
    _change_weight_map(tmp_path, lambda names: names.update({"extra": "model-00001-of-00003.safetensors"}))
    with pytest.raises(ValueError, match=r"not in the shard it names: extra \(in model-00001-of-00003"):
        open_source(tmp_path)


def test_tensor_that_the_index_leaves_out_is_named(tmp_path):
    tiny.write_sharded(tmp_path, TENSORS)
    _change_weight_map(tmp_path, lambda names: names.pop(NAME))
    with pytest.raises(ValueError, match=r"does not list: .*in_proj_qkv"):
        open_source(tmp_path)


def test_tensor_in_two_shards_is_named(tmp_path):
    tiny.write_sharded(tmp_path, TENSORS)
    save_file({NAME: TENSORS[NAME]}, tmp_path / "model-more.safetensors")
    _change_weight_map(tmp_path, lambda names: names.update({"extra": "model-more.safetensors"}))
    with pytest.raises(ValueError, match=r"model-more\.safetensors: tensor .*in_proj_qkv.* is also in"):
        open_source(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": [1]}'])
def test_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: damaged"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 20), slice(0, -3)])
def test_truncated_file_is_named(tmp_path, cut):
    tiny.write_single(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        open_source(tmp_path)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint32])
def test_other_dtypes_are_named(tmp_path, dtype):
    tiny.write_single(tmp_path, TENSORS | {"odd": np.zeros(3, dtype)})
    with pytest.raises(ValueError, match=r"allowed: float32, bfloat16, float16, float8_e4m3fn, .*\. Tensors: odd"):
        open_source(tmp_path)


def test_other_kinds_of_8_bits_are_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(ValueError, match=r"unsupported dtype.*Tensors: w \(F8_E5M2\)"):
        open_source(tmp_path)


def test_empty_params_folder_is_no_orbax_checkpoint(tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match=r"params: no tensors here"):
        open_source(tmp_path)


@pytest.mark.parametrize("damaged", ["manifest.ocdbt", "d/*"])
def test_damaged_orbax_checkpoint_is_named(tmp_path, damaged):
    tiny.write_single(tmp_path / "hf", TENSORS)
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    for file in (tmp_path / "orbax/params").rglob(damaged):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"orbax/params: .*damaged"):
        _read_all(tmp_path / "orbax")


def test_missing_orbax_data_is_named(tmp_path):
    tiny.write_single(tmp_path / "hf", TENSORS)
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    for file in (tmp_path / "orbax/params").rglob("d/*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"orbax/params: "):
        _read_all(tmp_path / "orbax")


def test_lost_orbax_data_is_never_read_as_zeros(tmp_path):
    tiny.write_single(tmp_path / "hf", TENSORS)
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    store = {"driver": "ocdbt", "base": f"{(tmp_path / 'orbax/params').as_uri()}/"}
    store = tensorstore.KvStore.open(store).result()
    (chunk,) = (key for key in store.list().result() if key.startswith(b"lm_head") and not key.endswith(b".zarray"))
    store.delete_range(tensorstore.KvStore.KeyRange(chunk, chunk + b"\0")).result()
    with pytest.raises(ValueError, match=r"orbax/params: tensor lm_head\.weight is damaged"):
        _read_all(tmp_path / "orbax")


def _read_all(directory):
    with open_source(directory) as source:
        for name in source.names():
            read_whole(source, name)
