"""A table of figures, in text and in Markdown."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """The first `names` columns are names, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    def text(self) -> str:
        """For a terminal: names to the left, numbers to the right."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.title, ""]
        for row in (self.columns, *self.rows):
            fields = [
                field.ljust(width) if i < self.names else field.rjust(width)
                for i, (field, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(fields).rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        rule = ["---" if i < self.names else "---:" for i in range(len(self.columns))]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))
