"""Adds a measured result to docs/results/, and refuses one that cannot be read later."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import json
import pathlib
from typing import Any

from site_pages import results

from gdnjax.cli.command import exit_status, run_as_process

DESCRIPTION = """\
Adds a result to docs/results/DATE/NAME-COMMIT.json: figures, and the hardware, versions, commit and command without
which nobody can read them. A result is never replaced. python scripts/make_docs.py then draws docs/results.md anew.

A file of gdnjax bench engine --output brings its figures, its hardware and its versions of jax and gdnjax. Others are
given one by one: --figure KIND NAME VALUE UNIT.
"""

EXAMPLES = f"""\
examples:
  python scripts/add_result.py engine-9b --raw engine.json --commit HEAD --time 2026-11-27 \\
      --command "gdnjax bench engine"
  python scripts/add_result.py gate --hardware "none: compiled" --versions jax=0.10.2 --commit HEAD --time 2026-11-27 \\
      --command "rocm_gate.py" --figure amd "gumbel_argmax, gfx942" 63 VGPR

kinds: {", ".join(results.KINDS)}

Exit status: 0 added, 2 refused (the reason is on stderr), 130 interrupted, 143 terminated.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("add_result.py", lambda: run(arguments))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="what the file is called, before its commit")
    parser.add_argument("--raw", metavar="FILE", help="what gdnjax bench engine --output has written; it is kept, too")
    parser.add_argument("--figure", nargs=4, action="append", default=[], metavar=("KIND", "NAME", "VALUE", "UNIT"))
    parser.add_argument("--commit", required=True, help="what was measured, as git knows it")
    parser.add_argument("--time", required=True, help="when it was measured: a date, or a date and a time (ISO)")
    parser.add_argument("--hardware", help="what it ran on, and how many (default: as the file of --raw has it)")
    parser.add_argument("--versions", nargs="+", default=[], metavar="PACKAGE=VERSION", help="of what matters to it")
    parser.add_argument("--command", required=True, help="what was run")
    parser.add_argument("--note", help="what else a reader must know")
    parser.add_argument("--directory", default=str(results.DIRECTORY), help="where results are (docs/results)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    figures: dict[str, dict[str, Any]] = {}
    hardware, versions, raw = arguments.hardware, {}, None
    if arguments.raw is not None:
        raw = json.loads(pathlib.Path(arguments.raw).read_text(encoding="utf-8"))
        figures = results.of_engine(raw)
        hardware = hardware or f"{raw['tensor_parallel_size']} x {raw['device']}"
        versions = {"gdnjax": raw["gdnjax"], "jax": raw["jax"]}
    for kind, name, value, unit in arguments.figure:
        try:
            figures.setdefault(kind, {})[name] = {"value": float(value), "unit": unit}
        except ValueError:
            raise ValueError(f"--figure {kind} {name!r}: {value!r} is no number") from None
    for text in arguments.versions:
        package, _, version = text.partition("=")
        versions[package] = version
    result = {
        "time": arguments.time,
        "commit": results.known_commit(arguments.commit),
        "hardware": hardware,
        "versions": versions,
        "command": arguments.command,
        "figures": figures,
    }
    if arguments.note:
        result["note"] = arguments.note
    if raw is not None:
        result["raw"] = raw
    path = results.write(result, arguments.name, pathlib.Path(arguments.directory))
    print(f"added {path}")
    return 0


if __name__ == "__main__":
    run_as_process(main)
