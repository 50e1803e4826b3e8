"""A file of completions, a JSON object a line, in the order of the prompts: what is there already is not done again."""

import contextlib
import fcntl
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO


def settings_of(**settings: Any) -> str:
    """A name for everything that decides a completion beside its prompt: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()[:12]


class BatchOutput:
    """The file. `prompts` are those of all lines, each as it stands in its line; a prompt has `samples` lines.

    A run that was cut off leaves whole lines, and perhaps a part of one. Prompts of which a line is missing are done
    anew.
    """

    def __init__(self, file: BinaryIO, prompts: Sequence[Mapping[str, Any]], samples: int, settings: str):
        self._file, self._prompts, self._samples, self._settings = file, prompts, samples, settings
        self.num_done = 0
        """Prompts, from the first one on, whose lines are there."""

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The lines of the next prompt: what they have beside `index`, `sample`, the prompt and `settings`."""
        assert len(lines) == self._samples
        given = self._prompts[self.num_done]
        text = io.StringIO()
        for sample, line in enumerate(lines):
            whole = {"index": self.num_done, "sample": sample, **given, **line, "settings": self._settings}
            text.write(json.dumps(whole, ensure_ascii=False) + "\n")
        self._file.write(text.getvalue().encode())
        self._file.flush()
        self.num_done += 1

    def find_done(self, name: str) -> None:
        """Reads what is there, and cuts off what is no whole prompt. Raises ValueError for lines of another run."""
        end = place = 0
        for number, line in enumerate(self._file, start=1):
            place += len(line)
            if not line.endswith(b"\n"):
                break
            self._check(f"{name}: line {number}", line, *divmod(number - 1, self._samples))
            if number % self._samples == 0:
                end, self.num_done = place, number // self._samples
        self._file.seek(end)
        self._file.truncate()

    def _check(self, where: str, line: bytes, index: int, sample: int) -> None:
        advice = "it is of another run; allowed: a new file, or one of a run with these prompts and flags"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}; {advice}") from error
        if not isinstance(found, dict) or index >= len(self._prompts):
            raise ValueError(f"{where}: {advice}")
        wanted = {"index": index, "sample": sample, **self._prompts[index], "settings": self._settings}
        other = [key for key, value in wanted.items() if found.get(key) != value]
        if other:
            raise ValueError(f"{where}: {other[0]!r} differs: {advice}")


@contextlib.contextmanager
def opened(
    path: str | pathlib.Path, prompts: Sequence[Mapping[str, Any]], samples: int, settings: str
) -> Iterator[BatchOutput]:
    """The file at `path`, made where there is none, with what is done. Raises ValueError where it is another run's, or
    another process writes it; then nothing is changed.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path}: another process writes to it") from error
        file.seek(0)
        output = BatchOutput(file, prompts, samples, settings)
        output.find_done(str(path))
        yield output
