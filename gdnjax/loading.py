"""A checkpoint as a model and its parameters, without an engine: for `batch_generate` and for steps of one's own."""

import pathlib

from gdnjax import checkpoint, sharding
from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.config import DTYPES, QUANTIZATIONS, ModelConfig
from gdnjax.models import HybridModel, abstract_params, build_model
from gdnjax.shapes import Params


def load_model(
    model: str | pathlib.Path = EMBEDDED_MODEL, *, dtype: str = "auto", quantization: str = "auto", mtp: bool = False
) -> tuple[HybridModel, Params]:
    """Loads a checkpoint directory, or "tiny", the embedded model, onto one device.

    `dtype` of weights and activations: "auto" (the checkpoint's), "float32" or "bfloat16". `quantization` as in
    EngineConfig: with "auto" weights that the checkpoint has as codes are `Quantized` in the parameters. `mtp` loads
    the multi-token-prediction head too. Raises FileNotFoundError or ValueError for what is no checkpoint of a supported
    model, or has no MTP head, or one that the engine does not run (`ModelConfig.require_mtp`).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    directory = model_directory(model)
    config = ModelConfig.from_hf(directory)
    if mtp:
        config.require_mtp()
    dtype = config.dtype if dtype == "auto" else dtype
    hybrid = build_model(config, dtype, mtp=mtp)
    abstract = abstract_params(config, 1, dtype, mtp=mtp)
    with checkpoint.opened(directory, config, abstract, sharding.make_mesh(1)) as stored:
        coded = checkpoint.coded_formats(stored, quantization)
        abstract = abstract_params(config, 1, dtype, mtp=mtp, coded=coded)
        params, _ = checkpoint.load_params(stored, abstract, progress=False)
    return hybrid, params
