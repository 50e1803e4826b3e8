"""YaRN is what transformers computes: live where torch is installed, from stored frequencies everywhere."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdnjax import EngineConfig, ModelConfig, full_logits, load_model
from gdnjax.models.layers import rotary_angles, yarn_frequencies
from tests import checkpoints
from tests.golden import make_yarn
from tests.models.test_parity import GOLDENS, LOGIT_BOUND

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROUNDING = 1.2e-6
"""Of frequencies, relative: transformers computes theta ** x in float32, where half an ulp of x <= 1 is ln(theta) *
6e-8, 9.7e-7 for 1e7; a product, a quotient and a sum come on top.
"""


def config_of(case):
    return ModelConfig.from_hf({"model_type": "qwen3_5_text", **make_yarn.CASES[case]})


def check_frequencies(case, frequencies, attention_factor):
    attention = config_of(case).attention
    found = yarn_frequencies(attention.rotary_dim, attention.rope_theta, attention.yarn)
    np.testing.assert_allclose(found, frequencies, rtol=ROUNDING)
    assert attention.yarn.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("case", make_yarn.CASES)
def test_frequencies_equal_the_stored(case):
    stored = json.loads(make_yarn.FILE.read_text())[case]
    check_frequencies(case, stored["frequencies"], stored["attention_factor"])


@pytest.mark.parametrize("case", make_yarn.CASES)
def test_angles_equal_transformers(case):
    """Through the interleaved sections of mrope, and to the end of the context, as far as float32 goes."""
    torch = pytest.importorskip("torch")
    attention, rotary = config_of(case).attention, make_yarn.rotary_of(case)
    check_frequencies(case, rotary.inv_freq.numpy(), rotary.attention_scaling)
    position = np.array([0, 1, 2, 63, 64, 1000, 262_143, 1_009_999])
    expected = [x[0].numpy() for x in rotary(torch.zeros(1), torch.from_numpy(position)[None])]
    for found, wanted in zip(rotary_angles(jnp.asarray(position, jnp.int32), attention), expected, strict=True):
        angle = position[:, None] * np.tile(rotary.inv_freq.numpy(), 2)
        bound = 2e-6 + attention.yarn.attention_factor * (ROUNDING + 2.0**-23) * angle
        assert (np.abs(np.asarray(found) - wanted) < bound).all()


def test_logits_equal_transformers(tmp_path):
    """Of a stored checkpoint whose configuration asks for YaRN from 48 tokens on."""
    pytest.importorskip("torch")
    shutil.copytree(GOLDENS / "qwen3_5", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    rope = raw["text_config"]["rope_parameters"]
    rope |= {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 48}
    file.write_text(json.dumps(raw))
    prompt = checkpoints.prompt_tokens(200, 307)
    reference = checkpoints.reference_logits(tmp_path, prompt)
    plain = checkpoints.reference_logits(GOLDENS / "qwen3_5", prompt)
    assert checkpoints.relative_error(plain, reference) > 20 * LOGIT_BOUND, "these settings change the logits"
    model, params = load_model(tmp_path, dtype="float32")
    actual = jax.jit(full_logits, static_argnums=0)(model, params, jnp.asarray(prompt, jnp.int32))
    assert checkpoints.relative_error(np.asarray(actual), reference) < LOGIT_BOUND


def test_context_is_that_of_yarn_where_it_is_longer():
    context = config_of("published").max_position_embeddings
    assert context == 1_048_576
    assert EngineConfig(max_model_len=1_010_000).length_within(context) == 1_010_000
    assert config_of("one bound").max_position_embeddings == 256
