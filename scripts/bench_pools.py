"""A decode step's time by the size of the pools: it should cost what its requests are, whatever the pools."""

import argparse
import sys
import time

from command import exit_status, prepare_environment

DESCRIPTION = """\
Decodes with the embedded model, or another, in engines whose pools have different numbers of slots and blocks, and
prints the median and the least time of a decode step. The rows of a table should be alike.
"""

EXAMPLES = """\
examples:
  python scripts/bench_pools.py
  python scripts/bench_pools.py --dtype float32 --slots 1 96 --blocks 64 --num-speculative-tokens 3

Exit status: 0 done, 2 an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="as of LLM (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="see EngineConfig (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1, help="that decode at once (default: %(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 32, 96], help="in all (default: 1 32 96)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 3072], help="of 16 tokens (default: 64 3072)")
    parser.add_argument("--steps", type=int, default=40, help="timed of each engine (default: %(default)s)")
    parser.add_argument("--num-speculative-tokens", type=int, default=0, help="drafts a step (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("requests", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if min(arguments.slots) < arguments.requests:
        parser.error(f"--slots must be at least --requests {arguments.requests}, got {min(arguments.slots)}")
    return exit_status("bench_pools.py", lambda: run(arguments))


def run(arguments) -> int:
    prepare_environment()
    print(f"{'slots':>6} {'blocks':>7} {'median':>10} {'least':>10}")
    for blocks in arguments.blocks:
        for slots in arguments.slots:
            median, least = decode_times(arguments, slots, blocks)
            print(f"{slots:6} {blocks:7} {median * 1e3:7.2f} ms {least * 1e3:7.2f} ms", flush=True)
    return 0


def decode_times(arguments, slots: int, blocks: int) -> tuple[float, float]:
    """Seconds of a decode step, the median and the least, with pools of so many slots and blocks."""
    import jax

    from gdnjax import LLM, SamplingParams

    drafts = arguments.num_speculative_tokens
    tokens = (arguments.steps + 8) * (1 + drafts)
    with LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_num_seqs=arguments.requests,
        num_checkpoint_slots=slots - arguments.requests,
        num_kv_blocks=blocks,
        max_model_len=tokens + 64,
        num_speculative_tokens=drafts,
        max_num_batched_tokens=128,
        # Of all steps it needs two.
        warmup=False,
    ) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for request in range(arguments.requests):
            llm.submit([3 + request, 5, 7], params)
        # Both steps are compiled, and nobody is in prefill.
        for _ in range(4):
            llm.step()
        times = []
        for _ in range(arguments.steps):
            jax.block_until_ready(llm.engine.runner.state)
            begin = time.perf_counter()
            llm.step()
            jax.block_until_ready(llm.engine.runner.state)
            times.append(time.perf_counter() - begin)
    times.sort()
    return times[len(times) // 2], times[0]


if __name__ == "__main__":
    sys.exit(main())
