"""scripts/bench_start.py reports runs as they were; the runs themselves are those of generate.py."""

import json
from typing import Any

import pytest

from gdnjax.checkpoint import convert
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


@pytest.mark.thorough
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


@pytest.mark.parametrize("flags", [["--layers", "2"], ["--config", "qwen3.5-9b"], ["--quantization", "fp8"]])
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


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.parametrize("orbax", [False, True])
def test_weights_are_loaded_from_disk_and_from_memory(capsys, tmp_path, orbax):
    directory = tmp_path / "model"
    make_random_checkpoint.write_checkpoint(directory, quantization="fp8_per_channel")
    size = (directory / "model.safetensors").stat().st_size
    if orbax:
        convert(directory, tmp_path / "orbax", progress=False)
        directory = tmp_path / "orbax"
    target = tmp_path / "numbers.json"
    assert bench_start.main(["--model", str(directory), "--loading", "2", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert [load["pages"] for load in found["loads"]] == ["cold", "cold", "warm", "warm"]
    assert min(load["weights"] for load in found["loads"]) > 0
    assert found["codes"] == 3 * 3 + 4 + 4 * 3
    # Of a small checkpoint, Orbax's own files are much of it.
    assert found["files_bytes"] == size or (orbax and found["files_bytes"] > size / 2)
    assert "from disk    from memory" in capsys.readouterr().out


def test_loading_table_shows_medians():
    loads = [("cold", 1.0), ("cold", 3.0), ("cold", 4.0), ("warm", 0.5), ("warm", 1.5), ("warm", 1.0)]
    numbers = [{"pages": pages, "names": seconds, "weights": 2 * seconds} for pages, seconds in loads]
    found = {"loads": numbers, "files_bytes": 9 << 30, "parameter_bytes": 8 << 30, "codes": 7}
    lines = bench_start.loading_table(found).splitlines()
    assert lines[0].endswith("9.00 GiB of files, 8.00 GiB of parameters, 7 of them codes")
    assert [line.split() for line in lines[2:]] == [
        ["names", "3.000", "s", "1.000", "s"],
        ["weights", "6.000", "s", "2.000", "s"],
        ["1.00", "GiB/s", "3.00", "GiB/s"],
    ]


@pytest.mark.parametrize(
    ("flags", "message"), [(["0"], "at least 1"), (["1", "--", "--temp", "0"], "runs no generate")]
)
def test_loading_takes_no_flags_of_generate(capsys, flags, message):
    with pytest.raises(SystemExit):
        bench_start.main(["--loading", *flags])
    assert message in capsys.readouterr().err
