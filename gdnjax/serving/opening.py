"""What every process of an engine does with a checkpoint before it reads weights, whether it leads or follows."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from gdnjax import backend, checkpoint, sharding
from gdnjax.assets import model_directory
from gdnjax.config import EngineConfig, ModelConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import HybridModel, Model, abstract_params, build_model, partition
from gdnjax.models.draft_head import with_abstract_draft_head, with_draft_head
from gdnjax.serving import compilation_cache
from gdnjax.serving.planning import plan_memory
from gdnjax.serving.processes import Followers, Leader
from gdnjax.serving.runner import Runner
from gdnjax.shapes import Params


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model, its ranks and the division of their memory. `others` are the other processes, if there are any."""

    model: Model
    mesh: Mesh
    config: EngineConfig
    plan: MemoryPlan
    max_model_len: int
    others: Followers | Leader | None

    def runner(self, params: Params) -> Runner:
        """The device's side of an engine, when all processes have come so far."""
        followers = self.others if isinstance(self.others, Followers) else None
        runner = Runner(self.model, params, self.mesh, self.config, self.plan, self.max_model_len, followers)
        if self.others is not None:
            self.others.ready()
        return runner


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint(Opened):
    """The same of a checkpoint that is open, and what its parameters will be."""

    directory: pathlib.Path
    model_config: ModelConfig
    stored: checkpoint.OpenCheckpoint
    abstract: Params

    def load(self, *, progress: bool) -> tuple[Params, checkpoint.LoadReport]:
        """Reads the weights: of several processes each its own."""
        params, report = checkpoint.load_params(self.stored, self.abstract, progress=progress)
        return (with_draft_head(params) if self.config.drafts_apart else params), report


@contextlib.contextmanager
def open_checkpoint(
    model: str | pathlib.Path, config: EngineConfig, others: Followers | Leader | None = None
) -> Iterator[OpenedCheckpoint]:
    """A checkpoint as an engine of this config has it. Raises what LLM raises before it reads weights."""
    directory = model_directory(model)
    compilation_cache.configure(config)
    model_config = ModelConfig.from_hf(directory)
    if config.enable_expert_parallel:
        model_config = model_config.with_expert_parallel()
    mesh = sharding.make_mesh(config.tensor_parallel_size)
    implementation = _implementation(config, mesh)
    dtype = model_config.dtype if config.dtype == "auto" else config.dtype
    mtp = config.num_speculative_tokens > 0
    if mtp:
        model_config.require_mtp()
    apart = config.drafts_apart
    tp = config.tensor_parallel_size
    hybrid = build_model(model_config, dtype, tp, mtp=mtp, backend=implementation, draft_head=apart)
    abstract = abstract_params(model_config, tp, dtype, mtp=mtp)
    with checkpoint.opened(directory, model_config, abstract, mesh) as stored:
        coded = checkpoint.coded_formats(stored, config.quantization)
        abstract = abstract_params(model_config, tp, dtype, mtp=mtp, coded=coded)
        if others is not None:
            others.compare(
                {**_facts(hybrid, abstract, mesh), "checkpoint's sample of weights": checkpoint.fingerprint(directory)}
            )
        max_model_len = config.length_within(model_config.max_position_embeddings)
        yield OpenedCheckpoint(
            model=hybrid,
            mesh=mesh,
            config=config,
            plan=_plan(
                hybrid,
                config,
                mesh,
                max_model_len,
                with_abstract_draft_head(abstract) if apart else abstract,
                others,
            ),
            max_model_len=max_model_len,
            others=others,
            directory=directory,
            model_config=model_config,
            stored=stored,
            abstract=abstract,
        )


def open_model(
    model: Model, params: Params, config: EngineConfig, context: int, others: Followers | Leader | None = None
) -> tuple[Opened, Params]:
    """A model and parameters that are in memory, and the parameters in their places. Raises what LLM.from_model
    raises.
    """
    compilation_cache.configure(config)
    mesh = sharding.make_mesh(config.tensor_parallel_size)
    model = model.on(_implementation(config, mesh))
    if others is not None:
        others.compare(_facts(model, params, mesh))
    length = config.length_within(context)
    apart = config.drafts_apart
    if apart:
        assert isinstance(model, HybridModel), "held by check_model"
        model = model.with_draft_head()
    plan = _plan(model, config, mesh, length, with_abstract_draft_head(params) if apart else params, others)
    placed = jax.device_put(params, partition.shardings_of(params, mesh, expert_parallel=model.expert_parallel))
    placed = with_draft_head(placed) if apart else placed
    return Opened(model=model, mesh=mesh, config=config, plan=plan, max_model_len=length, others=others), placed


def check_model(model: Model, config: EngineConfig) -> None:
    """Raises ValueError where a model in memory is not one that the config asks for."""
    if config.quantization != "auto":
        raise ValueError(
            f"quantization={config.quantization!r} is of checkpoints that are loaded; parameters are taken as they "
            'are; allowed: "auto"'
        )
    if model.tp != config.tensor_parallel_size:
        raise ValueError(
            f"the model was built for {model.tp} ranks, tensor_parallel_size is {config.tensor_parallel_size}"
        )
    if model.expert_parallel != config.enable_expert_parallel:
        raise ValueError(
            f"enable_expert_parallel is {config.enable_expert_parallel}, and the model was built with "
            f"expert_parallel={model.expert_parallel}: build_model(config.with_expert_parallel(), ...) and the "
            "setting go together"
        )
    if config.num_speculative_tokens and not model.mtp:
        raise ValueError(
            f"num_speculative_tokens={config.num_speculative_tokens} needs a model with its MTP head: "
            "build_model(..., mtp=True)"
        )
    if config.drafts_apart and not isinstance(model, HybridModel):
        raise ValueError(f"draft_head={config.draft_head!r} is of a HybridModel, got a {type(model).__name__}")


def _plan(
    model: Model,
    config: EngineConfig,
    mesh: Mesh,
    max_model_len: int,
    params: Any,
    others: Followers | Leader | None,
) -> MemoryPlan:
    if others is None:
        return plan_memory(model, config, mesh, max_model_len, params)
    if config.host_cache_gib:
        raise ValueError(f"host_cache_gib={config.host_cache_gib:g} is of one process alone; allowed with several: 0")
    plan = plan_memory(model, config, mesh, max_model_len, params, others.agree)
    others.compare({"memory plan": dataclasses.asdict(plan)})
    return plan


def _facts(model: Model, params: Any, mesh: Mesh) -> dict[str, Any]:
    """What steps are made of, in words that other processes can compare."""
    settings: Any = jax.config
    facts = {
        "device": mesh.local_devices[0].device_kind,
        "backend": repr(model.backend),
        "jax_enable_x64": settings.jax_enable_x64,
        "jax_default_matmul_precision": settings.jax_default_matmul_precision,
        "model": type(model).__name__,
        "parameters": hashlib.sha256(sharding.table_of(params).encode()).hexdigest(),
    }
    described = getattr(model, "config", None)
    if dataclasses.is_dataclass(described):
        facts |= {f"model's {f.name}": repr(getattr(described, f.name)) for f in dataclasses.fields(described)}
    return facts


def _implementation(config: EngineConfig, mesh: Mesh) -> backend.Backend:
    """What runs the model's ops."""
    found = backend.of_device(config.kernels, mesh.local_devices[0])
    return dataclasses.replace(found, quantize_activations=config.quantize_activations)
