"""Round trips between the two kinds, and the command line."""

import importlib.util
import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

from gdnjax.checkpoint import Format, convert, open_source
from gdnjax.checkpoint.huggingface import plan_shards
from gdnjax.checkpoint.sources import read_whole
from tests.checkpoint import tiny

TENSORS = tiny.mixed_dtypes(tiny.stored_tensors(tiny.model_tensors(tiny.MOE), tiny.MOE) | tiny.other_tensors())
# Zeros, which array stores like to leave out, and every special value.
TENSORS["mtp.zeros.weight"] = np.zeros((3, 5), tiny.BFLOAT16)
TENSORS["mtp.special.weight"] = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
SIDE_FILES = ("chat_template.jinja", "config.json", "tokenizer.json")
SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "convert.py"


def _contents(directory):
    with open_source(directory) as source:
        return {name: (source.dtype(name), read_whole(source, name).tobytes()) for name in source.names()}


def _run(*arguments):
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("write", [tiny.write_single, tiny.write_sharded])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 10])
def test_round_trip_keeps_every_bit(tmp_path, write, shard_bytes):
    write(tmp_path / "hf", TENSORS)
    assert convert(tmp_path / "hf", tmp_path / "orbax", progress=False) is Format.ORBAX
    assert (
        convert(tmp_path / "orbax", tmp_path / "again", shard_bytes=shard_bytes, progress=False) is Format.HUGGING_FACE
    )
    assert _contents(tmp_path / "hf") == _contents(tmp_path / "orbax") == _contents(tmp_path / "again")
    for name in SIDE_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_orbax_itself_reads_what_is_written(tmp_path):
    tiny.write_single(tmp_path / "hf", TENSORS)
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "orbax/params")
    assert {name: tensor.tobytes() for name, tensor in restored.items()} == {
        name: tensor.tobytes() for name, tensor in TENSORS.items()
    }


def test_files_are_as_transformers_expects_them(tmp_path):
    tiny.write_single(tmp_path / "hf", TENSORS)
    convert(tmp_path / "hf", tmp_path / "orbax", progress=False)
    convert(tmp_path / "orbax", tmp_path / "again", shard_bytes=1 << 10, progress=False)
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "again" / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_shards_hold_at_most_the_size_asked_for():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 2, "e": 5}
    assert plan_shards(sizes, 7) == [["a", "b"], ["c"], ["d", "e"]]


def test_command_line_converts_both_ways(tmp_path, capsys):
    tiny.write_single(tmp_path / "hf", TENSORS)
    assert _run(tmp_path / "hf", tmp_path / "orbax", "--to", "orbax") == 0
    assert _run(tmp_path / "orbax", tmp_path / "again", "--shard-gib", "1") == 0
    assert _contents(tmp_path / "hf") == _contents(tmp_path / "again")
    assert "wrote" in capsys.readouterr().out


def _assert_refused(capsys, match, *arguments):
    assert _run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert.py: error: ")
    assert match in line


def test_missing_source_is_one_line(tmp_path, capsys):
    _assert_refused(capsys, "nowhere: no such directory", tmp_path / "nowhere", tmp_path / "out")


def test_damaged_source_is_one_line(tmp_path, capsys):
    tiny.write_single(tmp_path / "hf", TENSORS)
    (tmp_path / "hf/model.safetensors").write_bytes(b"")
    _assert_refused(capsys, "model.safetensors: damaged", tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_without_configuration_is_refused(tmp_path, capsys):
    tiny.write_single(tmp_path / "hf", TENSORS)
    (tmp_path / "hf/config.json").unlink()
    _assert_refused(capsys, "no config.json", tmp_path / "hf", tmp_path / "out")


def test_target_that_holds_something_is_refused(tmp_path, capsys):
    tiny.write_single(tmp_path / "hf", TENSORS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    _assert_refused(capsys, "not an empty directory", tmp_path / "hf", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_direction_that_changes_nothing_is_refused(tmp_path, capsys):
    tiny.write_single(tmp_path / "hf", TENSORS)
    _assert_refused(capsys, "already of the kind 'hf'", tmp_path / "hf", tmp_path / "out", "--to", "hf")


def test_empty_shards_are_refused(tmp_path, capsys):
    tiny.write_single(tmp_path / "hf", TENSORS)
    _assert_refused(capsys, "must be positive", tmp_path / "hf", tmp_path / "out", "--shard-gib", "0")


def test_command_line_makes_weights_of_eight_bits(tmp_path, capsys):
    assert _run("tiny", tmp_path / "fp8", "--quantization", "fp8_per_channel") == 0
    assert f"wrote {tmp_path / 'fp8'} (hf): 57 weights made float8_e4m3fn by row, of a" in capsys.readouterr().out
    assert _run("tiny", tmp_path / "orbax", "--quantization", "fp8_per_channel", "--to", "orbax") == 0
    assert _contents(tmp_path / "fp8") == _contents(tmp_path / "orbax")
    _assert_refused(
        capsys, "a scale for each row already", tmp_path / "fp8", tmp_path / "out", "--quantization", "fp8_per_channel"
    )
