"""What layers of the delta rule tell the rule."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax.backend import REFERENCE
from gdnjax.models.context import FoldContext
from gdnjax.models.delta_mixer import DeltaMixer
from gdnjax.pallas_kernels.gated_delta_rule import Rounding
from gdnjax.sharding import AXIS, P, make_mesh, shard_step

HEADS = 8


def first_heads(tp):
    """The number of each rank's first head."""
    mixer = SimpleNamespace(tp=tp, key_head_dim=4, backend=REFERENCE)
    none = jnp.zeros((1,), jnp.int32)
    context = FoldContext(none, none, none, orders={}, rounding=Rounding(keys=none.astype(jnp.uint32)))

    def step(ssm):
        static = DeltaMixer._static(mixer, context, {"ssm": ssm})  # pyright: ignore[reportArgumentType]
        return jnp.full((1,), static["rounding"].first_head, jnp.int32)

    mapped = shard_step(step, make_mesh(tp), (P(None, None, AXIS),), P(AXIS))
    return np.asarray(jax.jit(mapped)(jnp.zeros((1, 1, HEADS, 16)))).tolist()


def test_ranks_round_by_the_noise_of_their_own_heads():
    assert first_heads(1) == [0]
    assert first_heads(2) == [0, 4]
    assert first_heads(4) == [0, 2, 4, 6]
