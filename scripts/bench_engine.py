"""Measures the whole engine: `gdnjax bench engine`, from a clone."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

from gdnjax.cli.bench import engine
from gdnjax.cli.command import run_as_process


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return engine.main(argv, "python scripts/bench_engine.py")


if __name__ == "__main__":
    run_as_process(main)
