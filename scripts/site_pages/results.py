"""A result: figures that were measured together, and what they cannot be read without."""

import datetime
import json
import math
import pathlib
import re
import subprocess
from typing import Any

DIRECTORY = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results"

KINDS = {
    "speed": "Speed",
    "acceptance": "Acceptance of drafts",
    "accuracy": "Accuracy",
    "start": "Start-up",
    "amd": "AMD: registers and emulation",
    "kernels": "Kernels",
    "tests": "Tests",
}
"""What a figure is about -> its heading on the page."""

NEEDED = ("time", "commit", "hardware", "versions", "command", "figures")


def check(result: Any) -> None:
    """Raises ValueError where a result lacks what its figures cannot be read without, or has what nobody reads."""
    if not isinstance(result, dict):
        raise ValueError(f"a result must be an object, got {type(result).__name__}")
    missing = [name for name in NEEDED if not result.get(name)]
    if missing:
        raise ValueError(f"a result needs {', '.join(missing)}")
    unknown = sorted(set(result) - {*NEEDED, "note", "raw"})
    if unknown:
        raise ValueError(f"a result has no {', '.join(unknown)}; allowed: {', '.join((*NEEDED, 'note', 'raw'))}")
    for name in ("hardware", "command"):
        if not isinstance(result[name], str) or "unknown" in result[name].lower():
            raise ValueError(f"{name} must say which it was, got {result[name]!r}")
    if not re.fullmatch(r"[0-9a-f]{40}", str(result["commit"])):
        raise ValueError(f"commit must be 40 digits of a hash, got {result['commit']!r}")
    try:
        datetime.datetime.fromisoformat(result["time"])
    except (TypeError, ValueError):
        raise ValueError(f"time must be a date, or a date and a time, in ISO form, got {result['time']!r}") from None
    versions = result["versions"]
    if not isinstance(versions, dict) or not all(isinstance(value, str) and value for value in versions.values()):
        raise ValueError(f"versions must be an object of texts, got {versions!r}")
    for kind, figures in result["figures"].items():
        if kind not in KINDS:
            raise ValueError(f"figures of the kind {kind!r}; allowed: {', '.join(KINDS)}")
        for name, figure in figures.items():
            value = figure.get("value") if isinstance(figure, dict) else None
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not isinstance(figure.get("unit"), str):
                raise ValueError(
                    f"figure {name!r} must be an object of a number 'value' and a text 'unit', got {figure!r}"
                )


def known_commit(commit: str) -> str:
    """All 40 digits of a commit of this repository. Raises ValueError where git does not know it."""
    command = ["git", "-C", str(DIRECTORY.parent), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"git knows no commit {commit!r} here")
    return found.stdout.strip()


def path_of(result: dict[str, Any], name: str, directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    """Where a result is kept: by its day, and by its commit."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(f"a name must be of small letters, digits, dots and dashes, got {name!r}")
    return directory / result["time"][:10] / f"{name}-{result['commit'][:10]}.json"


def write(result: dict[str, Any], name: str, directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    """Checks a result and writes it. Raises FileExistsError rather than replace one, ValueError as `check` does."""
    check(result)
    path = path_of(result, name, directory)
    if path.exists():
        raise FileExistsError(f"{path}: is there already; a result is never replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def read_all(directory: pathlib.Path = DIRECTORY) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """Every result, the oldest first. Raises ValueError that names a file which is none."""
    found = []
    for path in sorted(directory.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        try:
            check(result)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found.append((path, result))
    return sorted(found, key=lambda pair: (pair[1]["time"], pair[0].name))


def of_engine(record: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures of what `gdnjax bench engine --output` has written, by kind. Raises ValueError for another file."""
    if not {"device", "preset", "layers", "sections", "engines"} <= set(record):
        raise ValueError("this is no file of gdnjax bench engine --output; give its figures with --figure")
    model = record["preset"]
    # Records were without a dtype while all were of bfloat16.
    model += f", {record['quantization'] or record.get('dtype', 'bfloat16')}"
    ranks = record["tensor_parallel_size"]
    if ranks > 1:
        model += f", {ranks} GPUs" + (", whole experts" if record["enable_expert_parallel"] else "")
    cache = next(iter(record["engines"].values()))["config"]["kv_cache_dtype"]
    model += "" if cache == "auto" else f", KV {cache}"
    figures: dict[str, dict[str, dict[str, Any]]] = {}

    def add(kind: str, what: str, value: float, unit: str) -> None:
        figures.setdefault(kind, {})[f"{model}: {what}"] = {"value": float(f"{value:.4g}"), "unit": unit}

    for section, measured in record["sections"].items():
        if section == "decode":
            for batch, figure in measured.items():
                add("speed", f"decode, {batch} request{'s' * (batch != '1')}", figure["ms_per_step"], "ms a step")
        if section == "prefill":
            for figure in measured.values():
                what = f"prefill, {figure['requests']} x {figure['tokens']:,}"
                add("speed", what, figure["tokens_per_second"], "tokens/s")
    add("start", "weights loaded", record["load_seconds"], "s")
    return figures
