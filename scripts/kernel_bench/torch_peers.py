"""flash-linear-attention's Triton kernels at our workloads: times of captured graphs, and errors against float64.

    python -m kernel_bench.torch_peers FILE RUNS NAME...

Writes {name: {peer: {"median": s, "eager": s, "error": norm}}}. Gates are given ready-made and q and k are normalised
in the kernel, as its own layers do. Needs PyTorch with a GPU, and flash-linear-attention.
"""

import json
import pathlib
import re
import statistics
import sys
import time

import torch

K = V = 128


def main(file: str, runs: str, *names: str) -> None:
    found = {}
    for name in names:
        for pattern, measure in WORKLOADS.items():
            match = re.fullmatch(pattern, name)
            if match:
                try:
                    found[name] = {"flash-linear-attention": measure(int(runs), *match.groups())}
                except Exception as failure:  # whatever it raises about sizes that it does not take
                    found[name] = {"flash-linear-attention": {"failed": f"{type(failure).__name__}: {failure}"[:200]}}
                torch.cuda.empty_cache()
                # After each, whole or not at all: the process may be ended.
                part = pathlib.Path(f"{file}.part")
                part.write_text(json.dumps(found))
                part.replace(file)
    if not found:
        pathlib.Path(file).write_text("{}")


def _inputs(lead, key_heads: int, heads: int, correlated: bool = False):
    def normal(*shape):
        return torch.randn(*lead, *shape, device="cuda")

    q, k, v = (normal(h, 128).bfloat16() for h in (key_heads, key_heads, heads))
    if correlated:
        k = (0.05 * k.float() + torch.randn(key_heads, K, device="cuda")).bfloat16()
    half_life = 200 ** torch.linspace(0, 1, heads, device="cuda")
    bias = torch.log(torch.expm1(torch.log(torch.tensor(2.0, device="cuda")) / half_life))
    g = -torch.nn.functional.softplus(0.3 * normal(heads) + bias)
    return q, k, v, g, torch.sigmoid(2 * normal(heads))


def decode(runs: int, num_heads: str, num_rows: str, tokens: int = 1):
    """One call reads states and writes others; sets of them take turns, as layers do."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule  # pyright: ignore[reportMissingImports]

    heads, rows = int(num_heads), int(num_rows)
    sets = max(2, min(24, 512 // rows))
    q, k, v, g, beta = _inputs((rows, tokens), 16, heads)
    states = [0.1 * torch.randn(rows, heads, K, V, device="cuda") for _ in range(sets)]

    def call(i):
        return fused_recurrent_gated_delta_rule(
            q, k, v, g, beta=beta, initial_state=states[i % sets], output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    o, _ = call(0)
    wanted, _ = _recurrence(q, k, v, g, beta, states[0])
    return {**_times(call, sets, runs), "error": _error(o, wanted)}


def verify(runs: int, heads: str, rows: str, _: str, new: str):
    """Its tokens without any fold."""
    return decode(runs, heads, rows, int(new))


def prefill(runs: int, num_heads: str, lengths: str, correlated: str | None = None):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    heads = int(num_heads)
    count, each = (int(n) for n in lengths.split("x")) if "x" in lengths else (1, int(lengths))
    q, k, v, g, beta = _inputs((1, count * each), 16, heads, bool(correlated))
    ends = torch.arange(0, count * each + 1, each, device="cuda")
    state = torch.zeros(count, heads, K, V, device="cuda")
    ragged = {"cu_seqlens": ends, "cu_seqlens_cpu": ends.cpu()} if count > 1 else {}

    def call(_):
        return chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, **ragged
        )

    o, final = call(0)
    split = (x[0].unflatten(0, (count, each)) for x in (q, k, v, g, beta))
    wanted, last = _recurrence(*split, state=state)
    times = _times(call, 4, runs)
    return {**times, "error": _error(o[0].unflatten(0, (count, each)), wanted), "state_error": _error(final, last)}


def convolve(runs: int, channels: str, length: str):
    from fla.modules.causal_conv1d import causal_conv1d  # pyright: ignore[reportMissingImports]

    x = torch.randn(1, int(length), int(channels), device="cuda").bfloat16()
    weight = 0.5 * torch.randn(int(channels), 4, device="cuda").bfloat16()
    return _times(lambda _: causal_conv1d(x, weight, activation="silu", output_final_state=True), 4, runs)


def _recurrence(q, k, v, g, beta, state):
    """The formula in float64: [rows, tokens, heads, ...] and [rows, heads, K, V]."""
    state = state.double()
    repeats = v.shape[2] // q.shape[2]
    q, k = (torch.nn.functional.normalize(x.double(), dim=-1).repeat_interleave(repeats, 2) for x in (q, k))
    q, v, keep, beta = q * K**-0.5, v.double(), g.double().exp(), beta.double()
    outputs = []
    for t in range(q.shape[1]):
        state = keep[:, t, :, None, None] * state
        written = beta[:, t, :, None] * (v[:, t] - torch.einsum("nhkv,nhk->nhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * written[:, :, None, :]
        outputs.append(torch.einsum("nhkv,nhk->nhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def _error(value, wanted) -> float:
    return float((value.double() - wanted).norm() / wanted.norm())


def _times(call, count: int, runs: int) -> dict[str, float]:
    """Seconds a call: of a captured graph of `count` calls, and as called."""
    for i in range(3 * count):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    return {
        "median": _median(graph.replay, runs) / count,
        "eager": _median(lambda: [call(i) for i in range(count)], runs) / count,
    }


def _median(run, runs: int) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = max(1, round(4e-3 / (time.perf_counter() - start)))
    times = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(times)


WORKLOADS = {
    r"gdn-decode-(\d+)h-(\d+)": decode,
    r"gdn-verify-(\d+)h-(\d+)-(\d+)\+(\d+)": verify,
    r"gdn-prefill-(\d+)h-(\d+(?:x\d+)?)(-correlated)?": prefill,
    r"conv-prefill-(\d+)-(\d+)": convolve,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
