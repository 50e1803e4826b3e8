"""What the commands change in the process is put back."""

from tests.scripts.conftest import restored_process

__all__ = ["restored_process"]
