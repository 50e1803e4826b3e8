"""What has been measured so far: a line for each figure as soon as it is there, and a file that is never half."""

import json
import os
import pathlib
from typing import Any


class Record:
    """The content of the JSON file, which is written whenever it has grown.

    `content` has the head, and by section "sections": its figures, and "failed": its error.
    """

    def __init__(self, output: str | None):
        self._file = None if output is None else pathlib.Path(output)
        if self._file is not None and not self._file.absolute().parent.is_dir():
            raise ValueError(f"--output {output}: no such directory")
        self.content: dict[str, Any] = {"engines": {}, "sections": {}, "failed": {}}

    def head(self, **content: Any) -> None:
        """Adds to what is beside the sections."""
        parts = {name: self.content.pop(name) for name in ("engines", "sections", "failed")}
        self.content |= content | parts
        self.write()

    def engine(self, name: str, **content: Any) -> None:
        """Adds to what is known of an engine."""
        self.content["engines"].setdefault(name, {}).update(content)
        self.write()

    def figure(self, section: str, name: str, line: str, figures: dict[str, Any]) -> dict[str, Any]:
        """Prints the line, keeps the figures as `name` of a section, and returns them."""
        print(f"{section:<12} {line}", flush=True)
        self.content["sections"].setdefault(section, {})[name] = figures
        self.write()
        return figures

    def of(self, section: str) -> dict[str, Any]:
        """The figures of a section, by name; empty where it was not measured."""
        return self.content["sections"].get(section, {})

    def failure(self, section: str, error: str) -> None:
        """Notes why a section ended early."""
        self.content["failed"][section] = error
        self.write()

    def write(self) -> None:
        """Rewrites the file, in one go: who is killed leaves the one before."""
        if self._file is None:
            return
        new = self._file.with_name(f"{self._file.name}.new")
        new.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self._file)
