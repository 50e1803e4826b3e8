"""What ships with the package: the small trained model (made by scripts/train_tiny.py), and presets, which are
configurations of published models without their weights.
"""

import pathlib

EMBEDDED_MODEL = "tiny"
"""The name of the embedded model wherever a checkpoint directory is expected; `./tiny` is a directory of one's own."""

PRESETS = (
    "qwen3.5-0.8b",
    "qwen3.5-2b",
    "qwen3.5-4b",
    "qwen3.5-9b",
    "qwen3.5-9b-fp8",
    "qwen3.5-27b",
    "qwen3.5-27b-fp8",
    "qwen3.5-35b-a3b",
    "qwen3.5-35b-a3b-fp8",
    "qwen3.5-122b-a10b",
    "qwen3.5-397b-a17b",
    "qwen3.5-397b-a17b-fp8",
    "qwen3-next-80b-a3b",
    "deepseek-v3",
    "kimi-linear-48b-a3b",
    "olmo-hybrid-7b",
)
"""Published models whose configuration ships as presets/NAME.json; presets/README.md has where they are from."""

SAME_AS = {
    "qwen3.6-27b": "qwen3.5-27b",
    "qwen3.6-35b-a3b": "qwen3.5-35b-a3b",
    "qwen3.8-27b": "qwen3.5-27b",
}
"""Later models of the same configuration -> the preset that serves them too."""

_ASSETS = pathlib.Path(__file__).parent


def model_directory(model: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint directory that `model` names: that of the embedded model, or a local one.

    Raises FileNotFoundError where there is no such directory, ValueError for what names none.
    """
    if not isinstance(model, str | pathlib.Path):
        raise ValueError(
            f"a model is a checkpoint directory, or {EMBEDDED_MODEL!r} for the embedded one, got {model!r}"
        )
    directory = _ASSETS / EMBEDDED_MODEL if str(model) == EMBEDDED_MODEL else pathlib.Path(model)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such directory; a model is a local checkpoint directory, or {EMBEDDED_MODEL!r} for the "
            "embedded one (nothing is downloaded: fetch the checkpoint first)"
        )
    return directory


def config_file(config: str | pathlib.Path) -> pathlib.Path:
    """The config.json that `config` names: a preset's, the embedded model's, the file itself, or a directory's.

    Raises FileNotFoundError where there is none.
    """
    preset = SAME_AS.get(str(config), str(config))
    if preset in PRESETS:
        return _ASSETS / "presets" / f"{preset}.json"
    path = _ASSETS / EMBEDDED_MODEL if str(config) == EMBEDDED_MODEL else pathlib.Path(config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a configuration is a config.json, a directory that holds one, or one of "
            f"{', '.join((EMBEDDED_MODEL, *PRESETS, *SAME_AS))}"
        )
    return file
