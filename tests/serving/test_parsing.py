"""The parser of thinking and tool calls: whatever models get wrong, and however the output is cut."""

import collections
import dataclasses
import json
import sys

import jaxtyping
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.parsing import (
    Content,
    OutputParser,
    ParsedOutput,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    begins_thinking,
)
from gdnjax.serving.tokenizer import Tokenizer
from tests.make_tokenizer import write_tokenizer
from tests.serving.outputs import (
    Tag,
    cut_text,
    cut_tokens,
    encoded,
    grouped,
    parts_of,
    pieces_of,
    read,
    tagged_tokenizer,
    text_of,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "at": {"$ref": "#/$defs/Place"},
            },
            "$defs": {"Place": {"type": "object", "properties": {"lat": {"type": "number"}}}},
        },
    },
}
WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "content": {"type": "string"}, "lines": {"type": "array"}},
        },
    },
}
TOOLS = [WEATHER, WRITE]

CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
PARIS = ("get_weather", {"city": "Paris"})
OPEN, CLOSE, THOUGHT = Tag("<tool_call>"), Tag("</tool_call>"), Tag("</think>")
FILE = "<root>\n</parameter>\n</function>\n</tool_call>\nmore\n</function>\n</tool_call>\n</root>"


@dataclasses.dataclass(frozen=True)
class Case:
    """An output and what it says. Strings are ordinary tokens, which may spell tags.

    in_text  whether it says the same where tags are no tokens.
    """

    parts: list
    reasoning: str | None = None
    content: str | None = None
    calls: tuple = ()
    thinking: bool = False
    options: dict = dataclasses.field(default_factory=dict)
    in_text: bool = True


CASES = {
    "answer alone": Case(["Hello\n\nworld\n"], content="Hello\n\nworld\n"),
    "thinking, answer": Case(["Hm.\n", THOUGHT, "\n\nHello"], "Hm.", "Hello", thinking=True),
    "thinking that the output opens": Case([Tag("<think>"), "\nHm.\n", THOUGHT, "\n\nHi"], "Hm.", "Hi"),
    "thinking alone": Case(["Hm, é, 好\n\n"], "Hm, é, 好", thinking=True),
    "empty thinking": Case(["\n", THOUGHT, "\n\nHi"], None, "Hi", thinking=True),
    "one call": Case(parts_of(CALL), calls=(PARIS,)),
    "thinking, answer, two calls": Case(
        ["Hm.\n", THOUGHT, "\n\nI look.\n\n", *parts_of(CALL), "\n", *parts_of(CALL)],
        "Hm.",
        "I look.",
        (PARIS, PARIS),
        thinking=True,
    ),
    "a call without parameters": Case(
        parts_of("<tool_call>\n<function=get_weather>\n</function>\n</tool_call>"), calls=(("get_weather", {}),)
    ),
    "a function nobody has named": Case(
        parts_of("<tool_call>\n<function=other>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>"),
        calls=(("other", {"n": 5}),),
    ),
    "types": Case(
        parts_of(
            "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n"
            '</parameter>\n<parameter=unit>\nNone\n</parameter>\n<parameter=at>\n{"lat": 1.50}\n</parameter>\n'
            "</function>\n</tool_call>"
        ),
        calls=(("get_weather", {"city": "12", "days": 3, "unit": None, "at": {"lat": 1.5}}),),
    ),
    "text that may have become null": Case(
        parts_of(
            "<tool_call>\n<function=get_weather>\n<parameter=unit>\nnullable\n</parameter>\n<parameter=days>\nmany\n"
            "</parameter>\n</function>\n</tool_call>"
        ),
        calls=(("get_weather", {"unit": "nullable", "days": "many"}),),
    ),
    "empty and blank values": Case(
        parts_of(
            "<tool_call>\n<function=write>\n<parameter=path>\n\n</parameter>\n<parameter=content>\n\n\n x\n\n"
            "</parameter>\n</function>\n</tool_call>"
        ),
        calls=(("write", {"path": "", "content": "\n\n x\n"}),),
    ),
    "on one line": Case(
        parts_of("<tool_call><function=get_weather><parameter=city>Rio</parameter></function></tool_call>"),
        calls=(("get_weather", {"city": "Rio"}),),
    ),
    # The faults of other engines' parsers.
    "tool syntax as prose in thinking": Case(
        [f"I could write\n{CALL}\nbut no.\n", THOUGHT, "\n\nHi"],
        f"I could write\n{CALL}\nbut no.",
        "Hi",
        thinking=True,
    ),
    "the token in thinking as prose": Case(
        ["The tag ", OPEN, " begins calls.\n", THOUGHT, "\n\nHi"],
        "The tag <tool_call> begins calls.",
        "Hi",
        thinking=True,
    ),
    "a call out of thinking": Case(
        ["I call.\n", *parts_of(CALL)], "I call.", None, (PARIS,), thinking=True, in_text=False
    ),
    "a second end of thinking": Case(["Hm.\n", THOUGHT, "\n\n", THOUGHT, "\n\nHi"], "Hm.", "Hi", thinking=True),
    "no tool_call before function": Case(
        [
            "I look.\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n",
            CLOSE,
            "\nDone.",
        ],
        content="I look.\nDone.",
        calls=(PARIS,),
    ),
    "function as prose": Case(
        ["Write <function=get_weather> so, or\n<function=unknown> so."],
        content="Write <function=get_weather> so, or\n<function=unknown> so.",
    ),
    "last parameter not closed": Case(parts_of(CALL.replace("\n</parameter>", "")), calls=(PARIS,)),
    "a parameter not closed": Case(
        parts_of(
            "<tool_call>\n<function=write>\n<parameter=path>\na/b\n<parameter=content>\nx\n</parameter>\n</function>\n"
            "</tool_call>"
        ),
        calls=(("write", {"path": "a/b", "content": "x"}),),
    ),
    "function not closed": Case(parts_of(CALL.replace("\n</function>", "")), calls=(PARIS,)),
    "tool_call not closed": Case(parts_of(CALL.removesuffix("\n</tool_call>")), calls=(PARIS,)),
    "tool_call not closed, another behind": Case(
        parts_of(CALL.removesuffix("</tool_call>") + CALL), calls=(PARIS, PARIS)
    ),
    "nothing closed": Case(
        parts_of("<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</tool_call>"), calls=(PARIS,)
    ),
    "nothing closed, not even the call": Case(
        parts_of("<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"),
        calls=(("get_weather", {"city": "Par"}),),
    ),
    "function within a call": Case(
        parts_of(
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<function=write>\n"
            "<parameter=path>\np\n</parameter>\n</function>\n</tool_call>"
        ),
        calls=(PARIS, ("write", {"path": "p"})),
    ),
    "two functions in a call": Case(
        parts_of(CALL.removesuffix("</tool_call>") + CALL.removeprefix("<tool_call>\n")), calls=(PARIS, PARIS)
    ),
    "function's name cut by the call's end": Case(
        parts_of("<tool_call>\n<function=get_weather</tool_call>"), calls=(("get_weather", {}),)
    ),
    "no function at all": Case(
        parts_of("So:\n<tool_call>\n<function=</tool_call>"), content="So:\n<tool_call>\n<function="
    ),
    "no call behind the tag": Case(
        ["So:\n", OPEN, "\nnothing", CLOSE, "\nEnd"], content="So:\n<tool_call>\nnothing\nEnd"
    ),
    "text between parameters": Case(
        parts_of(
            "<tool_call>\n<function=get_weather>\nnow the city\n<parameter=city>\nParis\n</parameter>\n</function>\n"
            "</tool_call>"
        ),
        content="now the city",
        calls=(PARIS,),
    ),
    "a whole call in a value": Case(
        [
            OPEN,
            f"\n<function=write>\n<parameter=content>\n{FILE}\n</parameter>\n</function>\n",
            CLOSE,
        ],
        calls=(("write", {"content": FILE}),),
        in_text=False,
    ),
    "the end of a function and a call in a value": Case(
        [
            *parts_of("<tool_call>\n<function=write>\n<parameter=content>\n<a>\n</function>\n"),
            "</tool_call>\n</a>\n</parameter>\n</function>\n",
            CLOSE,
        ],
        calls=(("write", {"content": "<a>\n</function>\n</tool_call>\n</a>"}),),
    ),
    "the end of a parameter within a line": Case(
        parts_of(
            "<tool_call>\n<function=write>\n<parameter=content>\na</parameter>\n<parameter=path>\n</parameter>\nb\n"
            "</parameter>\n</function>\n</tool_call>"
        ),
        calls=(("write", {"content": "a</parameter>", "path": "</parameter>\nb"}),),
    ),
    "thinking ends in a value": Case(
        ["\n", THOUGHT, OPEN, "\n<function=get_weather>\n<parameter=city>\nPa", THOUGHT, "ris\n</parameter>\n", CLOSE],
        calls=(("get_weather", {"city": "Pa</think>ris"}),),
        thinking=True,
    ),
    "tool_choice none": Case(parts_of(CALL), content=CALL, options={"tool_choice": "none"}),
    "no tools": Case(parts_of(CALL), content=CALL, options={"tools": None}),
    "one call only": Case(
        parts_of(f"{CALL}\n{CALL}\nBye"), content="Bye", calls=(PARIS,), options={"parallel_tool_calls": False}
    ),
    "spelled tags, where a call is required": Case(
        [CALL, "\n", CALL], calls=(PARIS, PARIS), options={"tool_choice": "required"}
    ),
    "a named function": Case(
        ["Hm.\n", THOUGHT, "\n\n", CALL],
        "Hm.",
        calls=(PARIS,),
        thinking=True,
        options={"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ),
    "a budget's end": Case(
        ["One, two.\nTime is up.\n\nHi"], "One, two.", "Hi", thinking=True, options={"budget_end": "\nTime is up.\n"}
    ),
    "a budget's end, thinking closed again": Case(
        ["One, two. Time is up.\n", THOUGHT, "\n\nHi"],
        "One, two. ",
        "Hi",
        thinking=True,
        options={"budget_end": "Time is up."},
    ),
    "a budget's end with the tag": Case(
        ["One.\nTime is up.\n", THOUGHT, "\n\nHi"],
        "One.\nTime is up.",
        "Hi",
        thinking=True,
        options={"budget_end": "Time is up.\n</think>\n\n"},
    ),
    "thinking off": Case(["Hm.", THOUGHT, "Hi"], content="Hm.</think>Hi", options={"thinking": False}),
    # Calls in JSON.
    "JSON": Case(
        parts_of(
            'Hi\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa\\"r\\u0069s", "days": 3}}\n</tool_call>'
        ),
        content="Hi",
        calls=(("get_weather", {"city": 'Pa"ris', "days": 3}),),
    ),
    "JSON, several": Case(
        parts_of(
            '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>\n<tool_call>\n'
            '{"arguments": {"a": [1, -2.5e3, true, null, {"b": []}]}, "id": 7, "name": "write"}\n</tool_call>'
        ),
        calls=(("get_weather", {}), ("write", {"a": [1, -2500.0, True, None, {"b": []}]})),
    ),
    "JSON, a list of calls": Case(
        parts_of('<tool_call>[{"name": "write", "parameters": {"path": "p"}}, {"name": "write"}]</tool_call>\nBye'),
        content="Bye",
        calls=(("write", {"path": "p"}), ("write", {})),
    ),
    "JSON, arguments as text": Case(
        parts_of('<tool_call>{"name": "write", "arguments": "{\\"path\\": \\"p\\"}"}</tool_call>'),
        calls=(("write", {"path": "p"}),),
    ),
    "JSON, tags in a value": Case(
        parts_of(
            '<tool_call>{"name": "write", "arguments": {"content": "</tool_call> <tool_call> \\n{}"}}</tool_call>'
        ),
        calls=(("write", {"content": "</tool_call> <tool_call> \n{}"}),),
    ),
    "JSON, what is forgiven": Case(
        parts_of(
            '<tool_call>{"name": "write", "arguments": {"content": "a\n\\d\t", "lines": [True, None, 1,],}}</tool_call>'
        ),
        calls=(("write", {"content": "a\n\\d\t", "lines": [True, None, 1]}),),
    ),
    "JSON, cut off": Case(
        parts_of('<tool_call>{"name": "write", "arguments": {"lines": [1, {"a": "b\\u00'),
        calls=(("write", {"lines": [1, {"a": "b\\u00"}]}),),
    ),
    "JSON, braces missing": Case(
        parts_of('<tool_call>{"name": "write", "arguments": {"path": "p"</tool_call>Bye'),
        content="Bye",
        calls=(("write", {"path": "p"}),),
    ),
    "JSON, broken": Case(
        parts_of('<tool_call>{"name": "write", "arguments": {"path": "a"b"}}</tool_call>'),
        content='b"}}',
        calls=(("write", {"path": "a"}),),
    ),
    "JSON that is no call": Case(
        parts_of('<tool_call>{"nom": "write", "arguments": {"path": 1}}</tool_call>\nBye'),
        content='<tool_call>{"nom": "write", "arguments": {"path": 1}}\nBye',
    ),
    "JSON in the function": Case(
        parts_of('<tool_call>\n<function=write>{"path": "p"}</function>\n</tool_call>'),
        calls=(("write", {"path": "p"}),),
    ),
    "JSON without tags": Case(
        ['{"name": "write", "arguments": {"path": "p"}}'],
        calls=(("write", {"path": "p"}),),
        options={"tool_choice": "required"},
    ),
    "JSON without tags, not asked for": Case(['{"name": "write"}'], content='{"name": "write"}'),
}


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Without the checks of types, which take ten times what they check: the server's tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", params=[False, True], ids=["tags are text", "tags are special"])
def tagged(request, tmp_path_factory):
    return tagged_tokenizer(tmp_path_factory.mktemp("tagged"), special=request.param)


def parser_of(tokenizer, case, **options):
    return OutputParser(tokenizer, **{"tools": TOOLS, "begins_thinking": case.thinking, **case.options, **options})


def check(found, case, name):
    assert (found.reasoning, found.content) == (case.reasoning, case.content), name
    assert tuple((call.name, json.loads(call.arguments)) for call in found.tool_calls) == case.calls, name


@pytest.mark.parametrize("name", CASES)
def test_output_cut_at_every_token_says_the_same(name, tagged):
    case = CASES[name]
    parser = parser_of(tagged, case, call_id=str)
    ids = encoded(tagged, case.parts)
    if case.options.keys() & {"tools", "thinking"} or case.options.get("tool_choice") == "none":
        # Tags that nobody looks for are in the answer if they are in the text.
        case = dataclasses.replace(case, content=tagged.decode(ids))
    whole = parser.parse(ids, tagged.decode(ids))
    check(whole, case, name)
    for pieces in cut_tokens(pieces_of(tagged, ids)):
        found = read(parser, pieces)
        if "budget_end" in case.options:
            # Where thinking ends within a step, all tokens of the step count.
            found = dataclasses.replace(found, num_reasoning_tokens=whole.num_reasoning_tokens)
        assert found == whole, pieces


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.in_text])
def test_text_cut_at_every_character_says_the_same(name):
    case = CASES[name]
    text = text_of(case.parts)
    parser = parser_of(None, case, call_id=str)
    whole = parser.parse([], text)
    check(whole, case, name)
    for pieces in cut_text(text):
        assert read(parser, pieces) == whole, pieces


def test_parts_are_said_as_soon_as_they_are_known(tagged):
    """A long value streams, and nothing of a call is kept back but what may be its end."""
    parser = OutputParser(tagged, tools=TOOLS, begins_thinking=True, call_id=str)
    parts = ["Let me", THOUGHT, "I write", OPEN, "\n<function=write>\n<parameter=content>\n", "one two", ' "three"\n']
    parts += ["four\n", "</parameter>\n", "<parameter=lines>\n[1,", "2]\n</parameter>\n", "</function>", CLOSE]
    said, state = [], parser.initial
    for part in parts:
        ids = encoded(tagged, [part])
        state, more = parser.step(state, ids, tagged.decode(ids))
        said.append(more)
    assert said == [
        [Reasoning("Let me")],
        [],
        [Content("I write")],
        [],
        [ToolCallStart(0, "0", "write"), ToolCallArguments(0, '{"content": "')],
        [ToolCallArguments(0, "one two")],
        [ToolCallArguments(0, ' \\"three\\"')],
        [ToolCallArguments(0, "\\nfour")],
        [],
        [ToolCallArguments(0, '"')],
        [],
        [],
        [ToolCallArguments(0, ', "lines": [1,2]}')],
    ]
    assert parser.finish(state) == []


def test_step_leaves_its_state_as_it_was(tagged):
    ids = encoded(tagged, parts_of(f"Hello\n{CALL}"))
    parser = OutputParser(tagged, tools=TOOLS, call_id=str)
    pieces = pieces_of(tagged, ids)
    states, said = [parser.initial], []
    for piece in pieces:
        state, parts = parser.step(states[-1], *piece)
        states.append(state)
        said.append(parts)
    again = [parser.step(state, *piece)[1] for state, piece in zip(states[:-1], pieces, strict=True)]
    assert again == said
    assert read(parser, pieces) == parser.parse(ids, tagged.decode(ids))


def test_stop_string_within_a_call_leaves_what_stands_before_it(tagged):
    ids = encoded(tagged, parts_of(f"Hello\n{CALL}"))
    for stop, call in (("ris", ("get_weather", {"city": "Pa"})), ("</function>", PARIS)):
        parser = OutputParser(tagged, tools=TOOLS)
        found = read(parser, pieces_of(tagged, ids, SamplingParams(stop=stop)))
        assert found.content == "Hello"
        assert [(found.name, json.loads(found.arguments)) for found in found.tool_calls] == [call]


def test_text_that_waits_for_a_stop_string_is_read_in_its_place(tagged):
    """What is kept back may be a tag, and what stands before it a tag that others spell."""
    ids = encoded(tagged, ["<tool_call>", *parts_of(CALL)])
    parser = OutputParser(tagged, tools=TOOLS, call_id=str)
    found = read(parser, pieces_of(tagged, ids, SamplingParams(stop=["<tool_call>\n<function=write", "<tool_call>x"])))
    assert found == parser.parse(ids, tagged.decode(ids))
    assert found.content == "<tool_call>"
    assert found.tool_calls[0].name == "get_weather"


def test_reasoning_tokens_end_with_thinking(tagged):
    for parts, count in (
        (["One two", THOUGHT, "Hi"], len(tagged.encode("One two")) + 1),
        (["One two", *parts_of(CALL)], len(tagged.encode("One two"))),
        (["One two"], len(tagged.encode("One two"))),
    ):
        parser = OutputParser(tagged, tools=TOOLS, begins_thinking=True)
        assert read(parser, pieces_of(tagged, encoded(tagged, parts))).num_reasoning_tokens == count
    assert read(OutputParser(tagged), pieces_of(tagged, tagged.encode("Hi"))).num_reasoning_tokens == 0


def test_prompt_says_whether_output_begins_thinking(tagged):
    """By its end alone: not by what tools' descriptions, questions and earlier turns say about tags."""
    about = "What do <think> and </think> and <tool_call> do? <think>"
    messages = [
        {"role": "user", "content": about},
        {"role": "assistant", "content": "Hm.</think>"},
        {"role": "user", "content": about},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "</think><tool_call></tool_call></think>"}}]
    for thinking in (True, False):
        ids = tagged.apply_chat_template(messages, tools=tools, enable_thinking=thinking)
        assert begins_thinking(tagged, ids) is thinking
    assert begins_thinking(tagged, [*tagged.apply_chat_template(messages), *tagged.encode("I am not done")])
    tiny = Tokenizer.named("tiny")
    assert not begins_thinking(tiny, tiny.apply_chat_template([{"role": "user", "content": "<think>"}]))


def test_prompt_says_so_where_tags_are_no_tokens(untagged):
    messages = [{"role": "user", "content": "<think>"}]
    assert not begins_thinking(untagged, untagged.apply_chat_template(messages))
    assert not begins_thinking(untagged, untagged.apply_chat_template(messages, enable_thinking=False))
    assert begins_thinking(untagged, [*untagged.apply_chat_template(messages), *untagged.encode("<think>\n")])


@pytest.fixture(scope="module")
def untagged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("untagged")
    write_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def test_tokens_without_tags_are_read_by_their_text(untagged):
    parser = OutputParser(untagged, tools=TOOLS, begins_thinking=True, call_id=str)
    assert not parser.tag_ids
    ids = untagged.encode(f"Hm.\n</think>\n\nI look.\n\n{CALL}")
    for pieces in cut_tokens(pieces_of(untagged, ids)):
        found = read(parser, pieces)
        assert (found.reasoning, found.content) == ("Hm.", "I look.")
        assert [(call.name, call.arguments) for call in found.tool_calls] == [("get_weather", '{"city": "Paris"}')]


ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "path": st.text(st.sampled_from('ab \n"\\<>/é好😀{}[]:,0'), max_size=12),
        "content": st.lists(
            st.sampled_from(
                [
                    "\n",
                    "x",
                    " ",
                    "</parameter>",
                    "</function>",
                    "</tool_call>",
                    "<tool_call>",
                    "<function=f>",
                    "\n\n",
                    "{",
                ]
            ),
            max_size=8,
        ).map("".join),
        "lines": st.lists(
            st.one_of(st.integers(), st.booleans(), st.none(), st.text('a"\n\\<é', max_size=4)), max_size=3
        ),
        "count": st.integers(),
        "exact": st.booleans(),
        "where": st.none()
        | st.text("anule \n", max_size=6).filter(lambda text: text.strip().lower() not in ("null", "none")),
        "place": st.dictionaries(
            st.text('ab"', max_size=2), st.floats(allow_nan=False, allow_infinity=False), max_size=2
        ),
    },
)
ANY = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "properties": {
                "path": {"type": "string"},
                "content": {"enum": ["x", "y"]},
                "lines": {"allOf": [{"$ref": "#/$defs/lines"}]},
                "count": {"type": ["integer", "null"]},
                "exact": {"type": "boolean"},
                "where": {"type": "string", "nullable": True},
                "place": {"oneOf": [{"properties": {}}, {"type": "null"}]},
            },
            "$defs": {"lines": {"items": {}}},
        },
    },
}


@pytest.mark.short_cases("tags are special")
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate, Phase.shrink])
@given(data=st.data(), reasoning=st.text("ab <\n", max_size=6), content=st.text("ab <\n", max_size=6))
def test_chat_that_a_template_writes_is_read_back(data, reasoning, content, tagged):
    """By Qwen3.5's way of writing, and by the embedded model's, in JSON."""
    calls = data.draw(st.lists(ARGUMENTS, min_size=1, max_size=3))
    content = content.strip()
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [{"type": "function", "function": {"name": "write", "arguments": call}} for call in calls],
    }
    question = {"role": "user", "content": "?"}
    for template in (None, Tokenizer.named("tiny").hf.chat_template):
        options = {"chat_template": template} if template else {}
        head = tagged.render_chat([question], **options)
        turn = tagged.render_chat([question, message], add_generation_prompt=False, **options)
        assert turn.startswith(head)
        ids = spelled_ids(tagged, turn[len(head) :].removesuffix("<|im_end|>\n"), template is None)
        parser = OutputParser(tagged, tools=[ANY], begins_thinking=template is None)
        length = data.draw(st.integers(1, 9))
        found = read(parser, grouped(pieces_of(tagged, ids), length))
        assert found.reasoning == (reasoning.strip() or None if template is None else None)
        assert found.content == (content or None)
        assert [json.loads(call.arguments) for call in found.tool_calls] == calls


HEADS = ("<function=write>", '{"name"')


def spelled_ids(tokenizer, turn, thinks):
    """The ids of a turn in which only the tags that the template wrote are tokens."""
    parts = []
    if thinks:
        thought, turn = turn.split("</think>", 1)
        parts += [thought, THOUGHT]
    lines = turn.split("\n")
    for number, line in enumerate(lines):
        begins = line == "<tool_call>" and lines[number + 1].startswith(HEADS)
        another = lines[number + 1 : number + 2] == ["<tool_call>"] and lines[number + 2].startswith(HEADS)
        ends = line == "</tool_call>" and (number + 1 == len(lines) or another)
        newline = [] if number + 1 == len(lines) else ["\n"]
        parts += [Tag(line) if begins or ends else line, *newline]
    return encoded(tokenizer, parts)


WORDS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<function=write>", "<function=", "</function>"]
WORDS += [
    "<parameter=content>",
    "<parameter=lines>",
    "<parameter=",
    "</parameter>",
    '{"name": "write", ',
    '"arguments": {',
]
WORDS += [
    '"path": "',
    '", ',
    "}",
    "}}",
    "[",
    "]",
    "1",
    "null",
    "\\",
    "\n",
    "\n\n",
    " ",
    "a",
    "é",
    "Time",
    " is up.",
    "<",
    ">",
    '"',
]


@settings(max_examples=300, deadline=None, phases=[Phase.explicit, Phase.generate, Phase.shrink])
@given(
    parts=st.lists(st.sampled_from(WORDS + [Tag(word) for word in WORDS[:4]] * 3), max_size=25),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    lag=st.integers(0, 5),
    thinking=st.sampled_from([None, False, True]),
    choice=st.sampled_from(["auto", "auto", "none", "required"]),
    budget=st.sampled_from([None, "Time is up."]),
)
def test_any_output_says_the_same_however_it_is_cut(parts, lengths, lag, thinking, choice, budget, tagged):
    options = {
        "tools": TOOLS,
        "tool_choice": choice,
        "thinking": thinking is not None,
        "begins_thinking": bool(thinking),
        "budget_end": budget,
        "call_id": str,
    }
    ids = encoded(tagged, parts)
    for tokenizer, pieces in ((tagged, pieces_of(tagged, ids)), (None, [([], c) for c in text_of(parts)])):
        parser = OutputParser(tokenizer, **options)
        [whole] = grouped(pieces, len(pieces) or 1) or [([], "")]
        cut, start = [], 0
        while start < len(pieces):
            length = lengths[len(cut) % len(lengths)]
            cut += grouped(pieces[start : start + length], length)
            start += length
        # Text that lags behind its ids by a few steps.
        late = [ids for ids, _ in cut] + [[]] * lag, [""] * lag + [text for _, text in cut]
        once = dataclasses.replace(read(parser, [whole]), num_reasoning_tokens=0)
        assert dataclasses.replace(read(parser, cut), num_reasoning_tokens=0) == once
        assert dataclasses.replace(read(parser, zip(*late, strict=True)), num_reasoning_tokens=0) == once
        if choice == "none" and thinking is None:
            assert once == ParsedOutput(None, whole[1] or None)


@pytest.mark.parametrize("value", ['{"path": "a"}', '{"path": "a", ', '{"path": "a', "{"])
@pytest.mark.parametrize("length", [1, 7, 200])
def test_parameter_behind_an_object_belongs_to_no_call(value, length):
    """The object, whole or broken off, is the arguments: with more behind its brace they would be no JSON."""
    text = f"<tool_call><function=write>{value}<parameter=content>b</parameter></function></tool_call>"
    pieces = [([], text[i : i + length]) for i in range(0, len(text), length)]
    output = read(OutputParser(None, tools=TOOLS, call_id=str), pieces)
    (call,) = output.tool_calls
    path = {} if value == "{" else {"path": "a<parameter=content>b</parameter></function></tool_call>"}
    if value.endswith(("}", ", ")):
        path = {"path": "a"}
    assert json.loads(call.arguments) == path


STREAMS = {
    "answer": ([], "word "),
    "thinking": (["<think>"], "word "),
    "newlines": ([], "\n"),
    "value": (["<tool_call>", "\n<function=write>\n<parameter=content>\n"], "word "),
    "begun closers": (["<tool_call>", "\n<function=write>\n<parameter=content>\n"], "\n</parameter>"),
    "list": (["<tool_call>", "\n<function=write>\n<parameter=lines>\n"], "word "),
    "JSON": (["<tool_call>", '{"name": "write", "arguments": {"path": "'], "word "),
    "JSON, arguments first": (["<tool_call>", '{"arguments": {"path": "'], "word "),
    "JSON, deep": (["<tool_call>", '{"name": "write", "arguments": {"path": '], "["),
    "tags": ([], "<tool_call>"),
    "calls": ([], "<tool_call>\n<function=write>\n<parameter=path>\nx\n</parameter>\n</function>\n"),
}


@pytest.mark.short_cases("answer", "JSON")
@pytest.mark.parametrize("name", STREAMS)
def test_step_costs_its_length_however_long_the_output_is(name):
    """As many calls at the end of a long output as at its beginning, and no long text at hand that they could read."""
    head, word = STREAMS[name]
    tiny = Tokenizer.named("tiny")
    parser = OutputParser(tiny, tools=TOOLS)
    pieces = [(ids, tiny.decode(ids)) for ids in (encoded(tiny, parts_of(text)) for text in [*head, word])]
    state = parser.initial
    for ids, text in pieces:
        state, _ = parser.step(state, ids, text)
    counts = []
    for steps in (200, 8_000, 200):
        calls = collections.Counter()
        sys.setprofile(lambda frame, event, argument, calls=calls: calls.update((event,)))
        for _ in range(steps):
            state, _ = parser.step(state, *pieces[-1])
        sys.setprofile(None)
        counts.append(sum(calls.values()))
        texts = [value for value in vars(state).values() if isinstance(value, str | tuple)]
        # A list of pairs has two members, whatever it holds.
        assert max(map(len, texts)) < 400
    assert counts[2] <= 1.1 * counts[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "always"}, "tool_choice must be one of 'none', 'auto', 'required'"),
        ({"tools": None, "tool_choice": "required"}, "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "'no'; allowed: 'get_weather', 'write'"),
        ({"tool_choice": {"type": "function"}}, "None; allowed: 'get_weather'"),
        ({"tools": [{"type": "web_search"}]}, "tools\\[0\\] has type 'web_search'; allowed: 'function'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools\\[0\\] has no name"),
        ({"tools": [WRITE, WRITE]}, "two tools of the name 'write'"),
        ({"tools": [{"name": "f", "parameters": 3}]}, "must be a JSON schema"),
        ({"thinking": False, "begins_thinking": True}, "needs thinking=True"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        OutputParser(None, **{"tools": TOOLS, **options})
