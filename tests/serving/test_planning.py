"""What an engine's memory is planned with: every device and what is in use there, every weight, every step."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from gdnjax import EngineConfig, abstract_params, build_model
from gdnjax.assets import config_file
from gdnjax.config import ModelConfig
from gdnjax.models import engine_geometry
from gdnjax.models.partition import shardings_of
from gdnjax.serving import planning
from gdnjax.serving.runner import Runner
from gdnjax.sharding import make_mesh
from gdnjax.state import empty_state
from tests.ledger import LedgerModel
from tests.micro import MICRO, micro_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")

GIB = 1 << 30
CONFIG = EngineConfig(max_num_seqs=4, gpu_memory_utilization=0.5)
WORKSPACE = 5 << 20


@pytest.fixture
def memory_of(monkeypatch):
    """Says what devices say of their memory, by their place in the mesh; steps are not compiled."""

    def stub(mesh, *stats):
        known = dict(zip(mesh.devices.flat, stats, strict=True))
        monkeypatch.setattr(planning, "_memory_stats", lambda device: known[device])
        monkeypatch.setattr(planning, "workspaces", lambda *_: {"some": 7, "largest": WORKSPACE})

    return stub


def planned(mesh, params=None, config=CONFIG, model=None):
    tp = mesh.devices.size
    model = model or build_model(MICRO, "float32", tp)
    params = abstract_params(MICRO, tp, "float32") if params is None else params
    config = dataclasses.replace(config, tensor_parallel_size=tp)
    return planning.plan_memory(model, config, mesh, 1 << 20, params)


def test_plan_is_of_what_is_left(memory_of):
    mesh = make_mesh(1)
    memory_of(mesh, {"bytes_limit": 4 * GIB, "bytes_in_use": 0})
    alone = planned(mesh)
    assert alone.workspace_bytes == WORKSPACE
    assert alone.total_bytes <= 2 * GIB < 1.1 * alone.total_bytes
    memory_of(mesh, {"bytes_limit": 4 * GIB, "bytes_in_use": 3 * GIB})
    beside = planned(mesh)
    assert beside.total_bytes <= GIB // 2 < 1.1 * beside.total_bytes
    assert beside.num_blocks < alone.num_blocks / 3


def test_device_with_the_least_left_decides(memory_of):
    mesh = make_mesh(2)
    full, half = {"bytes_limit": 4 * GIB, "bytes_in_use": 0}, {"bytes_limit": 2 * GIB, "bytes_in_use": 0}
    taken = {"bytes_limit": 4 * GIB, "bytes_in_use": 2 * GIB}
    found = {}
    for name, second in (("full", full), ("half", half), ("taken", taken)):
        memory_of(mesh, full, second)
        found[name] = planned(mesh)
    assert found["half"] == found["taken"] != found["full"]
    assert found["half"].total_bytes <= GIB < 1.1 * found["half"].total_bytes


@pytest.mark.parametrize("tp", [1, 2])
def test_parameters_in_their_places_are_not_somebody_elses(memory_of, tp):
    """Those that have to be copied to be where they belong take their bytes twice."""
    mesh = make_mesh(tp)
    placed = jax.device_put(micro_params(tp), shardings_of(micro_params(tp), mesh))
    of_rank = planning.weight_bytes(placed, tp)
    shards = [shard for leaf in jax.tree.leaves(placed) for shard in leaf.addressable_shards]
    own = [sum(shard.data.nbytes for shard in shards if shard.device == device) for device in mesh.devices.flat]
    assert own == [of_rank] * tp
    memory_of(mesh, *[{"bytes_limit": GIB, "bytes_in_use": 0}] * tp)
    before = planned(mesh)
    memory_of(mesh, *[{"bytes_limit": GIB, "bytes_in_use": of_rank}] * tp)
    assert planned(mesh, placed) == before
    assert planning.bytes_left(mesh, placed) == (GIB, GIB)
    elsewhere = jax.device_put(micro_params(tp), jax.devices()[3])
    assert planning.bytes_left(mesh, elsewhere) == (GIB - of_rank, GIB)


def test_want_of_memory_says_what_is_in_use(memory_of):
    mesh = make_mesh(1)
    memory_of(mesh, {"bytes_limit": GIB, "bytes_in_use": GIB - 1000})
    with pytest.raises(MemoryError, match=r"bytes short: .* budget of 500 bytes.* Of a device's 1,073,741,824 bytes "):
        planned(mesh)
    memory_of(mesh, {"bytes_limit": 1000, "bytes_in_use": 0})
    with pytest.raises(MemoryError, match="bytes short") as error:
        planned(mesh)
    assert "in use" not in str(error.value)


def test_more_of_the_host_than_there_is_is_refused(memory_of):
    mesh = make_mesh(1)
    memory_of(mesh, {"bytes_limit": GIB, "bytes_in_use": 0})
    with pytest.raises(ValueError, match=r"host_cache_gib=1e\+06 exceeds the memory of this host; allowed: less than"):
        planned(mesh, config=dataclasses.replace(CONFIG, host_cache_gib=1e6))


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_weights_of_a_rank_are_what_it_holds(tp, expert_parallel):
    """To the byte: replicated ones (norms, routers, the head's projection) whole, the others by their shards."""
    how = {"expert_parallel": expert_parallel}
    config = MICRO.with_expert_parallel() if expert_parallel else MICRO
    params = abstract_params(config, tp, "bfloat16", mtp=True)
    leaves, places = jax.tree.leaves(params), jax.tree.leaves(shardings_of(params, make_mesh(tp), **how))
    held = [
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    ]
    assert planning.weight_bytes(params, tp, **how) == sum(held)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert (sum(held) > whole // tp) == (tp > 1)


def test_replicated_weights_of_a_published_model_are_counted():
    """9B on four ranks: 48 MiB that a division by the ranks would miss."""
    config = ModelConfig.from_hf(config_file("qwen3.5-9b"))
    params = abstract_params(config, 4, "bfloat16", mtp=True)
    divided = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) // 4
    assert 48 << 20 <= planning.weight_bytes(params, 4) - divided < 49 << 20


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_invariant": True, "enable_prefix_caching": False},
        {"num_speculative_tokens": 3, "draft_acceptance": "rejection", "adaptive_speculation": True},
    ],
    ids=["plain", "invariant", "speculating"],
)
def test_workspace_is_of_every_step_that_the_engine_warms_up(monkeypatch, options):
    """Each of its steps is among those measured, or is one of them in a smaller bucket or with fewer drafts."""
    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=128, num_kv_blocks=8, **options)
    model = LedgerModel(mtp=config.num_speculative_tokens > 0)
    params, mesh, calls = model.params(), make_mesh(1), {}
    monkeypatch.setattr(Runner, "_compile", lambda self, found: calls.update(found))
    plan = planning.memory.plan(engine_geometry(model, config), config, max_model_len=64, budget_bytes=GIB)
    runner = Runner(model, params, mesh, config, plan, 64)
    runner.warm_up()
    state = jax.eval_shape(lambda: runner.state)

    def shapes(batch):
        return [np.shape(leaf) for leaf in jax.tree.leaves(batch)]

    measured = {
        name: shapes(arguments[-1])
        for name, _, arguments in planning.largest_steps(model, config, mesh, jax.eval_shape(model.params), state)
    }
    kinds = {
        "admit": "admit",
        "counts": "fill counts",
        "masks": "fill masks",
        "seal": "seal",
        "prefill": "prefill",
        "prompt log-probabilities": "prefill",
        "decode, plain": "decode, plain sampler",
        "decode, full": "decode, full sampler",
    }
    seen = set()
    for name, call in calls.items():
        # A logit row is written as it comes.
        if name == "logit row":
            continue
        kind = next(measure for begin, measure in kinds.items() if name.startswith(begin))
        found = shapes(call.batch)
        assert all(math.prod(a) <= math.prod(b) for a, b in zip(found, measured[kind], strict=True)), name
        if found == measured[kind]:
            seen.add(kind)
    assert seen == set(measured)


@pytest.mark.short_cases("0-shared_noise-1.5")
@pytest.mark.parametrize(
    ("drafts", "acceptance", "most"),
    # Rejection keeps the drafter's logits beside the target's: 1 + 2k rows a request in place of 1 + k.
    [(0, "shared_noise", 1.5), (3, "shared_noise", 1.5), (3, "rejection", 7 / 4 + 0.25)],
)
def test_full_sampler_holds_little_more_than_the_logits(drafts, acceptance, most):
    """Its temporaries by one [rows x (1 + drafts), V] of float32, the layers' among them."""
    rows, size, model = 256, 4096, LedgerModel(vocab_size=4096, mtp=drafts > 0)
    config = EngineConfig(
        max_num_seqs=rows, max_num_batched_tokens=64, num_speculative_tokens=drafts, draft_acceptance=acceptance
    )
    geometry = engine_geometry(model, config)
    state = jax.eval_shape(lambda: empty_state(geometry, planning._pools(model, config, 64), config, 64))
    steps = planning.largest_steps(model, config, make_mesh(1), jax.eval_shape(model.params), state)
    step, arguments = next(found for name, *found in steps if name == "decode, full sampler")
    found = step.lower(*arguments).compile({"xla_backend_optimization_level": 0}).memory_analysis()
    logits = rows * (1 + drafts) * size * 4
    assert logits < found.temp_size_in_bytes < most * logits
