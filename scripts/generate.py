"""Completes prompts from the command line, streaming to the terminal: `gdnjax generate`, from a clone."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

from gdnjax.cli import generate
from gdnjax.cli.command import run_as_process


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return generate.main(argv, "python scripts/generate.py")


if __name__ == "__main__":
    run_as_process(main)
