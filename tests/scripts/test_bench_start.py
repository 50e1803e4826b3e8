"""scripts/bench_start.py reports runs as they were; the runs themselves are those of generate.py."""

import json

from scripts import bench_start


def _run(seconds: float) -> dict[str, float]:
    parts = ("import_time", "load_time", "compile_time", "time_to_first_token")
    return {"prompt_tokens": 7, "process_time": 5 * seconds, **dict.fromkeys(parts, seconds)}


def test_table_shows_the_cold_run_and_the_quickest_warm_one():
    lines = bench_start.table([_run(9.0), _run(3.0), _run(2.0), _run(4.0)]).splitlines()
    assert lines[0].endswith("a prompt of 7 tokens")
    numbers = {line[:12].strip(): line[12:].split() for line in lines[2:]}
    assert numbers["compile"] == ["9.00", "2.00"]
    assert numbers["sum"] == ["36.00", "8.00"]
    assert numbers["process"] == ["45.00", "10.00"]


def test_failing_run_passes_its_error_on(capsys, tmp_path):
    assert bench_start.main(["--model", str(tmp_path / "none"), "--json", str(tmp_path / "numbers.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no such directory; a model is a local checkpoint directory" in err
    assert not (tmp_path / "numbers.json").exists()


def test_numbers_of_every_run_are_written(monkeypatch, random_model, tmp_path):
    def instead_of_running(script, flags, environment):
        stats = flags[flags.index("--stats-json") + 1]
        with open(stats, "w") as file:
            json.dump(_run(1.0), file)
        return 6.0

    monkeypatch.setattr(bench_start, "run", instead_of_running)
    target = tmp_path / "numbers.json"
    assert bench_start.main(["--model", str(random_model), "--warm-runs", "2", "--json", str(target)]) == 0
    assert [run["process_time"] for run in json.loads(target.read_text())] == [6.0] * 3
