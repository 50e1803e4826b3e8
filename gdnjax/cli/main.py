"""The console script `gdnjax`, also `python -m gdnjax`: hands the rest of the line to a command."""

import sys

from gdnjax.cli import interrupt

# Type checkers know it by its name; typing would take longer to import than all the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

COMMANDS = {
    "generate": "complete prompts with a checkpoint, or with the embedded model",
    "serve": "answer over HTTP, with OpenAI's endpoints",
    "memory": "what of a model fits in a device's memory",
    "convert": "rewrite a checkpoint: Hugging Face's files as Orbax, or back",
    "bench": "how fast: throughput, latency, a server under load, the engine",
    "doctor": "what this machine offers and lacks",
}

USAGE = """\
usage: gdnjax COMMAND ...

Inference for Qwen3.5-style hybrid models in JAX.

commands:
{commands}

`gdnjax COMMAND --help` explains each. `gdnjax --version` says which gdnjax this is.

examples:
  gdnjax generate "Once upon a time"
  gdnjax generate --model path/to/Qwen3.5-4B --chat "Why is the sky blue?"
  gdnjax serve path/to/Qwen3.5-4B
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help"):
        commands = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
        print(USAGE.format(commands=commands), end="", file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        from gdnjax.version import __version__

        print(f"gdnjax {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"gdnjax: error: no command {name!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return _run(name, rest)


def _run(name: str, rest: list[str]) -> int:
    """One command. Only its own modules are imported: most wait for jax, and --help and mistakes need not."""
    if name == "generate":
        from gdnjax.cli import generate

        return generate.main(rest)
    if name == "serve":
        from gdnjax.cli import serve

        return serve.main(rest)
    if name == "convert":
        from gdnjax.cli import convert

        return convert.main(rest)
    if name == "bench":
        from gdnjax.cli.bench import main as bench

        return bench.main(rest)
    from gdnjax.cli.command import exit_status

    if name == "memory":
        from gdnjax.memory.__main__ import main as command
    else:
        from gdnjax.doctor import main as command
    return exit_status(f"gdnjax {name}", lambda: command(rest))


def run() -> "NoReturn":
    """The console script."""
    interrupt.expected()
    from gdnjax.cli.command import run_as_process

    run_as_process(main)
