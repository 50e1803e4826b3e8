"""A checkpoint without an engine: what `load_model` gives, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from gdnjax import load_model
from gdnjax.assets import EMBEDDED_MODEL, model_directory

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def dtypes(params):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


def test_embedded_model_is_the_default():
    model, params = load_model()
    assert (model.vocab_size, model.mtp, model.dtype) == (1024, False, "bfloat16")
    assert "mtp" not in params
    # Decays stay in float32.
    assert dtypes(params) == {"bfloat16", "float32"}


def test_dtype_is_that_asked_for_and_values_are_the_checkpoints():
    model, params = load_model(EMBEDDED_MODEL, dtype="float32", mtp=True)
    assert (model.dtype, model.mtp, dtypes(params)) == ("float32", True, {"float32"})
    stored = safetensors.numpy.load_file(model_directory(EMBEDDED_MODEL) / "model.safetensors")
    assert len(stored) == len(jax.tree.leaves(params))
    for name, leaf in (
        ("model.embed_tokens.weight", params["embed_tokens"]["weight"]),
        ("mtp.fc.weight", params["mtp"]["fc"]["weight"]),
        ("model.layers.0.linear_attn.A_log", params["layers"][0]["linear_attn"]["A_log"]),
    ):
        np.testing.assert_array_equal(leaf, stored[name].astype(np.float32))


def test_other_dtype_is_an_error():
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, got 'float16'"):
        load_model(dtype="float16")


def test_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no such directory; a model is a local checkpoint directory, or 'tiny'"
    ):
        load_model(tmp_path / "absent")


def test_directory_of_the_same_name_is_reached_by_its_path(tmp_path, monkeypatch):
    """`tiny` is the embedded model wherever one stands; `./tiny` is a directory of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert model_directory("tiny").name == "tiny"
    assert model_directory("tiny") != model_directory("./tiny").resolve()
    with pytest.raises(FileNotFoundError, match=r"no config\.json here"):
        load_model("./tiny")


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded model, whose tensors a test may change: (directory, tensors)."""
    shutil.copytree(model_directory(EMBEDDED_MODEL), tmp_path, dirs_exist_ok=True)
    return tmp_path, safetensors.numpy.load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("missing", ["mtp.fc.weight", "mtp.layers.0.self_attn.k_proj.weight", "mtp.norm.weight"])
def test_head_that_is_stored_in_part_is_an_error(copy, missing):
    directory, tensors = copy
    del tensors[missing]
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 missing: {missing}\. Without the MTP head \(num_speculative_tokens=0\)"):
        load_model(directory, mtp=True)
    # Without the head the rest is a whole model.
    load_model(directory)


@pytest.mark.parametrize(
    "name", ["mtp.embed_tokens.weight", "mtp.lm_head.weight", "mtp.layers.0.shared_head.norm.bias"]
)
def test_head_with_an_embedding_or_a_head_of_its_own_is_an_error(copy, name):
    directory, tensors = copy
    tensors[name] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=rf"or a head of its own: {name}\. Supported are .*; num_speculative_tokens=0"):
        load_model(directory, mtp=True)
    load_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mtp_num_hidden_layers": 0}, "num_speculative_tokens above 0 .* counts none"),
        ({"mtp_num_hidden_layers": 2}, "num_speculative_tokens above 0 .* got mtp_num_hidden_layers=2"),
        (
            {"mtp_use_dedicated_embeddings": True},
            r"num_speculative_tokens above 0 .*_embeddings=true\)",
        ),
    ],
)
def test_head_that_the_configuration_does_not_allow_is_an_error(copy, change, message):
    directory, _ = copy
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(directory, mtp=True)
    load_model(directory)


def test_head_that_is_counted_and_not_stored_is_an_error(copy):
    directory, tensors = copy
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor here begins with mtp\.; allowed: num_speculative_tokens=0"):
        load_model(directory, mtp=True)
