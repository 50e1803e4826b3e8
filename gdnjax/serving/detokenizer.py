"""Token ids of a running request to text that is safe to show, as they come."""

import itertools
from collections.abc import Sequence

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.tokenizer import Tokenizer

WINDOW = 8
"""Tokens of context that a new token is decoded with. Decoders look back at most a character (4 bytes, so 4 tokens)
or a word boundary (1 token)."""

OPEN_CHARACTERS = 3
"""The most U+FFFD that an incomplete character may show as: decoders write one for each byte, or one for all."""


RUN = 256
"""Tokens that are decoded at once where nobody reads the text before its end."""


class Detokenizer:
    """Incremental text of one sample: never half a character, never a part of what may become a stop string.

    Holds the last few tokens and the text released so far; a token costs the decoding of at most 2 * WINDOW tokens,
    whatever the length of the output. Tokens go in one at a time, whatever the runs they arrive in, so that text and
    ending do not depend on how many tokens a step accepted.

    Without a tokenizer every text is empty, and stop strings are a ValueError.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams):
        if tokenizer is None and params.stop:
            raise ValueError(f"stop strings need a tokenizer, got stop={params.stop!r} without one")
        self._tokenizer = tokenizer
        self._params = params
        # A tuple already: SamplingParams made it one.
        self._stops = tuple(params.stop or ())
        self._window: list[int] = []
        # Characters at the front of the window's text that have been passed on.
        self._taken = 0
        # The end of the text so far that begins a stop string.
        self._begun_stop = ""
        self._pieces: list[str] = []
        self._num_characters = 0
        self._num_tokens = 0
        self._finished = False
        self._stop_reason: str | None = None
        self._defers = False
        # Tokens whose text is still to be made.
        self._waiting: list[int] = []

    def defer(self) -> None:
        """Says that nobody reads the text before its end. So `append` makes none, and whoever reads or finishes has it
        made then, many tokens at once. Where stop strings are looked for nothing changes.
        """
        self._defers = self._tokenizer is not None and not self._stops

    def fresh(self) -> "Detokenizer":
        """One for the same sample that has seen no token."""
        found = Detokenizer(self._tokenizer, self._params)
        found._defers = self._defers
        return found

    def closed(self, text: str) -> "Detokenizer":
        """One for the same sample whose text is all there."""
        found = self.fresh()
        found._keep(text)
        found._finished = True
        return found

    @property
    def text(self) -> str:
        """All the text released so far: what append and finish have returned, in one piece."""
        self._make_waiting()
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def num_characters(self) -> int:
        """Length of the text released so far."""
        self._make_waiting()
        return self._num_characters

    def text_since(self, start: int) -> str:
        """The text released so far from character `start` on; costs what it returns, however long the text is.

        `text_since(num_characters)` of before is what has come since.
        """
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        missing = self.num_characters - start
        if missing <= 0:
            return ""
        if missing <= len(self._pieces[-1]):
            return self._pieces[-1][-missing:]
        pieces = []
        for piece in reversed(self._pieces):
            if missing <= 0:
                break
            pieces.append(piece[-missing:])
            missing -= len(piece)
        return "".join(reversed(pieces))

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stop_reason

    @property
    def num_tokens_kept(self) -> int:
        """Tokens appended so far, up to and including the one that completed the stop string."""
        return self._num_tokens

    def append(self, token_ids: Sequence[int]) -> str:
        """Takes the next output tokens and returns the text that is safe to show now, possibly empty; none after
        `defer`.

        Leave out an EOS or stop token whose text is not wanted. Tokens after the one that completes a stop string are
        ignored. Where a token completes several stop strings, the one that ends first wins, and among those that end
        together the longest. Raises RuntimeError after finish().
        """
        if self._finished:
            raise RuntimeError("append() after finish(): the text of this sample is closed")
        if self._tokenizer is None:
            self._num_tokens += len(token_ids)
            return ""
        if self._defers:
            self._num_tokens += len(token_ids)
            self._waiting.extend(token_ids)
            return ""
        released = ""
        for token_id in token_ids:
            if self._stop_reason is not None:
                break
            self._num_tokens += 1
            released += self._release(self._decode(token_id))
        self._keep(released)
        return released

    def finish(self) -> str:
        """Closes the text and returns what was held back: an incomplete character as U+FFFD, a begun stop string."""
        if self._finished:
            return ""
        self._make_waiting()
        released = ""
        if self._tokenizer is not None and self._stop_reason is None:
            released = self._release(self._window_text()[self._taken :])
            if not self._params.include_stop_str_in_output:
                released += self._begun_stop
        self._finished = True
        self._keep(released)
        return released

    def _keep(self, released: str) -> None:
        if released:
            self._pieces.append(released)
            self._num_characters += len(released)

    def _make_waiting(self) -> None:
        """Makes the text of tokens that wait for it. Those that it fails for have none: whoever asks again gets what
        there is.
        """
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), RUN):
            self._keep(self._decode_run(waiting[start : start + RUN]))

    def _decode_run(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete, and a window as if they had come one by one."""
        assert self._tokenizer is not None
        tokens = [*self._window, *itertools.filterfalse(self._is_silent, token_ids)]
        text = self._tokenizer.decode(tokens, self._params.skip_special_tokens)
        if "\ufffd" in text:
            # What of a broken character is shown depends on what has come when, so there it goes token by token.
            if len(token_ids) <= WINDOW:
                return "".join(map(self._decode, token_ids))
            middle = len(token_ids) // 2
            return self._decode_run(token_ids[:middle]) + self._decode_run(token_ids[middle:])
        new = text[self._taken :]
        length = len(tokens) if len(tokens) < 2 * WINDOW else WINDOW + len(tokens) % WINDOW
        self._window = tokens[len(tokens) - length :]
        self._taken = len(self._window_text())
        return new

    def _decode(self, token_id: int) -> str:
        """The characters that this token completes."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._window_text()
        whole = max(self._taken, _whole_characters(text))
        new = text[self._taken : whole]
        self._taken = whole
        if len(self._window) == 2 * WINDOW:
            self._window = self._window[-WINDOW:]
            # The shorter window may begin with a broken character or without its space, so count from the end.
            self._taken = len(self._window_text()) - (len(text) - whole)
        return new

    def _window_text(self) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(self._window, self._params.skip_special_tokens)

    def _is_silent(self, token_id: int) -> bool:
        """Whether a token has no text. Such tokens stay out of the window: they would push out what gives context."""
        if self._tokenizer is None or token_id >= self._tokenizer.vocab_size:
            return True
        return self._params.skip_special_tokens and token_id in self._tokenizer.special_token_ids

    def _release(self, new: str) -> str:
        """Looks for stop strings that end in the new text, and returns the text that can no longer be part of one."""
        include = self._params.include_stop_str_in_output
        text = self._begun_stop + new
        # Text that begins a stop string has been shown already where stop strings are shown.
        shown = len(self._begun_stop) if include else 0
        found = None
        if self._num_tokens >= self._params.min_tokens:
            found = _first_stop(text, len(self._begun_stop), self._stops)
        if found is None:
            self._begun_stop = _begun_stop(text, self._stops)
            return text[shown:] if include else text[: len(text) - len(self._begun_stop)]
        start, self._stop_reason = found
        self._begun_stop = ""
        return text[shown : start + len(self._stop_reason)] if include else text[:start]


def _whole_characters(text: str) -> int:
    """Length of the text without an incomplete character at its end."""
    num_open = len(text) - len(text.rstrip("\ufffd"))
    return len(text) - min(num_open, OPEN_CHARACTERS)


def _first_stop(text: str, num_old: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Start and stop string of the match that ends first, among those that end after `num_old` characters."""
    matches = []
    for stop in stops:
        start = text.find(stop, max(0, num_old - len(stop) + 1))
        if start >= 0:
            matches.append((start + len(stop), start, stop))
    if not matches:
        return None
    _, start, stop = min(matches)
    return start, stop


def _begun_stop(text: str, stops: Sequence[str]) -> str:
    """The longest end of the text that begins a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return text[-length:]
    return ""
