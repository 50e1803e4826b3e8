"""Text to token ids and back, and chats to prompts, with the checkpoint's own tokenizer. Never touches the network."""

import bisect
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.config import as_id_tuple, import_transformers, read_json_object
from gdnjax.sampling_params import MAX_BAD_WORD_TOKENS, MAX_STOP_TOKENS, SamplingParams, check_unicode

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a tokenizer directory holds at least one."""

MEDIA_PARTS = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "video": "videos",
    "video_url": "videos",
    "input_video": "videos",
    "audio": "audio inputs",
    "audio_url": "audio inputs",
    "input_audio": "audio inputs",
}
"""Types of message parts that other engines take, and what they carry."""

TEMPLATE_OPTIONS = ("chat_template", "continue_final_message")
"""Keywords of a chat that transformers takes itself, whatever the template knows."""

SYSTEM_ROLES = ("system", "developer")
"""Roles of the messages before a chat's first question, which other chats may begin with, too."""

SAMPLING_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""What is read from generation_config.json -> the sampling parameter that it is."""

INTEGER_DEFAULTS = ("top_k", "max_new_tokens")


class Tokenizer:
    """The tokenizer of a checkpoint; `hf` is the wrapped transformers tokenizer.

    vocab_size         ids that it knows, added tokens included. A model's vocabulary may be larger (padding).
    special_token_ids  ids that decoding leaves out with skip_special_tokens.
    added_token_ids    ids of tokens that stand for one text as a whole, by that text: <tool_call>, special ones, ...
    eos_token_ids      its own end-of-sequence id; generation_config.json may name more.
    """

    def __init__(self, hf: Any):
        self.hf = hf
        self.vocab_size: int = len(hf)
        self.special_token_ids: frozenset[int] = frozenset(
            token_id for token_id, token in hf.added_tokens_decoder.items() if token.special
        )
        self.added_token_ids: dict[str, int] = {
            token.content: token_id for token_id, token in hf.added_tokens_decoder.items()
        }
        self.eos_token_ids: tuple[int, ...] = as_id_tuple(hf.eos_token_id)
        self._backend = _plain_backend(hf)

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint directory.

        Raises FileNotFoundError where there is no such directory or no tokenizer in it, and ValueError where
        transformers cannot read it.
        """
        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such directory; a tokenizer is read from a local directory only")
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise FileNotFoundError(
                f"{directory}: no tokenizer here; expected one of {', '.join(TOKENIZER_FILES)} "
                "(copy the checkpoint's tokenizer files, or name another directory as the tokenizer)"
            )
        # Callers with token ids of their own need none of it.
        transformers = import_transformers()
        try:
            hf = transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise anything here, bare Exception included.
            raise ValueError(f"{directory}: the tokenizer cannot be read: {error}") from error
        return cls(hf)

    @classmethod
    def named(cls, name: str | pathlib.Path) -> "Tokenizer":
        """The embedded model's, by its name, or that of a directory; see `from_directory`."""
        return cls.from_directory(model_directory(name) if str(name) == EMBEDDED_MODEL else name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around a text (Qwen's puts none)."""
        # Not verbose: whether a text is too long is the engine's to say, which knows how long a request may be.
        return self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; incomplete UTF-8 becomes U+FFFD, ids outside the vocabulary decode to nothing."""
        if self._backend is not None:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return self.hf.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def token_of(self, text: str) -> int | None:
        """The one token that was added to stand for a text, a tag say; None where there is none."""
        return self.hf.get_added_vocab().get(text)

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True, **kwargs: Any) -> list[int]:
        """Token ids of `render_chat`, with its arguments and errors."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **kwargs), add_special_tokens=False)

    def render_chat(self, messages: Any, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The text of a chat: a list of {"role", "content"}, where content is a text or a list of text parts.

        Messages may be as OpenAI's clients send them, see `text_messages`. Other keys of a message (tool_calls, name,
        ...) and `kwargs` (tools, enable_thinking, ...) go to the template; those of TEMPLATE_OPTIONS are
        transformers'. Raises ValueError for messages of another form, for images, video and audio, where the tokenizer
        has no template, for keywords that the template does not know, and where the template fails, with the message
        that it fails at.
        """
        texts = text_messages(messages)
        if self.hf.chat_template is None and not kwargs.get("chat_template"):
            raise ValueError(
                "this tokenizer has no chat template; give the prompt as text, "
                "or put the model's chat_template.jinja beside its tokenizer files"
            )
        template = functools.partial(
            self.hf.apply_chat_template, add_generation_prompt=add_generation_prompt, tokenize=False, **kwargs
        )

        def render(messages: list[dict[str, Any]]) -> str:
            text = template(messages)
            # Half a character may come with a tool, or escaped in the JSON text of a call's arguments.
            check_unicode("what it gives", text)
            return text

        # Templates are programs: whatever they raise is about the messages, or what came with them.
        try:
            known = self._template_variables(kwargs)
        except Exception as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        unknown = [name for name in kwargs if name not in known and name not in TEMPLATE_OPTIONS]
        if unknown:
            raise ValueError(
                f"neither the chat template nor chat knows {', '.join(map(repr, unknown))}; the template knows "
                f"{', '.join(map(repr, sorted(known))) or 'no keywords'}"
            )
        try:
            return render(texts)
        except Exception as error:
            place = _failing_message(render, texts, error)
            raise ValueError(f"the chat template fails at messages[{place}]: {_of_error(error)}") from error

    def _template_variables(self, kwargs: dict[str, Any]) -> frozenset[str]:
        """Names that the template takes from outside, without those that every template is given."""
        return _variables_of(self.hf.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools")))

    def with_another_question(self, messages: Any, **kwargs: Any) -> list[int]:
        """Token ids of a chat with the same system messages, tools and other `kwargs`, whose first question is another.

        What it has in common with the chat is what all such chats begin with. Empty where there is no question, or
        where the template wants more than one message behind the system's.
        """
        texts = text_messages(messages)
        system = list(itertools.takewhile(lambda message: message["role"] in SYSTEM_ROLES, texts))
        if len(system) == len(texts):
            return []
        # From its first character on it differs.
        content = "1" if texts[len(system)]["content"].lstrip().startswith("0") else "0"
        try:
            return self.apply_chat_template(
                [*system, {"role": "user", "content": content}], add_generation_prompt=False, **kwargs
            )
        except ValueError:
            return []

    def bad_word_sequences(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences to forbid for each word: as it starts a text, and after a space, which BPE merges into it.

        Raises ValueError for a word of no tokens or more than MAX_BAD_WORD_TOKENS.
        """
        sequences: list[list[int]] = []
        for word in words:
            for form in (word.lstrip(), " " + word.lstrip()):
                sequence = self.encode(form, add_special_tokens=False)
                if not 1 <= len(sequence) <= MAX_BAD_WORD_TOKENS:
                    raise ValueError(
                        f"bad word {word!r}: {form!r} is {len(sequence)} tokens; allowed: 1 to {MAX_BAD_WORD_TOKENS}"
                    )
                if sequence not in sequences:
                    sequences.append(sequence)
        return sequences


def _plain_backend(hf: Any) -> Any:
    """What decodes for a transformers tokenizer that adds nothing to it; None where there is no such thing. What
    transformers does around it takes three times as long, for every token that is shown.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        return None
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(hf)
    adds_nothing = kind.decode is PreTrainedTokenizerBase.decode and getattr(kind, "_decode", None) is getattr(
        PreTrainedTokenizerFast, "_decode", kind
    )
    return backend if adds_nothing else None


@functools.lru_cache(maxsize=16)
def _variables_of(template: str) -> frozenset[str]:
    """Names that a template takes from outside. Kept: finding them takes ten times as long as rendering a chat."""
    from jinja2 import meta
    from transformers.utils import chat_template_utils

    environment = chat_template_utils._compile_jinja_template(template).environment
    given = {"messages", "add_generation_prompt", *environment.globals}
    return frozenset(meta.find_undeclared_variables(environment.parse(template)) - given)


def text_messages(messages: Any) -> list[dict[str, Any]]:
    """Checks the messages of a chat, as OpenAI's clients send them, and gives them as templates want them.

    Every content becomes a text: parts are joined without a separator, as the templates of the Qwen models do
    themselves, and an assistant's message may have no content, or None. The arguments of tool calls become objects
    where they are JSON text. The messages given are not changed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role', 'content'}}, got {messages!r}")
    return [_text_message(index, message) for index, message in enumerate(messages)]


def _text_message(index: int, message: Any) -> dict[str, Any]:
    place = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ValueError(f"{place} must be a dictionary with 'role' and 'content', got {message!r}")
    by_assistant = message.get("role") == "assistant"
    for key in ("role", "content"):
        if key not in message and not (key == "content" and by_assistant and message.get("tool_calls")):
            raise ValueError(f"{place} has no {key!r}; required: 'role' and 'content', got {', '.join(message)}")
    if not isinstance(message["role"], str) or not message["role"]:
        raise ValueError(f"{place}['role'] must be a non-empty string, got {message['role']!r}")
    content = message.get("content")
    if content is None and by_assistant:
        content = ""
    if isinstance(content, list):
        content = "".join(_part_text(f"{place}['content'][{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{place}['content'] must be a string or a list of text parts, got {content!r}")
    check_unicode(f"{place}['content']", content)
    found = {**message, "content": content}
    if message.get("tool_calls"):
        found["tool_calls"] = _tool_calls(f"{place}['tool_calls']", message["tool_calls"])
    return found


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects. A call has "arguments", or a "function" that has them."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{place} must be a list of tool calls, got {calls!r}")
    found = []
    for index, call in enumerate(calls):
        here = f"{place}[{index}]"
        if not isinstance(call, dict):
            raise ValueError(f"{here} must be a dictionary, got {call!r}")
        if call.get("function") is None:
            found.append(_parsed_arguments(here, call))
            continue
        if not isinstance(call["function"], dict):
            raise ValueError(f"{here}['function'] must be a dictionary, got {call['function']!r}")
        found.append({**call, "function": _parsed_arguments(f"{here}['function']", call["function"])})
    return found


def _parsed_arguments(place: str, function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}['arguments'] is not JSON: {error}, got {function['arguments']!r}") from error
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"{place}['arguments'] must be an object, got {function['arguments']!r}")
    return function if arguments is None else {**function, "arguments": arguments}


def _failing_message(render: Any, messages: list[dict[str, Any]], error: Exception) -> int:
    """The first message from which on a template that has raised `error` raises it, whatever follows."""

    def fails(count: int) -> bool:
        try:
            render(messages[:count])
        except Exception as other:
            return _of_error(other) == _of_error(error)
        return False

    return bisect.bisect_left(range(1, len(messages)), True, key=fails)


def _of_error(error: Exception) -> str:
    return str(error) or type(error).__name__


def _part_text(place: str, part: Any) -> str:
    allowed = "allowed: {'type': 'text', 'text': ...}"
    if not isinstance(part, dict) or "type" not in part:
        raise ValueError(f"{place} must be a dictionary with a 'type', got {part!r}; {allowed}")
    if part["type"] in MEDIA_PARTS:
        raise ValueError(
            f"text only: {place} has type {part['type']!r}, but {MEDIA_PARTS[part['type']]} are not supported; "
            f"{allowed}"
        )
    if part["type"] != "text":
        raise ValueError(f"{place} has the unknown type {part['type']!r}; {allowed}")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{place} has no text: 'text' must be a string, got {part.get('text')!r}")
    return part["text"]


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json says: ids that end a sequence, and its sampling parameters under the
    names of SamplingParams, `max_new_tokens` as max_tokens.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, int | float] = dataclasses.field(default_factory=dict)


def load_generation_defaults(directory: str | pathlib.Path) -> GenerationDefaults:
    """Reads generation_config.json; a directory without one has no defaults.

    `do_sample: false` reads as temperature 0. Raises a ValueError that names the file where it is malformed.
    """
    file = pathlib.Path(directory) / "generation_config.json"
    if not file.is_file():
        return GenerationDefaults()
    raw = read_json_object(file)
    eos = raw.get("eos_token_id")
    for token_id in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return GenerationDefaults(eos_token_ids=as_id_tuple(eos), sampling=_sampling_defaults(file, raw))


def ends_of_sequence(found: Mapping[str, Iterable[int]], vocab_size: int) -> tuple[int, ...]:
    """All ids that end a sequence, by where they are from. Raises ValueError that names the place of a wrong one."""
    for where, ids in found.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{where}: {token} is outside the vocabulary; allowed: 0 to {vocab_size - 1}")
    every = tuple(dict.fromkeys(token for ids in found.values() for token in ids))
    if len(every) > MAX_STOP_TOKENS:
        counts = ", ".join(f"{where} ({len(tuple(ids))})" for where, ids in found.items() if ids)
        raise ValueError(f"{len(every)} ids end a sequence, of {counts}; allowed: {MAX_STOP_TOKENS}")
    return every


def _sampling_defaults(file: pathlib.Path, raw: dict[str, Any]) -> dict[str, int | float]:
    sampling: dict[str, Any] = {}
    for name, parameter in SAMPLING_DEFAULTS.items():
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{file}: {name} must be a number, got {value!r}")
        if name in INTEGER_DEFAULTS and not isinstance(value, int):
            raise ValueError(f"{file}: {name} must be an integer, got {value!r}")
        sampling[parameter] = value if name in INTEGER_DEFAULTS else float(value)
    if raw.get("do_sample") is False:
        sampling["temperature"] = 0.0
    try:
        SamplingParams(**sampling)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return sampling
