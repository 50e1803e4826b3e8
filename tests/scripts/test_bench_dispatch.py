"""scripts/bench_dispatch.py counts the arrays of a step's call, and times it; its times are nobody's promise."""

import json

import pytest

from scripts import bench_dispatch

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_figures_are_printed_and_written(tmp_path, capsys):
    file = tmp_path / "dispatch.json"
    given = ["--config", "tiny", "--calls", "2", "--num-speculative-tokens", "3", "--json", str(file)]
    assert bench_dispatch.main(given) == 0
    rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
    printed = capsys.readouterr().out.splitlines()
    assert [line[: len(name)] for line, name in zip(printed, rows, strict=True)] == list(rows)
    assert all(0 < row["least_us"] <= row["median_us"] for row in rows.values())
    assert rows["parameters, a tree"]["arrays"] == rows["parameters, flat"]["arrays"] > 20
    assert (rows["batch, a tree"]["arrays"], rows["batch, words"]["arrays"]) == (4, 1)
    assert (rows["home"]["arrays"], rows["home, with log-probabilities"]["arrays"]) == (1, 5)


def test_calls_must_be_made(capsys):
    with pytest.raises(SystemExit):
        bench_dispatch.main(["--calls", "0"])
    assert "--calls must be at least 1, got 0" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "none" / "figures.json"
    assert bench_dispatch.main(["--json", str(file)]) == 2
    said = capsys.readouterr()
    assert "--json" in said.err
    assert str(file) in said.err
    assert not said.out
