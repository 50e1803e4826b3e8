"""The settings that are compared, the pools that they get for the same bytes, and engines of them."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gdnjax import memory
from gdnjax.config import EngineConfig, ModelConfig
from gdnjax.memory import StateGeometry

if TYPE_CHECKING:
    from gdnjax.serving.llm import LLM

ACCOUNTINGS = ("packed", "decoupled")

GRID = 256
"""The engine's longest sequence is rounded up to a multiple of this: few lengths, so few compilations."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting. `accounting` is one of ACCOUNTINGS; `invariant` is EngineConfig's batch_invariant; `speculation`
    are further fields of EngineConfig, empty where nothing is drafted.
    """

    name: str
    accounting: str = "decoupled"
    prefix_cache: bool = False
    invariant: bool = False
    speculation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_drafts(self) -> int:
        return self.speculation.get("num_speculative_tokens", 0)

    @property
    def forced_length(self) -> float | None:
        """Tokens of a step where acceptance is forced, so that outputs are not the model's; None where it is not."""
        return self.speculation.get("spec_acceptance_length")

    def check(self) -> None:
        """Raises ValueError where an engine cannot be set up like this."""

        EngineConfig(batch_invariant=self.invariant, **self.speculation)


COMPARISONS = {
    "accounting": (Arm("packed", "packed"), Arm("decoupled")),
    "prefix-cache": (Arm("cache off"), Arm("cache on", prefix_cache=True)),
    "invariance": (Arm("free", prefix_cache=True), Arm("invariant", prefix_cache=True, invariant=True)),
}
"""Pairs of arms; ratios are what the second is of the first."""

DRAFTS = 3
"""Most drafts of a comparison of speculation, where nobody says."""


def speculating(arm: Arm, speculation: Mapping[str, Any]) -> Arm:
    """The same setting with drafts."""
    return dataclasses.replace(arm, speculation=dict(speculation))


def drafting(speculation: Mapping[str, Any]) -> tuple[Arm, ...]:
    """Settings with no drafts, with one, and so on up to `num_speculative_tokens`, alike otherwise.

    A forced acceptance is cut where fewer drafts do not reach it.
    """
    arms = []
    for drafts in range(speculation["num_speculative_tokens"] + 1):
        own = {**speculation, "num_speculative_tokens": drafts}
        if "spec_acceptance_length" in own:
            own["spec_acceptance_length"] = min(own["spec_acceptance_length"], 1.0 + drafts)
        arms.append(Arm(f"k = {drafts}", prefix_cache=True, speculation=own if drafts else {}))
    return tuple(arms)


def geometry_of(arm: Arm, config: ModelConfig, options: Mapping[str, Any], block_size: int) -> StateGeometry:
    """What a slot and a block of a setting are, on one rank. `options` are fields of EngineConfig.

    Drafting takes rows of its own in every slot, and the MTP head's layer in every block.
    """

    return StateGeometry.of(
        config,
        tp=options["tensor_parallel_size"],
        block_size=block_size,
        dtype=config.dtype if options["dtype"] == "auto" else options["dtype"],
        ssm_dtype=options["ssm_dtype"],
        kv_cache_dtype=options["kv_cache_dtype"],
        speculation=EngineConfig(**arm.speculation),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What an engine is to hold.

    rows           requests that run at once, at most.
    longest        tokens of the longest conversation.
    pool_bytes     for states and KV blocks of one rank, null ones aside; None: what all rows and checkpoints can use.
    pool_requests  in place of pool_bytes: what a packed pool needs for so many of the longest conversations.
    checkpoints    slots for the prefix cache; None: two a row, of a quarter of the bytes at most.
    host_gib       of the host's memory for the prefix cache, where there is one.
    """

    rows: int
    longest: int
    block_size: int
    pool_bytes: int | None = None
    pool_requests: int | None = None
    checkpoints: int | None = None
    host_gib: float = 0

    @property
    def blocks_per_request(self) -> int:
        """Blocks of the longest conversation. Its last token is drawn, never fed, and needs no place."""
        return -(-(self.longest - 1) // self.block_size)

    def bytes_of(self, geometry: StateGeometry) -> int | None:
        """The bytes of the pools; None: no limit."""
        if self.pool_requests is not None:
            return self.pool_requests * self.blocks_per_request * geometry.packed_block_bytes
        return self.pool_bytes


@dataclasses.dataclass(frozen=True)
class Pools:
    """Checkpoint slots and blocks of an arm, null ones aside.

    `afforded` blocks fit the bytes; `blocks` leaves out those that nobody could use.
    """

    checkpoints: int
    blocks: int
    afforded: int


def pools(arm: Arm, geometry: StateGeometry, sizes: Sizes) -> Pools:
    """The pools of an arm. Raises ValueError where its bytes do not hold the longest conversation."""
    budget = sizes.bytes_of(geometry)
    checkpoints = _checkpoints(arm, geometry, sizes, budget)
    slots = sizes.rows + checkpoints
    wanted = slots * sizes.blocks_per_request
    if budget is None:
        return Pools(checkpoints, wanted, wanted)
    if arm.accounting == "packed":
        afforded = memory.packed_blocks(geometry, budget)
    else:
        afforded = memory.decoupled_blocks(geometry, budget, slots)
    if afforded < sizes.blocks_per_request:
        raise ValueError(
            f"{arm.name}: pools of {budget:,} bytes have {max(0, afforded)} blocks for {slots} slots, and a "
            f"conversation of {sizes.longest} tokens needs {sizes.blocks_per_request}; raise --pool-gib or "
            "--pool-requests, lower --max-num-seqs or --num-checkpoint-slots, or shorten the workload"
        )
    return Pools(checkpoints, min(wanted, afforded), afforded)


def _checkpoints(arm: Arm, geometry: StateGeometry, sizes: Sizes, budget: int | None) -> int:
    if not arm.prefix_cache:
        return 0
    if sizes.checkpoints is not None:
        return sizes.checkpoints
    if budget is None:
        return 2 * sizes.rows
    spare = max(0, budget - sizes.rows * geometry.slot_bytes)
    return min(2 * sizes.rows, spare // 4 // geometry.slot_bytes)


def decode_buckets(rows: int) -> tuple[int, ...]:
    """The engine's own, and halves of the largest: a pool that holds half of the rows must not pay for empty ones."""
    return (*sorted({1, *(size for size in (8, rows // 4, rows // 2) if 8 <= size < rows), rows}),)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in memory, from which engines are made."""

    model: Any
    params: Any
    tokenizer: Any = None

    def for_arm(self, arm: Arm) -> "Loaded":
        """The same, as an arm has it."""
        return self.for_drafts(arm.num_drafts)

    def for_drafts(self, drafts: int) -> "Loaded":
        """The same, without its MTP head where nothing is drafted: the head's layer would have KV in every block."""
        from gdnjax.models import build_model

        if drafts or not self.model.mtp:
            return self
        model = build_model(self.model.config, self.model.dtype, self.model.tp)
        return Loaded(model, {name: part for name, part in self.params.items() if name != "mtp"}, self.tokenizer)


def load_checkpoint(directory: pathlib.Path, options: dict[str, Any], *, mtp: bool, progress: bool) -> Loaded:
    """A checkpoint without its tokenizer, with its MTP head if `mtp`. `options` are fields of EngineConfig."""
    from gdnjax.serving.opening import open_checkpoint

    # As an engine of the smallest pools would have it.
    config = EngineConfig(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_model_len=64,
        enable_prefix_caching=False,
        num_speculative_tokens=int(mtp),
        warmup=False,
        **options,
    )
    with open_checkpoint(directory, config) as opened:
        params, _ = opened.load(progress=progress)
    return Loaded(opened.model, params)


def with_tokenizer(loaded: Loaded, directory: pathlib.Path) -> Loaded:
    """The same with the checkpoint's tokenizer, if it has one."""
    from gdnjax.serving.tokenizer import Tokenizer

    try:
        return dataclasses.replace(loaded, tokenizer=Tokenizer.from_directory(directory))
    except FileNotFoundError:
        return loaded


def follow(loaded: Loaded) -> None:
    """In another process than process 0: takes part in all engines that process 0 makes of its own `loaded`."""
    from gdnjax.serving.following import follow_model

    def model_for(config: EngineConfig) -> tuple[Any, Any]:
        own = loaded.for_drafts(config.num_speculative_tokens)
        return own.model, own.params

    while follow_model(model_for):
        pass


CPU_WEIGHTS, CPU_TOKENS = 1 << 30, 1 << 15
"""Bytes of weights and prompt tokens beyond which a CPU would be at it for hours, or out of memory."""


def check_size_on_cpu(config: ModelConfig | None, dtype: str, tokens: int, instead: str) -> None:
    """Raises ValueError where JAX runs on a CPU and the model or the prompts are meant for a GPU.

    `config` is of a model that is to be made; None of a checkpoint, whose size is known to whom it belongs.
    """
    import jax

    from gdnjax.models import abstract_params

    if jax.default_backend() != "cpu":
        return
    weights, what, limits = 0, "", ""
    if config is not None:
        leaves = jax.tree.leaves(abstract_params(config, 1, config.dtype if dtype == "auto" else dtype))
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        what, limits = f"{weights / (1 << 30):.1f} GiB of weights and ", f"{CPU_WEIGHTS / (1 << 30):g} GiB and "
    if weights > CPU_WEIGHTS or tokens > CPU_TOKENS:
        raise ValueError(
            f"JAX runs on a CPU, and this is {what}{tokens} prompt tokens; "
            f"there it takes {limits}{CPU_TOKENS} at most: {instead}"
        )


def first_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The model of --layers: so many of its layers, from the first on. Raises ValueError for a number that it lacks."""
    if not 0 < count <= config.num_layers:
        raise ValueError(f"--layers must be between 1 and the model's {config.num_layers}, got {count}")
    return config.with_layers(range(count))


def load_random(
    config: ModelConfig, options: dict[str, Any], seed: int, *, mtp: bool, quantization: str | None = None
) -> Loaded:
    """A model of random weights, made where they stay, with an MTP head if `mtp`. `options` are fields of
    EngineConfig; `quantization` "fp8" or "fp8_per_channel": as `gdnjax.checkpoint.coded.usual_formats` has it.
    """
    import jax

    from gdnjax import sharding
    from gdnjax.checkpoint.coded import usual_formats
    from gdnjax.models import abstract_params, build_model, partition, random_params

    tp, dtype = options["tensor_parallel_size"], options["dtype"]
    dtype = config.dtype if dtype == "auto" else dtype
    abstract = abstract_params(config, tp, dtype, mtp=mtp)
    coded = {}
    if quantization is not None:
        coded = usual_formats(abstract, tp, quantization, expert_parallel=config.expert_parallel)
        abstract = abstract_params(config, tp, dtype, mtp=mtp, coded=coded)
    shardings = partition.shardings_of(abstract, sharding.make_mesh(tp), expert_parallel=config.expert_parallel)
    # This generator is the fastest.
    key = jax.random.key(seed, impl="unsafe_rbg")
    params = random_params(config, tp, dtype, key, mtp=mtp, coded=coded, shardings=shardings)
    return Loaded(build_model(config, dtype, tp, mtp=mtp), params)


def build(loaded: Loaded, arm: Arm, sizes: Sizes, options: dict[str, Any]) -> "tuple[LLM, Pools]":
    """A warmed-up engine of an arm. `options` are further fields of EngineConfig."""
    from gdnjax.serving.llm import LLM

    loaded = loaded.for_arm(arm)
    chosen = pools(arm, geometry_of(arm, loaded.model.config, options, sizes.block_size), sizes)
    config = EngineConfig(
        max_num_seqs=sizes.rows,
        max_model_len=math.ceil(sizes.longest / GRID) * GRID,
        block_size=sizes.block_size,
        num_kv_blocks=chosen.blocks,
        num_checkpoint_slots=chosen.checkpoints,
        enable_prefix_caching=arm.prefix_cache,
        host_cache_gib=sizes.host_gib if arm.prefix_cache else 0,
        batch_invariant=arm.invariant,
        decode_buckets=(sizes.rows,) if arm.invariant else decode_buckets(sizes.rows),
        # No request of a workload needs one.
        max_logit_rows=1,
        **options,
        **arm.speculation,
    )
    length = config.max_model_len or GRID
    llm = LLM.from_model(loaded.model, loaded.params, config, max_model_len=length, tokenizer=loaded.tokenizer)
    return llm, chosen
