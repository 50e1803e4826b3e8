"""The part of a pool that one program holds: some value columns of one head's state, by all of K."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from gdnjax.pallas_kernels.gated_delta_rule.rounding import noise, rounded
from gdnjax.pallas_kernels.launch import bounded, power_of_two
from gdnjax.shapes import Array, Leaf


@dataclasses.dataclass(frozen=True)
class StateTile:
    """A tile [v, k] in registers, of either order in memory. `v` and `k` number its columns and rows in the head.

    Blocks have sizes of powers of two: what stands past the head is masked, and is 0 in registers. With `lanes` the
    tile is [k // lanes, v, k % lanes]: threads side by side in memory then hold several columns between them, and a
    sum over k is mostly one within a thread.
    """

    layer: Leaf  # [] int32
    head: Leaf  # [] int32
    v: Leaf  # [columns] int32
    k: Leaf  # [power of two] int32, or [power of two / lanes, lanes]
    key_dim: int
    value_dim: int

    @classmethod
    def of(
        cls, layer, head, block, *, columns: int, key_dim: int, value_dim: int, least: int = 1, lanes: int = 0
    ) -> "StateTile":
        v = block * columns + jnp.arange(columns, dtype=jnp.int32)
        size = power_of_two(key_dim, least)
        k = jnp.arange(min(lanes, size) if lanes else size, dtype=jnp.int32)
        if lanes:
            k = k.size * jnp.arange(size // k.size, dtype=jnp.int32)[:, None] + k[None, :]
        return cls(layer=layer, head=head, v=v, k=k, key_dim=key_dim, value_dim=value_dim)

    @property
    def v_mask(self) -> Array | None:
        return None if self.value_dim % self.v.size == 0 else self.v < self.value_dim

    @property
    def k_mask(self) -> Array | None:
        return None if self.k.size == self.key_dim else self.k < self.key_dim

    def load(self, ssm_ref, slot, vk: bool | Array, wanted: Array | None = None) -> Array:
        """The tile in float32, zeros if not `wanted` (a scalar). `vk` is a bool, or a scalar that tells of a slot."""

        def load(vk):
            mask = self._mask(wanted)
            at = self._at(ssm_ref, slot, vk)
            return plgpu.load(at, mask=mask, other=None if mask is None else 0).astype(jnp.float32)

        return load(vk) if isinstance(vk, bool) else lax.cond(vk, lambda: load(True), lambda: load(False))

    def store(
        self, ssm_ref, slot, tile: Array, vk: bool, when: Array | None = None, keys: tuple[Array, Array] | None = None
    ) -> None:
        """`keys`: the head's, where it is rounded stochastically."""
        if keys is not None:
            tile = rounded(tile, noise(keys, self.along_k(self.k) * self.value_dim + self.along_v(self.v)))
        at = self._at(ssm_ref, slot, vk)
        plgpu.store(at, tile.astype(ssm_ref.dtype), mask=self._mask(when))

    def along_v(self, x: Array) -> Array:
        """[v], to be multiplied with a tile."""
        return x[:, None] if self.k.ndim == 1 else x[None, :, None]

    def along_k(self, x: Array) -> Array:
        """As `k` is, to be multiplied with a tile."""
        return x[None, :] if self.k.ndim == 1 else x[:, None, :]

    def over_k(self, tile: Array) -> Array:
        """Sum over k: [v]."""
        return jnp.sum(tile, axis=1) if self.k.ndim == 1 else jnp.sum(jnp.sum(tile, axis=0), axis=1)

    def _at(self, ssm_ref, slot, vk: bool):
        layer, slot = bounded(self.layer, ssm_ref.shape[0]), bounded(slot, ssm_ref.shape[1])
        return ssm_ref.at[layer, slot, self.head, self._places(vk)]

    def _places(self, vk: bool) -> Array:
        v, k = self.along_v(self.v), self.along_k(self.k)
        places = v * self.key_dim + k if vk else k * self.value_dim + v
        # Nothing masked may stand where something else is stored: the interpreter stores masked places, too, unchanged.
        mask = self._mask(None)
        return places if mask is None else jnp.where(mask, places, self.key_dim * self.value_dim)

    def _mask(self, wanted: Array | None) -> Array | None:
        masks = []
        if self.v_mask is not None:
            masks.append(self.along_v(self.v_mask))
        if self.k_mask is not None:
            masks.append(self.along_k(self.k_mask))
        if wanted is not None:
            masks.append(jnp.reshape(wanted, (1,) * (self.k.ndim + 1)))
        if not masks:
            return None
        shape = (self.v.size, self.k.size) if self.k.ndim == 1 else (self.k.shape[0], self.v.size, self.k.shape[1])
        mask = jnp.ones(shape, bool)
        for part in masks:
            mask &= jnp.broadcast_to(part, mask.shape)
        return mask


def heads_and_blocks(heads: int, blocks: int, program) -> tuple[Array, Array, Array]:
    """(row, head, block) of a program: tiles of a head are neighbours in time, then heads of a row, as in memory."""
    return program // (blocks * heads), program // blocks % heads, program % blocks
