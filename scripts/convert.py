"""Rewrites a checkpoint: a Hugging Face directory as an Orbax one, or back."""

import argparse
import sys

DESCRIPTION = """\
Rewrites a checkpoint directory as the other kind:

  Hugging Face   model.safetensors, or shards with model.safetensors.index.json
  Orbax          params/, as this script writes it

Either can be given to the engine. Every tensor is kept bit for bit under its own name, those of the vision tower and
the MTP head too, and the files beside the weights (config, tokenizer, chat template) are copied.
"""

EXAMPLES = """\
examples:
  python scripts/convert.py Qwen3.5-4B Qwen3.5-4B-orbax                 to Orbax
  python scripts/convert.py Qwen3.5-4B-orbax Qwen3.5-4B-again           and back
  python scripts/convert.py Qwen3.5-4B-orbax small-files --shard-gib 1  in files of at most 1 GiB

Host memory needed: the whole model to write Orbax, one shard to write Hugging Face files.
Exit status: 0 done, 2 a bad argument or checkpoint (the reason is on stderr).
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="an existing checkpoint directory; its kind decides the direction")
    parser.add_argument("target", help="a directory to create; one that exists must be empty")
    parser.add_argument("--to", choices=("hf", "orbax"), help="the kind to write, to be sure of the direction")
    parser.add_argument(
        "--shard-gib", type=float, default=5.0, help="the largest safetensors file, in GiB (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)

    # Imported here, since --help need not wait for jax.
    from gdnjax.checkpoint import Format, convert

    try:
        written = convert(
            arguments.source,
            arguments.target,
            to=None if arguments.to is None else Format(arguments.to),
            shard_bytes=int(arguments.shard_gib * (1 << 30)),
        )
    except (OSError, ValueError) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.target} ({written.value})")
    return 0


if __name__ == "__main__":
    import jax

    # Nothing is computed here; an accelerator would only be taken from those who need it.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
