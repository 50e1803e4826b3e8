"""Answers the prompts of a file with Ray Data, on as many engines as there are devices for."""

import argparse
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray  # pyright: ignore[reportMissingImports]

DESCRIPTION = """\
Reads JSON Lines of {"prompt": ...}, has each batch answered by one of several engines, each an actor with a device of
its own, and writes JSON Lines with "text", "finish_reason" and "num_tokens" added. pip install "gdnjax[ray]".
"""

EXAMPLES = """\
examples:
  python examples/ray_batch.py prompts.jsonl answers --actors 2                      the embedded model, on the CPU
  python examples/ray_batch.py prompts.jsonl answers --model Qwen3.5-4B --gpus 1 --actors 8

Exit status: 0 done, 2 a bad argument, or Ray is not installed.
"""


class Worker:
    """An engine in an actor. Ray makes it once, and gives it batches: columns by name."""

    def __init__(self, model: str, engine: dict[str, Any], sampling: dict[str, Any]):
        # Here and not above: the device is the actor's, and Ray has set which one it sees.
        from gdnjax import LLM

        self.llm = LLM(model, use_tqdm=False, **engine)
        self.sampling_params = self.llm.default_sampling_params(**sampling)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = self.llm.generate([str(prompt) for prompt in batch["prompt"]], self.sampling_params, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return {
            **batch,
            "text": [answer.text for answer in answers],
            "finish_reason": [answer.finish_reason for answer in answers],
            "num_tokens": [len(answer.token_ids) for answer in answers],
        }


def answer(
    prompts: "ray.data.Dataset",
    model: str = "tiny",
    *,
    actors: int = 1,
    gpus: float = 0,
    batch_size: int = 64,
    engine: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
) -> "ray.data.Dataset":
    """The data set with the answers beside the prompts; nothing runs before somebody reads it.

    actors       engines, each with `gpus` GPUs, or one CPU core where that is 0.
    batch_size   prompts that an engine is given at once: several times its max_num_seqs keeps it full.
    engine       options of LLM; sampling: fields of SamplingParams.
    """
    import ray  # pyright: ignore[reportMissingImports]

    return prompts.map_batches(
        Worker,
        fn_constructor_args=(model, engine or {}, sampling or {}),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus or None,
        num_cpus=None if gpus else 1,
        batch_size=batch_size,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", metavar="FILE", help='JSON Lines of {"prompt": ...}, or a directory of such files')
    parser.add_argument("answers", metavar="DIR", help="where answers go, a file for each block of the data set")
    parser.add_argument("--model", default="tiny", help="checkpoint directory (default: tiny, the embedded model)")
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="engines (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="of each engine (default: 0, a CPU core)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="prompts at once (default: 64)")
    parser.add_argument("--max-num-seqs", type=int, default=16, metavar="N", help="running at once (default: 16)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="temperature (default: 0)")
    given = parser.parse_args(arguments)
    # Not imported above: the help is for those, too, who have yet to install it.
    if importlib.util.find_spec("ray") is None:
        parser.error('Ray is not installed: pip install "gdnjax[ray]"')
    import ray  # pyright: ignore[reportMissingImports]

    answers = answer(
        ray.data.read_json(given.prompts),
        given.model,
        actors=given.actors,
        gpus=given.gpus,
        batch_size=given.batch_size,
        # Steps are compiled as they are needed: a job has the same few shapes again and again.
        engine={"max_num_seqs": given.max_num_seqs, "warmup": False},
        sampling={"max_tokens": given.max_tokens, "temperature": given.temp},
    )
    answers.write_json(given.answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
