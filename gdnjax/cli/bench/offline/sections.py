"""What is measured, section by section. Figures go to the record as soon as they are there."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gdnjax.cli.bench.offline.sizes import LEAD, WINDOWS, Sizes

if TYPE_CHECKING:
    from gdnjax.cli.bench.offline.engines import Bench

PUBLISHED_ACCOUNTING = 1.59
"""Throughput with a decoupled pool over that with a packed one, as the field has published it."""


def decode(bench: "Bench", sizes: Sizes) -> None:
    """Steps of full batches without drafts, and of padded ones."""
    bench.open(0, sizes.batches)
    for name, batch in sizes.named_batches.items():
        found = _decode(bench, sizes, batch, drafts=0, tokens_per_step=1.0)
        bench.record.figure("decode", name, _decode_line(name, found), found)


def speculation(bench: "Bench", sizes: Sizes) -> None:
    """The same batches, and the requests of throughput where these were measured, with drafts and a forced acceptance:
    the outputs are not the model's.
    """
    (drafts,) = (number for number in bench.configs if number)
    length = bench.configs[drafts].spec_acceptance_length or 1.0
    bench.open(drafts, sizes.batches)
    for name, batch in sizes.named_batches.items():
        found = _decode(bench, sizes, batch, drafts=drafts, tokens_per_step=length)
        plain = bench.record.of("decode").get(name)
        ratio = found["tokens_per_second"] / plain["tokens_per_second"] if plain else None
        found |= {"forced_acceptance_length": length, "outputs_are_the_models": False, "ratio": ratio}
        line = f"k = {drafts}, forced to {length:g} tokens a step: {_decode_line(name, found)}"
        line += f", {ratio:.2f}x of k = 0" if ratio else ""
        bench.record.figure("speculation", name, line, found)
    plain = bench.record.of("throughput").get("run")
    if plain is not None:
        line, found = _serve(bench, sizes)
        ratio = found["output_tokens_per_second"] / plain["output_tokens_per_second"]
        found |= {"forced_acceptance_length": length, "outputs_are_the_models": False, "ratio": ratio}
        line = f"k = {drafts}, forced to {length:g} tokens a step: {line}, {ratio:.2f}x of k = 0"
        bench.record.figure("speculation", "throughput", line, found)


def _decode(bench: "Bench", sizes: Sizes, batch: int, *, drafts: int, tokens_per_step: float) -> dict[str, Any]:
    """Windows of steps of a batch that was prefilled. Steps are dispatched ahead: nothing waits between them."""
    llm = bench.llm
    llm.reset_prefix_cache()
    before = bench.happened()
    params = bench.greedy(sizes.decode_output(batch, drafts, tokens_per_step))
    submissions = [llm.submit(prompt, params) for prompt in bench.prompts(batch, sizes.input_len)]
    requests = [submission.requests[0] for submission in submissions]
    while not all(request.output_token_ids for request in requests):
        llm.step()
    for _ in range(LEAD):
        llm.step()

    steps = sizes.window_steps(tokens_per_step)
    windows, first = [], _num_tokens(requests)
    for _ in range(WINDOWS):
        tokens, begin = _num_tokens(requests), time.perf_counter()
        for _ in range(steps):
            llm.step()
        seconds = time.perf_counter() - begin
        windows.append({"ms_per_step": 1e3 * seconds / steps, "tokens": _num_tokens(requests) - tokens, "steps": steps})
        windows[-1]["tokens_per_second"] = windows[-1]["tokens"] / seconds
    last = _num_tokens(requests)
    if any(request.finished for request in requests):
        raise RuntimeError(f"a request of batch {batch} ended while the clock ran")
    bench.abort(submissions)
    return {
        "batch": batch,
        "ms_per_step": statistics.median(window["ms_per_step"] for window in windows),
        "tokens_per_second": statistics.median(window["tokens_per_second"] for window in windows),
        "tokens_per_step": (last - first) / (WINDOWS * steps * batch),
        "mean_context": sizes.input_len + (first + last) / 2 / batch,
        "windows": windows,
        **{name: now - before[name] for name, now in bench.happened().items()},
    }


def _num_tokens(requests: list[Any]) -> int:
    return sum(len(request.output_token_ids) for request in requests)


def _decode_line(name: str, found: dict[str, Any]) -> str:
    return (
        f"{name} requests at {found['mean_context']:.0f} tokens: {found['ms_per_step']:.2f} ms a step, "
        f"{found['tokens_per_second']:.0f} tokens/s{_remarks(found)}"
    )


def _remarks(found: dict[str, Any]) -> str:
    """What a reader should know of a figure that is not what it should be."""
    return f" ({found['compilations']} steps compiled while the clock ran)" if found["compilations"] else ""


def prefill(bench: "Bench", sizes: Sizes) -> None:
    """Long prompts: several at once for throughput, one alone for the time to its first token."""
    bench.open(0, [])
    for name, count in (("batch", sizes.prefill_requests), ("alone", 1)):
        runs = [_prefill(bench, count, sizes.prefill_len) for _ in range(sizes.repeat)]
        seconds = statistics.median(run["seconds"] for run in runs)
        rate = count * sizes.prefill_len / seconds
        figures = {"requests": count, "tokens": sizes.prefill_len, "seconds": seconds, "tokens_per_second": rate}
        figures |= {"runs": [run["seconds"] for run in runs], "compilations": sum(run["compilations"] for run in runs)}
        line = f"{count} x {sizes.prefill_len} tokens: {rate:.0f} tokens/s"
        if name == "alone":
            figures["seconds_to_first_token"] = seconds
            line = f"{sizes.prefill_len} tokens alone: {seconds:.3f} s to the first token"
        bench.record.figure("prefill", name, line + _remarks(figures), figures)


def _prefill(bench: "Bench", count: int, length: int) -> dict[str, Any]:
    prompts = bench.prompts(count, length)
    bench.llm.reset_prefix_cache()
    return bench.generate(prompts, 1)


def throughput(bench: "Bench", sizes: Sizes) -> None:
    """Many requests through LLM.generate, prefill and decode together."""
    bench.open(0, sizes.batches)
    bench.record.figure("throughput", "run", *_serve(bench, sizes))


def _serve(bench: "Bench", sizes: Sizes) -> tuple[str, dict[str, Any]]:
    found = bench.generate(bench.prompts(sizes.requests, sizes.input_len), sizes.output_len)
    line = (
        f"{sizes.requests} x ({sizes.input_len} in, {sizes.output_len} out): "
        f"{found['output_tokens_per_second']:.0f} output tokens/s, {found['total_tokens_per_second']:.0f} in all, "
        f"TTFT {found['ttft_ms']:.0f} ms, "
        + (f"TPOT {found['tpot_ms']:.2f} ms, " if "tpot_ms" in found else "")
        + f"{found['preemptions']} preemptions{_remarks(found)}"
    )
    return line, found


def accounting(bench: "Bench", sizes: Sizes) -> None:
    """A pool in which every block carries a state, against the decoupled one of the same bytes.

    What is emulated of the packed pool is its scheduling, by its number of blocks: not its blocks, nor their traffic.
    """
    from gdnjax.models import geometry_of

    llm = bench.open(0, sizes.batches)
    geometry = geometry_of(
        llm.model,
        block_size=llm.config.block_size,
        ssm_dtype=llm.config.ssm_dtype,
        kv_cache_dtype=llm.config.kv_cache_dtype,
    )
    packed, decoupled = sizes.pools(geometry)
    with bench.scheduled(num_blocks=packed.blocks, prefix_caching=False):
        line, found = _serve(bench, sizes)
    found |= {"blocks": packed.blocks}
    slow = bench.record.figure("accounting", "packed", f"packed, {packed.blocks} blocks: {line}", found)
    # With so many no request waits for one.
    needed = min(sizes.rows, sizes.requests) * llm.engine.scheduler.num_blocks_for(sizes.input_len + sizes.output_len)
    if decoupled.blocks < needed:
        with bench.scheduled(num_blocks=decoupled.blocks):
            line, found = _serve(bench, sizes)
    else:
        # The bytes hold every block that anybody asks for: that is the engine as it was measured.
        found = dict(bench.record.of("throughput").get("run") or _serve(bench, sizes)[1])
        line = f"{found['output_tokens_per_second']:.0f} output tokens/s, its blocks no limit"
    found |= {"blocks": decoupled.blocks, "blocks_afforded": decoupled.afforded}
    bench.record.figure("accounting", "decoupled", f"decoupled, {decoupled.blocks} blocks: {line}", found)
    ratio = found["output_tokens_per_second"] / slow["output_tokens_per_second"]
    line = f"decoupled / packed: {ratio:.2f}x (published {PUBLISHED_ACCOUNTING}x)"
    bench.record.figure("accounting", "ratio", line, {"value": ratio, "published": PUBLISHED_ACCOUNTING})


def prefix(bench: "Bench", sizes: Sizes) -> None:
    """Requests that begin alike, with the prefix cache and without, from an empty one each time."""
    bench.open(0, [*(size for size in sizes.buckets if size < sizes.prefix_requests), sizes.prefix_requests])
    (shared,) = bench.prompts(1, sizes.prefix_len)
    prompts = [shared + own for own in bench.prompts(sizes.prefix_requests, sizes.prefix_own_len)]
    what = f"{sizes.prefix_requests} x ({sizes.prefix_len} shared + {sizes.prefix_own_len} own in, "
    what += f"{sizes.prefix_output_len} out)"
    seconds = {}
    for name, caching in (("with", True), ("without", False)):
        with bench.scheduled(prefix_caching=caching):
            found = bench.generate(prompts, sizes.prefix_output_len)
        seconds[name] = found["seconds"]
        line = f"{what} {name} the cache: {found['seconds']:.2f} s{_remarks(found)}"
        bench.record.figure("prefix", name, line, found)
    ratio = seconds["without"] / seconds["with"]
    bench.record.figure("prefix", "ratio", f"{ratio:.2f}x as fast with the cache", {"value": ratio})


def balance(bench: "Bench", sizes: Sizes) -> None:
    """Where the routers send the tokens of a full prefill step, and as many of them as a decode step has. Nothing is
    timed: it is a prefill of its own.
    """
    from gdnjax.routing import ExpertBalance, expert_choices

    llm = bench.open(0, [])
    moe = llm.model.config.moe
    (tokens,) = bench.prompts(1, min(sizes.batched_tokens, sizes.prefill_len))
    choices = expert_choices(llm.model, llm.params, tokens, llm.mesh)
    ranks = llm.model.tp if llm.model.expert_parallel else 1
    for count in dict.fromkeys((len(tokens), min(sizes.rows, len(tokens)))):
        found = ExpertBalance.of(choices[:, :count], moe.num_experts, ranks)
        line = f"{count} random tokens, top {moe.experts_per_token} of {moe.num_experts} experts: {found}"
        bench.record.figure("balance", f"{count} tokens", line, {"tokens": count, **found.figures})


SECTIONS: dict[str, Callable[["Bench", Sizes], None]] = {
    "decode": decode,
    "prefill": prefill,
    "throughput": throughput,
    "accounting": accounting,
    "prefix": prefix,
    "balance": balance,
    "speculation": speculation,
}
"""In the order in which they run: those of one engine stand together."""

NEEDS = {"speculation": "decode", "accounting": "throughput"}
"""Sections whose ratios are to figures of others, which run before them."""


def choose(names: Sequence[str], *, experts: bool = True) -> list[str]:
    """The sections so named, none for all that are of a model with `experts` or without, in their order, and those that
    they need. ValueError for an unknown one, and for one of experts where there are none.
    """
    for name in names:
        if name not in SECTIONS:
            raise ValueError(f"no section {name!r}; allowed: {', '.join(SECTIONS)}")
    if "balance" in names and not experts:
        raise ValueError("balance is of a model with a mixture of experts")
    wanted = set(names or SECTIONS) - (set() if experts else {"balance"})
    wanted |= {NEEDS[name] for name in wanted if name in NEEDS}
    return [name for name in SECTIONS if name in wanted]
