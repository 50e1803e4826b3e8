"""Rewrites a checkpoint: a Hugging Face directory as an Orbax one, or back; or with weights of eight bits."""

import argparse

from gdnjax.cli.command import command_parser, exit_status

DESCRIPTION = """\
Rewrites a checkpoint directory as the other kind:

  Hugging Face   model.safetensors, or shards with model.safetensors.index.json
  Orbax          params/, as this command writes it

Either can be given to the engine. Every tensor is kept bit for bit under its own name, those of the vision tower and
the MTP head too, and the files beside the weights (config, tokenizer, chat template) are copied.

With --quantization fp8_per_channel a checkpoint of either kind, in bfloat16, float32 or FP8 by blocks, becomes a
Hugging Face one (with --to orbax an Orbax one) whose projections and experts are FP8 with a scale for each row, as
compressed-tensors' FP8_DYNAMIC: half the bytes of bfloat16, and the very codes and scales that an engine with
quantization="fp8_per_channel" makes of the old one at every start. Embeddings, head, norms, routers, gates of heads and
the vision tower are kept bit for bit; what else is FP8 in the old one becomes the model's dtype. How far the weights
were moved is said at the end.
"""

EXAMPLES = """\
examples:
  {command} Qwen3.5-4B Qwen3.5-4B-orbax                 to Orbax
  {command} Qwen3.5-4B-orbax Qwen3.5-4B-again           and back
  {command} Qwen3.5-4B-orbax small-files --shard-gib 1  in files of at most 1 GiB
  {command} tiny tiny-orbax                             the embedded model
  {command} Qwen3.5-4B Qwen3.5-4B-FP8-Dynamic --quantization fp8_per_channel

Host memory needed: the whole model to write Orbax, one shard to write Hugging Face files.
Exit status: 0 done, 2 a bad argument or checkpoint (the reason is on stderr), 130 interrupted, 143 terminated.
"""


def main(argv: list[str] | None = None, command: str = "gdnjax convert") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    parser = command_parser(command, DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "source",
        help="an existing checkpoint directory, or tiny; without --quantization its kind decides the direction",
    )
    parser.add_argument("target", help="a directory to create; one that exists must be empty")
    parser.add_argument(
        "--to",
        choices=("hf", "orbax"),
        help="the kind to write: with --quantization either (default: hf), otherwise to be sure of the direction",
    )
    parser.add_argument(
        "--quantization",
        choices=("fp8_per_channel",),
        help="make projections and experts FP8 with a scale for each row (default: every tensor bit for bit)",
    )
    parser.add_argument(
        "--shard-gib", type=float, default=5.0, help="the largest safetensors file, in GiB (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    # What is half written is no checkpoint, and its cleaning up may take longer than a moment.
    return exit_status(command.rpartition("/")[2], lambda: run(arguments), patience_s=None)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    # Imported here, since --help need not wait for jax.
    import jax

    from gdnjax.assets import model_directory
    from gdnjax.checkpoint import Format, convert, quantise

    # Nothing is computed here; an accelerator would only be taken from those who need it.
    jax.config.update("jax_platforms", "cpu")
    source, to = model_directory(arguments.source), None if arguments.to is None else Format(arguments.to)
    shard_bytes = int(arguments.shard_gib * (1 << 30))
    if arguments.quantization is not None:
        report = quantise(source, arguments.target, to=to or Format.HUGGING_FACE, shard_bytes=shard_bytes)
        print(f"wrote {arguments.target} ({report.format.value}): {report}")
        return 0
    written = convert(source, arguments.target, to=to, shard_bytes=shard_bytes)
    print(f"wrote {arguments.target} ({written.value})")
    return 0
