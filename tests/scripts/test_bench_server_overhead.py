"""scripts/bench_server_overhead.py streams what it says; how fast is nobody's promise."""

import json

import pytest

from scripts import bench_server_overhead
from scripts.overhead import model


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


def test_the_stand_in_has_a_token_for_every_id_and_every_byte():
    tokenizer = model.tokenizer_of(1000)
    assert tokenizer.vocab_size == 1000
    (text, other) = model.texts(2, 40, seed=1)
    assert text != other
    ids = tokenizer.encode(text)
    assert len(ids) == 40
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.decode([token]) for token in range(1000))
    with pytest.raises(ValueError, match="at least 256 tokens, and 100"):
        model.tokenizer_of(100)


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
def test_a_model_is_served_beside_itself_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_server_overhead, "SINGLES", 2)
    monkeypatch.setattr(model, "BATCHED_TOKENS", 256)
    file = tmp_path / "overhead.json"
    given = ["--random-weights", "tiny", "--streams", "2", "--input-len", "16", "--tokens", "8", "--json", str(file)]
    assert bench_server_overhead.main(given) == 0
    alone, chat, completions = json.loads(file.read_text())["rows"]
    assert alone["preset"] == "tiny"
    for row in (chat, completions):
        assert row["tokens"] == 16
        assert 0 < row["events"] <= 2 * (8 + 3)
        assert row["share_of_alone"] == pytest.approx(row["tokens_per_s"] / alone["tokens_per_s"])
        assert row["first_token_added_ms"] == pytest.approx(row["first_token_ms"] - alone["first_token_ms"])
    assert "(" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [
        ["--streams", "0"],
        ["--step-ms", "-1"],
        ["--profile", "x.prof"],
        ["--step-ms", "5", "--random-weights", "tiny"],
        ["--input-len", "5"],
    ],
)
def test_wrong_arguments_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        bench_server_overhead.main(given)
    assert given[0] in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path, capsys):
    assert bench_server_overhead.main(["--json", str(tmp_path / "none" / "overhead.json")]) == 2
    said = capsys.readouterr()
    assert "no such directory" in said.err
    assert not said.out
