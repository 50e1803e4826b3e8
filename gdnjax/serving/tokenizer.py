"""Text to token ids and back, and chats to prompts, with the checkpoint's own tokenizer. Never touches the network."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from gdnjax.config import as_id_tuple, read_json_object
from gdnjax.sampling_params import MAX_BAD_WORD_TOKENS, SamplingParams

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

SYSTEM_ROLES = ("system", "developer")
"""Roles of the messages before a chat's first question, which other chats may begin with, too."""

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The sampling parameters that are read from generation_config.json."""


class Tokenizer:
    """The tokenizer of a checkpoint; `hf` is the wrapped transformers tokenizer.

    vocab_size         ids that it knows, added tokens included. A model's vocabulary may be larger (padding).
    special_token_ids  ids that decoding leaves out with skip_special_tokens.
    eos_token_ids      its own end-of-sequence id; generation_config.json may name more.
    """

    def __init__(self, hf: Any):
        self.hf = hf
        self.vocab_size: int = len(hf)
        self.special_token_ids = frozenset(
            token_id for token_id, token in hf.added_tokens_decoder.items() if token.special
        )
        self.eos_token_ids = as_id_tuple(hf.eos_token_id)

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
        # Imported here because it takes seconds, and callers with token ids of their own need none of it.
        import transformers

        try:
            hf = transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise anything here, bare Exception included.
            raise ValueError(f"{directory}: the tokenizer cannot be read: {error}") from error
        return cls(hf)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around a text (Qwen's puts none)."""
        return self.hf.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; incomplete UTF-8 becomes U+FFFD, ids outside the vocabulary decode to nothing."""
        return self.hf.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True, **kwargs: Any) -> list[int]:
        """Token ids of a chat: a list of {"role", "content"}, where content is a text or a list of text parts.

        Other keys of a message (tool_calls, name, ...) and `kwargs` (tools, enable_thinking, ...) go to the template.
        Raises ValueError for messages of another form, for images, video and audio, where the tokenizer has no
        template, and where the template refuses the messages.
        """
        texts = text_messages(messages)
        if self.hf.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template; give the prompt as text, "
                "or put the model's chat_template.jinja beside its tokenizer files"
            )
        # Needed by chat templates alone; transformers imports it for the first of them too.
        import jinja2

        try:
            return self.hf.apply_chat_template(
                texts, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False, **kwargs
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

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


def text_messages(messages: Any) -> list[dict[str, Any]]:
    """Checks the messages of a chat and joins text parts, so that every content is a text.

    Parts are joined without a separator, as the templates of the Qwen models do themselves. An assistant's message
    that carries tool_calls may have no content (None).
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role', 'content'}}, got {messages!r}")
    return [_text_message(index, message) for index, message in enumerate(messages)]


def _text_message(index: int, message: Any) -> dict[str, Any]:
    place = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ValueError(f"{place} must be a dictionary with 'role' and 'content', got {message!r}")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{place} has no {key!r}; required: 'role' and 'content', got {', '.join(message)}")
    if not isinstance(message["role"], str) or not message["role"]:
        raise ValueError(f"{place}['role'] must be a non-empty string, got {message['role']!r}")
    content = message["content"]
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part_text(f"{place}['content'][{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{place}['content'] must be a string or a list of text parts, got {content!r}")
    return {**message, "content": content}


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
    """What a checkpoint's generation_config.json says: ids that end a sequence, and its sampling parameters."""

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


def _sampling_defaults(file: pathlib.Path, raw: dict[str, Any]) -> dict[str, int | float]:
    sampling: dict[str, Any] = {}
    for name in SAMPLING_DEFAULTS:
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{file}: {name} must be a number, got {value!r}")
        sampling[name] = value if name == "top_k" else float(value)
    if raw.get("do_sample") is False:
        sampling["temperature"] = 0.0
    try:
        SamplingParams(**sampling)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return sampling
