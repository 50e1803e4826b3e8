"""Conversations to prompts: the keywords of a chat, and the texts of one conversation or several."""

from collections.abc import Mapping, Sequence
from inspect import isfunction, ismethod
from typing import Any

from gdnjax.serving.tokenizer import Tokenizer
from gdnjax.serving.tool_calls import read_tools

TAKEN = ("messages", "add_generation_prompt", "tokenize")
"""What is an argument of a chat, or of transformers' rendering, and so none of the template's keywords."""


def template_options(given: Mapping[str, Any] | None, others: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a chat's template, from the two places where they may stand: in `chat_template_kwargs`, which
    vLLM's users know, and beside it. Raises ValueError for what stands in both, or is none, and for malformed tools,
    which a template would pass on to the model as they are.
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
    if options.get("tools") is not None:
        _check_tools(options["tools"])
    return options


def _check_tools(tools: Any) -> None:
    """Raises ValueError for what is no list of tools. A function is one: transformers reads its hints and docstring."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list of tools, got {tools!r}")
    read_tools([{"name": tool.__name__} if isfunction(tool) or ismethod(tool) else tool for tool in tools])


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
