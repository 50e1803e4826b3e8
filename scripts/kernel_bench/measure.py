"""One workload: its values, its times, those of its peers, and those of other tiles."""

import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax.backend import REFERENCE, Backend
from kernel_bench import sweeps, timing
from kernel_bench.workloads import Workload


@dataclasses.dataclass
class Row:
    """One workload's figures. Errors are relative norms against float64; times are seconds."""

    name: str
    bytes: int
    flops: int
    error: float
    state_error: float
    limits: tuple[float, float]
    times: list[float] = dataclasses.field(default_factory=list)
    peers: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def right(self) -> bool:
        # Not "no error above": NaN is wrong.
        return self.error <= self.limits[0] and self.state_error <= self.limits[1]

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None


def one(work: Workload, backend: Backend, seed: int, runs: int | None, *, peers: bool = False) -> Row:
    """Values, then times, unless the values are wrong or `runs` is None."""
    arguments, pools = jax.block_until_ready(jax.jit(work.inputs)(jax.random.key(seed)))
    layer = work.layers - 1
    with jax.enable_x64(True):
        wanted = jax.block_until_ready(jax.jit(lambda x, p: work.exact(x, p, layer))(arguments, pools))
    shapes = jax.eval_shape(lambda x, p: work.call(x, p, layer, backend), arguments, pools)[0]
    _leave_nan_behind(shapes)
    outputs, pools = jax.jit(lambda x, p: work.call(x, p, layer, backend), donate_argnums=1)(arguments, pools)
    error = relative_error(work.sample(outputs), wanted[0])
    state_error = relative_error(work.written(pools, arguments, layer), wanted[1])
    row = Row(work.name, work.bytes, work.flops, error, state_error, work.limits)
    del outputs, wanted
    if row.right and runs is not None:
        timed = functools.partial(timing.time_calls, layers=work.layers, chain=work.chain, runs=runs)
        row.times, pools = timed(_call(work, backend), arguments, pools)
        for name, call in (_peers_in_jax(work) if peers else {}).items():
            try:
                times, pools = timed(call, arguments, pools)
                row.peers[name] = {"median": statistics.median(times)}
            except Exception as failure:  # a peer may not take these sizes, or this GPU, and says so in any way
                row.peers[name] = {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
    return row


def relative_error(values, wanted) -> float:
    """Norm of the difference over that of what is wanted, NaN where any value is."""
    leaves, others = jax.tree.leaves(values), jax.tree.leaves(wanted)
    if not others:
        return 0.0
    with jax.enable_x64(True):
        top = sum(float(jnp.sum((x.astype(jnp.float64) - y) ** 2)) for x, y in zip(leaves, others, strict=True))
        return float(np.sqrt(top / sum(float(jnp.sum(y * y)) for y in others)))


def _leave_nan_behind(shapes) -> None:
    """Fills memory of the sizes of the outputs with NaN and frees it, so that what is not written is seen."""
    poison = [jnp.full(leaf.shape, jnp.nan, leaf.dtype) for leaf in jax.tree.leaves(shapes)]
    for leaf in jax.block_until_ready(poison):
        leaf.delete()


def _call(work: Workload, backend: Backend):
    return lambda arguments, pools, layer: work.call(arguments, pools, layer, backend)


def _peers_in_jax(work: Workload) -> dict[str, Any]:
    """XLA's own way where it is one that people would use, and jax's own kernels."""
    from kernel_bench import jax_peers

    return jax_peers.of(work) | (
        {"XLA": _call(work, REFERENCE)} if work.name.startswith(("grouped", "matmul", "draw", "kv-write")) else {}
    )


def sweep(work: Workload, backend: Backend, seed: int, runs: int) -> None:
    """Times of other tiles, best first, the row of the table that they would be."""
    arguments, pools = jax.block_until_ready(jax.jit(work.inputs)(jax.random.key(seed)))
    found = []
    for tile, entry in sweeps.candidates(work.name, backend):
        with entry:
            try:
                times, pools = timing.time_calls(
                    _call(work, backend), arguments, pools, work.layers, chain=work.chain, runs=runs
                )
            except Exception as failure:  # too large for the device: the compiler says so in its own ways
                print(f"    {tile}: {type(failure).__name__}: {str(failure)[:120]}", flush=True)
                _, pools = jax.block_until_ready(jax.jit(work.inputs)(jax.random.key(seed)))
                continue
        found.append((statistics.median(times), str(tile)))
        print(f"    {found[-1][0] * 1e6:9.1f} us  {tile}", flush=True)
    if found:
        print(f"    best: {min(found)[1]}", flush=True)


def torch_peers(names: list[str], runs: int) -> dict[str, dict[str, Any]]:
    """Figures of flash-linear-attention by workload, from a process of its own; empty without PyTorch."""
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / "peers.json"
        command = [sys.executable, "-m", "kernel_bench.torch_peers", str(file), str(runs), *names]
        run = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True)
        if run.returncode or not file.exists():
            last = (run.stderr.strip() or "no output").splitlines()[-1]
            print(f"peers of PyTorch: not measured ({last})", flush=True)
            return {}
        return json.loads(file.read_text())
