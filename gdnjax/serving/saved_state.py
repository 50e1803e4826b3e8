"""A saved engine on disk: `pools/`, the arrays of its state by Orbax, and `state.json`, everything else, written last.

Weights are not in it: it goes on in an engine of the same model and settings, which is checked before anything changes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdnjax.config import EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import Model, engine_geometry
from gdnjax.shapes import Params
from gdnjax.sharding import path_name, table_of
from gdnjax.state import ServeState
from gdnjax.version import __version__

FORMAT = 2
"""Of what is written. Another number is refused."""

POOLS, STATE = "pools", "state.json"

FREE = ("gpu_memory_utilization", "warmup", "compilation_cache_dir", "host_cache_gib")
"""Settings that nothing of a state depends on."""

SIZES = ("num_kv_blocks", "num_checkpoint_slots")
"""Settings that say the same as the sizes of the pools, or nothing."""

SAMPLED_LEAVES, SAMPLED_PLACES = 16, 4
"""Parameters that weights are known by, and places along each of their axes."""


def identity(
    model: Model, params: Params, config: EngineConfig, plan: MemoryPlan, max_model_len: int, has_tokenizer: bool
) -> dict[str, dict[str, Any]]:
    """What two engines have to agree in, as plain data: settings, sizes, the model's geometry, its weights."""
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in (*FREE, *SIZES, "max_model_len")
    }
    sizes = {"num_kv_blocks": plan.num_blocks, "num_checkpoint_slots": plan.num_checkpoint_slots}
    geometry = dataclasses.asdict(engine_geometry(model, config))
    found = {
        "settings": {**settings, **sizes, "max_model_len": max_model_len},
        "model": {"geometry": geometry, "vocab_size": model.vocab_size, "weights": weights_digest(params)},
        "tokenizer": {"is there": has_tokenizer},
    }
    # As it is when it has been read: tuples are lists there.
    return json.loads(json.dumps(found))


def weights_digest(params: Params) -> str:
    """Names, shapes and dtypes of all parameters, and some numbers of a few that are spread over them."""
    leaves = jax.tree.leaves(params)
    digest = hashlib.blake2b(table_of(params).encode(), digest_size=16)
    for leaf in leaves[:: max(1, len(leaves) // SAMPLED_LEAVES)]:
        some = tuple(slice(None, None, max(1, size // SAMPLED_PLACES)) for size in leaf.shape)
        digest.update(np.ascontiguousarray(jax.device_get(leaf[some])).tobytes())
    return digest.hexdigest()


def write(directory: str | pathlib.Path, content: dict[str, Any], state: ServeState) -> None:
    """Makes the directory. Raises FileExistsError where there is something; what was begun and cut off is removed."""
    directory = pathlib.Path(directory).resolve()
    if directory.exists():
        raise FileExistsError(f"{directory}: is there already; save_state makes a directory of its own")
    directory.mkdir(parents=True)
    try:
        _write_arrays(directory / POOLS, _arrays_of(state))
        new = directory / f"{STATE}.new"
        new.write_text(json.dumps({"format": FORMAT, "gdnjax": __version__, **content}), encoding="utf-8")
        os.replace(new, directory / STATE)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def read(directory: str | pathlib.Path, expected: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `write` was given. Raises FileNotFoundError where it is not, and ValueError for another format, for damage,
    and by name for whatever of its identity is not as `expected`.
    """
    file = pathlib.Path(directory) / STATE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a directory that LLM.save_state has written")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{file}: format {version!r}, by gdnjax {content.get('gdnjax')}; this one reads {FORMAT}")
    _check_identity(file, content["identity"], expected)
    return content


def _check_identity(file: pathlib.Path, saved: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    different = [
        f"{name}={saved['settings'].get(name)!r}, here {value!r}"
        for name, value in expected["settings"].items()
        if saved["settings"].get(name) != value
    ]
    if different:
        raise ValueError(f"{file}: saved with {'; '.join(different)}: restore needs an engine of the same settings")
    for name, value in expected["model"].items():
        if saved["model"][name] != value:
            raise ValueError(f"{file}: saved with another model: not the same {name.replace('_', ' ')} as here")
    if saved["tokenizer"] != expected["tokenizer"]:
        which = "without a tokenizer, here there is one" if expected["tokenizer"]["is there"] else "with a tokenizer"
        raise ValueError(f"{file}: saved {which}: texts would not go on")


def loader(directory: str | pathlib.Path) -> Callable[[ServeState], ServeState]:
    """Reads the pools of a saved state into the shapes and places of another's."""
    return lambda state: _with_arrays(state, _read_arrays(pathlib.Path(directory).resolve() / POOLS, _arrays_of(state)))


def _arrays_of(state: ServeState) -> dict[str, Any]:
    """Orbax has no arrays without numbers."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.size}


def _with_arrays(state: ServeState, arrays: dict[str, Any]) -> ServeState:
    def found(path, leaf):
        return arrays[path_name(path)] if leaf.size else jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(found, state)


def _handler():
    # Orbax takes longer to import than everything else here.
    import orbax.checkpoint as ocp

    # What was computed hardly compresses, and compressed copies of all pools would exist at once.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)


def _write_arrays(directory: pathlib.Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(directory, ocp.args.PyTreeSave(arrays))


def _read_arrays(directory: pathlib.Path, places: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in places.items()
    }
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(_handler()) as checkpointer:
        try:
            return checkpointer.restore(directory, args=ocp.args.PyTreeRestore(item=wanted, restore_args=arguments))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(f"{directory}: damaged: {error}") from error
