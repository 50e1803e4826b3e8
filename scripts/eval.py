"""Measures how many word problems a model solves, and shows that every way to run it gives the same answers."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import dataclasses
import pathlib
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evaluation import agreement, cells, problems, report
from evaluation.cells import Cell
from evaluation.problems import Problem, Prompt
from evaluation.progress import Progress
from evaluation.report import CellReport

from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.cli.command import (
    add_device_flags,
    add_speculation_flags,
    check_writable,
    devices,
    exit_status,
    prepare_environment,
    run_as_process,
    speculation,
    write_json,
)

DESCRIPTION = """\
Solves word problems in GSM8K's format (JSON Lines of {"question": "...", "answer": "steps\\n#### 7"}) greedily, and
prints the share of exact matches with its 95% confidence interval (Wilson).

Forms of a prompt:
  plain      the question as it stands; what the embedded model was trained on
  few-shot   solved problems, then the question: the prompt and the stop strings of lm-eval's gsm8k task
  chat       the question as a user's message, through the chat template; shots are earlier turns

An answer is taken out of a completion in two ways, as that task does: strict (the number behind "#### ") and flexible
(the last number).
"""

EXAMPLES = f"""\
examples:
  python scripts/eval.py                                           the embedded model on its held-out problems
  python scripts/eval.py --matrix --limit 100                      all cells of the matrix
  python scripts/eval.py --cells f32-one-by-one,f32-batched --output result.json
  python scripts/eval.py --model Qwen3.5-4B --data gsm8k/test.jsonl --shots gsm8k/train.jsonl     5-shot
  python scripts/eval.py --model Qwen3.5-4B --data gsm8k/test.jsonl --form chat --no-thinking --max-tokens 512
  python scripts/eval.py --floor 0.95                              fails where fewer are solved
  python scripts/eval.py --num-speculative-tokens 3                with drafts of the MTP head

The matrix, f32 for float32, bf16 for bfloat16:
{
    textwrap.fill(
        ", ".join(cell.name for cell in cells.MATRIX if cell not in (*cells.CROSS, *cells.SPECULATING)),
        110,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )
}
and f32-LAYOUT-PIECES-CACHE-MEMORY in every combination:
  LAYOUT   {", ".join(cells.LAYOUTS)}
  PIECES   {", ".join(cells.PIECES)}: prompts are cut at 64 tokens
  CACHE    {", ".join(cells.CACHES)}: all prompts run twice, and the second time counts
  MEMORY   {", ".join(cells.MEMORIES)}: few blocks, and every {cells.TURNS_BETWEEN_DRILLS} turns a request is preempted
and, with 1, 2 or 3 drafts of the MTP head, f32-LAYOUT-whole-CACHE-ample-kN in the layouts kv and mixed, and
f32-mixed-pieces-cached-scarce-kN, in which everything is on.
--pairwise runs {len(cells.COVERING)} combinations, in which every two settings meet and drafts meet the cache, its
absence and the mixed layout, and one bf16 cell. The columns "cached", "preempted" and "accepted" say that it happened.

Without --matrix, --pairwise and --cells one cell runs: {cells.DEFAULT.name}, in the checkpoint's dtype. It alone takes
the flags of speculation: the names of the others say how they draft. The device loop is one device's: on several
--matrix and --pairwise do without it.

Every cell is compared with the first float32 cell (the first cell, where there is none): on how many problems both
answers, and all tokens, are the same. Where another float32 cell parts from it, the logits there are computed anew by
one prefill of what is common: both tokens within {
    agreement.NEAR_TIE:g} of the best logit are a near tie, counted; anything else is
a failure. bfloat16 cells and those with keys and values (kv) or weights of 8 bits may differ, and the table says how
often. Seconds hold neither loading nor compilation.

How far a cell is, and how many of its answers are right so far, is said on stderr every few seconds. The file of
--output is written anew each time. A run that is interrupted (Ctrl-C, SIGTERM) prints the table of the cells that it
has and leaves them in the file, with the answers of the one that was running; "complete" is false there.

Exit status: 0 done, 1 a cell is below --floor or differs beyond near ties, 2 a bad argument, file or checkpoint (the
reason is on stderr), 130 interrupted, 143 terminated.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line. Imports no jax: --help and mistakes answer at once."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR", default=EMBEDDED_MODEL, help="checkpoint directory (default: the embedded model)")
    add("--max-num-seqs", type=int, default=32, metavar="N", help="requests at once, rows of a batch (default: 32)")
    add_device_flags(add)
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add = parser.add_argument_group("problems").add_argument
    add("--data", metavar="FILE", help="problems to solve (default: those of the embedded model)")
    add("--shots", metavar="FILE", help="solved problems, of which the first are shown (default: as --data)")
    add("--num-shots", type=int, metavar="N", help="how many are shown (default: 5 for few-shot, otherwise 0)")
    add("--form", choices=problems.FORMS, help="of the prompts (default: plain for the embedded model, else few-shot)")
    add("--no-thinking", action="store_true", help="chat: give the template enable_thinking=False")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--max-tokens", type=int, default=256, metavar="N", help="most tokens of a completion (default: 256)")
    add = parser.add_argument_group("cells").add_argument
    add("--matrix", action="store_true", help="run all cells of the matrix")
    add("--pairwise", action="store_true", help="run the matrix with fewer combinations: every two settings meet")
    add("--cells", metavar="A,B", help="run these cells")
    add_speculation_flags(parser.add_argument_group("speculation").add_argument)
    add = parser.add_argument_group("output").add_argument
    add("--floor", type=float, metavar="F", help="the least share of strict matches that every cell must reach")
    add("--output", metavar="FILE", help="write settings, prompts, completions and scores there, as JSON")
    add("--brief", action="store_true", help="leave prompts and completions out of that file")
    add("--verbose", action="store_true", help="log what the engine does, and show where an error came from")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("eval.py", lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    check_arguments(arguments)
    chosen = choose_cells(arguments)
    directory = model_directory(arguments.model)
    solve, shots = read_files(arguments)
    prepare_environment(arguments.memory_fraction, verbose=arguments.verbose)
    prompts, work, own_dtype = prepare(arguments, directory, solve, shots)
    reports: dict[str, CellReport] = {}

    def in_order() -> list[CellReport]:
        return [reports[cell.name] for cell in chosen if cell.name in reports]

    def save() -> None:
        if not arguments.output:
            return
        waiting = [cell.name for cell in chosen if cell.name not in reports and cell.name != progress.name]
        partial = None
        if progress.name:
            partial = report.partial_json(
                progress.name, progress.dtype, progress.completions, progress.scores, len(solve)
            )
        content = report.as_json(
            settings(arguments, len(shots)),
            solve,
            prompts,
            in_order(),
            brief=arguments.brief,
            partial=partial,
            not_run=waiting,
        )
        write_json(arguments.output, content)

    progress = Progress(solve, save)
    try:
        for made in run_cells(chosen, directory, own_dtype, work, solve, progress, devices(arguments)):
            reports[made.name] = made
            save()
    except KeyboardInterrupt:
        # Who interrupts once more, while this is written, has the file of before.
        save()
        if reports:
            print(report.table(in_order()))
        partly = f", and of {progress.name} {progress.so_far()}" if progress.name else ""
        print(f"partial: {len(reports)} of {len(chosen)} cells{partly}")
        raise
    print(report.table(in_order()))
    complaints = verdict(in_order(), arguments.floor)
    for complaint in complaints:
        print(f"eval.py: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError for values that cannot work, and fills in the defaults that depend on others."""
    for name, least in (("limit", 1), ("max_tokens", 1), ("max_num_seqs", 1), ("num_shots", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.floor is not None and not 0 <= arguments.floor <= 1:
        raise ValueError(f"--floor must be in [0, 1], got {arguments.floor:g}")
    if arguments.form is None:
        arguments.form = "plain" if arguments.model == EMBEDDED_MODEL else "few-shot"
    if arguments.num_shots is None:
        arguments.num_shots = problems.FEW_SHOTS if arguments.form == "few-shot" else 0
    if arguments.form == "plain" and arguments.num_shots:
        raise ValueError("--num-shots needs --form few-shot or chat; plain has no place for shots")
    if arguments.no_thinking and arguments.form != "chat":
        raise ValueError("--no-thinking needs --form chat")
    if arguments.brief and not arguments.output:
        raise ValueError("--brief needs --output FILE")
    # A long run must not end with the news that its result cannot be written.
    check_writable("--output", arguments.output)


def choose_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The cells to run, in order. Raises ValueError for a name that is none."""
    if arguments.matrix + arguments.pairwise + (arguments.cells is not None) > 1:
        raise ValueError("--matrix, --pairwise and --cells each name the cells to run; give one of them")
    drafting = speculation(arguments)
    if drafting:
        if arguments.matrix or arguments.pairwise or arguments.cells is not None:
            raise ValueError("--num-speculative-tokens: --matrix, --pairwise and --cells say themselves what drafts")
        name = f"{cells.DEFAULT.name}-k{drafting['num_speculative_tokens']}"
        return [dataclasses.replace(cells.DEFAULT, name=name, options=drafting)]
    one_device = arguments.tensor_parallel_size == 1
    if arguments.matrix or arguments.pairwise:
        named = cells.MATRIX if arguments.matrix else cells.PAIRWISE
        return [cell for cell in named if one_device or cell.driver == "engine"]
    if arguments.cells is None:
        return [cells.DEFAULT]
    names = list(dict.fromkeys(name.strip() for name in arguments.cells.split(",")))
    for name in names:
        if name not in cells.BY_NAME:
            raise ValueError(f"--cells: no cell {name!r}; allowed: {', '.join(cells.BY_NAME)}")
        if cells.BY_NAME[name].driver != "engine" and not one_device:
            raise ValueError(f"--cells: {name} runs on one device, got --tensor-parallel-size above 1")
    return [cells.BY_NAME[name] for name in names]


def read_files(arguments: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """The problems to solve, and those to show solved."""
    data = problems.problem_file(arguments.model, arguments.data, "problems.jsonl", "--data")
    solve = problems.read_problems(data)[: arguments.limit]
    if not arguments.num_shots:
        return solve, []
    file = problems.problem_file(arguments.model, arguments.shots, "shots.jsonl", "--shots")
    shots = problems.read_problems(file)
    if len(shots) < arguments.num_shots:
        raise ValueError(f"{file}: {arguments.num_shots} shots are wanted, and {len(shots)} problems are in it")
    return solve, shots[: arguments.num_shots]


def prepare(
    arguments: argparse.Namespace, directory: pathlib.Path, solve: Sequence[Problem], shots: Sequence[Problem]
) -> tuple[list[Prompt], cells.Workload, str]:
    """The prompts, what the cells make of them, and the checkpoint's dtype. Raises ValueError where one is too long."""
    from gdnjax.config import ModelConfig
    from gdnjax.serving.tokenizer import Tokenizer

    model = ModelConfig.from_hf(directory)
    options = {"enable_thinking": False} if arguments.no_thinking else {}
    prompts = problems.make_prompts(solve, shots, arguments.form, Tokenizer.from_directory(directory), options)
    work = cells.Workload(
        prompts=[prompt.token_ids for prompt in prompts],
        max_tokens=arguments.max_tokens,
        stop=problems.STOPS[arguments.form],
        max_num_seqs=arguments.max_num_seqs,
        progress=True,
    )
    if work.max_length > model.max_position_embeddings:
        raise ValueError(
            f"the longest prompt has {work.longest} tokens, with --max-tokens {work.max_tokens} more than the model's "
            f"context of {model.max_position_embeddings}"
        )
    return prompts, work, model.dtype


def run_cells(
    chosen: Sequence[Cell],
    directory: pathlib.Path,
    own_dtype: str,
    work: cells.Workload,
    solve: Sequence[Problem],
    progress: Progress,
    shared_by: Mapping[str, Any],
) -> Iterator[CellReport]:
    """Runs the cells, float32 first and weights as they are before others, with the parameters loaded once for each
    such; yields each report.

    The first float32 cell is the reference, or the first of all where there is none.
    """
    dtypes = {cell.name: own_dtype if cell.dtype == "auto" else cell.dtype for cell in chosen}
    reference: CellReport | None = None
    loads = dict.fromkeys((dtypes[cell.name], cell.quantization) for cell in chosen)
    for dtype, quantization in sorted(loads, key=lambda load: (load[0] != "float32", load[1] != "auto")):
        of_load = [cell for cell in chosen if (dtypes[cell.name], cell.quantization) == (dtype, quantization)]
        mtp = any(map(cells.speculates, of_load))
        options = {"mtp": mtp, "quantization": quantization, "devices": shared_by}
        print(f"loading the model in {dtype}", file=sys.stderr, flush=True)
        with cells.load(directory, dtype, work.progress, **options) as loaded:
            if quantization != "auto":
                print(f"loaded {loaded.load_report}", file=sys.stderr, flush=True)
            judge = None
            for cell in of_load:
                progress.begin(cell.name, dtype)
                made = cells.run_cell(cell, dtype, loaded, work, progress)
                found = report.report_cell(made, solve, reference, None if cells.rounds_keys(cell) else judge)
                progress.end()
                if reference is None:
                    reference = found
                if judge is None and dtype == "float32" and not cells.rounds_weights(cell):
                    tokens = [completion.token_ids for completion in reference.run.completions]
                    judge = agreement.Teacher(loaded, work.prompts, tokens)
                yield found


def verdict(reports: Sequence[CellReport], floor: float | None) -> list[str]:
    """What is wrong with a run, a line each; empty where nothing is."""
    complaints = []
    for item in reports:
        if item.failures:
            first = item.failures[0]
            gap = "one had ended" if first.gap is None else f"{first.gap:.2g} below the best logit"
            complaints.append(
                f"{item.name}: {len(item.failures)} of {len(item.scores)} completions differ beyond near ties, "
                f"first problem {first.problem + 1} at output token {first.position} ({gap})"
            )
        if floor is not None and item.strict < floor:
            complaints.append(f"{item.name}: strict match {item.strict:.4f} is below --floor {floor:g}")
    return complaints


def settings(arguments: argparse.Namespace, num_shots: int) -> dict[str, Any]:
    """What a result depends on, for the record."""
    import platform

    import jax

    import gdnjax

    given = {name: getattr(arguments, name) for name in ("model", "data", "shots", "form", "limit", "max_tokens")}
    return {
        **given,
        "num_shots": num_shots,
        "max_num_seqs": arguments.max_num_seqs,
        "enable_thinking": False if arguments.no_thinking else None,
        **speculation(arguments),
        **devices(arguments),
        "near_tie": agreement.NEAR_TIE,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "gdnjax": gdnjax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    run_as_process(main)
