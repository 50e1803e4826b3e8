"""Rewrites a checkpoint: a Hugging Face directory as an Orbax one, or back."""

import argparse

from gdnjax.cli.command import exit_status

DESCRIPTION = """\
Rewrites a checkpoint directory as the other kind:

  Hugging Face   model.safetensors, or shards with model.safetensors.index.json
  Orbax          params/, as this command writes it

Either can be given to the engine. Every tensor is kept bit for bit under its own name, those of the vision tower and
the MTP head too, and the files beside the weights (config, tokenizer, chat template) are copied.
"""

EXAMPLES = """\
examples:
  {command} Qwen3.5-4B Qwen3.5-4B-orbax                 to Orbax
  {command} Qwen3.5-4B-orbax Qwen3.5-4B-again           and back
  {command} Qwen3.5-4B-orbax small-files --shard-gib 1  in files of at most 1 GiB
  {command} tiny tiny-orbax                             the embedded model

Host memory needed: the whole model to write Orbax, one shard to write Hugging Face files.
Exit status: 0 done, 2 a bad argument or checkpoint (the reason is on stderr), 130 interrupted, 143 terminated.
"""


def main(argv: list[str] | None = None, command: str = "gdnjax convert") -> int:
    """Runs the command line and returns the exit status. `command` is what it is called in messages."""
    parser = argparse.ArgumentParser(
        prog=command.removeprefix("python "),
        description=DESCRIPTION,
        epilog=EXAMPLES.replace("{command}", command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="an existing checkpoint directory, or tiny; its kind decides the direction")
    parser.add_argument("target", help="a directory to create; one that exists must be empty")
    parser.add_argument("--to", choices=("hf", "orbax"), help="the kind to write, to be sure of the direction")
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
    from gdnjax.checkpoint import Format, convert

    # Nothing is computed here; an accelerator would only be taken from those who need it.
    jax.config.update("jax_platforms", "cpu")
    written = convert(
        model_directory(arguments.source),
        arguments.target,
        to=None if arguments.to is None else Format(arguments.to),
        shard_bytes=int(arguments.shard_gib * (1 << 30)),
    )
    print(f"wrote {arguments.target} ({written.value})")
    return 0
