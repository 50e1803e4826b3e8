"""A model that calls Python functions, through the server and OpenAI's client: ask, call, answer with the results."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import openai

DESCRIPTION = """\
Asks a question that needs arithmetic. The model calls `add` or `multiply`, gets what they return, and answers.
Start `gdnjax serve DIR` first; pip install openai.
"""

EXAMPLES = """\
examples:
  python examples/tool_loop.py "What is 3127 times 89?" --url http://127.0.0.1:8000/v1 --model Qwen3.5-4B
"""


def add(a: int, b: int) -> int:
    return a + b


def multiply(a: int, b: int) -> int:
    return a * b


FUNCTIONS: dict[str, Callable[..., Any]] = {"add": add, "multiply": multiply}

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} two integers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
    for name in FUNCTIONS
]


def call(functions: Mapping[str, Callable[..., Any]], name: str, arguments: str) -> str:
    """What a call comes to, as text for the model. Whatever is wrong with it is told to the model, which wrote it."""
    try:
        return json.dumps(functions[name](**json.loads(arguments)))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {error!r}"


def converse(client: openai.OpenAI, model: str, question: str, *, most_rounds: int = 4, **options: Any) -> list[Any]:
    """The conversation up to an answer without a call, or to `most_rounds` answers. The first answer has to be a call.
    `options` go to every request.
    """
    messages: list[Any] = [{"role": "user", "content": question}]
    for number in range(most_rounds):
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice="auto" if number else "required", **options
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for each in message.tool_calls:
            assert each.type == "function"
            result = call(FUNCTIONS, each.function.name, each.function.arguments)
            messages.append({"role": "tool", "tool_call_id": each.id, "content": result})
    return messages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="its name at the server: /v1/models lists them")
    given = parser.parse_args(arguments)
    client = openai.OpenAI(base_url=given.url, api_key="none")
    for message in converse(client, given.model, given.question):
        print(json.dumps(message, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
