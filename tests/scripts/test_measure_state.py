"""What measures the forms of the state: that it sees what noise is for, and says what is wrong with its arguments."""

import measure_state
import numpy as np
import pytest
from measuring import state_layer

CASES = (
    (["--parts", "layers"], "no part 'layers'"),
    (["--tokens", "1000"], "--tokens must be a multiple of 1024, got 1000"),
    (["--tokens", "1024", "--length", "2048"], "--length must be at most --tokens 1024, got 2048"),
    (["--limit", "0"], "--limit must be at least 1, got 0"),
    (["--key-heads", "8", "--parts", "layer"], "8 key heads and 32 value heads"),
)


@pytest.mark.parametrize(("arguments", "message"), CASES)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert measure_state.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_nearest_rounding_loses_what_noise_keeps():
    """A state that only decays, by less than half a step of bfloat16 a token."""
    forms = tuple(form for form in state_layer.FORMS if form.dtype != "float16")
    layer = state_layer.Layer(16, 16, 8)
    tokens = (state_layer.BLOCK, layer.value_heads)
    q, k, v = (np.zeros((*tokens, layer.dim), np.float32) for _ in range(3))
    given = (q, k, v, np.full(tokens, np.log(0.5) / state_layer.BLOCK, np.float32), np.ones(tokens, np.float32))
    first = np.random.default_rng(0).standard_normal((layer.value_heads, layer.dim, layer.dim)).astype("bfloat16")
    states = [np.asarray(first, form.dtype) for form in forms]
    found, exact, *_ = state_layer.decode_block(states, np.asarray(first, np.float32), given, np.int32(0), forms)
    norms = [np.mean(state_layer.norm_ratio(state, exact)) for state in found]
    plain, nearest, noisy = norms
    assert abs(plain) < 1e-4
    # Nothing was lost: the state is twice as large as it should be.
    assert nearest == pytest.approx(1.0, abs=1e-3)
    assert abs(noisy) < 0.05
