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
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    loggers = [logging.getLogger(name) for name in ("gdnjax", "gdnjax.progress")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
