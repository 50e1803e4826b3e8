"""The small trained model that ships with the package. scripts/train_tiny.py made it."""

import pathlib

EMBEDDED_MODEL = "tiny"
"""The name of the embedded model wherever a checkpoint directory is expected; `./tiny` is a directory of one's own."""

_ASSETS = pathlib.Path(__file__).parent


def model_directory(model: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint directory that `model` names: that of the embedded model, or a local one.

    Raises FileNotFoundError where there is no such directory.
    """
    directory = _ASSETS / EMBEDDED_MODEL if str(model) == EMBEDDED_MODEL else pathlib.Path(model)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such directory; a model is a local checkpoint directory, or {EMBEDDED_MODEL!r} for the "
            "embedded one (nothing is downloaded: fetch the checkpoint first)"
        )
    return directory
