"""Objects of a schema out of texts: every answer parses, whatever the model is."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from gdnjax import LLM, SamplingParams, StructuredOutputsParams

DESCRIPTION = "Answers each text with a JSON object of a schema: who has how many of what."

EXAMPLES = """\
examples:
  python examples/extract_json.py "Ann has 3 pens." "Tom sees 4 birds."
"""

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 100},
        "what": {"enum": ["pens", "apples", "birds", "books"]},
    },
    "required": ["name", "count", "what"],
    "additionalProperties": False,
}


def extract(llm: LLM, texts: Sequence[str], schema: dict[str, Any]) -> list[Any]:
    """An instance of `schema` for each text, or None where max_tokens ended it first."""
    params = SamplingParams(temperature=0.0, max_tokens=96, structured_outputs=StructuredOutputsParams(json=schema))
    answers = [output.outputs[0] for output in llm.generate(list(texts), params, use_tqdm=False)]
    return [json.loads(answer.text) if answer.finish_reason == "stop" else None for answer in answers]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", metavar="TEXT", nargs="+")
    parser.add_argument("--model", default="tiny", help="checkpoint directory (default: tiny, the embedded model)")
    given = parser.parse_args(arguments)
    with LLM(given.model, max_num_seqs=8, warmup=False, use_tqdm=False) as llm:
        for found in extract(llm, given.texts, SCHEMA):
            print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
