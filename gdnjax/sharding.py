"""Tensor parallelism: the mesh, the one shard_map, the collectives. How parameters are split is in
`models/partition.py`, how the state is, in `state.py`.

Everything that a step computes runs per rank inside `shard_step`. Model code sees the sizes of its rank and calls
`psum` and its siblings below; with one rank they are the identity and no shard_map is built.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, KeyPath, tree_leaves_with_path

log = logging.getLogger("gdnjax")

AXIS = "tp"

P = PartitionSpec


def make_mesh(tp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `tp` devices along the axis "tp". Raises ValueError where there are fewer, or where a process of
    several has none among them.

    Ranks on a CPU share XLA's pool of one thread a core, and wait for one another in every collective: more ranks than
    threads can wait for ever, so that is logged as a warning.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < tp:
        platform = devices[0].platform if devices else "none"
        hint = f"; to try it on a CPU, set JAX_NUM_CPU_DEVICES={tp} before JAX starts" if platform == "cpu" else ""
        raise ValueError(f"tensor_parallel_size={tp} needs {tp} devices, JAX sees {len(devices)} ({platform}){hint}")
    if devices[0].platform == "cpu" and tp > (os.cpu_count() or 1):
        log.warning(
            "%d ranks on %d CPU cores may wait for one another for ever; set the environment variable NPROC to at "
            "least %d before JAX starts",
            tp,
            os.cpu_count(),
            2 * tp,
        )
    if idle := {each.process_index for each in devices} - {each.process_index for each in devices[:tp]}:
        needed = 1 + next(i for i, each in enumerate(devices) if each.process_index == max(idle))
        raise ValueError(
            f"tensor_parallel_size={tp} leaves process {min(idle)} without a rank; allowed with the devices of these "
            f"processes: {needed} to {len(devices)}"
        )
    return Mesh(np.asarray(devices[:tp]), (AXIS,))


def path_name(path: KeyPath) -> str:
    """A key path of a pytree, joined by dots: `layers.0.mlp.up_proj.weight`, `slots.hidden`."""
    parts = []
    for key in path:
        if isinstance(key, DictKey):
            parts.append(str(key.key))
        elif isinstance(key, GetAttrKey):
            parts.append(key.name)
        else:
            parts.append(str(getattr(key, "idx", key)))
    return ".".join(parts)


def table_of(tree: Any) -> str:
    """A line for each array of a tree: its name, shape and dtype."""
    leaves = tree_leaves_with_path(tree)
    return "\n".join(f"{path_name(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves)


def placed_like(tree: Any, there: Any) -> Any:
    """`tree`, each array where the one of the same name in `there` is. Raises ValueError, before anything is placed,
    for the first names that are missing or not known, and for the first array of another shape or dtype.
    """
    arrays, wanted = ({path_name(path): x for path, x in tree_leaves_with_path(t)} for t in (tree, there))
    for what, names in (("lacks", wanted.keys() - arrays.keys()), ("has unknown", arrays.keys() - wanted.keys())):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"the tree {what} {some}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    for name, x in arrays.items():
        found, needed = (f"{np.dtype(y.dtype).name}{list(y.shape)}" for y in (x, wanted[name]))
        if found != needed:
            raise ValueError(f"{name} is {found}; allowed: {needed}")
    if jax.tree.structure(tree) != jax.tree.structure(there):
        raise ValueError("the tree has the arrays that it should, held in another way")
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, there)


def shard_step(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """Wraps a whole step: `function` then sees one rank's part of every argument. The identity for one rank.

    Varying types are not checked, since kernels' outputs carry none; tests compare all ranks instead.
    """
    if mesh.shape[AXIS] == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def rank(tp: int):
    """This rank's index, 0 to tp - 1."""
    return lax.axis_index(AXIS) if tp > 1 else 0


def psum(x, tp: int):
    """Sum over ranks."""
    return lax.psum(x, AXIS) if tp > 1 else x


def pmax(x, tp: int):
    """Maximum over ranks."""
    return lax.pmax(x, AXIS) if tp > 1 else x


def all_gather(x, tp: int, axis: int):
    """The ranks' parts side by side along `axis`."""
    return lax.all_gather(x, AXIS, axis=axis, tiled=True) if tp > 1 else x
