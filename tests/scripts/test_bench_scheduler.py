"""scripts/bench_scheduler.py measures what it names, at small sizes; its times are nobody's promise."""

import json

import pytest

from scripts import bench_scheduler


@pytest.mark.usefixtures("without_type_checks")
def test_figures_are_printed_and_written(tmp_path, capsys):
    file = tmp_path / "costs.json"
    parts = ["plan", "turn", "logit rows", "deadlines"]
    assert bench_scheduler.main(["--only", *parts, "--largest", "100", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    printed = capsys.readouterr().out.splitlines()
    assert len(rows) == len(printed)
    assert {row["part"] for row in rows} == {*parts}
    assert all(row["value"] >= 0 for row in rows)
    found = {(row["part"], row["size"], row["what"]): row["value"] for row in rows}
    # These do not depend on the machine.
    assert found["deadlines", 100, "finished requests kept"] == 0
    assert found["logit rows", 60, "turns until all without a row have ended"] == 20


@pytest.mark.thorough
@pytest.mark.usefixtures("without_type_checks")
def test_agents_find_more_with_fewer_states_where_prompts_part():
    hits = {}
    for name, places, interval in bench_scheduler.PLACES:
        if interval in (64, 1024):
            cache, _ = bench_scheduler.run_agents(places, 32, interval, thinks=True, chat=True)
            hits[name] = cache.counters.hit_tokens / cache.counters.queried_tokens
    assert hits["today's places"] == max(hits.values()) > 0.7


def test_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_scheduler.main(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "none" / "costs.json"
    with pytest.raises(ValueError, match=r"--json .*: no such directory"):
        bench_scheduler.main(["--json", str(file)])
    assert not capsys.readouterr().out
