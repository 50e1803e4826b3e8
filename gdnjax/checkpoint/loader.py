"""From a checkpoint directory to sharded parameters, each rank reading its own part."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from gdnjax import sharding
from gdnjax.checkpoint.formats import open_source
from gdnjax.checkpoint.mapping import Copy, Origin, copies, origin_of, stores_experts_apart
from gdnjax.checkpoint.names import Names, sort_names
from gdnjax.checkpoint.sources import TensorSource, abbreviate
from gdnjax.config import ModelConfig
from gdnjax.shapes import Params

log = logging.getLogger("gdnjax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of the tensors of a checkpoint. Counts are of checkpoint tensors.

    loaded            became parameters, those of the MTP head included
    mtp_loaded        belong to the multi-token-prediction head, and became parameters
    mtp_shared        modules of the target that the loaded MTP head uses in place of its own; empty without a head
    skipped_vision    belong to the vision tower, which the engine does not run
    skipped_mtp       belong to the multi-token-prediction head, which `abstract` does not have
    skipped_tied      the lm_head of a model whose lm_head is its embedding
    parameter_bytes   size of all parameters, all ranks together, replicated ones counted once
    """

    loaded: int
    mtp_loaded: int
    mtp_shared: tuple[str, ...]
    skipped_vision: int
    skipped_mtp: int
    skipped_tied: int
    parameter_bytes: int

    def __str__(self) -> str:
        head = ""
        if self.mtp_shared:
            head = f"; {self.mtp_loaded} of them are the MTP head, which shares {' and '.join(self.mtp_shared)}"
        return (
            f"{self.loaded} tensors, {self.parameter_bytes / (1 << 30):.2f} GiB of parameters{head}; skipped: "
            f"{self.skipped_vision} of the vision tower, {self.skipped_mtp} of the MTP head, "
            f"{self.skipped_tied} tied to the embedding"
        )


def load_params(
    directory: str | pathlib.Path, cfg: ModelConfig, abstract: Params, mesh: Mesh, *, progress: bool = True
) -> tuple[Params, LoadReport]:
    """Reads the parameters of a model into the tree `abstract`, cast to its dtypes and sharded over `mesh`.

    abstract    nested dict of jax.ShapeDtypeStruct with global shapes, under the modules' names; the MTP head is
                loaded if it is a part of this tree
    progress    a progress bar over parameters, on stderr

    Names, shapes and dtypes of all tensors are checked before anything is read. Host memory holds one parameter at a
    time. Raises FileNotFoundError where the directory is no checkpoint, and ValueError that names the tensors where
    some are missing, unexpected, of another shape or dtype, where a file is damaged, where the MTP head is wanted and
    not stored, or has an embedding or a head of its own, or where the ranks of `mesh` do not divide the model.
    """
    tp = mesh.shape[sharding.AXIS]
    # For its errors: what the ranks cannot divide is named before any index vector is cut.
    cfg.shard(tp)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    parameters = {sharding.path_name(path): leaf for path, leaf in leaves}
    with open_source(directory) as source:
        names, origins = _resolve(source, directory, parameters, cfg, tp)
        arrays = [
            _load_parameter(source, names.language, origins[name], leaf, NamedSharding(mesh, sharding.spec_of(name)))
            for name, leaf in tqdm(parameters.items(), desc="loading", unit="parameter", disable=not progress)
        ]
    mtp_loaded = sum(map(_is_of_head, names.language))
    tables = ("embed_tokens",) if cfg.tie_word_embeddings else ("embed_tokens", "lm_head")
    report = LoadReport(
        loaded=len(names.language),
        mtp_loaded=mtp_loaded,
        mtp_shared=tables if mtp_loaded else (),
        skipped_vision=len(names.vision),
        skipped_mtp=len(names.mtp),
        skipped_tied=len(names.tied),
        parameter_bytes=sum(array.nbytes for array in arrays),
    )
    log.info("loaded %s: %s", directory, report)
    return jax.tree_util.tree_unflatten(treedef, arrays), report


def _resolve(
    source: TensorSource,
    directory: str | pathlib.Path,
    parameters: dict[str, jax.ShapeDtypeStruct],
    cfg: ModelConfig,
    tp: int,
) -> tuple[Names, dict[str, Origin]]:
    """Finds every parameter in the checkpoint. Raises one ValueError that names all that does not fit."""
    try:
        mtp_wanted = any(map(_is_of_head, parameters))
        names = sort_names(source.names(), tied_lm_head=cfg.tie_word_embeddings, mtp_wanted=mtp_wanted)
        # Either part may store its experts one by one or together, whatever the other does.
        experts_apart = {
            head: stores_experts_apart([name for name in names.language if _is_of_head(name) == head])
            for head in (False, True)
        }
        _check_head(names, mtp_wanted)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    origins = {
        name: origin_of(name, leaf.shape, cfg, tp, experts_apart=experts_apart[_is_of_head(name)])
        for name, leaf in parameters.items()
    }
    expected = {part.tensor: part.shape for origin in origins.values() for part in origin.parts}
    missing = [name for name in expected if name not in names.language]
    unexpected = [*names.unknown, *(full for name, full in names.language.items() if name not in expected)]
    misshaped = [
        f"{names.language[name]} is {source.shape(names.language[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in names.language and source.shape(names.language[name]) != shape
    ]
    problems = [
        f"{len(found)} {what}: {abbreviate(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if found
    ]
    if problems:
        # The rest may be a whole model.
        if any(_is_of_head(name) for name in (*missing, *unexpected)):
            problems.append("Without the MTP head (num_speculative_tokens=0) nothing that begins with mtp. is read")
        raise ValueError(f"{directory}: the tensors do not fit the model's config.json. {'. '.join(problems)}")
    return names, origins


def _is_of_head(name: str) -> bool:
    """Whether a parameter or a tensor, in module names, belongs to the MTP head."""
    return name.startswith("mtp.")


def _check_head(names: Names, mtp_wanted: bool) -> None:
    """Raises ValueError where the MTP head is wanted and not stored, or brings tables that should be the target's."""
    if names.mtp_tables:
        raise ValueError(
            f"the MTP head has an embedding or a head of its own: {abbreviate(list(names.mtp_tables))}. Supported are "
            "heads that share those of the model; num_speculative_tokens=0 does without the MTP head"
        )
    if mtp_wanted and not any(map(_is_of_head, names.language)):
        raise ValueError(
            "num_speculative_tokens above 0 needs the MTP head, and no tensor here begins with mtp.; allowed: "
            "num_speculative_tokens=0"
        )


def _load_parameter(
    source: TensorSource,
    stored_names: dict[str, str],
    origin: Origin,
    leaf: jax.ShapeDtypeStruct,
    placement: NamedSharding,
) -> jax.Array:
    def block(index: Any) -> np.ndarray:
        bounds = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
        slices = tuple(slice(start, stop) for start, stop, _ in bounds)
        return _fill(source, stored_names, copies(origin, slices), slices, leaf.dtype)

    # Waited for, so that the host buffers of one parameter are gone before the next is read.
    return jax.make_array_from_callback(leaf.shape, placement, block).block_until_ready()


def _fill(
    source: TensorSource, stored_names: dict[str, str], reads: list[Copy], block: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    # Zeros, since padding is what no read covers.
    values = np.zeros([part.stop - part.start for part in block], dtype)
    for copy in reads:
        values[copy.target] = source.read(stored_names[copy.tensor], copy.source)
    return values
