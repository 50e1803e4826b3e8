"""`gdnjax bench`: hands the rest of the line to what measures."""

import sys

COMMANDS = {
    "throughput": "many requests at once, without a server: output tokens/s",
    "latency": "seconds to the first token, and milliseconds of a decode step",
    "serve": "a workload as it arrives, on a server or in this process; two settings by turns",
    "engine": "all figures of the engine, of random weights in any published size",
}

USAGE = """\
usage: gdnjax bench COMMAND ...

Measures an engine, or a server.

commands:
{commands}

`gdnjax bench COMMAND --help` explains each.

examples:
  gdnjax bench throughput --model path/to/Qwen3.5-4B
  gdnjax bench latency --random-weights qwen3.5-9b
  gdnjax bench serve --url http://127.0.0.1:8000 --request-rate 8
"""


def main(argv: list[str]) -> int:
    """Runs the command line, which is what stands behind `gdnjax bench`, and returns the exit status."""
    name, *rest = argv or [""]
    if name in ("", "-h", "--help"):
        commands = "\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items())
        print(USAGE.format(commands=commands), end="", file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "throughput":
        from gdnjax.cli.bench import throughput

        return throughput.main(rest)
    if name == "latency":
        from gdnjax.cli.bench import latency

        return latency.main(rest)
    if name == "serve":
        from gdnjax.cli.bench import serve

        return serve.main(rest)
    if name == "engine":
        from gdnjax.cli.bench import engine

        return engine.main(rest)
    print(f"gdnjax bench: error: no command {name!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
