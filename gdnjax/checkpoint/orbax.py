"""Checkpoints written by gdnjax convert: an Orbax tree {Hugging Face tensor name: array} in `params/`."""

import pathlib
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from gdnjax.checkpoint.sources import ORBAX_FOLDER, TensorSource, check_dtypes, read_whole
from gdnjax.progress import Progress

# In an Orbax checkpoint every tensor is a zarr array under its name, in one OCDBT key-value store. Its key there:
ARRAY_KEY_SUFFIX = "/.zarray"


class OrbaxSource:
    """The tensors of a converted directory. Each thread keeps the tensor that it read last, so slices of it are cheap.

    Raises FileNotFoundError where there is no `params/`, and ValueError where it is not a checkpoint of
    gdnjax convert, is damaged, or holds a tensor of a dtype that is not in `sources.DTYPES`.
    """

    def __init__(self, directory: str | pathlib.Path):
        self._params = pathlib.Path(directory).resolve() / ORBAX_FOLDER
        if not self._params.is_dir():
            raise FileNotFoundError(f"{self._params}: no such directory; expected one written by gdnjax convert")
        try:
            self._tensors = _open_tensors(self._params)
        except ValueError as error:
            raise ValueError(f"{self._params}: damaged: {error}") from error
        if not self._tensors:
            raise ValueError(f"{self._params}: no tensors here; expected an Orbax checkpoint of gdnjax convert")
        self._dtypes = {name: tensor.dtype.numpy_dtype for name, tensor in self._tensors.items()}
        check_dtypes(str(self._params), {name: dtype.name for name, dtype in self._dtypes.items()})
        self._kept = threading.local()

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return self._dtypes[name]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if getattr(self._kept, "name", None) != name:
            # Dropped first, so that a thread never holds two tensors.
            self._kept.name = self._kept.tensor = None
            try:
                self._kept.tensor = self._tensors[name].read().result()
            except ValueError as error:
                raise ValueError(f"{self._params}: tensor {name} is damaged: {error}") from error
            self._kept.name = name
        return self._kept.tensor[index]

    def __enter__(self) -> "OrbaxSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self._tensors.clear()
        self._kept = threading.local()


def _open_tensors(params: pathlib.Path) -> dict[str, tensorstore.TensorStore]:
    # Not by Orbax's restore of a part of a tree: each call of that reads the metadata of all tensors, which is
    # quadratic for a checkpoint that stores every expert apart. This is the layout that write_orbax asks for.
    context = tensorstore.Context()
    store = {"driver": "ocdbt", "base": f"{params.as_uri()}/"}
    keys = tensorstore.KvStore.open(store, context=context).result().list().result()
    names = [key.decode().removesuffix(ARRAY_KEY_SUFFIX) for key in keys if key.endswith(ARRAY_KEY_SUFFIX.encode())]
    opening = {
        name: tensorstore.open(
            # Lost data would otherwise be read as zeros. Orbax writes zeros out, so nothing else is missing.
            {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}, "fill_missing_data_reads": False},
            open=True,
            read=True,
            context=context,
        )
        for name in names
    }
    return {name: tensor.result() for name, tensor in opening.items()}


def write_orbax(source: TensorSource, directory: pathlib.Path, *, progress: bool) -> None:
    """Writes all tensors of `source` bit for bit into `directory / "params"`.

    Orbax saves a tree as a whole, so host memory holds the model once.
    """
    # Orbax copies numpy arrays before it writes them, to guard against changes meanwhile. Nothing changes these.
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # Compressed copies of all tensors would exist at once, a second model in memory; weights hardly compress.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, use_compression=False, type_handler_registry=registry
    )
    names = source.names()
    with (
        ocp.Checkpointer(handler) as checkpointer,
        Progress("reading tensors", len(names), "tensor", enabled=progress) as bar,
    ):
        tensors = {}
        for name in names:
            tensors[name] = read_whole(source, name)
            bar.update()
        # Orbax writes all of them in one call that reports nothing.
        bar.note("writing Orbax")
        checkpointer.save(directory.resolve() / ORBAX_FOLDER, ocp.args.PyTreeSave(tensors))
