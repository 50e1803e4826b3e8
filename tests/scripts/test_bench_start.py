"""scripts/bench_start.py reports runs as they were; the runs themselves are those of generate.py."""

import json
from typing import Any

import pytest

from scripts import bench_start, make_random_checkpoint


def _run(seconds: float) -> dict[str, Any]:
    return {
        "prompt_tokens": 7,
        "process_time": 20 * seconds,
        "time_to_first_token": seconds,
        "stages": dict.fromkeys(bench_start.STAGES, seconds),
        "weights_bytes": 3 << 30,
        "weights_rate": 3 / seconds,
    }


def test_table_shows_the_cold_run_and_the_quickest_warm_one():
    lines = bench_start.table([_run(9.0), _run(3.0), _run(2.0), _run(4.0)]).splitlines()
    assert lines[0].endswith("a prompt of 7 tokens")
    numbers = {line[:12].strip(): line[12:].split() for line in lines[2:]}
    assert numbers["trace"] == ["9.00", "2.00"]
    assert numbers["weights"][:2] == ["9.00", "2.00"]
    assert " ".join(numbers["weights"][2:]) == "3.00 GiB, at 0.33 and 1.50 GiB/s"
    assert numbers["sum"] == ["90.00", "20.00"]
    assert numbers["process"] == ["180.00", "40.00"]


def test_whole_bench_of_a_published_configuration(capsys, tmp_path):
    """Cold and warm, in processes of their own: the parts are those that the table has, and add up."""
    config = make_random_checkpoint.model_config(vocab_size=600, layers=8, hidden_size=64, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = tmp_path / "numbers.json"
    flags = ["--config", str(tmp_path), "--layers", "4", "--warm-runs", "1", "--limit-s", "300", "--json", str(target)]
    assert bench_start.main(flags) == 0, capsys.readouterr().err
    assert "GiB/s" in capsys.readouterr().out
    cold, warm = json.loads(target.read_text())
    for run in (cold, warm):
        assert set(run["stages"]) == set(bench_start.STAGES)
        assert min(run["stages"].values()) > -0.05
        start_up = run["import_time"] + run["load_time"] + run["compile_time"]
        assert sum(run["stages"].values()) == pytest.approx(start_up, abs=0.05)
        assert run["weights_bytes"] > 0 < run["weights_rate"]
    assert warm["stages"]["xla"] < cold["stages"]["xla"]


def test_process_that_takes_too_long_is_ended(capsys):
    assert bench_start.main(["--limit-s", "0.05"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "generate.py had not ended after 0.05 s and was ended; --limit-s allows more" in err


@pytest.mark.parametrize("flags", [["--layers", "2"], ["--config", "qwen3.5-9b"]])
def test_model_and_sizes_contradict_each_other(capsys, flags):
    with pytest.raises(SystemExit):
        bench_start.main(["--model", "somewhere", *flags])
    assert "leave them or --model out" in capsys.readouterr().err


def test_failing_run_passes_its_error_on(capsys, tmp_path):
    assert bench_start.main(["--model", str(tmp_path / "none"), "--json", str(tmp_path / "numbers.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no such directory; a model is a local checkpoint directory" in err
    assert not (tmp_path / "numbers.json").exists()


def test_numbers_of_every_run_are_written(monkeypatch, random_model, tmp_path):
    def instead_of_running(script, flags, environment, limit):
        stats = flags[flags.index("--stats-json") + 1]
        with open(stats, "w") as file:
            json.dump(_run(1.0), file)
        assert limit == 900
        return 6.0

    monkeypatch.setattr(bench_start, "run", instead_of_running)
    target = tmp_path / "numbers.json"
    assert bench_start.main(["--model", str(random_model), "--warm-runs", "2", "--json", str(target)]) == 0
    assert [run["process_time"] for run in json.loads(target.read_text())] == [6.0] * 3
