"""Measures what is inside the small model that gdnjax ships: how long it remembers, and what breaks when it forgets."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import json
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from gdnjax.cli.command import exit_status, run_as_process

if TYPE_CHECKING:
    from measuring.tables import Result

DESCRIPTION = """\
Measures the embedded model, or another that scripts/train_tiny.py has made, without an engine: tables on stdout, and
where they are wanted JSON, pictures, and the tables of the model card.

Parts:
  half-lives  tokens after which half of a head's state is left: as it stands, and over text
  drafts      the MTP head against the model, up to three tokens ahead: argmax, acceptance at temperature 1, 1 - TV
  recall      values of a text found again, by the tokens before them, with full attention and without
  faults      what each fault of a table does, once, between a prompt and what follows it: exact match, completions
              that change, shifts of log-probabilities. Problems are then solved greedily; the texts that recall are
              given, and the argmax at each value's tokens counts.

All of it in float32, over held-out problems and over text drawn anew from a seed that training has not used.
"""

EXAMPLES = """\
examples:
  python scripts/measure_tiny.py                                            all parts of the embedded model
  python scripts/measure_tiny.py --parts drafts,recall --limit 20           two parts, of less text
  python scripts/measure_tiny.py --output m.json --pictures docs            JSON and PNGs, too
  python scripts/measure_tiny.py --model tiny2 --run second --output m.json another run, beside what m.json has
  python scripts/measure_tiny.py --from m.json --card README.md             no measuring: tables from what m.json has

Exit status: 0 done, 2 a bad argument, file or checkpoint (the reason is on stderr), 130 interrupted.
"""

PARTS = ("half-lives", "drafts", "recall", "faults")
DOMAINS = ("problems", "story", "story_chat", "chat", "recall")
PROBLEMS = 200
MOST = 128
"""Tokens of a completion at which a faulty run is cut; the longest right one has 117."""


def build_parser() -> argparse.ArgumentParser:
    """The command line. Imports no jax: --help and mistakes answer at once."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="DIR", default="tiny", help="checkpoint directory (default: the embedded model)")
    add("--parts", metavar="A,B", default=",".join(PARTS), help=f"what is measured (default: {','.join(PARTS)})")
    add(
        "--limit",
        type=int,
        default=PROBLEMS,
        metavar="N",
        help="most problems for the faults, most documents of a kind elsewhere (default: 200)",
    )
    add("--output", metavar="FILE", help="write what was measured there; what the file has of others stays")
    add("--run", metavar="NAME", default="shipped", help="name of this model in the JSON (default: %(default)s)")
    add("--evaluation", metavar="FILE", help="take the exact matches from what scripts/eval.py --output wrote")
    add("--from", metavar="FILE", dest="source", help="measure nothing, take what --output has written")
    add("--pictures", metavar="DIR", help="draw PNGs there")
    add("--card", metavar="FILE", help="write the marked tables of this model card anew; needs --output or --from")
    add("--verbose", action="store_true", help="show where an error came from")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("measure_tiny.py", lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    parts = check_arguments(arguments)
    from gdnjax.assets import model_directory

    directory = model_directory(arguments.model)
    file = pathlib.Path(arguments.source or arguments.output) if arguments.source or arguments.output else None
    content = read_measurements(file, must_exist=arguments.source is not None)
    if arguments.source and arguments.run not in content:
        raise ValueError(f"{file}: no run {arguments.run!r} in it; there are: {', '.join(content)}")
    result = content.setdefault(arguments.run, {})
    if arguments.evaluation:
        result["evaluation"] = read_evaluation(pathlib.Path(arguments.evaluation))
    if not arguments.source:
        result |= measure(directory, parts, arguments.limit)
    from measuring import tables

    print("\n\n".join(table.text() for table in tables.of_result(result).values()))
    if file is not None and (arguments.output or arguments.evaluation):
        file.write_text(as_text(content), encoding="utf-8")
    if arguments.card:
        card = pathlib.Path(arguments.card)
        card.write_text(tables.render_card(card.read_text(encoding="utf-8"), content), encoding="utf-8")
    if arguments.pictures:
        from measuring import pictures

        for picture in pictures.draw(result, training(directory).get("history"), pathlib.Path(arguments.pictures)):
            print(f"wrote {picture}", file=sys.stderr)
    return 0


def check_arguments(arguments: argparse.Namespace) -> list[str]:
    """The parts, in order. Raises ValueError for values that cannot work."""
    from measuring.parts import chosen

    parts = chosen(arguments.parts, PARTS)
    if arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.source and arguments.output:
        raise ValueError("--from measures nothing; leave it or --output out")
    if arguments.card and not (arguments.source or arguments.output):
        raise ValueError("--card needs the measurements of all runs: --from FILE or --output FILE")
    # A long run must not end with the news that its result cannot be written.
    if arguments.output and not pathlib.Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"--output {arguments.output}: no such directory")
    if arguments.pictures and not pathlib.Path(arguments.pictures).is_dir():
        raise ValueError(f"--pictures {arguments.pictures}: no such directory")
    if arguments.card and not pathlib.Path(arguments.card).is_file():
        raise ValueError(f"--card {arguments.card}: no such file")
    return parts


def read_measurements(file: pathlib.Path | None, must_exist: bool) -> "dict[str, Result]":
    """What a file has of each run."""
    if file is None or not (must_exist or file.exists()):
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not written by measure_tiny.py --output: {error}") from error


def read_evaluation(file: pathlib.Path) -> list[dict[str, Any]]:
    """The name and the strict matches of each cell that scripts/eval.py has run."""
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        return [{"name": cell["name"]} | cell["strict_match"] for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not written by eval.py --output: {error}") from error


def training(directory: pathlib.Path) -> dict[str, Any]:
    """training.json of a model, or nothing."""
    file = directory / "training.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def as_text(content: "dict[str, Result]") -> str:
    """JSON with numbers as long as they mean something."""

    def rounded(value):
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list) else value

    return json.dumps({"runs": rounded(content)}, indent=1) + "\n"


def progress(text: str) -> None:
    """A line on stderr that the next one replaces, or on what is no terminal nothing."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def measure(directory: pathlib.Path, parts: list[str], limit: int) -> "Result":
    """Measures the parts, one after another."""
    import jax
    from measuring import documents

    from gdnjax.loading import load_model

    model, params = load_model(directory, dtype="float32", mtp=True)
    tokenizer = documents.load_tokenizer(directory)
    made = training(directory)
    names = ("settings", "steps", "tokens", "parameters", "device", "versions", "seconds")
    result: Result = {"training": {name: made[name] for name in names if name in made}}
    result["measured_with"] = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "dtype": "float32"}
    measures = {
        "half-lives": measure_half_lives,
        "drafts": measure_drafts,
        "recall": measure_recall,
        "faults": measure_faults,
    }
    for part in parts:
        began = time.monotonic()
        result[part.replace("-", "_")] = measures[part](model, params, tokenizer, limit)
        progress("")
        print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return result


def long_feeder(model: Any, params: Any) -> Any:
    """Room for a few long documents at once."""
    from measuring.forcing import Feeder

    return Feeder(model, params, rows=24, longest=2048, tokens=4096)


def measure_half_lives(model: Any, params: Any, tokenizer: Any, limit: int) -> "Result":
    import numpy as np
    from measuring import documents, half_lives

    from gdnjax.config import LayerKind

    progress("half-lives")
    feeder = long_feeder(model, params)
    # As much as one call holds, of every domain alike.
    each, cut = feeder.rows // len(DOMAINS), feeder.tokens // feeder.rows
    texts = [
        text.cut(cut)
        for domain in DOMAINS
        for text in documents.encode(tokenizer, documents.documents_of(domain, each))
    ]
    g = half_lives.over_texts(feeder, texts)
    layers = [i for i, kind in enumerate(model.config.layer_kinds) if kind == LayerKind.DELTA]
    return {
        "layers": layers,
        "tokens": g.shape[1],
        "at_zero": half_lives.at_zero(model, params).tolist(),
        "at_median": half_lives.half_life(np.median(g, axis=1)).tolist(),
        "at_mean": half_lives.half_life(g.mean(axis=1)).tolist(),
    }


def measure_drafts(model: Any, params: Any, tokenizer: Any, limit: int) -> "Result":
    from measuring import documents
    from measuring.drafts import Drafter

    drafter = Drafter(model, params)
    result = {}
    for domain in DOMAINS:
        texts = documents.encode(tokenizer, documents.documents_of(domain, min(limit, 40)))
        result[domain] = drafter.measure(texts, lambda text, domain=domain: progress(f"{text}, {domain}"))
    return result


def measure_recall(model: Any, params: Any, tokenizer: Any, limit: int) -> "Result":
    from measuring import documents, recall

    feeder = long_feeder(model, params)
    texts = documents.encode(tokenizer, documents.documents_of("recall", min(limit, 144)))
    texts += documents.encode(tokenizer, documents.documents_of("recall_long", min(limit, 48)))
    return recall.measure(feeder, texts, progress)


def measure_faults(model: Any, params: Any, tokenizer: Any, limit: int) -> "Result":
    from measuring import documents, faults
    from measuring.forcing import Feeder

    problems = documents.held_out_problems(limit)
    stops = tuple(model.config.eos_token_ids)
    feeder = Feeder(model, params, rows=len(problems), longest=192, tokens=4096, stops=stops)
    on_problems = faults.on_problems(feeder, tokenizer, len(problems), MOST, progress=progress)
    texts = documents.encode(tokenizer, documents.documents_of("recall_long", min(limit, 24)))
    texts = [text for text in texts if text.values]
    feeder = Feeder(model, params, rows=len(texts), longest=2048, tokens=4096)
    on_recall = faults.on_recall(feeder, texts, progress=progress)
    return {
        "problems": {"count": len(problems), "faults": on_problems},
        "recall": {
            "documents": len(texts),
            "values": sum(len(text.values) for text in texts),
            "faults": on_recall,
        },
    }


if __name__ == "__main__":
    run_as_process(main)
