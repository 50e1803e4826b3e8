"""Log-probabilities in the forms of the two endpoints."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gdnjax.serving.outputs import Logprob
from gdnjax.serving.tokenizer import Tokenizer

LEAST = -9999.0
"""In place of -inf, which JSON has no number for."""

TokenLogprobs = Sequence[Mapping[int, Logprob] | None]


class TokenTexts:
    """Texts and bytes of single tokens. `as_ids`: token_id:N in place of texts, which several tokens may share."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._bytes: dict[int, list[int] | None] = {}
        self._byte_of = _bytes_of_characters() if tokenizer is not None and _is_byte_level(tokenizer) else None

    def text(self, token_id: int, logprob: Logprob | None, as_ids: bool) -> str:
        """The text of a token alone, which its log-probability brings along where there is one."""
        if as_ids:
            return f"token_id:{token_id}"
        if logprob is not None or self._tokenizer is None:
            return (logprob and logprob.decoded_token) or ""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def bytes(self, token_id: int) -> list[int] | None:
        """The bytes of a token, also of one that is a part of a character; None without a tokenizer."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._bytes_of(token_id)
        return self._bytes[token_id]

    def _bytes_of(self, token_id: int) -> list[int] | None:
        if self._tokenizer is None:
            return None
        if token_id >= self._tokenizer.vocab_size:
            return []
        if self._byte_of is not None and token_id not in self._tokenizer.hf.added_tokens_decoder:
            return [self._byte_of[character] for character in self._tokenizer.hf.convert_ids_to_tokens(token_id)]
        return list(self._tokenizer.decode([token_id], skip_special_tokens=False).encode())


def for_chat(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: TokenLogprobs, num_top: int, as_ids: bool
) -> dict[str, Any]:
    """`{"content": [{"token", "bytes", "logprob", "top_logprobs"}]}`, the most probable first."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": texts.text(token_id, logprob, as_ids),
            "logprob": max(logprob.logprob, LEAST),
            "bytes": texts.bytes(token_id),
        }

    content = []
    for token_id, found in zip(token_ids, logprobs, strict=True):
        assert found is not None
        content.append(
            {
                **entry(token_id, found[token_id]),
                "top_logprobs": [entry(other, logprob) for other, logprob in _by_rank(found)[:num_top]],
            }
        )
    return {"content": content, "refusal": None}


def for_completion(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: TokenLogprobs, offset: int, as_ids: bool, num_top: int
) -> tuple[dict[str, Any], int]:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`, and the offset behind them.

    `offset` is where the first token stands in the choice's text. A first token of a prompt has no probability.
    """
    found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, entries in zip(token_ids, logprobs, strict=True):
        own = None if entries is None else entries[token_id]
        text = texts.text(token_id, own, as_ids)
        found["text_offset"].append(offset)
        found["tokens"].append(text)
        found["token_logprobs"].append(None if own is None else max(own.logprob, LEAST))
        found["top_logprobs"].append(
            None
            if entries is None
            else {texts.text(other, each, as_ids): max(each.logprob, LEAST) for other, each in _by_rank(entries)}
            if num_top
            else {}
        )
        offset += len(text)
    return found, offset


def of_prompt(logprobs: TokenLogprobs) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's prompt_logprobs: for each token but the first, token id -> {"logprob", "rank", "decoded_token"}."""
    return [
        None
        if entries is None
        else {
            str(token_id): {
                "logprob": max(each.logprob, LEAST),
                "rank": each.rank,
                "decoded_token": each.decoded_token,
            }
            for token_id, each in entries.items()
        }
        for entries in logprobs
    ]


def _by_rank(entries: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    return sorted(entries.items(), key=lambda item: item[1].rank if item[1].rank is not None else math.inf)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return "ByteLevel" in [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]


def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes are themselves, the others stand from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
