"""Takes up many answers where they were cut, from states that decode wrote, and breaks these on purpose."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from evaluation import agreement, problems

from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.cli.command import check_writable, exit_status, prepare_environment, run_as_process, write_json
from gdnjax.config import DELTA

if TYPE_CHECKING:
    from gdnjax import LLM

DESCRIPTION = """\
A mixed pool holds states in two layouts: prefill writes KV, decode writes VK, and a bit of each slot says which. At the
end of a turn the request's slot becomes a checkpoint, written by decode; the next turn forks it, in a prefill step. A
bit that did not come along is the worst fault that such a system has had: the state is read transposed, and text goes
on as if nothing were wrong.

Every problem is answered greedily in two turns: the first is cut in mid-answer, the second takes it up. That one is
computed
  fresh    by an engine without a prefix cache, in the KV layout: the reference
  forked   in the mixed layout, from the checkpoint at the end of the first turn
  broken   the same with the bit forced to KV whenever a checkpoint is forked
The last two speculate, if they are told to; the first one never does.
In float32. A forked run is clean if its tokens are those of the fresh one, near ties counted. States are compared right
after the fork, layer by layer: |forked - fresh| / max|fresh|.
"""

EXAMPLES = """\
examples:
  python scripts/eval_forks.py                              250 runs of the embedded model
  python scripts/eval_forks.py --runs 20 --output forks.json
  python scripts/eval_forks.py --num-speculative-tokens 3   checkpoints written with accepted drafts pending

After every batch of runs a line on stderr says what was found so far, and the file of --output is written anew. A run
that is interrupted (Ctrl-C, SIGTERM) prints that, and leaves it there with "complete" false.

Exit status: 0 all forked runs are clean and every broken state is seen, 1 not so, 2 a bad argument or checkpoint (the
reason is on stderr), 130 interrupted, 143 terminated.
"""

ROWS = 16
STATE_BOUND = 1e-4
"""Of the relative difference of a state. Clean forks of the embedded model differ by some 1e-6, broken ones by 1."""


def build_parser() -> argparse.ArgumentParser:
    """The command line. Imports no jax: --help and mistakes answer at once."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="DIR", default=EMBEDDED_MODEL, help="checkpoint directory (default: the embedded model)")
    add("--data", metavar="FILE", help="problems, as scripts/eval.py takes them (default: the embedded model's)")
    add("--runs", type=int, default=250, metavar="N", help="answers (default: 250)")
    add("--states", type=int, default=20, metavar="N", help="runs whose states are compared, too (default: 20)")
    add("--first-tokens", type=int, default=6, metavar="N", help="tokens of the first turn (default: 6)")
    add("--max-tokens", type=int, default=96, metavar="N", help="most tokens of the second turn (default: 96)")
    add("--num-speculative-tokens", type=int, default=0, metavar="K", help="drafts a step, 0 to 7 (default: 0)")
    add("--memory-fraction", type=float, metavar="F", help="share of a GPU's memory, 0 to 1 (default: 0.9)")
    add("--output", metavar="FILE", help="write what was found there, as JSON")
    add("--verbose", action="store_true", help="log what the engine does, and show where an error came from")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return exit_status("eval_forks.py", lambda: run(arguments), verbose=arguments.verbose)


def run(arguments: argparse.Namespace) -> int:
    """Everything between the arguments and the exit status."""
    limits = (("runs", 1), ("states", 0), ("first_tokens", 2), ("max_tokens", 1), ("num_speculative_tokens", 0))
    for name, least in limits:
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    check_writable("--output", arguments.output)
    directory = model_directory(arguments.model)
    file = problems.problem_file(arguments.model, arguments.data, "problems.jsonl", "--data")
    questions = [problem.question for problem in problems.read_problems(file)]
    prepare_environment(arguments.memory_fraction, verbose=arguments.verbose)
    found = Forks()
    began = time.monotonic()
    print("loading the model", file=sys.stderr, flush=True)
    try:
        for found in measure(directory, questions, arguments):
            so_far = f"{found.clean} clean, {found.near_ties} near ties, {found.broken} changed by the broken bit"
            states = f", {len(found.broken_states)} states" if found.broken_states else ""
            after = f"{time.monotonic() - began:.0f} s"
            print(f"{found.runs} of {arguments.runs} runs: {so_far}{states}, {after}", file=sys.stderr, flush=True)
            if arguments.output:
                write_json(arguments.output, _content(found, arguments))
    except KeyboardInterrupt:
        # What there is was written behind the last batch.
        print(table(found))
        print(f"partial: {found.runs} of {arguments.runs} runs, {len(found.broken_states)} states")
        raise
    print(table(found))
    return 0 if found.is_as_it_should_be else 1


def _content(found: "Forks", arguments: argparse.Namespace) -> dict[str, Any]:
    wanted = (arguments.runs, min(arguments.states, arguments.runs))
    return dataclasses.asdict(found) | {"complete": (found.runs, len(found.broken_states)) == wanted}


@dataclasses.dataclass(frozen=True)
class Forks:
    """What was found over so many runs. Tokens and states are in the order of the runs.

    hits          second turns that went on from the very end of the first.
    clean         of these, answers equal to the fresh one's; near_ties are counted apart.
    broken        answers that the forced bit changed, and `first_changes`, the token at which each of them parts.
    clean_states, broken_states   the largest relative difference over layers, run by run.
    drafted, accepted   tokens that the forked engine's MTP head proposed, and those that were kept.
    """

    runs: int = 0
    hits: int = 0
    clean: int = 0
    near_ties: int = 0
    broken: int = 0
    first_changes: list[int] = dataclasses.field(default_factory=list)
    clean_states: list[float] = dataclasses.field(default_factory=list)
    broken_states: list[float] = dataclasses.field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def is_as_it_should_be(self) -> bool:
        states_are_told_apart = (
            max(self.clean_states, default=0.0) <= STATE_BOUND < min(self.broken_states, default=1.0)
        )
        return self.hits == self.runs == self.clean + self.near_ties and states_are_told_apart


def measure(directory: pathlib.Path, questions: Sequence[str], arguments: argparse.Namespace) -> Iterator[Forks]:
    """Runs the conversations in three engines, batch by batch; yields what was found after each, the states last."""
    from evaluation import cells

    drafts = arguments.num_speculative_tokens
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(cells.load(directory, "float32", mtp=drafts > 0))
        assert loaded.tokenizer is not None
        firsts = [loaded.tokenizer.encode(questions[i % len(questions)]) for i in range(arguments.runs)]
        # Room for the checkpoints of a batch's first turns until the second turns have read them.
        mixed = {"state_layout": "mixed", "num_checkpoint_slots": 4 * ROWS, "num_speculative_tokens": drafts}
        fresh, forked, broken = (
            stack.enter_context(_engine(loaded, firsts, arguments, **options))
            for options in ({"state_layout": "kv", "enable_prefix_caching": False}, mixed, mixed)
        )
        _force_bits(broken)
        prompts: list[list[int]] = []
        reference: list[list[int]] = []
        judge = agreement.Teacher(loaded, prompts, reference)
        found = Forks()
        for start in range(0, len(firsts), ROWS):
            part = firsts[start : start + ROWS]
            cut = [answer for answer, _ in _complete(fresh, part, arguments.first_tokens)]
            seconds = [first + answer for first, answer in zip(part, cut, strict=True)]
            exact = [answer for answer, _ in _complete(fresh, seconds, arguments.max_tokens)]
            prompts += seconds
            reference += exact
            completed = {}
            for llm in (forked, broken):
                # First turns are followed by their second turns, before their checkpoints are given up.
                _complete(llm, part, arguments.first_tokens)
                completed[llm] = _complete(llm, seconds, arguments.max_tokens)
            answers, changed = ([answer for answer, _ in completed[llm]] for llm in (forked, broken))
            pairs = zip(seconds, completed[forked], strict=True)
            differences = agreement.compare(exact, answers, _behind(judge, start))
            changes = agreement.compare(answers, changed)
            speculation = forked.stats()["speculation"]
            found = dataclasses.replace(
                found,
                runs=found.runs + len(part),
                hits=found.hits + sum(cached == len(prompt) - 1 for prompt, (_, cached) in pairs),
                clean=found.clean + len(part) - len(differences),
                near_ties=found.near_ties + sum(difference.near_tie for difference in differences),
                broken=found.broken + len(changes),
                first_changes=[*found.first_changes, *(change.position for change in changes)],
                drafted=speculation["num_draft_tokens"],
                accepted=speculation["num_accepted_draft_tokens"],
            )
            yield found
        for first, prompt in list(zip(firsts, prompts, strict=True))[: arguments.states]:
            wanted = _state_behind(fresh, prompt)
            differences = []
            for llm in (forked, broken):
                _complete(llm, [first], arguments.first_tokens)
                differences.append(_difference(_state_behind(llm, prompt), wanted))
            found = dataclasses.replace(
                found,
                clean_states=[*found.clean_states, differences[0]],
                broken_states=[*found.broken_states, differences[1]],
            )
            yield found


def _behind(judge: agreement.Judge, start: int) -> agreement.Judge:
    """The judge for a batch whose first problem has that number."""
    return lambda problem, *where: judge(start + problem, *where)


def _engine(loaded: "LLM", firsts: Sequence[list[int]], arguments: argparse.Namespace, **options: Any) -> "LLM":
    from gdnjax import LLM, EngineConfig

    longest = max(map(len, firsts)) + arguments.first_tokens + arguments.max_tokens
    config = EngineConfig(
        max_num_seqs=ROWS,
        max_num_batched_tokens=256,
        prefill_buckets=(256,),
        decode_buckets=(ROWS,),
        dtype="float32",
        warmup=False,
        **options,
    )
    return LLM.from_model(
        loaded.model, loaded.params, config, max_model_len=longest, tokenizer=loaded.tokenizer,
        eos_token_ids=loaded.eos_token_ids,
    )  # fmt: skip


def _force_bits(llm: "LLM") -> None:
    """Makes every fork read its checkpoint as if prefill had written it."""
    import jax.numpy as jnp

    steps, config = llm.engine.runner.steps, llm.engine.config

    def prefill(options):
        step = steps.prefill(options)

        def forgetful(params, state, batch):
            assert config.state_layout == "mixed"
            forked = batch.read_slot[batch.read_slot != batch.slot]
            layout = jnp.array(state.cache.slots[DELTA]["layout"]).at[forked].set(0)
            cache = state.cache.with_slots(DELTA, layout=layout)
            return step(params, dataclasses.replace(state, cache=cache), batch)

        return forgetful

    llm.engine.runner.steps = dataclasses.replace(steps, prefill=prefill)


def _complete(llm: "LLM", prompts: Sequence[list[int]], max_tokens: int) -> list[tuple[list[int], int]]:
    """Greedy answers as tokens, and how many tokens of each prompt were cached."""
    from gdnjax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs]


def _state_behind(llm: "LLM", prompt: list[int]) -> Any:
    """The states of all layers behind a prompt, [L, hv, K, V]: what its prefill leaves in the request's slot."""
    import numpy as np

    from gdnjax import SamplingParams
    from gdnjax.pallas_kernels.pools import read_rows

    submission = llm.submit({"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=1))
    (request,) = submission.requests
    slot = 0
    while not request.filled:
        llm.engine.step()
        slot = request.slot or slot
    gdn = llm.engine.runner.state.cache.slots[DELTA]
    flat = np.stack([read_rows(gdn["ssm"], layer, slot) for layer in range(gdn["ssm"].shape[0])])
    while llm.step():
        pass
    delta = llm.model.config.delta
    if int(gdn["layout"][slot]):
        flat = flat.reshape(*flat.shape[:2], delta.value_head_dim, delta.key_head_dim).swapaxes(2, 3)
    return flat.reshape(*flat.shape[:2], delta.key_head_dim, delta.value_head_dim)


def _difference(states: Any, exact: Any) -> float:
    """The largest over layers of max|states - exact| / max|exact|."""
    import numpy as np

    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(states, exact, strict=True))


def table(found: Forks) -> str:
    """What was found, a line each."""

    def span(values: Sequence[float]) -> str:
        return f"{min(values):.1e} to {max(values):.1e}" if values else "not compared"

    parts = f", the first change at token {min(found.first_changes)}, " if found.first_changes else ""
    median = f"the median at {statistics.median(found.first_changes):.0f}" if found.first_changes else ""
    return "\n".join(
        (
            f"second turns from the end of the first   {found.hits} of {found.runs}",
            f"clean                                    {found.clean} of {found.runs}, near ties {found.near_ties}",
            f"state behind a fork, clean               {span(found.clean_states)}",
            f"state behind a fork, broken              {span(found.broken_states)}",
            f"answers changed by the broken bit        {found.broken} of {found.runs}{parts}{median}",
            *(
                [f"drafts kept                              {found.accepted} of {found.drafted}"]
                if found.drafted
                else []
            ),
        )
    )


if __name__ == "__main__":
    run_as_process(main)
