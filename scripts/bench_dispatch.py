"""What it costs the host to call a decode step, by what the step is given and gives."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from gdnjax.cli.command import check_writable, exit_status, prepare_environment, run_as_process, write_json

DESCRIPTION = """\
Calls functions that have the arguments and results of a decode step of a model, array for array, and nothing to do:
every array has one number. Prints the microseconds of the thread that calls, the median and the least, for:

  parameters, state, batch, emitted   each alone, as trees and as an engine has them (gdnjax/words.py)
  a step                              all together, as trees and as an engine has them
  home                                starting and reading the copy of what was emitted, with log-probabilities or not

Others on the same cores move the medians, so compare runs of one hour, and the least.
"""

EXAMPLES = """\
examples:
  python scripts/bench_dispatch.py
  python scripts/bench_dispatch.py --config qwen3.5-27b --rows 128 --num-speculative-tokens 3 --json dispatch.json

Exit status: 0 done, 2 an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="qwen3.5-9b", help="whose tree of parameters (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="of the batch (default: %(default)s)")
    parser.add_argument("--num-speculative-tokens", type=int, default=0, help="drafts a step (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=500, help="timed of each (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args(argv)
    for name in ("rows", "calls"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return exit_status("bench_dispatch.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    check_writable("--json", arguments.json)
    prepare_environment()
    trees = trees_of(arguments)
    rows = []
    for name, leaves, seconds in measured(trees, arguments.calls):
        median, least = 1e6 * statistics.median(seconds), 1e6 * min(seconds)
        rows.append({"what": name, "arrays": leaves, "median_us": median, "least_us": least})
        print(f"{name:32} {leaves:5} arrays {median:9.1f} {least:9.1f} us", flush=True)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})
    return 0


def trees_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Parameters, state and batch of a decode step."""
    import jax
    import jax.numpy as jnp

    from gdnjax import EngineConfig, abstract_params, build_model
    from gdnjax.assets import config_file
    from gdnjax.config import ModelConfig
    from gdnjax.memory import MemoryPlan
    from gdnjax.models import engine_geometry
    from gdnjax.serving.packing import pack_decode
    from gdnjax.serving.plan import max_growth
    from gdnjax.state import empty_state

    config, drafts = ModelConfig.from_hf(config_file(arguments.config)), arguments.num_speculative_tokens
    engine = EngineConfig(num_speculative_tokens=drafts)
    model = build_model(config, "bfloat16", 1, mtp=drafts > 0)
    geometry = engine_geometry(model, engine)
    plan = MemoryPlan.of_counts(geometry, num_slots=1, num_blocks=1, num_logit_rows=1, num_count_rows=1)
    params = abstract_params(config, 1, "bfloat16", mtp=drafts > 0)
    state = jax.eval_shape(lambda: empty_state(geometry, plan, engine, engine.block_size))
    grown = max_growth(drafts, engine.block_size)
    batch = pack_decode([], {}, [], rows=arguments.rows, table_width=1, grown_width=grown, drafts=drafts > 0)

    def small(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros((1,), leaf.dtype), tree)

    return {"parameters": small(params), "state": small(state), "batch": batch}


def measured(trees: dict[str, Any], calls: int):
    """(what, how many arrays, seconds of each call)."""
    import jax
    import jax.numpy as jnp

    from gdnjax.batch import Emitted, Logprobs
    from gdnjax.words import FlatParams, Form

    params, state, batch = trees["parameters"], trees["state"], trees["batch"]
    flat, form = FlatParams.of(params).leaves, Form.of(batch)
    words, rows, one = form.pack(batch), len(batch.slot), jnp.zeros((), jnp.int32)
    emitted_shape = (rows, 3 + 1 + (batch.max_drafts is not None))

    def touched(tree: Any):
        """Something of every array, or jit would leave it out."""
        return sum(leaf.reshape(-1)[0].astype(jnp.int32) for leaf in jax.tree.leaves(tree))

    def emitted(number):
        return Emitted(jnp.full(emitted_shape, number, jnp.int32), None, None)

    def with_logprobs(number):
        found = jnp.zeros((rows, 1, 20)) + number
        logprobs = Logprobs(found[..., 0], found[..., 1].astype(jnp.int32), found.astype(jnp.int32), found)
        return Emitted(emitted(number).words, logprobs, None)

    def step(params, state, batch):
        return state, emitted(touched((params, batch)))

    def of(tree: Any) -> int:
        return len(jax.tree.leaves(tree))

    def again(state, *_):
        return (state,)

    alone = {
        "parameters, a tree": (touched, params),
        "parameters, flat": (touched, flat),
        "batch, a tree": (touched, batch),
        "batch, words": (touched, words),
        "emitted": (emitted, one),
        "emitted, with log-probabilities": (with_logprobs, one),
    }
    for name, (function, given) in alone.items():
        shown = jax.eval_shape(function, given) if given is one else given
        yield name, of(shown), times(jax.jit(function), (given,), calls)
    own = jax.jit(again, donate_argnums=0)
    yield "state", of(state), times(own, (copied(state),), calls, carry=0)
    yield "the words of a batch", of(batch), times(lambda batch: Form.of(batch).pack(batch), (batch,), calls)
    whole = jax.jit(step, donate_argnums=1)
    given = (params, copied(state), batch)
    yield "a step, trees", of(given) + of(state) + 1, times(whole, given, calls, carry=1)
    given = (flat, copied(state), words)
    yield "a step, as an engine has it", of(given) + of(state) + 1, times(whole, given, calls, carry=1)
    for name, function in (("home", emitted), ("home, with log-probabilities", with_logprobs)):
        found = [jax.jit(function)(one) for _ in range(calls)]
        jax.block_until_ready(found)
        yield name, of(found[0]), times(home, iter(found), calls)


def home(emitted: Any) -> None:
    """What an engine does to have it."""
    import jax

    for leaf in jax.tree.leaves(emitted):
        leaf.copy_to_host_async()
    jax.device_get(emitted)


def copied(tree: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def times(call: Callable, given: tuple[Any, ...] | Iterator[Any], calls: int, carry: int | None = None) -> list[float]:
    """Seconds of this thread in each call. The first result is argument `carry` of the next one; an iterator gives one
    argument for each.
    """
    import jax

    found = []
    fixed = [] if isinstance(given, Iterator) else list(given)
    # The first calls compile.
    for _ in range(calls + (3 if fixed else 0)):
        arguments = [next(given)] if isinstance(given, Iterator) else fixed
        began = time.thread_time()
        result = call(*arguments)
        found.append(time.thread_time() - began)
        if carry is not None:
            fixed[carry] = result[0]
        jax.block_until_ready(result)
    return found[-calls:]


if __name__ == "__main__":
    run_as_process(main)
