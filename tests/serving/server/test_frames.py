"""Chunks that come as events are, to the byte, the chunks that they stand for; without an engine."""

import asyncio
import json

import pytest

from gdnjax import SamplingParams
from gdnjax.serving.outputs import RequestMetrics, RequestOutput, StreamOutput
from gdnjax.serving.parsing import OutputParser
from gdnjax.serving.server import chat, completions
from gdnjax.serving.server.events import Pattern, frame, frames
from gdnjax.serving.server.protocol import ChatCompletionRequest, CompletionRequest
from gdnjax.serving.server.service import Run, Service
from gdnjax.serving.server.settings import ServerConfig
from gdnjax.serving.submission import Submission

TEXTS = [
    "", "A", " word", 'a "quote" and a \\', "two\nlines", "\n", "\n\n", "\u00e9\u4e16\U0001f34f", "\x00\x1f\u2028",
    "\0text\0", "1 < 2 <", "b", "</think>", "\n\nBehind.", " More",
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo", "\n</parameter>\n</function>\n</tool_call>",
    " the end", "",
]  # fmt: skip
"""What a sample's pieces say, one after another."""

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}

OUTPUT = RequestOutput("r", None, (1, 2, 3), None, (), True, RequestMetrics(arrival_time=0.0), 2)


SERVICE = Service(None, ServerConfig(served_model_names=("a model",)))
PROMPT = Submission("r", None, [1, 2, 3], [])


class Pieces(Run):
    """A run that gives what it is told."""

    def __init__(self, *pieces):
        super().__init__(SERVICE, 'id "quoted"', None, 1)
        self._pieces = pieces

    async def pieces(self):
        for piece in self._pieces:
            yield piece


def run_of(num_prompts, n):
    """All samples in turns, each a few texts ahead of the one before it."""
    samples = [(number, index) for number in range(num_prompts) for index in range(n)]
    found = []
    for place in range(len(TEXTS) + len(samples)):
        for shift, (number, index) in enumerate(samples):
            at = place - shift
            if 0 <= at < len(TEXTS):
                is_last = at == len(TEXTS) - 1
                piece = StreamOutput(TEXTS[at], (at,), "stop" if is_last else None, None, index)
                found.append((number, piece._replace(output=OUTPUT) if is_last and index == n - 1 else piece))
    return Pieces(*found)


def both(make):
    """The bytes of a stream whose chunks come framed, and of one whose chunks do not."""

    async def collect(framed):
        kinds, sent = set(), []

        async def noted():
            async for chunk in make(framed):
                kinds.add(type(chunk))
                yield chunk

        sent = [event async for event in frames(noted())]
        return kinds, sent

    return asyncio.run(collect(True)), asyncio.run(collect(False))


def check(make, framed):
    (kinds, found), (plain_kinds, expected) = both(make)
    assert found == expected
    assert plain_kinds == {dict}
    assert (bytes in kinds) == framed
    for event in expected[:-1]:
        json.loads(event.removeprefix(b"data: "))


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(
    ("fields", "framed"),
    [
        ({}, True),
        ({"stream_options": {"include_usage": True}}, True),
        ({"include_reasoning": False}, True),
        ({"n": 3}, True),
        ({"tools": [TOOL]}, True),
        ({"return_token_ids": True}, False),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, False),
    ],
)
def test_framed_chunks_of_a_chat_are_its_chunks(fields, framed, thinks):
    body = ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], stream=True, **fields)
    parser = OutputParser(tools=body.tools, begins_thinking=thinks)
    run = run_of(1, body.n or 1)
    writer = chat._Writer(SERVICE, body, run, "a model", PROMPT, parser)
    check(writer.chunks, framed)


@pytest.mark.parametrize(
    ("fields", "framed"),
    [
        ({}, True),
        ({"stream_options": {"include_usage": True}}, True),
        ({"n": 2, "prompt": ["a", "b"]}, True),
        ({"echo": True}, True),
        ({"echo": True, "max_tokens": 0}, False),
        ({"return_token_ids": True}, False),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, False),
    ],
)
def test_framed_chunks_of_a_completion_are_its_chunks(fields, framed):
    body = CompletionRequest(**({"prompt": "?", "stream": True} | fields))
    prompts = completions.prompts_of(body)
    run = run_of(len(prompts), body.n or 1)
    params = SamplingParams(n=body.n or 1)
    echoes = ["an echo" if body.echo else ""] * len(prompts)
    writer = completions._Writer(SERVICE, body, run, "a model", params, [PROMPT] * len(prompts), echoes)
    check(writer.chunks, framed)


def test_pattern_puts_a_text_wherever_its_hole_is():
    chunk = {"id": Pattern.HOLE + "not it", "delta": {"a": Pattern.HOLE, "b": Pattern.HOLE}, "end": None}
    for text in TEXTS:
        assert Pattern(chunk).frame(text) == frame({**chunk, "delta": {"a": text, "b": text}})
