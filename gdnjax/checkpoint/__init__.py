"""Checkpoints on disk: reading them into sharded parameters, and rewriting them as another kind."""

from gdnjax.checkpoint.formats import Format, convert, fingerprint, open_source
from gdnjax.checkpoint.fp8_dynamic import QuantiseReport, quantise
from gdnjax.checkpoint.loader import LoadReport, OpenCheckpoint, coded_formats, load_params, opened
from gdnjax.checkpoint.sources import TensorSource

__all__ = [
    "Format",
    "LoadReport",
    "OpenCheckpoint",
    "QuantiseReport",
    "TensorSource",
    "coded_formats",
    "convert",
    "fingerprint",
    "load_params",
    "open_source",
    "opened",
    "quantise",
]
