"""One workload: its values, its times, those of its peers, and those of other tiles."""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp

from gdnjax.backend import REFERENCE, Backend
from kernel_bench import sweeps, timing
from kernel_bench.timing import Calls, Ceilings, DoesNotFitError, NotMeasuredError
from kernel_bench.workloads import Workload

XLAS = ("choose", "draw", "kv-", "matmul", "normed", "sort")
"""What workloads' names begin with that are timed by XLA, too."""

KEY = jax.eval_shape(lambda: jax.random.key(0))


@dataclasses.dataclass
class Row:
    """One workload's figures. Errors are relative norms against float64; times are seconds.

    `fault` says why there is none of these, or no time. A peer has a "median", or one of "failed" and "fault".
    """

    name: str
    bytes: int
    flops: int
    error: float
    state_error: float
    limits: tuple[float, float]
    times: list[float] = dataclasses.field(default_factory=list)
    peers: dict[str, Any] = dataclasses.field(default_factory=dict)
    fault: str | None = None
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def right(self) -> bool:
        # Not "no error above": NaN is wrong.
        return self.error <= self.limits[0] and self.state_error <= self.limits[1]

    @property
    def is_as_it_should_be(self) -> bool:
        return self.right and not self.fault and not any("fault" in peer for peer in self.peers.values())

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None

    def add_peer(self, name: str, figures: dict[str, Any], ceilings: Ceilings) -> None:
        """A peer's figures, unless they are more than the device has."""
        fault = ceilings.fault_of(self.bytes, self.flops, figures["median"]) if "median" in figures else None
        self.peers[name] = {"fault": fault} if fault else figures


class Prepared:
    """A workload, traced here and compiled by other threads, for `measure` to run.

    Without ceilings its values alone will be looked at.
    """

    def __init__(
        self,
        work: Workload,
        backend: Backend,
        pool: Executor,
        ceilings: Ceilings | None = None,
        *,
        peers: bool = False,
        bytes_limit: int | None = None,
    ):
        began = time.perf_counter()
        self.work, self.ceilings = work, ceilings
        layer = work.layers - 1
        count = timing.count_of(work.layers, ceilings.least_seconds(work.bytes, work.flops)) if ceilings else 0
        x, p = jax.eval_shape(work.inputs, KEY)

        def calls_of(call):
            calls = Calls(call, x, p, work.layers, chain=work.chain, count=count, backend=backend)
            return pool.submit(calls.compile, bytes_limit)

        self.ours: Future[Calls] = calls_of(_call(work, backend))
        outputs, pools = jax.eval_shape(lambda x, p: work.call(x, p, layer, backend), x, p)
        self._inputs = pool.submit(jax.jit(work.inputs).lower(KEY).compile)
        self._poison = pool.submit(jax.jit(lambda: _nan_like(outputs)).lower().compile)

        def compare(outputs, pools, x, wanted):
            right, stored = wanted
            return (
                relative_error(jax.tree.map(lambda o, r: o[: len(r)], work.sample(outputs), right), right),
                relative_error(work.written(pools, x, layer), stored),
            )

        def submit_exact(function, *arguments):
            lowered = jax.jit(function).lower(*arguments)

            def compile_exact():
                with jax.enable_x64(True):
                    return lowered.compile()

            return pool.submit(compile_exact)

        with jax.enable_x64(True):
            exact = lambda x, p: work.exact(x, p, layer)  # noqa: E731
            self._exact = submit_exact(exact, x, p)
            self._compare = submit_exact(compare, outputs, pools, x, jax.eval_shape(exact, x, p))
        self.peers: dict[str, Future[Calls] | str] = {}
        for name, call in (_peers_in_jax(work) if peers and ceilings else {}).items():
            try:
                self.peers[name] = calls_of(call)
            except DoesNotFitError as failure:
                self.peers[name] = str(failure)
            except Exception as failure:  # a peer may not take these sizes, or this GPU, and says so in any way
                self.peers[name] = _said(failure)
        self.trace_seconds = time.perf_counter() - began

    def wait(self) -> None:
        """Until all is compiled, or has failed to be."""
        for future in (self.ours, self._inputs, self._poison, self._exact, self._compare, *self.peers.values()):
            if isinstance(future, Future):
                future.exception()

    def measure(self, seed: int, runs: int | None) -> Row:
        """Values, then times, unless the values are wrong or `runs` is None."""
        work = self.work
        row = Row(work.name, work.bytes, work.flops, float("nan"), float("nan"), work.limits)
        row.trace_seconds = self.trace_seconds
        try:
            self._measure_ours(row, seed, runs)
        except (DoesNotFitError, NotMeasuredError) as fault:
            # The latter behind the values.
            row.fault = str(fault)
        except jax.errors.JaxRuntimeError as failure:
            # The other workloads go on.
            row.fault = _said(failure)
        if row.times and self.ceilings:
            for name, future in self.peers.items():
                row.add_peer(name, self._measure_peer(future, seed, runs or 1), self.ceilings)
        return row

    def _measure_ours(self, row: Row, seed: int, runs: int | None) -> None:
        arguments, pools = self._make_inputs(seed)
        with jax.enable_x64(True):
            wanted = jax.block_until_ready(self._exact.result()(arguments, pools))
        ours = self.ours.result()
        row.compile_seconds = ours.compile_seconds
        _leave_behind(self._poison.result()())
        outputs, pools = ours.alone(arguments, pools)
        with jax.enable_x64(True):
            row.error, row.state_error = map(float, self._compare.result()(outputs, pools, arguments, wanted))
        del outputs, wanted
        if row.right and runs is not None and self.ceilings:
            times, _ = ours.time(arguments, pools, runs)
            row.fault = self.ceilings.fault_of(row.bytes, row.flops, statistics.median(times))
            row.times = [] if row.fault else times

    def _measure_peer(self, future: Future[Calls] | str, seed: int, runs: int) -> dict[str, Any]:
        if isinstance(future, str):
            return {"failed": future}
        try:
            arguments, pools = self._make_inputs(seed)
            times, _ = future.result().time(arguments, pools, runs)
        except NotMeasuredError as fault:
            return {"fault": str(fault)}
        except DoesNotFitError as failure:
            return {"failed": str(failure)}
        except Exception as failure:  # as above
            return {"failed": _said(failure)}
        return {"median": statistics.median(times)}

    def _make_inputs(self, seed: int):
        return jax.block_until_ready(self._inputs.result()(jax.random.key(seed)))


def relative_error(values, wanted) -> jax.Array:
    """Norm of the difference over that of what is wanted, NaN where any value is."""
    leaves, others = jax.tree.leaves(values), jax.tree.leaves(wanted)
    with jax.enable_x64(True):
        if not others:
            return jnp.zeros((), jnp.float64)
        top = sum(jnp.sum((x.astype(jnp.float64) - y) ** 2) for x, y in zip(leaves, others, strict=True))
        return jnp.sqrt(top / sum(jnp.sum(jnp.square(y.astype(jnp.float64))) for y in others))


def _nan_like(shapes) -> list[jax.Array]:
    return [jnp.full(leaf.shape, jnp.nan, leaf.dtype) for leaf in jax.tree.leaves(shapes)]


def _leave_behind(poison: list[jax.Array]) -> None:
    """Frees memory of the sizes of the outputs that is full of NaN, so that what is not written is seen."""
    for leaf in jax.block_until_ready(poison):
        leaf.delete()


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def _call(work: Workload, backend: Backend):
    return lambda arguments, pools, layer: work.call(arguments, pools, layer, backend)


def _peers_in_jax(work: Workload) -> dict[str, Any]:
    """XLA's own way where it is one that people would use, and jax's own kernels."""
    from kernel_bench import jax_peers

    return jax_peers.of(work) | ({"XLA": _call(work, REFERENCE)} if work.name.startswith(XLAS) else {})


def sweep(
    work: Workload, backend: Backend, seed: int, runs: int, ceilings: Ceilings, pool: Executor, deadline: float
) -> None:
    """Times of other tiles, and the row of the table that the best would be. None is begun behind the deadline."""
    inputs = jax.jit(work.inputs)
    x, p = jax.eval_shape(work.inputs, KEY)
    count = timing.count_of(work.layers, ceilings.least_seconds(work.bytes, work.flops))
    compiling: list[tuple[object, Future[Calls]]] = []
    for tile, entry in sweeps.candidates(work.name, backend):
        with entry:
            try:
                calls = Calls(_call(work, backend), x, p, work.layers, chain=work.chain, count=count, backend=backend)
            except Exception as failure:  # the lowering says in its own ways what it does not take
                print(f"    {tile}: {_said(failure)}", flush=True)
                continue
        compiling.append((tile, pool.submit(calls.compile)))
    found = []
    for tile, future in compiling:
        if time.monotonic() > deadline:
            future.cancel()
            print(f"    {tile}: not tried, the time is over", flush=True)
            continue
        try:
            arguments, pools = inputs(jax.random.key(seed))
            times, _ = future.result().time(arguments, pools, runs)
        except Exception as failure:  # too large for the device: the compiler says so in its own ways
            print(f"    {tile}: {_said(failure)}", flush=True)
            continue
        median = statistics.median(times)
        if fault := ceilings.fault_of(work.bytes, work.flops, median):
            print(f"    {tile}: not measured: {fault}", flush=True)
            continue
        found.append((median, str(tile)))
        print(f"    {median * 1e6:9.1f} us  {tile}", flush=True)
    if found:
        print(f"    best: {min(found)[1]}", flush=True)


def torch_peers(names: list[str], runs: int, limit_s: float) -> dict[str, dict[str, Any]]:
    """Figures of flash-linear-attention by workload, from a process of its own; empty without PyTorch.

    The process ends after `limit_s` seconds, and what it has by then is taken.
    """
    if not any(name.startswith(("gdn-", "conv-prefill")) for name in names):
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / "peers.json"
        command = [sys.executable, "-m", "kernel_bench.torch_peers", str(file), str(runs), *names]
        try:
            run = subprocess.run(
                command, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            found = json.loads(file.read_text()) if file.exists() else {}
            print(f"peers of PyTorch: {len(found)} workloads in {limit_s:.0f} s, then ended", flush=True)
            return found
        if run.returncode or not file.exists():
            last = (run.stderr.strip() or "no output").splitlines()[-1]
            print(f"peers of PyTorch: not measured ({last})", flush=True)
            return {}
        return json.loads(file.read_text())
