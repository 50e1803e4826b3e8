"""A random checkpoint for the scripts, what they change in the process put back, and the site."""

import logging
import pathlib
import shutil
import subprocess
import sysconfig

import pytest

from scripts import make_random_checkpoint
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """The directory that README.md's commands make."""
    directory = tmp_path_factory.mktemp("scripts") / "random-model"
    # Before any fixture of a module: a small program for each shape.
    with compiled_with(IN_ONE_PIECE, WITHOUT_MLIR):
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


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> pathlib.Path:
    """The site, built as docs/install.md says, of a copy: nothing is left beside the sources."""
    root = pathlib.Path(__file__).parents[2]
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(root / "docs", place / "docs")
    for name in ("zensical.toml", "WORKSPACE.md"):
        shutil.copy(root / name, place)
    zensical = pathlib.Path(sysconfig.get_path("scripts")) / "zensical"
    built = subprocess.run([zensical, "build", "--strict"], cwd=place, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "arning" not in built.stdout + built.stderr
    return place / "site"
