"""What puts faults of one line into the package: its table, and a run with tests that take no time."""

import ast
import json
import pathlib

import pytest

from scripts import check_tests
from tests.line_faults import LINE_FAULTS, LineFault

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("fault", LINE_FAULTS, ids=lambda fault: fault.name)
def test_faults_are_of_lines_that_there_are(fault):
    """And what takes their place is Python, so that a test fails, not an import."""
    right = (ROOT / fault.file).read_text(encoding="utf-8")
    wrong = check_tests.faulty(fault, right)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(right))
    near, _, test = fault.near.partition("::")
    assert f"def {test}" in (ROOT / near).read_text(encoding="utf-8")


def test_there_are_thirty_of_different_names():
    assert len({fault.name for fault in LINE_FAULTS}) == len(LINE_FAULTS) >= 30


FAULTS = (
    LineFault("deadly", "adder.py", "return a + b", "import os; os._exit(3)", "test_near.py"),
    LineFault("sum", "adder.py", "a + b", "a - b", "test_near.py"),
    LineFault("far", "adder.py", "x * y", "x + y", "test_near.py"),
    LineFault("harmless", "adder.py", "c + 0", "c - 0", "test_near.py"),
)


OTHER = """
import pytest

import adder


@pytest.mark.parametrize("x", [2], ids=["two - as it is"])
def test_far(x):
    assert adder.times(x, 3) == 6, [1]
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One of three files, that `check_tests` takes for its own."""
    (tmp_path / "adder.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef times(x, y):\n    return x * y\n\n\ndef same(c):\n    return c + 0\n"
    )
    (tmp_path / "test_near.py").write_text("import adder\n\n\ndef test_sum():\n    assert adder.add(2, 1) == 3\n")
    (tmp_path / "test_other.py").write_text(OTHER)
    monkeypatch.setattr(check_tests, "LINE_FAULTS", FAULTS)
    monkeypatch.setattr(check_tests, "ROOT", tmp_path)
    monkeypatch.setattr(check_tests, "copied", lambda target: tmp_path)
    # Loading them takes longer than all else.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path


def test_a_fault_is_caught_near_it_or_by_the_others_or_missed(repository, capsys):
    assert check_tests.main(["--processes", "1", "--output", str(repository / "out.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("without a fault all short tests pass")
    assert lines[1].startswith("deadly: CRASHED: pytest ended with status 3")
    assert lines[2].startswith("sum: caught by test_near.py::test_sum")
    assert lines[3].startswith("far: caught by test_other.py::test_far[two - as it is] (")
    assert lines[4].startswith("harmless: MISSED")
    assert lines[5] == "2 of 4 faults are caught"
    assert "a + b" in (repository / "adder.py").read_text()
    found = json.loads((repository / "out.json").read_text())
    assert [(row["caught_by"], row["crash"]) for row in found[1:]] == [
        ("test_near.py::test_sum", None),
        ("test_other.py::test_far[two - as it is]", None),
        (None, None),
    ]
    assert found[0]["caught_by"] is None
    assert "status 3" in found[0]["crash"]
    alone = ["--processes", "1", "--without-trial", "--near-alone"]
    assert check_tests.main(["sum", *alone]) == 0
    assert check_tests.main(["far", *alone]) == 1


def test_wrong_calls_are_refused_by_name(repository, capsys):
    assert check_tests.main(["nothing"]) == 2
    assert "no fault is called 'nothing'" in capsys.readouterr().err
    (repository / "adder.py").write_text("def add(a, b):\n    return a + b + 1\n")
    assert check_tests.main(["sum", "--processes", "1"]) == 2
    assert "without a fault the short tests fail: test_near.py::test_sum" in capsys.readouterr().err
    (repository / "adder.py").write_text("def add(a, b):\n    return a - b\n")
    assert check_tests.main(["sum"]) == 2
    assert "adder.py has the line of 'sum' 0 times" in capsys.readouterr().err
    (repository / "adder.py").write_text('import os\n\nwhy = "a + b"\nos._exit(3)\n')
    assert check_tests.main(["sum", "--processes", "1"]) == 2
    assert "without a fault the short tests cannot be run: pytest ended with status 3" in capsys.readouterr().err


def test_repository_is_copied_without_what_git_ignores(tmp_path):
    copy = check_tests.copied(tmp_path / "copy")
    assert (copy / "gdnjax" / "step.py").is_file()
    assert (copy / "pyproject.toml").is_file()
    assert not (copy / ".git").exists()


SHRINKING = """
import pathlib

import hypothesis
from hypothesis import strategies as st

CALLS = []


@hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=20)
@hypothesis.given(st.lists(st.integers(0, 10**6), min_size=20))
def test_small(numbers):
    CALLS.append(numbers)
    pathlib.Path("calls").write_text(str(len(CALLS)))
    assert sum(numbers) < 1000
"""


@pytest.mark.thorough
def test_runs_of_faults_do_not_shrink(tmp_path):
    """Whose settings say something else, too: with shrinking it is called hundreds of times."""
    (tmp_path / "test_shrinking.py").write_text(SHRINKING)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    assert "test_small" in (check_tests.failing(tmp_path, ["test_shrinking.py"]) or "")
    assert int((tmp_path / "calls").read_text()) < 30
