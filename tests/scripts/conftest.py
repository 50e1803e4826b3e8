"""A random checkpoint for the scripts, and what they change in the process put back."""

import logging

import pytest

from scripts import make_random_checkpoint


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """The directory that README.md's commands make."""
    directory = tmp_path_factory.mktemp("scripts") / "random-model"
    assert make_random_checkpoint.main([str(directory)]) == 0
    return directory


@pytest.fixture(autouse=True)
def restored_process(monkeypatch):
    """Scripts set environment variables and the level of the logger for a process that is theirs alone."""
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    logger = logging.getLogger("gdnjax")
    level = logger.level
    yield
    logger.setLevel(level)
