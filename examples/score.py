"""How probable a model finds given continuations: log-likelihoods, and which of several answers it prefers."""

import argparse
import sys
from collections.abc import Sequence

from gdnjax import LLM, SamplingParams

DESCRIPTION = "Ranks the given continuations of a text by their log-likelihood."

EXAMPLES = """\
examples:
  python examples/score.py "Ann has 3 pens and buys 4 more. How many pens does Ann have? Ann has 3 + 4 =" " 7" " 8"
  python examples/score.py --model Qwen3.5-4B "The capital of France is" " Paris" " Rome"
"""


def log_likelihoods(llm: LLM, context: str, continuations: Sequence[str]) -> list[float]:
    """The sum of the log-probabilities of each continuation's tokens behind `context`. All are scored in one batch; the
    context is computed for each, since log-probabilities of a prompt need every position of it.
    """
    tokenizer = llm.get_tokenizer()
    # Tokens of the whole: a continuation is not always cut as it is alone.
    prompts = [tokenizer.encode(context + continuation) for continuation in continuations]
    first = len(tokenizer.encode(context))
    # Nothing is to be generated, and one token is the least that a request can ask for.
    outputs = llm.generate(prompts, SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False)
    totals = []
    for tokens, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = zip(tokens[first:], output.prompt_logprobs[first:], strict=True)
        totals.append(sum(entry[token].logprob for token, entry in entries if entry is not None))
    return totals


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("context", metavar="TEXT")
    parser.add_argument("continuations", metavar="CONTINUATION", nargs="+")
    parser.add_argument("--model", default="tiny", help="checkpoint directory (default: tiny, the embedded model)")
    given = parser.parse_args(arguments)
    with LLM(given.model, max_num_seqs=8, warmup=False, use_tqdm=False) as llm:
        scores = log_likelihoods(llm, given.context, given.continuations)
    for score, continuation in sorted(zip(scores, given.continuations, strict=True), reverse=True):
        print(f"{score:10.3f} {continuation!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
