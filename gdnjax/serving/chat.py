"""Conversations to prompts: the keywords of a chat, and the texts of one conversation or several."""

from collections.abc import Mapping, Sequence
from typing import Any

from gdnjax.serving.tokenizer import Tokenizer

TAKEN = ("messages", "add_generation_prompt", "tokenize")
"""What is an argument of a chat, or of transformers' rendering, and so none of the template's keywords."""


def template_options(given: Mapping[str, Any] | None, others: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a chat's template, from the two places where they may stand: in `chat_template_kwargs`, which
    vLLM's users know, and beside it. Raises ValueError for what stands in both, or is none.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"chat_template_kwargs must be a dictionary, got {given!r}")
    twice = [name for name in given or () if name in others]
    if twice:
        raise ValueError(f"{', '.join(twice)} stands in chat_template_kwargs and beside it; give it once")
    options = {**(given or {}), **others}
    taken = [name for name in options if name in TAKEN]
    if taken:
        raise ValueError(f"the keywords of a chat template may not have {', '.join(taken)}: chat gives it by itself")
    return options


def render_chats(
    tokenizer: Tokenizer, chats: Sequence[Any], options: dict[str, Any], add_generation_prompt: bool, *, several: bool
) -> list[str]:
    """The text of each conversation. Raises ValueError, with the index of the conversation if there are `several`."""
    texts = []
    for index, chat in enumerate(chats):
        try:
            texts.append(tokenizer.render_chat(chat, add_generation_prompt, **options))
        except ValueError as error:
            raise ValueError(f"conversation {index}: {error}" if several else str(error)) from error
    return texts
