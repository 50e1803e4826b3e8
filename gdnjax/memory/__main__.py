"""`gdnjax memory`: what weights, a slot and a block of a model cost, what a budget holds, and whether a GPU does. No
weights are read.
"""

import argparse
import dataclasses
import fractions
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

from gdnjax import memory
from gdnjax.assets import PRESETS, SAME_AS, config_file
from gdnjax.cache_kinds import CacheKind
from gdnjax.config import DRAFT_HEADS, DTYPES, KV_CACHE_DTYPES, EngineConfig, ModelConfig
from gdnjax.config.quantization import GRIDS, Quantization
from gdnjax.memory import Accounting, HostSizes, MemoryPlan, StateGeometry
from gdnjax.memory.weights import weight_bytes, workspace_estimate

GIB = 1 << 30

DOES_NOT_FIT = 1
BAD_INPUT = 2

DEFAULT = "qwen3.5-9b"
"""The model of which it speaks where none is named."""

DESCRIPTION = """\
Bytes of the weights, of one recurrent state (a slot) and of one block of keys and values, for one tensor-parallel rank
of a model, from its geometry alone. With --gpu-memory: whether the model fits, by the plan that the engine would make;
the workspace, which the engine measures, is an estimate here. With --budget-gib: what that holds in two accountings.

  packed     every block holds a whole recurrent state beside its keys and values, the field's older layout
  decoupled  a slot for each request, and the rest is blocks, as gdnjax divides memory

The budget is that of these pools alone. Weights, workspace, logit rows, token counts, last hidden states, and the null
slot and block come on top: --gpu-memory counts them."""

EXAMPLES = """\
examples:
  gdnjax memory --list
  gdnjax memory --config qwen3.5-9b --gpu-memory 24
  gdnjax memory --config path/to/checkpoint --budget-gib 40 --max-num-seqs 64 --max-model-len 32768
  gdnjax memory --config qwen3.5-397b-a17b --tp 4 --kv-cache-dtype fp8 --ssm-dtype bfloat16 --budget-gib 157.88 \\
      --max-num-seqs 128

Exit status: 0, 1 where the model does not fit in --gpu-memory, 2 for input that makes no sense."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdnjax memory",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--config",
        default=DEFAULT,
        metavar="NAME|PATH",
        help=f"a preset, a config.json, or a directory that holds one ({DEFAULT})",
    )
    what.add_argument("--list", action="store_true", help="print the names of the presets")
    add = parser.add_argument_group("geometry").add_argument
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (1); all bytes are those of one rank")
    add(
        "--enable-expert-parallel",
        action="store_true",
        help="ranks share out routed experts whole, in place of a slice of every expert on each",
    )
    add("--block-size", type=int, default=16, metavar="N", help="tokens in a block, a power of two (16)")
    add("--dtype", choices=DTYPES, default="auto", help="weights, activations, windows (auto: the model's)")
    add(
        "--quantization",
        choices=("auto", *GRIDS, "dequantized"),
        default="auto",
        help="weights of projections: auto, codes of 8 bits where config.json has a quantization_config, on its grid; "
        "fp8, in blocks of 128 x 128; fp8_per_channel, with a scale for each row; dequantized, as --dtype",
    )
    add("--ssm-dtype", choices=("float32", "bfloat16"), default="float32", help="the recurrent state (float32)")
    add(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="keys and values (auto: as --dtype); fp8 and int8 have a float32 scale for each token and head",
    )
    add(
        "--num-speculative-tokens",
        type=int,
        default=0,
        metavar="K",
        help="drafts of the MTP head in a step (0): a slot keeps their inputs, a block the head's keys and values",
    )
    add(
        "--draft-head",
        choices=DRAFT_HEADS,
        default="target",
        help="what drafts are drawn by (target); fp8: a copy of the head, a byte a number and a scale for each token",
    )
    add = parser.add_argument_group("GPU").add_argument
    add("--gpu-memory", type=budget, metavar="GIB", help="say whether the model fits in so many GiB of one GPU, a rank")
    add(
        "--memory-fraction",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of it that JAX takes, by XLA_PYTHON_CLIENT_MEM_FRACTION (0.9, as the commands set it; unset it is 0.75)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=EngineConfig.gpu_memory_utilization,
        metavar="SHARE",
        help="of that what the engine may use (%(default)g)",
    )
    add("--max-num-batched-tokens", type=int, default=1024, metavar="N", help="tokens of a prefill step (1024)")
    add(
        "--host-cache-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="of the host, of all ranks together, for what the prefix cache evicts (0); of the GPU it takes room for "
        "what is on its way",
    )
    add = parser.add_argument_group("budget").add_argument
    add("--budget-gib", type=budget, metavar="GIB", help="GiB for slots and blocks on one rank")
    add("--max-num-seqs", type=int, default=8, metavar="N", help="requests that run at once, each with a slot (8)")
    add(
        "--num-checkpoint-slots",
        type=int,
        metavar="N",
        help="slots for the prefix cache, beside them (0; with --gpu-memory: as many as the engine would make)",
    )
    add("--max-model-len", type=int, metavar="N", help="tokens of one request (the model's context, and at most 8192)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def budget(text: str) -> int:
    """Bytes of a number of GiB, rounded down."""
    try:
        size = int(fractions.Fraction(text) * GIB)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"expected a number of GiB, got {text!r}") from error
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 0, 1 where the model does not fit, or 2 where the input makes no report."""
    arguments = build_parser().parse_args(argv)
    if arguments.list:
        print(*PRESETS, *SAME_AS, sep="\n")
        return 0
    try:
        report = make_report(arguments)
    except (OSError, ValueError, MemoryError) as error:
        print(f"gdnjax memory: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(json.dumps(report.as_json(), indent=2) if arguments.json else report)
    return DOES_NOT_FIT if report.fit and report.fit.plan is None else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a model fits in one GPU. `plan` is what the engine would make of it; None, and why, where it does not."""

    gpu_memory_bytes: int
    memory_fraction: float
    budget_bytes: int
    workspace_bytes: int
    plan: MemoryPlan | None = None
    shortfall: str = ""

    def text(self, max_num_seqs: int, max_model_len: int, block_size: int) -> str:
        gpu = f"{self.gpu_memory_bytes / GIB:,.6g} GiB"
        share = f"JAX has {self.memory_fraction:g} of them, and the engine {self.budget_bytes / GIB:,.4g} GiB"
        if self.plan is None:
            return f"Does not fit in {gpu} ({share}): {self.shortfall}."
        blocks = self.plan.num_blocks
        requests = min(max_num_seqs, blocks // -(-max_model_len // block_size))
        return (
            f"Fits in {gpu} ({share}), the workspace being an estimate.\n\n{self.plan}\n\n"
            f"  {blocks:,} blocks hold {blocks * block_size:,} tokens: {requests:,} requests of {max_model_len:,} "
            f"tokens at once, of at most {max_num_seqs:,}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What is printed. `budget_bytes` is None, and there are no accountings, where no budget was given.

    `plain` is the geometry without speculation; without drafts it is `geometry`. `weight_codes` is what the weights of
    projections are, where they are codes.
    """

    name: str
    tp: int
    expert_parallel: bool
    num_drafts: int
    geometry: StateGeometry
    plain: StateGeometry
    dtype: str
    weight_codes: str | None
    weight_bytes: int
    budget_bytes: int | None
    max_num_seqs: int
    num_checkpoint_slots: int
    max_model_len: int
    fit: Fit | None = None
    packed: Accounting | None = None
    decoupled: Accounting | None = None
    host: HostSizes | None = None

    @property
    def largest_state(self) -> tuple[str, float]:
        """The pool that takes most of a slot, and which part of a packed block it is; "" of a model without state."""
        pools = [leaf for kind in self.geometry.cache.slots for leaf in kind.leaves]
        if not pools:
            return "", 0.0
        largest = max(pools, key=lambda leaf: leaf.bytes)
        return largest.name, largest.bytes / self.geometry.packed_block_bytes

    @property
    def slot_growth(self) -> float:
        """What a slot takes, of what it takes without speculation."""
        return self.geometry.slot_bytes / self.plain.slot_bytes if self.plain.slot_bytes else 1.0

    def as_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        names = ("slot_bytes", "block_bytes", "packed_block_bytes", "equivalent_blocks", "hidden_bytes")
        names += ("logit_row_bytes", "count_row_bytes", "mask_row_bytes")
        data["bytes"] = {name: getattr(self.geometry, name) for name in names}
        # Of one layer: one slot's row, or one entry of a block.
        data["row_bytes"] = {f"{kind.name}.{leaf.name}": leaf.row_bytes for kind, leaf in self.geometry.cache.leaves()}
        data["largest_state"] = self.largest_state
        data["slot_growth"] = self.slot_growth
        if self.packed and self.decoupled and self.packed.num_blocks:
            data["ratio"] = self.decoupled.num_blocks / self.packed.num_blocks
        return data

    def __str__(self) -> str:
        fit = self.fit.text(self.max_num_seqs, self.max_model_len, self.geometry.block_size) if self.fit else ""
        return "\n\n".join(filter(None, (self._costs(), fit, self._holdings(), self._on_host())))

    def _costs(self) -> str:
        g = self.geometry
        rank = f"one of {self.tp} ranks" if self.tp > 1 else "one rank"
        rank += ", experts whole" if self.expert_parallel and self.tp > 1 else ""
        head = ", one of them the MTP head's" if self.num_drafts else ""
        with_head = ", the MTP head among them" if self.num_drafts else ""
        slot = " + ".join(f"{_layers(kind)} x ({_leaves(kind)})" for kind in g.cache.slots) or "no state to keep"
        block = " + ".join(
            f"{kind.entries(g.block_size)} x {_layers(kind)} x ({_leaves(kind)})" for kind in g.cache.paged
        )
        name, share = self.largest_state
        both = f"both in one: {share:.1%} of it is {name}" if name else "a block: there is no state"
        dtypes = f"{self.weight_codes} and {self.dtype}" if self.weight_codes else self.dtype
        rows = [
            ("weights", self.weight_bytes, f"{self.weight_bytes / GIB:,.2f} GiB in {dtypes}{with_head}"),
            ("a slot", g.slot_bytes, slot),
            ("a block", g.block_bytes, f"{block}{head}" if block else "nothing"),
            ("packed block", g.packed_block_bytes, both),
        ]
        table = "\n".join(f"  {name:<12} {size:>15,} B  {note}" for name, size, note in rows)
        return (
            f"{self.name}, {rank}, by geometry alone\n\n{table}\n\n"
            f"  By its bytes a slot is worth {g.equivalent_blocks:,} blocks: "
            f"{g.equivalent_blocks * g.block_size:,} tokens of keys and values.{self._drafts()}"
        )

    def _drafts(self) -> str:
        if not self.num_drafts:
            return ""
        drafts = "1 draft" if self.num_drafts == 1 else f"{self.num_drafts} drafts"
        more, plain = self.slot_growth - 1, self.plain
        return (
            f"\n  With {drafts} a step a slot takes {more:.2%} more than the {plain.slot_bytes:,} B without, for the "
            f"inputs of {self.geometry.pending_rows} tokens.\n  A block without takes {plain.block_bytes:,} B."
        )

    def _on_host(self) -> str:
        if self.host is None:
            return ""
        return (
            f"{self.host.capacity_bytes / GIB:,.2f} GiB of the host hold {self.host.holds} of a rank. What is on its "
            f"way there or back takes up to {self.host.staging_bytes:,} B of the device."
        )

    def _holdings(self) -> str:
        if self.budget_bytes is None or self.packed is None or self.decoupled is None:
            return ""
        rows = "\n".join(
            f"  {name:<10} {by.block_bytes:>12,} {by.num_blocks:>12,} {by.num_tokens:>14,} {by.num_requests:>10,}"
            for name, by in (("packed", self.packed), ("decoupled", self.decoupled))
        )
        slots = f"{self.max_num_seqs + self.num_checkpoint_slots:,} slots"
        if self.num_checkpoint_slots:
            slots += f", {self.num_checkpoint_slots:,} of them checkpoints"
        ratio = "Packed holds no block at all."
        if self.packed.num_blocks:
            ratio = f"Decoupled has {self.decoupled.num_blocks / self.packed.num_blocks:,.1f}x the blocks."
        return (
            f"{self.budget_bytes / GIB:,.2f} GiB ({self.budget_bytes:,} B) for slots and blocks alone: neither weights "
            f"nor workspace are in it\n\n"
            f"  {'accounting':<10} {'B a block':>12} {'blocks':>12} {'tokens':>14} {'requests':>10}\n{rows}\n\n"
            f"  {ratio} It counts {slots}. Requests: of {self.max_model_len:,} tokens each, at once, and at most "
            f"{self.max_num_seqs:,}."
        )


def _layers(kind: CacheKind) -> str:
    return f"{kind.leaves[0].layers} layers"


def _leaves(kind: CacheKind) -> str:
    """What a row of a kind takes in one layer, pool by pool."""
    return " + ".join(f"{leaf.row_bytes:,} {leaf.name} in {leaf.dtype}" for leaf in kind.leaves)


def make_report(arguments: argparse.Namespace) -> Report:
    """Raises FileNotFoundError, ValueError or MemoryError that say what is wrong with the input."""
    engine = EngineConfig(
        tensor_parallel_size=arguments.tp,
        enable_expert_parallel=arguments.enable_expert_parallel,
        block_size=arguments.block_size,
        dtype=arguments.dtype,
        kv_cache_dtype=arguments.kv_cache_dtype,
        ssm_dtype=arguments.ssm_dtype,
        max_num_seqs=arguments.max_num_seqs,
        num_checkpoint_slots=arguments.num_checkpoint_slots,
        max_model_len=arguments.max_model_len,
        num_speculative_tokens=arguments.num_speculative_tokens,
        draft_head=arguments.draft_head,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        host_cache_gib=arguments.host_cache_gib,
    )
    model = ModelConfig.from_hf(config_file(arguments.config))
    if engine.enable_expert_parallel:
        model = model.with_expert_parallel()
    dtype = model.dtype if engine.dtype == "auto" else engine.dtype
    geometry_of = functools.partial(
        StateGeometry.of,
        model,
        tp=engine.tensor_parallel_size,
        block_size=engine.block_size,
        dtype=dtype,
        ssm_dtype=engine.ssm_dtype,
        kv_cache_dtype=engine.kv_cache_dtype,
    )
    plain = geometry = geometry_of()
    if engine.num_speculative_tokens:
        model.require_mtp()
        geometry = geometry_of(speculation=engine)
    max_model_len = engine.length_within(model.max_position_embeddings)
    packed = decoupled = None
    if arguments.budget_gib is not None:
        packed, decoupled = memory.accountings(
            geometry,
            arguments.budget_gib,
            max_num_seqs=engine.max_num_seqs,
            max_model_len=max_model_len,
            num_checkpoint_slots=arguments.num_checkpoint_slots or 0,
        )
    quantization = _quantization(arguments.quantization, model)
    weights = weight_bytes(
        model,
        tp=engine.tensor_parallel_size,
        dtype=dtype,
        mtp=engine.num_speculative_tokens > 0,
        draft_head=engine.drafts_apart,
        quantization=quantization,
    )
    fit = None
    if arguments.gpu_memory is not None:
        if not 0 < arguments.memory_fraction <= 1:
            raise ValueError(f"--memory-fraction must be in (0, 1], got {arguments.memory_fraction:g}")
        fit = _fit(
            arguments.gpu_memory, arguments.memory_fraction, engine, model, geometry, weights, dtype, max_model_len
        )
    return Report(
        name=str(arguments.config),
        tp=engine.tensor_parallel_size,
        expert_parallel=engine.enable_expert_parallel,
        num_drafts=engine.num_speculative_tokens,
        geometry=geometry,
        plain=plain,
        dtype=dtype,
        weight_codes=_codes(quantization),
        weight_bytes=weights,
        budget_bytes=arguments.budget_gib,
        max_num_seqs=engine.max_num_seqs,
        num_checkpoint_slots=arguments.num_checkpoint_slots or 0,
        max_model_len=max_model_len,
        fit=fit,
        packed=packed,
        decoupled=decoupled,
        host=HostSizes.of(geometry, engine.host_cache_bytes) if engine.host_cache_gib else None,
    )


def _quantization(given: str, model: ModelConfig) -> str | Quantization | None:
    """What `weight_bytes` takes. Raises ValueError where a config.json has several grids of weights."""
    if given != "auto":
        return given if given in GRIDS else None
    found = model.quantization
    if found is not None and len(found.grids) > 1:
        raise ValueError(
            f"--quantization auto: the quantization_config ({found.method}) has weights of {len(found.grids)} grids, "
            f"and which are on which the files say; allowed: {', '.join((*GRIDS, 'dequantized'))}"
        )
    return found


def _codes(quantization: str | Quantization | None) -> str | None:
    if quantization is None:
        return None
    if isinstance(quantization, str) or quantization.codes == "float8_e4m3fn":
        return "float8_e4m3fn"
    return "int8"


def _fit(gpu_memory, memory_fraction, engine, model, geometry, weights, dtype, max_model_len) -> Fit:
    workspace = workspace_estimate(model, engine, dtype)
    allowed = int(gpu_memory * memory_fraction * engine.gpu_memory_utilization)
    fit = functools.partial(
        Fit,
        gpu_memory_bytes=gpu_memory,
        memory_fraction=memory_fraction,
        budget_bytes=allowed,
        workspace_bytes=workspace,
    )
    options = {"max_model_len": max_model_len, "weight_bytes": weights, "workspace_bytes": workspace}
    try:
        return fit(plan=memory.plan(geometry, engine, budget_bytes=allowed, **options))
    except MemoryError as error:
        return fit(shortfall=str(error))


if __name__ == "__main__":
    sys.exit(main())
