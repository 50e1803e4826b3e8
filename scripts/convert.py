"""Rewrites a checkpoint: a Hugging Face directory as an Orbax one, or back. `gdnjax convert`, from a clone."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

from gdnjax.cli import convert
from gdnjax.cli.command import run_as_process


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return convert.main(argv, "python scripts/convert.py")


if __name__ == "__main__":
    run_as_process(main)
