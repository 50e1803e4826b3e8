"""scripts/bench_server_overhead.py streams what it says; how fast is nobody's promise."""

import json

import pytest

from scripts import bench_server_overhead


@pytest.mark.usefixtures("without_type_checks")
def test_every_token_is_streamed_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_server_overhead, "WARM_S", 0.05)
    file = tmp_path / "overhead.json"
    given = ["--streams", "3", "--tokens", "60", "--step-ms", "10", "--json", str(file)]
    assert bench_server_overhead.main(given) == 0
    alone, chat, completions = json.loads(file.read_text())["rows"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert [row["what"] for row in (alone, chat, completions)] == ["alone", "chat", "completions"]
    for row in (chat, completions):
        # Single requests take two tokens each, and not one of them ends without a figure.
        assert row["tokens"] >= 180
        assert row["tokens"] % 2 == 0
        assert 0 < row["events"] <= 3 * (60 + 3)
        assert row["loop_us"] > 0
    assert all(0 < row["busy"] <= 1.0001 for row in (alone, chat, completions))


@pytest.mark.parametrize("given", [["--streams", "0"], ["--step-ms", "-1"], ["--profile", "x.prof"]])
def test_wrong_arguments_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        bench_server_overhead.main(given)
    assert given[0] in capsys.readouterr().err
