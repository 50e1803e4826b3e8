"""Measures what the HTTP server costs: over an engine whose device is a clock, or over one of random weights."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import statistics
import time
from typing import Any

from gdnjax.cli.command import check_writable, exit_status, prepare_environment, run_as_process, write_json
from scripts.overhead import client
from scripts.overhead.client import PATHS, WARM_S
from scripts.overhead.server import LOOP, cpu_seconds, serving

DESCRIPTION = """\
Streams over HTTP from an engine whose device is a clock: a step takes --step-ms of waiting and gives every row a token.
All else is real: scheduler, packing, detokenizer, streams, parser, application, sockets. So what the device idles is
what the host has lost, and no GPU is needed. Beside the server's lines there is one of the same prompts by
LLM.generate ("alone"):

  busy         the share of the time that the device has something to do while all streams run; alone it is 100%
  us a token   of the processor, by thread: the engine's, the event loop's, others (prompts are prepared there)
  events       of the streams; fewer than tokens where the loop lags and tells of several in one
  first token  milliseconds to it, of requests that come one by one while all streams run: the median as the client sees
               it, and how much of that is not in the engine's own figure

With --random-weights the device is a real one, and the model one of that size. Its prompts are random texts, and its
tokenizer a stand-in of the model's vocabulary. The lines are then:

  tokens/s     output tokens a second, from the first request to the last token, and what share it is of "alone"
  us a token   as above
  first token  milliseconds to it, of requests that come one by one while nothing else runs: the median, and how much
               that is above "alone", which is the time of LLM.generate for one token

Three threads have work at once: where others use the machine, too, the share says how long they wait for a core. Then
compare the processor's times, or give it a core each (`chrt -f 1 python ...`, as root). The client counts events in a
process of its own, and reads no JSON.
"""

EXAMPLES = """\
examples:
  python scripts/bench_server_overhead.py                           128 streams of both endpoints, 10 ms a step
  python scripts/bench_server_overhead.py --streams 32 --step-ms 5 --tokens 1000
  python scripts/bench_server_overhead.py --endpoints chat --profile chat.prof    where the event loop's time goes
  python scripts/bench_server_overhead.py --random-weights qwen3.5-9b --input-len 1024 --tokens 1024    on a GPU

Exit status: 0 done, 2 wrong arguments (the reason is on stderr).
"""

QUESTION = "A box has 3 apples. 4 more are put in. How many apples are in the box?"

SINGLES = 20
"""Requests that come one by one to a model of random weights."""


def share_busy(llm: Any) -> float | None:
    """Of the time from the warm part to the last turn of all streams; None where there were too few to tell."""
    turns = llm.engine.runner.turns
    full = [begun for begun, _, is_full in turns if is_full]
    if len(full) < 2 or full[-1] - full[0] < 2 * WARM_S:
        return None
    kept = [(begun, ended) for begun, ended, _ in turns if full[0] + WARM_S <= begun < full[-1]]
    return sum(ended - begun for begun, ended in kept) / (full[-1] - kept[0][0])


def by_thread(seconds: dict[str, float], tokens: int) -> dict[str, float]:
    """Microseconds of the processor a token: the engine's thread, the event loop's, all others."""
    used = {"engine_us": seconds["gdnjax-engine"], "loop_us": seconds[LOOP]}
    used["others_us"] = seconds["process"] - sum(used.values())
    return {name: 1e6 * value / tokens for name, value in used.items()}


def greedy(tokens: int) -> Any:
    from gdnjax import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def run_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """LLM.generate over a clock."""
    from scripts.overhead import clock

    llm = clock.make_llm(arguments)
    with cpu_seconds() as seconds:
        llm.generate([QUESTION] * arguments.streams, greedy(arguments.tokens), use_tqdm=False)
    tokens, busy = llm.engine.counters.num_output_tokens, share_busy(llm)
    llm.close()
    return {"what": "alone", "busy": busy, "engine_us": 1e6 * seconds["process"] / tokens}


def run_served(arguments: argparse.Namespace, endpoint: str) -> dict[str, Any]:
    """The same streams over HTTP."""
    from gdnjax.serving.async_llm import AsyncLLM
    from scripts.overhead import clock

    llm = clock.make_llm(arguments)
    with AsyncLLM.from_llm(llm) as front:
        with serving(front, "clock", arguments.streams, arguments.profile) as port, cpu_seconds() as seconds:
            streams = [QUESTION] * arguments.streams
            events, _, firsts = client.ask(port, endpoint, streams, arguments.tokens, [QUESTION])
        tokens, busy = llm.engine.counters.num_output_tokens, share_busy(llm)
    found: dict[str, Any] = {"what": endpoint, "busy": busy, "tokens": tokens, "events": events}
    found |= by_thread(seconds, tokens)
    if firsts:
        found["first_token_ms"] = 1e3 * statistics.median(whole for whole, _ in firsts)
        found["first_token_added_ms"] = 1e3 * statistics.median(whole - inside for whole, inside in firsts)
    return found


def run_model(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """LLM.generate of a model of random weights, and the same engine behind HTTP."""
    import jax

    from gdnjax.serving.async_llm import AsyncLLM
    from scripts.overhead import model

    preset, streams, tokens = arguments.random_weights, arguments.streams, arguments.tokens
    llm = model.make_llm(preset, streams, arguments.input_len, tokens)
    print(f"{preset} on {jax.devices()[0].device_kind}, {streams} streams, {arguments.input_len} bytes in, {tokens} "
          "tokens out", flush=True)  # fmt: skip
    seeds = iter(range(1, 1000))

    def asked(count: int) -> list[str]:
        """Of nobody's before: no prefix is found in the cache."""
        return model.texts(count, arguments.input_len, next(seeds))

    llm.generate(asked(streams), greedy(4), use_tqdm=False)
    given = asked(streams)
    began = time.monotonic()
    with cpu_seconds() as used:
        llm.generate(given, greedy(tokens), use_tqdm=False)
    seconds, firsts = time.monotonic() - began, []
    for text in asked(SINGLES):
        began = time.monotonic()
        llm.generate([text], greedy(1), use_tqdm=False)
        firsts.append(time.monotonic() - began)
    alone = {
        "what": "alone",
        "tokens_per_s": streams * tokens / seconds,
        "first_token_ms": 1e3 * statistics.median(firsts),
    }
    alone["engine_us"] = 1e6 * used["process"] / (streams * tokens)
    rows: list[dict[str, Any]] = [{"preset": preset, "device": jax.devices()[0].device_kind, **alone}]
    print(line(rows[-1]), flush=True)
    with AsyncLLM.from_llm(llm) as front, serving(front, preset, streams, arguments.profile) as port:
        for endpoint in arguments.endpoints:
            client.ask(port, endpoint, asked(streams), 4, [])
            with cpu_seconds() as used:
                events, seconds, _ = client.ask(port, endpoint, asked(streams), tokens, [])
            _, _, firsts = client.ask(port, endpoint, [], tokens, asked(SINGLES))
            row = {"what": endpoint, "tokens_per_s": streams * tokens / seconds, "events": events}
            row |= {"tokens": streams * tokens, **by_thread(used, streams * tokens)}
            row["share_of_alone"] = row["tokens_per_s"] / alone["tokens_per_s"]
            row["first_token_ms"] = 1e3 * statistics.median(whole for whole, _ in firsts)
            row["first_token_added_ms"] = row["first_token_ms"] - alone["first_token_ms"]
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    if "tokens_per_s" in row:
        parts = [f"{row['what']:12}{row['tokens_per_s']:,.0f} tokens/s"]
        if "share_of_alone" in row:
            parts[0] += f" ({row['share_of_alone']:.1%} of alone)"
    else:
        parts = [f"{row['what']:12}" + ("too short to tell" if row["busy"] is None else f"busy {row['busy']:.1%}")]
    names = [name for name in ("engine", "loop", "others") if f"{name}_us" in row]
    parts.append("us a token: " + ", ".join(f"{name} {row[name + '_us']:.1f}" for name in names))
    if "events" in row:
        parts.append(f"{row['events']:,} events of {row['tokens']:,} tokens")
    if "first_token_ms" in row:
        parts.append(f"first token {row['first_token_ms']:.1f} ms")
        if "first_token_added_ms" in row:
            parts[-1] += f", {row['first_token_added_ms']:.1f} added"
    return " | ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--streams", type=int, default=128, metavar="N", help="at once (default: 128)")
    add("--tokens", type=int, default=600, metavar="N", help="of each (default: 600)")
    add("--step-ms", type=float, metavar="MS", help="of a step of the clock (default: 10)")
    add("--dispatch-ms", type=float, metavar="MS", help="of the host to launch one (default: 1)")
    add("--random-weights", metavar="PRESET", help="a model of that size in the clock's place")
    add("--input-len", type=int, metavar="N", help="bytes of its prompts, a token each (default: 1024)")
    add("--endpoints", nargs="+", choices=list(PATHS), default=list(PATHS), help="which are served (default: both)")
    add("--tokenizer", metavar="DIR", help="the clock's: of a checkpoint directory (default: the embedded model's)")
    add("--profile", metavar="FILE", help="write a cProfile of the event loop's thread here, for one endpoint")
    add("--json", metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args(argv)
    of_model = arguments.random_weights is not None
    defaults = {"input_len": 1024} if of_model else {"step_ms": 10.0, "dispatch_ms": 1.0, "tokenizer": "tiny"}
    for name in ("input_len", "step_ms", "dispatch_ms", "tokenizer"):
        if name not in defaults and getattr(arguments, name) is not None:
            whose = "the clock's; leave it or --random-weights out" if of_model else "of --random-weights; give it, too"
            parser.error(f"--{name.replace('_', '-')} is {whose}")
        if getattr(arguments, name) is None:
            setattr(arguments, name, defaults.get(name))
    for name in ("streams", "tokens", "step_ms", "input_len"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if arguments.profile is not None and len(arguments.endpoints) != 1:
        parser.error("--profile is of one endpoint; name it by --endpoints")
    return exit_status("bench_server_overhead.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    check_writable("--json", arguments.json)
    if arguments.random_weights is not None:
        prepare_environment()
        rows = run_model(arguments)
    else:
        rows = [run_alone(arguments)]
        print(line(rows[-1]), flush=True)
        for endpoint in arguments.endpoints:
            rows.append(run_served(arguments, endpoint))
            print(line(rows[-1]), flush=True)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    run_as_process(main)
