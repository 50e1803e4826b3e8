"""PyTorch is hidden from transformers in processes of our own, and from nobody else."""

import subprocess
import sys

import pytest

TORCH = "raise SystemExit('PyTorch was imported')"

COMMAND = """
import sys
from gdnjax.cli.command import run_as_process
from gdnjax.config import import_transformers
from gdnjax.serving.tokenizer import Tokenizer

def main():
    ids, available = Tokenizer.named("tiny").encode("2 + 3"), import_transformers().utils.is_torch_available()
    print(ids, available, "torch" in sys.modules)
    return 0

run_as_process(main, needs_torch={needs_torch})
"""


@pytest.fixture
def torch_is_there(tmp_path, monkeypatch):
    """A version that transformers takes, and that says when it is imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


@pytest.mark.parametrize("needs_torch", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_commands_read_tokenizers_without_torch(torch_is_there, needs_torch):
    code = COMMAND.format(needs_torch=needs_torch)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if needs_torch:
        assert "PyTorch was imported" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
        *ids, available, imported = done.stdout.split()
        assert len(ids) >= 3
        assert (available, imported) == ("False", "False")
