"""What a model's output says: its thinking, its answer and its tool calls, as tokens come.

    parser = OutputParser(tokenizer, tools=tools, begins_thinking=begins_thinking(tokenizer, prompt_token_ids))
    state = parser.initial
    for piece in stream:
        state, parts = parser.step(state, piece.token_ids, piece.text)
    parts = parser.finish(state)

Pure, but for `advance`: no state is changed, and the parts do not depend on how the output is cut into pieces. What a
part says is never taken back. Text is held back only while it may still become something else: a begun tag, newlines
before a call.

Calls are read in both forms that Qwen's models were trained on, whichever comes:

    <tool_call>                                    <tool_call>
    <function=NAME>                                {"name": NAME, "arguments": {...}}
    <parameter=KEY>                                </tool_call>
    VALUE
    </parameter>
    </function>
    </tool_call>

Tags are tokens where the tokenizer has them as tokens: the same characters, spelled by others, are text. Where it has
not, they are found in the text. Which token stands where in the text is computed by decoding what lies between: this
needs the ids of all of the output, and text that is not ahead of them. It may lag behind, as a Detokenizer's does. Tags
that decoding leaves out (special tokens, with skip_special_tokens) are no different; ends of turns and other special
tokens are no business of the parser's: leave them out of the text by skip_special_tokens.

What is read where there is more than one way:

- Tool syntax in thinking is thinking, but for the token <tool_call> with the beginning of a call behind it.
- `<function=NAME>` at the beginning of a line of the answer is a call without <tool_call> if NAME is a tool.
- </parameter> ends a value if it stands on a line of its own (on the value's line, where the value began on the tag's)
  and if <parameter=, </function>, <tool_call>, </tool_call> or the end is next. Where tags are tokens, </function>
  must have one of the latter three behind it itself, so a value may hold a whole call as text.
- What is missing at the end of a value, </parameter>, </function> or </tool_call>, is supplied by what follows, and a
  line <parameter=KEY> ends a value if KEY is a parameter of the tool that has not been given.
- What begins like a call and is none is part of the answer, in full. So is text within a call that belongs nowhere.
- A call that the end of the output cuts off gets the brackets that it lacks; finish_reason "length" says that it was.
"""

import dataclasses
import enum
import itertools
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gdnjax.serving.tokenizer import Tokenizer
from gdnjax.serving.tool_calls import (
    JsonValue,
    Tool,
    begins_null,
    escaped,
    quoted,
    read_json,
    read_tools,
    strict_json,
    value_json,
)

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"
END = "the end"
"""What stands behind the last character, where a tag might."""

FUNCTION = "<function="
FUNCTION_CLOSE = "</function>"
PARAMETER = "<parameter="
PARAMETER_CLOSE = "</parameter>"

MAX_SPACE = 64
"""Most white space between two tags that belong together."""

MAX_NAME = 256
"""Most characters of the name of a function or a parameter."""

TOOL_CHOICES = ("none", "auto", "required")


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thinking, without the tags and the newlines around it."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call has begun: its index among the calls of this output, its id, and its function."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of a call's arguments. All pieces of a call, joined, are a JSON object."""

    index: int
    text: str


Part = Reasoning | Content | ToolCallStart | ToolCallArguments


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A whole output. Thinking and answer are None where there is none.

    num_reasoning_tokens  tokens up to the end of thinking, the closing tag included.
    """

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    num_reasoning_tokens: int = 0


def joined(parts: Sequence[Part], num_reasoning_tokens: int = 0) -> ParsedOutput:
    """The whole output of all of its parts."""
    calls = {part.index: part for part in parts if isinstance(part, ToolCallStart)}
    arguments: dict[int, list[str]] = {index: [] for index in calls}
    for part in parts:
        if isinstance(part, ToolCallArguments):
            arguments[part.index].append(part.text)
    return ParsedOutput(
        reasoning="".join(part.text for part in parts if isinstance(part, Reasoning)) or None,
        content="".join(part.text for part in parts if isinstance(part, Content)) or None,
        tool_calls=tuple(ToolCall(call.id, call.name, "".join(arguments[i])) for i, call in calls.items()),
        num_reasoning_tokens=num_reasoning_tokens,
    )


def begins_thinking(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool:
    """Whether the output of a prompt begins within thinking: whether <think> is open where the prompt ends.

    Only what stands behind the last special token counts, which is the head of the model's turn: not what users,
    tools' descriptions and earlier turns say about tags.
    """
    tags = {tokenizer.added_token_ids.get(tag) for tag in (THINK_OPEN, THINK_CLOSE)}
    start = len(prompt_token_ids)
    while start and (
        prompt_token_ids[start - 1] in tags or prompt_token_ids[start - 1] not in tokenizer.special_token_ids
    ):
        start -= 1
    head = prompt_token_ids[start:]
    if None not in tags:
        open_id = tokenizer.added_token_ids[THINK_OPEN]
        last = next((token for token in reversed(head) if token in tags), None)
        return last == open_id
    text = tokenizer.decode(head, skip_special_tokens=False)
    return text.rfind(THINK_OPEN) > text.rfind(THINK_CLOSE)


def _merged(parts: Sequence[Part]) -> list[Part]:
    """The parts, neighbours that say more of the same as one."""
    if len(parts) < 2:
        return list(parts)
    merged: list[Part] = []
    for (kind, _), group in itertools.groupby(parts, lambda part: (type(part), getattr(part, "index", None))):
        same = list(group)
        if kind is ToolCallStart:
            merged += same
        else:
            text = "".join(part.text for part in same if not isinstance(part, ToolCallStart))
            merged.append(dataclasses.replace(same[0], text=text))
    return merged


class _Phase(enum.Enum):
    START = "white space so far, before which <think> may come"
    REASONING = "thinking"
    CONTENT = "the answer"
    OPENED = "behind <tool_call>"
    NAME = "behind <function="
    PARAMETERS = "between parameters"
    KEY = "behind <parameter="
    VALUE = "within a parameter"
    OBJECT = "within a JSON object that stands in place of the parameters"
    CLOSED = "behind </function>"
    JSON = "within a call in JSON"


class _Form(enum.Enum):
    """How the text of a parameter becomes JSON."""

    TEXT = "text"
    TEXT_OR_NULL = "text or null"
    WHOLE = "whole"


class OutputParser:
    """Reads the outputs of one request; all of its samples have their own states.

    tokenizer           of the model. None: tags are found in the text.
    tools               functions that may be called, in OpenAI's form. Without any, nothing is read as a call.
    tool_choice         as in OpenAI's API: "none": nothing is read as a call; "auto"; "required", or
                        {"type": "function", "function": {"name": NAME}}: a call is expected, so tags of calls count
                        in the answer however they are spelled, and an answer that begins with a call's JSON,
                        {"name": ..., "arguments": ...} or a list of such, is one. Which function is called is not
                        checked: a grammar sees to that.
    parallel_tool_calls False: calls after the first are left out.
    thinking            whether to look for thinking at all; False: its tags are text.
    begins_thinking     whether the output begins within it, see the function of that name.
    budget_end          the text that a thinking budget ends thinking with, where it has no </think>: it ends thinking,
                        and belongs to neither thinking nor answer.
    skip_special_tokens whether the text was decoded so.
    call_id             the id of the call of an index; by default made of a random number and the index.

    Raises ValueError for bad tools and a bad tool_choice.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool = True,
        begins_thinking: bool = False,
        budget_end: str | None = None,
        skip_special_tokens: bool = True,
        call_id: Callable[[int], str] | None = None,
    ):
        if begins_thinking and not thinking:
            raise ValueError("begins_thinking=True needs thinking=True")
        self.tools = read_tools(tools)
        self.expects_call = _expects_call(tool_choice, self.tools)
        self.reads_calls = bool(self.tools) and tool_choice != "none"
        self.parallel_tool_calls = parallel_tool_calls
        self.thinking = thinking
        core = (budget_end or "").strip("\n")
        self.budget_end = "" if THINK_CLOSE in core else core
        salt = secrets.token_hex(8)
        self.call_id = call_id or (lambda index: f"call_{salt}{index:04x}")
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        # Ids of the tags that this parser looks for, if the tokenizer has both of a pair.
        self.tag_ids: dict[int, str] = {}
        known = tokenizer.added_token_ids if tokenizer is not None else {}
        self.thinks_in_tokens = thinking and THINK_OPEN in known and THINK_CLOSE in known
        self.calls_in_tokens = self.reads_calls and CALL_OPEN in known and CALL_CLOSE in known
        if self.thinks_in_tokens:
            self.tag_ids |= {known[THINK_OPEN]: THINK_OPEN, known[THINK_CLOSE]: THINK_CLOSE}
        if self.calls_in_tokens:
            self.tag_ids |= {known[CALL_OPEN]: CALL_OPEN, known[CALL_CLOSE]: CALL_CLOSE}
        # A name with a bracket in it would need more care than it is worth.
        self.heads = tuple(f"{FUNCTION}{name}>" for name in self.tools if "<" not in name and ">" not in name)
        calls_in_text = self.reads_calls and (not self.calls_in_tokens or self.expects_call)
        # What the answer is searched for.
        self.marks = (
            *((THINK_CLOSE,) if thinking and not self.thinks_in_tokens else ()),
            *((CALL_OPEN, CALL_CLOSE) if calls_in_text else ()),
            *(self.heads if self.reads_calls else ()),
        )
        self.mark_pattern = re.compile("|".join(map(re.escape, self.marks))) if self.marks else None
        self.initial = State(self, begins_thinking)

    def width(self, token_id: int, tag: str) -> int:
        """Characters that the text has of a tag."""
        assert self._tokenizer is not None
        silent = self._skips_special and token_id in self._tokenizer.special_token_ids
        return 0 if silent else len(tag)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens between two tags."""
        assert self._tokenizer is not None
        known = [token for token in token_ids if token < self._tokenizer.vocab_size]
        return self._tokenizer.decode(known, self._skips_special)

    def step(self, state: "State", token_ids: Sequence[int], text: str) -> "tuple[State, list[Part]]":
        """Takes the next tokens and the next text, which may lag behind them; returns what is now known to be said."""
        state = state.copy()
        return state, self.advance(state, token_ids, text)

    def advance(self, state: "State", token_ids: Sequence[int], text: str) -> list[Part]:
        """As `step`, of a state that nobody else has (a copy of `initial`) and that this changes: copying one for every
        token costs more than most steps do.
        """
        if state.is_plain(token_ids, text):
            return [state.take_plain(token_ids, text)]
        state.take(token_ids, text)
        parts, state.parts = state.parts, []
        return _merged(parts)

    def finish(self, state: "State") -> list[Part]:
        """What is left to say where the output has ended."""
        state = state.copy()
        state.end()
        return _merged(state.parts)

    def num_reasoning_tokens(self, state: "State") -> int:
        """Tokens up to the end of thinking, so far. Where tags are no tokens, to the end of the step that ended it."""
        if state.num_reasoning is not None:
            return state.num_reasoning
        return state.num_tokens if state.phase is _Phase.REASONING else 0

    def parse(self, token_ids: Sequence[int], text: str) -> ParsedOutput:
        """A whole output at once."""
        state, parts = self.step(self.initial, token_ids, text)
        return joined([*parts, *self.finish(state)], self.num_reasoning_tokens(state))


def _expects_call(tool_choice: str | Mapping[str, Any], tools: Mapping[str, Tool]) -> bool:
    if isinstance(tool_choice, str):
        if tool_choice not in TOOL_CHOICES:
            raise ValueError(
                f"tool_choice must be one of {', '.join(map(repr, TOOL_CHOICES))}, or "
                f"{{'type': 'function', 'function': {{'name': ...}}}}, got {tool_choice!r}"
            )
        if tool_choice == "required" and not tools:
            raise ValueError("tool_choice 'required' needs tools, and there are none")
        return tool_choice == "required"
    function = tool_choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in tools:
        raise ValueError(
            f"tool_choice names the function {name!r}; allowed: {', '.join(map(repr, tools)) or 'none, without tools'}"
        )
    return True


def _begun(text: str, start: int, words: Sequence[str]) -> int:
    """Where in text[start:] one of the words may have begun that is not whole; the text's length where none has."""
    longest = max(map(len, words), default=1) - 1
    place = text.find(words[0][0], max(start, len(text) - longest)) if words else -1
    while place >= 0:
        if any(word.startswith(text[place:]) for word in words):
            return place
        place = text.find(words[0][0], place + 1)
    return len(text)


def _texts(pairs: Any) -> list[Any]:
    """The pieces of a list of pairs, in order."""
    found = []
    while pairs is not None:
        pairs, piece = pairs
        found.append(piece)
    return found[::-1]


_SPACE = re.compile(r"\s*")
_NAME = re.compile(rf"([^<>\n]{{1,{MAX_NAME}}})(>|\n|<|\Z)")
_CLOSERS = re.compile(r"\n?(?:</parameter>|</function>|<parameter=|</tool_call>|<tool_call>)")
_CLOSER_WORDS = (PARAMETER_CLOSE, FUNCTION_CLOSE, PARAMETER, CALL_CLOSE, CALL_OPEN)
_INSIDE = re.compile(r"<parameter=|</parameter>|<function=|</function>|</tool_call>|<tool_call>")
_INSIDE_WORDS = (*_CLOSER_WORDS, FUNCTION)

_WAIT = "wait"
"""Instead of what comes next: it is not known yet."""
_OTHER = "other"
"""Instead of what comes next: nothing that was asked for."""

_ARGUMENT_KEYS = ("arguments", "parameters")
"""Keys of a call's arguments, where it is JSON."""


class State:
    """How far one output has been read. Made and advanced by OutputParser; nobody else looks into it.

    A step copies it, so whatever grows with the output is a list of pairs, (what came before, a piece), and not a text
    or a tuple, which a step would copy in full.
    """

    def __init__(self, parser: OutputParser, thinking: bool):
        self.parser = parser
        self.parts: list[Part] = []
        # Tokens to text. `unread`: text that has not been passed on, for it may stand behind a tag; `read`: the number
        # of characters that have. `tags`: (place, width, tag, tokens up to it) of those whose text has not come;
        # `segment`: the ids since the last tag, whose text ends at `anchor`. `passed`: tokens up to the last tag that
        # was passed on.
        self.num_tokens = 0
        self.unread = ""
        self.read = 0
        self.tags: tuple[tuple[int, int, str, int], ...] = ()
        self.segment: Any = None
        self.anchor = 0
        self.passed = 0
        # Text to parts. `held`: text that may become something else. Buffer, position and tag are the running step's:
        # its text, how far it has been read, and what stands behind it, None where that is not known.
        self.phase = _Phase.REASONING if thinking else _Phase.START if parser.thinking else _Phase.CONTENT
        self.held = ""
        self.buffer = ""
        self.position = 0
        self.tag: str | None = None
        self.num_reasoning: int | None = None
        # The phase's text: newlines at its end so far, whether there is any other, and whether newlines at its
        # beginning are dropped. Whether there has been any of the answer.
        self.newlines = 0
        self.has_text = False
        self.trims = thinking
        self.has_content = False
        # What may be a call: the phase that it came in, the tokens before it, and its text so far. Whether its
        # <tool_call> is spelled by other tokens, or there is none.
        self.back = _Phase.CONTENT
        self.mark = 0
        self.kept: Any = None
        self.spelled = False
        # The call: whether a brace has been given, whether the closing one has; the parameters given that the tool
        # has; and the parameter: its name and form, the pieces of its text, whether it has none yet, whether its first
        # character is to come, and whether it stands on lines of its own.
        self.index = -1
        self.tool = Tool("", {})
        self.opened = False
        self.complete = False
        self.given: frozenset[str] = frozenset()
        self.key = ""
        self.form = _Form.TEXT
        self.pieces: Any = None
        self.is_empty = True
        self.is_first = True
        self.is_block = True
        # A call in JSON: what comes next of its own object; the value that is being read, what it is, and its pieces;
        # the key, the name; arguments that came before it; whether the call has been given, and whether any has since
        # <tool_call>.
        self.json_next = "call"
        self.json_value: JsonValue | None = None
        self.json_role = ""
        self.json_key = ""
        self.json_name = ""
        self.json_early = ""
        self.json_started = False
        self.json_any = False

    def copy(self) -> "State":
        """The same, with nothing said yet."""
        state = object.__new__(State)
        # Faster than copy.copy, and this is done for every token.
        state.__dict__.update(self.__dict__)
        state.parts = []
        return state

    # Most tokens are text in the middle of a text: for them there is a short way to what `take` and `feed` come to.

    def is_plain(self, token_ids: Sequence[int], text: str) -> bool:
        """Whether all of a text goes on with the thinking or the answer, and nothing in it or before it may be else."""
        parser, phase = self.parser, self.phase
        return (
            self.has_text
            and not (self.held or self.newlines or self.tags)
            and (phase is _Phase.CONTENT or (phase is _Phase.REASONING and parser.budget_end == ""))
            and text != ""
            and "<" not in text
            and text[-1] != "\n"
            and parser.tag_ids.keys().isdisjoint(token_ids)
        )

    def take_plain(self, token_ids: Sequence[int], text: str) -> Part:
        """Takes them."""
        if self.parser.tag_ids:
            self.segment = (self.segment, tuple(token_ids))
        self.num_tokens += len(token_ids)
        self.read += len(text)
        return Reasoning(text) if self.phase is _Phase.REASONING else Content(text)

    # Tokens to text.

    def take(self, token_ids: Sequence[int], text: str) -> None:
        """Takes tokens and text, and passes on the text whose place among the tags is known."""
        tag_ids = self.parser.tag_ids
        start = 0
        for number, token_id in enumerate(token_ids if tag_ids and not tag_ids.keys().isdisjoint(token_ids) else ()):
            tag = tag_ids.get(token_id)
            if tag is None:
                continue
            between = [token for tokens in (*_texts(self.segment), token_ids[start:number]) for token in tokens]
            place = self.anchor + len(self.parser.decode(between))
            width = self.parser.width(token_id, tag)
            self.tags = (*self.tags, (place, width, tag, self.num_tokens + number + 1))
            self.anchor = place + width
            self.segment = None
            start = number + 1
        if tag_ids and start < len(token_ids):
            self.segment = (self.segment, tuple(token_ids[start:]))
        self.num_tokens += len(token_ids)
        if self.tags:
            self.unread += text
            self.pass_on(ended=False)
        else:
            self.read += len(text)
            self.feed(text, None)

    def end(self) -> None:
        """The output has ended."""
        self.pass_on(ended=True)
        self.feed("", END)

    def pass_on(self, *, ended: bool) -> None:
        """Passes on the text up to the first tag whose text has not come; all of it where the output has ended."""
        text, base, start = self.unread, self.read, 0
        drift = 0
        number = 0
        at = len(text)
        for place, width, tag, tokens in self.tags:
            at = place + drift - base
            found = at if at <= len(text) else -1
            if width and found >= 0 and not text.startswith(tag, at):
                # Decoders may give a text that begins elsewhere another beginning: without its space, say.
                found = text.find(tag, max(start, at))
            if found < 0:
                break
            drift += found - at
            self.passed = tokens
            self.feed(text[start:found], tag)
            start = found + width
            number += 1
        else:
            at = len(text)
        limit = len(text) if ended else max(start, min(at, len(text)))
        self.anchor += drift
        self.tags = tuple((place + drift, width, tag, tokens) for place, width, tag, tokens in self.tags[number:])
        self.unread, self.read = text[limit:], base + limit
        self.feed(text[start:limit], None)

    # Text to parts.

    def feed(self, text: str, tag: str | None) -> None:
        """Reads text, and the tag behind it if there is one."""
        self.buffer = self.held + text
        self.position = 0
        self.tag = tag
        while _HANDLERS[self.phase](self):
            pass
        self.held = self.buffer[self.position :]
        self.buffer = ""

    def add(self, part: Part) -> None:
        """Says something."""
        is_call = isinstance(part, ToolCallStart | ToolCallArguments)
        if not is_call or part.index == 0 or self.parser.parallel_tool_calls:
            self.parts.append(part)

    def enter(self, phase: _Phase) -> None:
        """Begins a phase, whose text begins behind newlines."""
        self.phase = phase
        self.newlines = 0
        self.has_text = False
        self.trims = True

    def say(self, text: str) -> None:
        """Adds to the thinking or the answer. Newlines at the end are kept back: a tag may follow."""
        if self.trims and not self.has_text:
            text = text.lstrip("\n")
        bare = text.rstrip("\n")
        if bare:
            kind = Reasoning if self.phase is _Phase.REASONING else Content
            # What stands before a call and what stands behind it are two lines.
            apart = kind is Content and self.trims and not self.has_text and self.has_content
            self.add(kind("\n" * (self.newlines + apart) + bare))
            self.has_content |= kind is Content
            self.has_text = True
            self.newlines = 0
        self.newlines += len(text) - len(bare)

    def begun(self, words: Sequence[str]) -> int:
        """Where one of the words may begin that is not whole; the buffer's end where none does, or a tag is there."""
        if self.tag is not None:
            return len(self.buffer)
        return _begun(self.buffer, self.position, words)

    def following(self, position: int, words: Sequence[str]) -> tuple[str, int]:
        """Which of the words, or which tag, stands behind the white space at a position, and where it ends."""
        space = _SPACE.match(self.buffer, position)
        assert space is not None
        if space.end() - position > MAX_SPACE:
            return _OTHER, position
        if space.end() == len(self.buffer):
            return self.tag or _WAIT, position
        for word in words:
            if self.buffer.startswith(word, space.end()):
                return word, space.end() + len(word)
        rest = self.buffer[space.end() : space.end() + MAX_NAME]
        if self.tag is None and any(word.startswith(rest) for word in words):
            return _WAIT, position
        return _OTHER, position

    def start(self) -> bool:
        """White space so far."""
        words = () if self.parser.thinks_in_tokens else (THINK_OPEN,)
        found, end = self.following(self.position, words)
        if found == _WAIT:
            return False
        if found == THINK_OPEN:
            if self.parser.thinks_in_tokens:
                self.tag, end = None, len(self.buffer)
            self.position = end
            self.enter(_Phase.REASONING)
            return True
        self.phase = _Phase.CONTENT
        return True

    def reasoning(self) -> bool:
        """Thinking."""
        words = [*(() if self.parser.thinks_in_tokens else (THINK_CLOSE,))]
        words += [self.parser.budget_end] if self.parser.budget_end else []
        places = [(place, word) for word in words if (place := self.buffer.find(word, self.position)) >= 0]
        if places:
            place, word = min(places)
            self.say(self.buffer[self.position : place])
            self.position = place + len(word)
            self.end_thinking(self.num_tokens)
            return True
        end = min((self.begun((word,)) for word in words), default=len(self.buffer))
        self.say(self.buffer[self.position : end])
        self.position = end
        tag, self.tag = self.tag, None
        match tag:
            case str() if tag == THINK_CLOSE:
                self.end_thinking(self.passed)
            case str() if tag == CALL_OPEN:
                self.open_call(self.passed - 1)
            case str() if tag == CALL_CLOSE or (tag == THINK_OPEN and self.has_text):
                self.say(tag)
        return False

    def end_thinking(self, num_tokens: int) -> None:
        """The answer begins."""
        self.num_reasoning = num_tokens
        self.enter(_Phase.CONTENT)

    def open_call(self, mark: int = 0, *, spelled: bool = False) -> None:
        """A call may begin; its tag may be spelled by other tokens, and then the closing one may be, too."""
        self.back = self.phase
        self.mark = mark
        self.kept = (None, CALL_OPEN)
        self.spelled = spelled
        self.phase = _Phase.OPENED

    def no_call(self) -> bool:
        """What began like a call is text of the phase that it came in."""
        self.phase = self.back
        self.say("".join(_texts(self.kept)))
        self.kept = None
        return True

    def content(self) -> bool:
        """The answer."""
        parser = self.parser
        if parser.expects_call and not self.has_text and self.index < 0:
            found, _ = self.following(self.position, ("{", "["))
            if found == _WAIT:
                return False
            if found in ("{", "["):
                self.back, self.kept = self.phase, None
                self.begin_json()
                return True
        scan = self.position
        while parser.mark_pattern and (found := parser.mark_pattern.search(self.buffer, scan)):
            mark = found[0]
            if mark.startswith(FUNCTION) and not self.begins_line(found.start()):
                scan = found.start() + 1
                continue
            self.say(self.buffer[self.position : found.start()])
            self.position = found.end()
            if mark == CALL_OPEN:
                self.open_call(spelled=True)
            elif mark.startswith(FUNCTION):
                self.back, self.spelled = self.phase, True
                self.begin_call(mark[len(FUNCTION) : -1])
                self.enter(_Phase.PARAMETERS)
            return True
        end = self.begun(parser.marks)
        self.say(self.buffer[self.position : end])
        self.position = end
        tag, self.tag = self.tag, None
        match tag:
            case str() if tag == CALL_OPEN:
                self.open_call()
            case str() if tag == THINK_OPEN:
                self.say(tag)
            case str() if tag == END and self.newlines:
                self.add(Content("\n" * self.newlines))
        return False

    def begins_line(self, place: int) -> bool:
        """Whether a place in the buffer is the beginning of a line of the answer."""
        if place > self.position:
            return self.buffer[place - 1] == "\n"
        return self.newlines > 0 or not self.has_text

    def opened_call(self) -> bool:
        """Behind <tool_call>."""
        found, end = self.following(self.position, (FUNCTION, "{", "["))
        if found == _WAIT:
            return False
        if found in (FUNCTION, "{", "["):
            if found != FUNCTION:
                end -= 1
            self.kept = (self.kept, self.buffer[self.position : end])
            self.position = end
            if found == FUNCTION:
                self.phase = _Phase.NAME
            else:
                self.begin_json()
            return True
        return self.no_call()

    def name(self) -> bool:
        """Behind <function=."""
        found = _NAME.match(self.buffer, self.position)
        at_end = self.position == len(self.buffer) or (found is not None and not found[2])
        if at_end and self.tag is None:
            return False
        name = found[1].strip() if found else ""
        # Without its bracket it is one only if there is such a function; the end of the output may have cut it off.
        if found and name and (found[2] == ">" or (name in self.parser.tools and not (at_end and self.tag == END))):
            self.position = found.end() if found[2] == ">" else found.end(1)
            self.begin_call(name)
            self.enter(_Phase.PARAMETERS)
            return True
        return self.no_call()

    def begin_call(self, name: str) -> None:
        """A call, and no doubt about it."""
        if self.back is _Phase.REASONING:
            self.num_reasoning = self.mark
        self.back = _Phase.CONTENT
        self.kept = None
        self.index += 1
        self.tool = self.parser.tools.get(name) or Tool(name, {})
        self.opened = False
        self.complete = False
        self.given = frozenset()
        self.add(ToolCallStart(self.index, self.parser.call_id(self.index), name))

    def arguments(self, text: str) -> None:
        """Says more of the call's arguments."""
        if text:
            self.add(ToolCallArguments(self.index, text))

    def end_call(self, phase: _Phase) -> None:
        """Closes the arguments."""
        if not self.complete:
            self.arguments("}" if self.opened else "{}")
        self.enter(phase)

    @property
    def is_strict(self) -> bool:
        """Whether a call ends with a tag that text cannot imitate."""
        return self.parser.calls_in_tokens and not self.spelled

    def parameters(self) -> bool:
        """Between parameters. Other text here belongs nowhere, so it is part of the answer."""
        if not self.has_text:
            space = _SPACE.match(self.buffer, self.position)
            assert space is not None
            self.position = space.end()
            if not self.opened and not self.complete and self.buffer.startswith("{", self.position):
                self.json_value = JsonValue()
                self.opened = True
                self.phase = _Phase.OBJECT
                return True
        scan = self.position
        while found := _INSIDE.search(self.buffer, scan):
            if found[0] in (CALL_OPEN, CALL_CLOSE) and self.is_strict:
                scan = found.end()
                continue
            self.say(self.buffer[self.position : found.start()])
            self.position = found.end()
            match found[0]:
                case str() if found[0] == PARAMETER and self.complete:
                    # Behind an object, whole or broken off: the arguments have their closing brace.
                    self.say(PARAMETER)
                case str() if found[0] == PARAMETER:
                    self.phase = _Phase.KEY
                case str() if found[0] == FUNCTION_CLOSE:
                    self.end_call(_Phase.CLOSED)
                case str() if found[0] == FUNCTION:
                    self.end_call(_Phase.CONTENT)
                    self.kept = (None, FUNCTION)
                    self.phase = _Phase.NAME
                case str() if found[0] == CALL_CLOSE:
                    self.end_call(_Phase.CONTENT)
                case str() if found[0] == CALL_OPEN:
                    self.end_call(_Phase.CONTENT)
                    self.open_call(spelled=True)
            return True
        end = self.begun(_INSIDE_WORDS)
        self.say(self.buffer[self.position : end])
        self.position = end
        if self.tag is None:
            return False
        if self.tag in (THINK_OPEN, THINK_CLOSE):
            self.tag = None
            return False
        self.end_call(_Phase.CONTENT)
        return True

    def parameter_key(self) -> bool:
        """Behind <parameter=."""
        found = _NAME.match(self.buffer, self.position)
        at_end = self.position == len(self.buffer) or (found is not None and not found[2])
        if at_end and self.tag is None:
            return False
        key = found[1].strip() if found else ""
        if not found or not key or found[2] not in (">", "\n"):
            self.phase = _Phase.PARAMETERS
            self.say(PARAMETER)
            return True
        self.position = found.end() if found[2] == ">" else found.end(1)
        self.begin_value(key)
        return True

    def begin_value(self, key: str) -> None:
        """A parameter's name is known."""
        types = self.tool.types_of(key)
        self.key = key
        if key in self.tool.parameters:
            self.given |= {key}
        self.pieces = None
        self.is_empty = self.is_first = True
        self.is_block = True
        self.phase = _Phase.VALUE
        if types == {"string"}:
            self.begin_text("")
        else:
            self.form = _Form.TEXT_OR_NULL if types == {"string", "null"} else _Form.WHOLE

    def begin_text(self, text: str) -> None:
        """The value is a text, which begins with this."""
        self.form = _Form.TEXT
        self.arguments(f'{self.before_value()}"{escaped(text)}')

    def before_value(self) -> str:
        """The brace or comma, and the key."""
        before = ", " if self.opened else "{"
        self.opened = True
        return f"{before}{quoted(self.key)}: "

    def put(self, text: str) -> None:
        """More of the value's text."""
        if not text:
            return
        self.is_empty = False
        if self.form is _Form.TEXT:
            self.arguments(escaped(text))
            return
        self.pieces = (self.pieces, text)
        if self.form is _Form.TEXT_OR_NULL:
            whole = "".join(_texts(self.pieces))
            if len(whole) > MAX_SPACE or not begins_null(whole):
                self.begin_text(whole)

    def end_value(self, position: int) -> bool:
        """The value's text is all there; what is behind it begins at a position."""
        if self.form is _Form.TEXT:
            self.arguments('"')
        else:
            text = "".join(_texts(self.pieces))
            self.arguments(self.before_value() + value_json(text, self.tool.types_of(self.key)))
        self.pieces = None
        self.position = position
        self.enter(_Phase.PARAMETERS)
        return True

    def value(self) -> bool:
        """Within a parameter."""
        if self.is_first and self.position < len(self.buffer):
            self.is_first = False
            self.is_block = self.buffer[self.position] == "\n"
            self.position += self.is_block
        while found := _CLOSERS.search(self.buffer, self.position):
            own_line = found[0][0] == "\n" or (self.is_empty and found.start() == self.position)
            end = self.closer(found, own_line) if own_line or not self.is_block else -1
            if end is None:
                self.put(self.buffer[self.position : found.start()])
                self.position = found.start()
                return False
            if end >= 0:
                self.put(self.buffer[self.position : found.start()])
                return self.end_value(end)
            self.put(self.buffer[self.position : found.end()])
            self.position = found.end()
        end = _begun(self.buffer, self.position, _CLOSER_WORDS)
        after_newline = end > self.position and self.buffer[end - 1] == "\n"
        if self.tag is None:
            end -= after_newline
            self.put(self.buffer[self.position : end])
            self.position = end
            return False
        # A closing tag that the end has cut off is no part of the value, if there is enough of it to tell.
        if not (self.tag == END and after_newline and len(self.buffer) - end > 2):
            end = len(self.buffer)
        text = self.buffer[self.position : end]
        if self.tag in (THINK_OPEN, THINK_CLOSE):
            self.put(text + self.tag)
            self.position, self.tag = len(self.buffer), None
            return False
        self.put(text.removesuffix("\n"))
        return self.end_value(len(self.buffer))

    def closer(self, found: re.Match[str], own_line: bool) -> int | None:
        """Where the text goes on behind a value that a closing tag may end; -1 where it does not, None where that is
        not known yet.
        """
        word = found[0].removeprefix("\n")
        begin = found.end() - len(word)
        ends = (CALL_OPEN, CALL_CLOSE, END)
        in_text = () if self.is_strict else (CALL_OPEN, CALL_CLOSE)
        heads = self.parser.heads
        if word == PARAMETER:
            return self.known_parameter(found.end(), begin) if own_line else -1
        if word == CALL_OPEN:
            words = () if self.is_strict or not own_line else heads
            return self.decided(self.following(found.end(), words)[0], words, begin)
        if word == CALL_CLOSE:
            if self.is_strict:
                return -1
            return self.decided(self.following(found.end(), (CALL_OPEN,))[0], (CALL_OPEN, END), begin)
        if word == FUNCTION_CLOSE:
            after, end = self.following(found.end(), (*in_text, *heads))
            if after == CALL_CLOSE and not self.is_strict:
                after, _ = self.following(end, (CALL_OPEN,))
            return self.decided(after, (*ends, *heads), begin)
        after, end = self.following(found.end(), (PARAMETER, FUNCTION_CLOSE, *in_text, *heads))
        if after == FUNCTION_CLOSE and self.is_strict:
            after, _ = self.following(end, heads)
            return self.decided(after, (*ends, *heads), found.end())
        return self.decided(after, (*ends, PARAMETER, FUNCTION_CLOSE, *heads), found.end())

    def decided(self, after: str, closing: Sequence[str], end: int) -> int | None:
        """What `closer` returns, by what comes next and by what of that ends the value."""
        if after == _WAIT:
            return None
        return end if after in closing else -1

    def known_parameter(self, start: int, begin: int) -> int | None:
        """What `closer` returns for <parameter=."""
        found = _NAME.match(self.buffer, start)
        at_end = start == len(self.buffer) or (found is not None and not found[2])
        if at_end and self.tag is None:
            return None
        key = found[1].strip() if found and found[2] == ">" else ""
        return begin if key in self.tool.parameters and key not in self.given else -1

    def closed(self) -> bool:
        """Behind </function>."""
        found, end = self.following(self.position, (FUNCTION, *(() if self.is_strict else (CALL_CLOSE,))))
        if found == _WAIT:
            return False
        if found == FUNCTION:
            self.kept = (None, self.buffer[self.position : end])
            self.position = end
            self.phase = _Phase.NAME
            return True
        if found == CALL_CLOSE and not self.is_strict and self.tag != CALL_CLOSE:
            self.position = end
        self.enter(_Phase.CONTENT)
        return True

    # JSON.

    def object(self) -> bool:
        """Within an object that stands in place of the parameters."""
        assert self.json_value is not None
        before = self.json_value
        self.json_value, self.position, out, good = read_json(before, self.buffer, self.position, self.tag is None)
        self.arguments(out)
        if good and not self.json_value.done:
            if self.tag is None:
                return False
            if self.json_value.string and self.tag != END:
                self.json_value, _, out, _ = read_json(self.json_value, self.tag, 0, True)
                self.arguments(out)
                self.tag = None
                return False
        if not self.json_value.done:
            self.arguments(self.json_value.closing)
        self.complete = True
        self.enter(_Phase.PARAMETERS)
        return True

    def begin_json(self) -> None:
        """A call in JSON may begin, or a list of them."""
        self.phase = _Phase.JSON
        self.json_any = False
        self.next_json()

    def next_json(self) -> None:
        """Another call may begin behind this."""
        self.json_next = "call"
        self.json_value = None
        self.json_name = self.json_key = self.json_role = ""
        self.json_early = ""
        self.json_started = False
        self.complete = False
        self.pieces = None

    def json(self) -> bool:
        """Within a call in JSON."""
        while True:
            if self.json_value is not None:
                more = self.read_json_value(self.json_value)
                if more is not None:
                    return more
                continue
            space = _SPACE.match(self.buffer, self.position)
            assert space is not None
            self.keep_json(space.end())
            if self.position == len(self.buffer):
                if self.tag is None:
                    return False
                if self.tag in (THINK_OPEN, THINK_CLOSE):
                    self.tag = None
                    return False
                return self.end_json()
            if not self.read_json_mark(self.buffer[self.position]):
                return self.end_json()

    def keep_json(self, end: int) -> None:
        """Goes on to a position. What may be no call is kept."""
        if not self.json_started and end > self.position:
            self.kept = (self.kept, self.buffer[self.position : end])
        self.position = end

    def read_json_value(self, value: JsonValue) -> bool | None:
        """Reads the value at hand on; None where it is complete, else what the handler returns."""
        value, end, out, good = read_json(value, self.buffer, self.position, self.tag is None)
        self.keep_json(end)
        self.json_value = value
        self.take_json(out)
        if good and value.done:
            self.json_value = None
            return None if self.end_json_value() else self.end_json()
        if good and self.tag is None:
            return False
        if good and value.string and self.tag not in (END, None):
            self.json_value, _, out, _ = read_json(value, self.tag, 0, True)
            self.take_json(out)
            if not self.json_started:
                self.kept = (self.kept, self.tag)
            self.tag = None
            return False
        return self.end_json()

    def take_json(self, out: str) -> None:
        """What a value gives: a piece of the arguments, or of what must be whole before it means anything."""
        if self.json_role == "arguments" and self.json_started:
            self.arguments(out)
        elif self.json_role != "other" and out:
            self.pieces = (self.pieces, out)

    def end_json_value(self) -> bool:
        """A value is complete. False where it cannot be what it should."""
        role, self.json_role = self.json_role, ""
        self.json_next = "colon" if role == "key" else "comma"
        if role == "other":
            return True
        if role == "arguments" and self.json_started:
            self.complete = True
            return True
        text = "".join(_texts(self.pieces))
        self.pieces = None
        if role == "key":
            self.json_key = strict_json(text)
        elif role == "name":
            self.json_name = strict_json(text)
            if self.json_name and self.json_early:
                self.start_json(self.json_early)
                self.complete = True
            return bool(self.json_name)
        elif role == "text":
            return self.take_arguments(strict_json(text))
        else:
            return self.take_arguments("{}" if role == "null" else text)
        return True

    def take_arguments(self, text: str) -> bool:
        """The arguments as a whole: for the name is not known yet, or they are a text. False where they are none."""
        try:
            is_object = isinstance(strict_json(text), dict)
        except ValueError:
            is_object = False
        if is_object and self.json_name:
            self.start_json(text.strip())
            self.complete = True
        elif is_object:
            self.json_early = text.strip()
        return is_object

    def start_json(self, text: str) -> None:
        """The call's name is known, and how its arguments begin."""
        self.begin_call(self.json_name)
        self.enter(_Phase.JSON)
        self.json_started = self.json_any = True
        self.arguments(text)

    def read_json_mark(self, character: str) -> bool:
        """Reads a character of the call's own object, or of what is around it; False where it cannot be there."""
        match self.json_next, character:
            case "call", "{":
                self.json_next = "key"
            case "call", "[":
                pass
            case "call", "," | "]" if self.json_any:
                pass
            case "key" | "comma", "}":
                if not self.json_started:
                    if not self.json_name:
                        return False
                    self.start_json(self.json_early or "{}")
                self.keep_json(self.position + 1)
                self.next_json()
                return True
            case "key", '"':
                self.json_role = "key"
            case "colon", ":":
                self.json_next = "value"
            case "comma", ",":
                self.json_next = "key"
            case "value", _:
                self.json_role = self.role_of_value(character)
                if not self.json_role:
                    return False
                if self.json_role == "arguments" and self.json_name:
                    self.start_json("")
            case _:
                return False
        if self.json_role:
            self.pieces = None
            self.json_value = JsonValue()
        else:
            self.keep_json(self.position + 1)
        return True

    def role_of_value(self, character: str) -> str:
        """What the value is that begins with a character; "" where it can be nothing."""
        if self.json_key == "name" and not self.json_started:
            return "name" if character == '"' else ""
        if self.json_key in _ARGUMENT_KEYS and not self.json_started and not self.json_early:
            return {"{": "arguments", '"': "text", "n": "null", "N": "null"}.get(character, "")
        return "other"

    def end_json(self) -> bool:
        """The call ends here, whether it is whole or not."""
        if self.json_started:
            if not self.complete and self.json_value is not None:
                self.arguments(self.json_value.closing)
        elif self.tag is not None and self.position == len(self.buffer) and self.json_name and not self.json_role:
            self.start_json(self.json_early or "{}")
        elif self.json_next != "call" or not self.json_any:
            return self.no_call()
        self.json_value = None
        self.enter(_Phase.CONTENT)
        return True


_HANDLERS: dict[_Phase, Callable[[State], bool]] = {
    _Phase.START: State.start,
    _Phase.REASONING: State.reasoning,
    _Phase.CONTENT: State.content,
    _Phase.OPENED: State.opened_call,
    _Phase.NAME: State.name,
    _Phase.PARAMETERS: State.parameters,
    _Phase.KEY: State.parameter_key,
    _Phase.VALUE: State.value,
    _Phase.OBJECT: State.object,
    _Phase.CLOSED: State.closed,
    _Phase.JSON: State.json,
}
"""What reads the text of each phase. It returns whether there is more to do for the text at hand."""
