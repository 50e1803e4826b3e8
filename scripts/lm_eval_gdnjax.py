"""lm-eval's own command line, with the engine registered as the model "gdnjax" and two tasks over local files."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator

from gdnjax.cli.command import exit_status, prepare_environment, run_as_process

DESCRIPTION = """\
Runs lm-eval (pip install -e ".[eval]") on a checkpoint: every flag is lm-eval's own, and `lm_eval_gdnjax.py run
--help` lists them. Where they are not given, --model gdnjax and --include_path of the tasks here are added.

--model_args   model=DIR (or model=tiny), and engine options such as max_num_seqs=16 dtype=float32 max_model_len=4096;
               max_gen_toks=N and enable_thinking=False where the tasks leave them open
--tasks        gsm8k_local        lm-eval's gsm8k over local files in GSM8K's own format
               gsm8k_local_plain  the question as it stands, for the embedded model and for chats
               or any other of lm-eval, if its data can be reached
--metadata     data=FILE shots=FILE: the files of those two tasks (default: those of the embedded model)
"""

EXAMPLES = """\
examples:
  python scripts/lm_eval_gdnjax.py --model_args model=tiny --tasks gsm8k_local_plain
  python scripts/lm_eval_gdnjax.py --model_args model=Qwen3.5-4B --tasks gsm8k_local --limit 100 \\
      --metadata data=gsm8k/test.jsonl shots=gsm8k/train.jsonl
  python scripts/lm_eval_gdnjax.py --model_args model=Qwen3.5-4B --tasks gsm8k_local_plain --num_fewshot 2 \\
      --apply_chat_template --fewshot_as_multiturn true --metadata data=gsm8k/test.jsonl shots=gsm8k/train.jsonl
  python scripts/lm_eval_gdnjax.py ls tasks

The scores are those of scripts/eval.py on the same problems in the same form; that one needs no lm-eval.

Exit status: 0 done, 2 a bad argument, file or checkpoint, or no lm-eval (the reason is on stderr), 130 interrupted.
"""

TASKS = pathlib.Path(__file__).resolve().parent / "evaluation" / "tasks"
SUBCOMMANDS = ("run", "ls", "validate")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not given or given[0] in ("-h", "--help"):
        argparse.ArgumentParser(
            description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        ).print_help()
        raise SystemExit(0)
    return exit_status("lm_eval_gdnjax.py", lambda: run(completed(given)))


def completed(given: list[str]) -> list[str]:
    """lm-eval's arguments: those given, with the model and the tasks of this repository where none are named."""
    command, flags = (given[0], given[1:]) if given[0] in SUBCOMMANDS else ("run", given)
    added = []
    if command == "run" and not _names(flags, "--model", "-M"):
        added += ["--model", "gdnjax"]
    if not _names(flags, "--include_path"):
        added += ["--include_path", str(TASKS)]
    return [command, *flags, *added]


def _names(flags: list[str], *names: str) -> bool:
    return any(flag.split("=", 1)[0] in names for flag in flags)


def run(arguments: list[str]) -> int:
    """Registers the model and hands the arguments to lm-eval."""
    prepare_environment()
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f'{error}; this script needs lm-eval: pip install -e ".[eval]"') from error
    # Imported for its effect: it registers the model.
    import evaluation.lm_eval_model  # noqa: F401

    with _argv(["lm-eval", *arguments]):
        cli_evaluate()
    return 0


@contextlib.contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    """lm-eval's command line reads the process's arguments and no others."""
    before = sys.argv
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    # Of lm-eval.
    run_as_process(main, needs_torch=True)
