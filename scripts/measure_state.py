"""Measures what the form of the recurrent state costs: how far 16 bits drift from float32 over a long text."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import sys
import time
from typing import Any

from gdnjax.cli.command import check_writable, exit_status, prepare_environment, run_as_process, write_json

DESCRIPTION = """\
Keeps the recurrent state in float32, in bfloat16 rounded to the nearest and stochastically (ssm_rounding), in float16,
and as int8 where a checkpoint would be, and compares. float16 and int8 are no options of the engine.

Parts:
  layer     one random Gated DeltaNet layer of Qwen3.5-9B's sizes (32 value heads, 16 key heads, 128 x 128): errors of
            states and outputs, relative to the recurrence in float64, after tokens that come one at a time and after
            pieces of 1,024. Pairs of heads differ in half-lives (1 to 200, 2,048 and 32,768 tokens, for ever), in how
            strongly they write (beta about 0.5 or 0.02), and in keys (everywhere, or in few directions)
  logprobs  a model in float32 over joined texts that training has not seen: shifts of the log-probability of each next
            token, and how often the argmax is that of float32
  problems  its held-out problems, solved greedily by the engine

On stdout tables, errors in per cent; with --output all figures as JSON.
"""

EXAMPLES = """\
examples:
  python scripts/measure_state.py                                       everything, in 15 minutes on two CPU cores
  python scripts/measure_state.py --parts layer --output layer.json     the layer alone; runs on a GPU as it is
  python scripts/measure_state.py --parts layer --tokens 131072         a longer text, of multiples of 1,024
  python scripts/measure_state.py --parts logprobs,problems --limit 100

Exit status: 0 done, 2 a bad argument, file or checkpoint (the reason is on stderr), 130 interrupted, 143 terminated.
"""

PARTS = ("layer", "logprobs", "problems")
BLOCK = 1024
POSITIONS = (1024, 4096, 8192, 32768)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Imports no jax: --help and mistakes answer at once."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", metavar="A,B", default=",".join(PARTS), help=f"what is measured (default: {','.join(PARTS)})")
    add("--tokens", type=int, default=32768, metavar="N", help="of the layer and of all texts (default: %(default)s)")
    add("--value-heads", type=int, default=32, metavar="N", help="of the layer (default: %(default)s)")
    add("--key-heads", type=int, default=16, metavar="N", help="of the layer, a multiple of 16 (default: %(default)s)")
    add("--head-dim", type=int, default=128, metavar="N", help="of the layer (default: %(default)s)")
    add("--reference", choices=("float64", "float32"), default="float64", help="of the layer (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the layer's inputs (default: %(default)s)")
    add("--model", metavar="DIR", default="tiny", help="checkpoint directory (default: the embedded model)")
    add(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a text, of which as many as --tokens holds are fed side by side (default: the model's context, "
        "at most --tokens)",
    )
    add("--limit", type=int, default=500, metavar="N", help="only the first N problems (default: %(default)s)")
    add("--output", metavar="FILE", help="write all figures there, as JSON")
    add("--verbose", action="store_true", help="show where an error came from")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("measure_state.py", lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    parts = check_arguments(arguments)
    prepare_environment(verbose=arguments.verbose)
    import jax

    result: dict[str, Any] = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    measures = {"layer": measure_layer, "logprobs": measure_logprobs, "problems": measure_problems}
    for part in parts:
        began = time.monotonic()
        result[part] = measures[part](arguments)
        print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        print("\n".join(TABLES[part](result[part])), flush=True)
        if arguments.output:
            write_json(arguments.output, result)
    return 0


def check_arguments(arguments: argparse.Namespace) -> list[str]:
    """The parts, in order. Raises ValueError for values that cannot work."""
    from measuring.parts import chosen

    parts = chosen(arguments.parts, PARTS)
    for name in ("tokens", "length"):
        value = getattr(arguments, name)
        if value is not None and (value < BLOCK or value % BLOCK):
            raise ValueError(f"--{name} must be a multiple of {BLOCK}, got {value}")
    if arguments.length is not None and arguments.length > arguments.tokens:
        raise ValueError(f"--length must be at most --tokens {arguments.tokens}, got {arguments.length}")
    for name in ("limit", "value_heads", "key_heads", "head_dim"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    # A long run must not end with the news that its result cannot be written.
    check_writable("--output", arguments.output)
    return parts


def measure_layer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors of every head, by position, mode and form."""
    from measuring import state_layer

    from gdnjax.progress import Progress

    layer = state_layer.Layer(arguments.value_heads, arguments.key_heads, arguments.head_dim)
    positions = tuple(sorted({*(at for at in POSITIONS if at < arguments.tokens), arguments.tokens}))
    found: dict[str, Any] = {}
    progress = Progress("layer", arguments.tokens, "token")
    for position, here in state_layer.measure(
        layer, arguments.tokens, positions, arguments.reference, seed=arguments.seed
    ):
        progress.update(BLOCK)
        if here is not None:
            found[str(position)] = here
    sizes = {"value_heads": layer.value_heads, "key_heads": layer.key_heads, "head_dim": layer.dim}
    return {**sizes, "reference": arguments.reference, "class_of_heads": layer.class_of_heads(), "positions": found}


def layer_table(found: dict[str, Any]) -> list[str]:
    """A line for each form and class: means over heads, in per cent, at each position."""
    lines, positions = [], found["positions"]
    of_heads = found["class_of_heads"]
    classes = list(dict.fromkeys(of_heads))
    columns = [f"{int(position):>9,}" for position in positions]
    first = next(iter(positions.values()))
    for mode, measure in (
        ("decode", "state"),
        ("decode", "output"),
        ("decode", "norm"),
        ("prefill", "state"),
        ("prefill", "output"),
        ("checkpoint", "state"),
        ("checkpoint", "output"),
    ):
        for form in first[mode]:
            lines += ["", f"{mode}, {form}: {measure}, %"]
            lines.append(f"  {'half-life / writes / keys':<36}" + "".join(columns))
            for name in classes:
                numbers = [
                    [x for x, of in zip(here[mode][form][measure], of_heads, strict=True) if of == name]
                    for here in positions.values()
                ]
                cells = [f"{100 * sum(x) / len(x):>9.3g}" for x in numbers]
                lines.append(f"  {name:<36}" + "".join(cells))
    return lines


def measure_logprobs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Shifts of log-probabilities against the state in float32, by mode and form."""
    from measuring import state_model

    from gdnjax.assets import model_directory
    from gdnjax.loading import load_model
    from gdnjax.progress import Progress

    directory = model_directory(arguments.model)
    model, params = load_model(directory, dtype="float32")
    length = arguments.length or min(arguments.tokens, model.config.max_position_embeddings // BLOCK * BLOCK)
    given = state_model.texts(directory, arguments.tokens // length, length)
    found: dict[str, Any] = {"texts": given.shape[0], "length": length}
    for mode in state_model.MODES:
        plain = None
        found[mode] = {}
        for form in state_model.FORMS:
            with Progress(f"{mode}, {form.name}", given.size, "token") as progress:
                scores = state_model.feed(model, params, form, mode, given, progress.update)
            plain = scores if plain is None else plain
            found[mode][form.name] = state_model.compare(scores, plain)
    return found


def logprobs_table(found: dict[str, Any]) -> list[str]:
    """A line for each mode and form."""
    lines = [
        "",
        f"log-probabilities, {found['texts']} texts of {found['length']:,} tokens, against the state in float32",
    ]
    lines.append(f"  {'':<32}{'mean':>9}{'shift':>11}{'|shift|':>10}{'99%':>10}{'most':>10}{'argmax':>10}")
    for mode in ("decode", "prefill"):
        for form, x in found[mode].items():
            lines.append(
                f"  {mode + ', ' + form:<32}{x['mean_logprob']:>9.4f}{x['mean_shift']:>11.2g}{x['mean_size']:>10.2g}"
                f"{x['p99_size']:>10.2g}{x['max_size']:>10.2g}{x['same_argmax']:>10.4%}"
            )
    return lines


def measure_problems(arguments: argparse.Namespace) -> dict[str, Any]:
    """Exact match by an engine with each of its forms."""
    from measuring import state_model

    from gdnjax.assets import model_directory

    return state_model.solve(model_directory(arguments.model), arguments.limit)


def problems_table(found: dict[str, Any]) -> list[str]:
    """A line for each form."""
    lines = ["", f"  {'problems':<24}{'exact':>9}{'same tokens as float32':>25}"]
    for form, x in found.items():
        lines.append(f"  {form:<24}{x['strict_match']:>9.2%}{x['same_tokens']:>20} / {x['problems']}")
    return lines


TABLES = {"layer": layer_table, "logprobs": logprobs_table, "problems": problems_table}


if __name__ == "__main__":
    run_as_process(main)
