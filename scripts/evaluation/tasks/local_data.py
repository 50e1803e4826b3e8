"""The data of the tasks beside this file: lm-eval calls `load` with what --metadata and --model_args say."""

import pathlib
from typing import Any

import datasets  # pyright: ignore[reportMissingImports]
from evaluation.problems import EMBEDDED_MODEL, problem_file, read_problems  # pyright: ignore[reportMissingImports]


def load(model: str = EMBEDDED_MODEL, data: str | None = None, shots: str | None = None, **_: Any) -> Any:
    """The problems of `data` as the split test, those of `shots` as train; the embedded model brings its own.

    Without shots train is empty, which is enough for --num_fewshot 0.
    """
    files = {"test": problem_file(str(model), data, "problems.jsonl", "--metadata data=FILE")}
    if shots is not None or model == EMBEDDED_MODEL:
        files["train"] = problem_file(str(model), shots, "shots.jsonl", "--metadata shots=FILE")
    splits = {split: _dataset(file) for split, file in files.items()}
    splits.setdefault("train", splits["test"].select([]))
    return splits


def _dataset(file: pathlib.Path) -> Any:
    problems = read_problems(file)
    return datasets.Dataset.from_list([{"question": item.question, "answer": item.answer} for item in problems])
