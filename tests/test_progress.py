"""Bars on terminals, lines elsewhere."""

import logging

import pytest

from gdnjax import progress
from gdnjax.progress import EVERY_S, Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def _lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "gdnjax.progress"]


def test_without_a_terminal_a_line_comes_now_and_then(clock, caplog):
    caplog.set_level(logging.INFO, "gdnjax.progress")
    with Progress("compiling steps", 5, "step") as bar:
        bar.update()
        assert _lines(caplog) == []
        clock[0] += EVERY_S
        bar.note("decode 8")
        bar.update()
        clock[0] += 3 * EVERY_S
        bar.update()
    assert _lines(caplog) == [
        "compiling steps: 1 of 5 steps, decode 8, 10 s",
        "compiling steps: 3 of 5 steps, decode 8, 40 s",
    ]


def test_who_wants_no_progress_gets_none(clock, caplog, capsys):
    caplog.set_level(logging.INFO, "gdnjax.progress")
    with Progress("loading", 2, "parameter", enabled=False) as bar:
        clock[0] += 10 * EVERY_S
        bar.update(2)
    assert _lines(caplog) == []
    assert capsys.readouterr().err == ""


def test_terminal_shows_a_bar(monkeypatch, clock, caplog, capsys):
    caplog.set_level(logging.INFO, "gdnjax.progress")
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("loading", 2, "parameter") as bar:
        clock[0] += 10 * EVERY_S
        bar.update(2)
    assert _lines(caplog) == []
    assert "loading" in capsys.readouterr().err
