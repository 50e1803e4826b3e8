"""`python -m gdnjax.memory`: what a slot and a block of a model cost, and what a budget holds. No weights needed."""

import argparse
import dataclasses
import fractions
import json
import sys
from collections.abc import Sequence
from typing import Any

from gdnjax import memory
from gdnjax.assets import PRESETS, config_file
from gdnjax.config import DTYPES, EngineConfig, ModelConfig
from gdnjax.memory import KV_SCALE_BYTES, Accounting, StateGeometry

GIB = 1 << 30

BAD_INPUT = 2

DESCRIPTION = """\
Bytes of one recurrent state (a slot) and of one block of keys and values, for one tensor-parallel rank of a model, from
its geometry alone. With a budget: what it holds in two accountings.

  packed     every block holds a whole recurrent state beside its keys and values, the field's older layout
  decoupled  a slot for each request, and the rest is blocks, as gdnjax divides memory

The budget is that of these pools alone. Weights, workspace, logit rows, last hidden states, and the null slot and block
come on top: the engine counts them at start and prints its plan."""

EXAMPLES = """\
examples:
  python -m gdnjax.memory --list
  python -m gdnjax.memory --config qwen3.5-9b
  python -m gdnjax.memory --config path/to/checkpoint --budget-gib 40 --max-num-seqs 64 --max-model-len 32768
  python -m gdnjax.memory --config qwen3.5-397b-a17b --tp 4 --kv-dtype fp8 --ssm-dtype bfloat16 --budget-gib 157.88 \\
      --max-num-seqs 128"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gdnjax.memory",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="NAME|PATH", help="a preset, a config.json, or a directory that holds one")
    what.add_argument("--list", action="store_true", help="print the names of the presets")
    add = parser.add_argument_group("geometry").add_argument
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (1); all bytes are those of one rank")
    add("--block-size", type=int, default=16, metavar="N", help="tokens in a block, a power of two (16)")
    add("--dtype", choices=DTYPES, default="auto", help="activations and convolution windows (auto: the model's)")
    add("--ssm-dtype", choices=("float32", "bfloat16"), default="float32", help="the recurrent state (float32)")
    add(
        "--kv-dtype",
        choices=("auto", "float32", "bfloat16", "fp8"),
        default="auto",
        help="keys and values (auto: as --dtype); fp8 has a float32 scale for each token and head",
    )
    add(
        "--num-speculative-tokens",
        type=int,
        default=0,
        metavar="K",
        help="drafts of the MTP head in a step (0): a slot keeps their inputs, a block the head's keys and values",
    )
    add = parser.add_argument_group("budget").add_argument
    add("--budget-gib", type=budget, metavar="GIB", help="GiB for slots and blocks on one rank")
    add("--max-num-seqs", type=int, default=8, metavar="N", help="requests that run at once, each with a slot (8)")
    add("--num-checkpoint-slots", type=int, default=0, metavar="N", help="slots for the prefix cache, beside them (0)")
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
    """Prints the report; returns 0, or 2 where the input makes none."""
    arguments = build_parser().parse_args(argv)
    if arguments.list:
        print(*PRESETS, sep="\n")
        return 0
    try:
        report = make_report(arguments)
    except (OSError, ValueError, MemoryError) as error:
        print(f"gdnjax.memory: {error}", file=sys.stderr)
        return BAD_INPUT
    print(json.dumps(report.as_json(), indent=2) if arguments.json else report)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What is printed. `budget_bytes` is None, and there are no accountings, where no budget was given.

    `plain` is the geometry without speculation; without drafts it is `geometry`.
    """

    name: str
    tp: int
    num_drafts: int
    geometry: StateGeometry
    plain: StateGeometry
    budget_bytes: int | None
    max_num_seqs: int
    num_checkpoint_slots: int
    max_model_len: int
    packed: Accounting | None = None
    decoupled: Accounting | None = None

    @property
    def ssm_share(self) -> float:
        """The part of a packed block that is recurrent state."""
        geometry = self.geometry
        return geometry.delta_layers * geometry.ssm_bytes / geometry.packed_block_bytes

    @property
    def slot_growth(self) -> float:
        """What a slot takes, of what it takes without speculation."""
        return self.geometry.slot_bytes / self.plain.slot_bytes

    def as_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        parts = ("slot_bytes", "conv_bytes", "ssm_bytes", "pending_bytes", "block_bytes", "packed_block_bytes")
        names = (*parts, "equivalent_blocks", "hidden_bytes", "logit_row_bytes")
        data["bytes"] = {name: getattr(self.geometry, name) for name in names}
        data["ssm_share"] = self.ssm_share
        data["slot_growth"] = self.slot_growth
        if self.packed and self.decoupled and self.packed.num_blocks:
            data["ratio"] = self.decoupled.num_blocks / self.packed.num_blocks
        return data

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (self._costs(), self._holdings())))

    def _costs(self) -> str:
        g = self.geometry
        rank = f"one of {self.tp} ranks" if self.tp > 1 else "one rank"
        slot = f"{g.delta_layers} layers x ({g.conv_bytes:,} window in {g.conv_dtype} + {g.ssm_bytes:,} state in "
        gates = f" + {g.pending_bytes:,} gates" if g.pending_rows else ""
        head = ", one of them the MTP head's" if self.num_drafts else ""
        scales = " + scales" if g.kv_dtype in KV_SCALE_BYTES else ""
        block = f"{g.block_size} tokens x {g.attention_layers} layers x {g.kv_heads} x {g.head_dim} keys and values in "
        rows = [
            ("a slot", g.slot_bytes, f"{slot}{g.ssm_dtype}{gates})"),
            ("a block", g.block_bytes, f"{block}{g.kv_dtype}{scales}{head}"),
            ("packed block", g.packed_block_bytes, f"both in one: {self.ssm_share:.1%} of it is recurrent state"),
        ]
        table = "\n".join(f"  {name:<12} {size:>13,} B  {note}" for name, size, note in rows)
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
            f"{self.budget_bytes / GIB:,.2f} GiB ({self.budget_bytes:,} B) for slots and blocks alone: weights and "
            f"workspace are not known here\n\n"
            f"  {'accounting':<10} {'B a block':>12} {'blocks':>12} {'tokens':>14} {'requests':>10}\n{rows}\n\n"
            f"  {ratio} It counts {slots}. Requests: of {self.max_model_len:,} tokens each, at once, and at most "
            f"{self.max_num_seqs:,}."
        )


def make_report(arguments: argparse.Namespace) -> Report:
    """Raises FileNotFoundError, ValueError or MemoryError that say what is wrong with the input."""
    engine = EngineConfig(
        tensor_parallel_size=arguments.tp,
        block_size=arguments.block_size,
        dtype=arguments.dtype,
        ssm_dtype=arguments.ssm_dtype,
        max_num_seqs=arguments.max_num_seqs,
        num_checkpoint_slots=arguments.num_checkpoint_slots,
        max_model_len=arguments.max_model_len,
        num_speculative_tokens=arguments.num_speculative_tokens,
    )
    model = ModelConfig.from_hf(config_file(arguments.config))
    plain = geometry = StateGeometry.of(
        model,
        tp=engine.tensor_parallel_size,
        block_size=engine.block_size,
        dtype=model.dtype if engine.dtype == "auto" else engine.dtype,
        ssm_dtype=engine.ssm_dtype,
        kv_dtype=None if arguments.kv_dtype == "auto" else arguments.kv_dtype,
    )
    if engine.num_speculative_tokens:
        model.require_mtp()
        layers = plain.attention_layers + model.mtp_layers
        geometry = dataclasses.replace(plain, attention_layers=layers).speculating(engine)
    max_model_len = engine.length_within(model.max_position_embeddings)
    packed = decoupled = None
    if arguments.budget_gib is not None:
        packed, decoupled = memory.accountings(
            geometry,
            arguments.budget_gib,
            max_num_seqs=engine.max_num_seqs,
            max_model_len=max_model_len,
            num_checkpoint_slots=arguments.num_checkpoint_slots,
        )
    return Report(
        name=str(arguments.config),
        tp=engine.tensor_parallel_size,
        num_drafts=engine.num_speculative_tokens,
        geometry=geometry,
        plain=plain,
        budget_bytes=arguments.budget_gib,
        max_num_seqs=engine.max_num_seqs,
        num_checkpoint_slots=arguments.num_checkpoint_slots,
        max_model_len=max_model_len,
        packed=packed,
        decoupled=decoupled,
    )


if __name__ == "__main__":
    sys.exit(main())
