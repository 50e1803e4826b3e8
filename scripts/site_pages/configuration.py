"""docs/configuration.md: every option with its default and its meaning, from the docstrings of the dataclasses."""

import dataclasses
import re
from typing import Any, NamedTuple

from gdnjax import EngineConfig, SamplingParams, StructuredOutputsParams
from gdnjax.serving.server.settings import ServerConfig

HEAD = """\
# Configuration

<!-- Made by scripts/make_docs.py from the docstrings; edit those. -->

Every option there is. A bad value is an error at construction that names what is allowed.

- [EngineConfig](#engineconfig): how the engine runs. Its fields are keyword arguments of `LLM` and `AsyncLLM`.
- [SamplingParams](#samplingparams): how the tokens of one request are drawn, and when it ends.
- [StructuredOutputsParams](#structuredoutputsparams): what the text of an output has to be.
- [ServerConfig](#serverconfig): what clients of `gdnjax serve` meet. `gdnjax serve --help` has them as flags.

No environment variable is read by the package. Its commands set some for JAX: see [Quickstart](quickstart.md).
"""

SHOWN = (EngineConfig, SamplingParams, StructuredOutputsParams, ServerConfig)


class Option(NamedTuple):
    """A field, or several that are explained together: under which heading, and what the docstring says."""

    section: str
    names: tuple[str, ...]
    meaning: str


def options(cls: type) -> list[Option]:
    """What the docstring of a dataclass says of its fields, in its order.

    A line that begins with names of fields and two spaces begins an option; deeper lines go on with it; any other line
    behind the first paragraph is a heading, and a blank one ends the option. Raises ValueError where a field is
    explained never or twice.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    found: list[Option] = []
    section = ""
    open_at = None
    for line in (cls.__doc__ or "").split("\n", 1)[1].split("\n"):
        match = re.match(r"\s*(\w+(?:, \w+)*)\s+(\S.*)", line)
        names = tuple(match[1].split(", ")) if match else ()
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            open_at = None
        elif match and set(names) <= fields and (open_at is None or indent <= open_at):
            found.append(Option(section, names, match[2]))
            open_at = indent
        elif open_at is not None and indent > open_at:
            found[-1] = found[-1]._replace(meaning=f"{found[-1].meaning} {line.strip()}")
        else:
            section, open_at = line.strip(), None
    explained = [name for option in found for name in option.names]
    for name in sorted(fields | set(explained)):
        if explained.count(name) != 1:
            raise ValueError(f"the docstring of {cls.__name__} explains {name} {explained.count(name)} times")
    return found


def default(cls: type, name: str) -> str:
    """As it is written in Python; of a field without one, that it is needed."""
    (field,) = [field for field in dataclasses.fields(cls) if field.name == name]
    if field.default is dataclasses.MISSING:
        return "needed"
    value: Any = field.default
    return f"`{value}`" if not isinstance(value, str) else f'`"{value}"`'


def marked(text: str, names: set[str]) -> str:
    """Texts of a docstring as Markdown: quoted values and names of fields as code, nothing of it markup."""
    parts = re.split(r"(`[^`]*`)", text)
    for at in range(0, len(parts), 2):
        quoted = re.split(r'("[^"]*")', parts[at])
        for i, part in enumerate(quoted):
            if i % 2:
                quoted[i] = f"`{part}`"
                continue
            part = part.replace("<", "&lt;").replace("*", "\\*")
            quoted[i] = re.sub(r"\b\w+_\w+\b(?!`)", lambda m: f"`{m[0]}`" if m[0] in names else m[0], part)
        parts[at] = "".join(quoted)
    return "".join(parts).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    names = {field.name for cls in SHOWN for field in dataclasses.fields(cls)}
    lines = [HEAD]
    for cls in SHOWN:
        lines += [f"## {cls.__name__}", "", marked((cls.__doc__ or "").split("\n")[0], names), ""]
        section = None
        for option in options(cls):
            if option.section != section:
                section = option.section
                if section:
                    lines += ["", f"### {section}"] if lines[-1] else [f"### {section}"]
                lines += ["", "| Option | Default | Meaning |", "|---|---|---|"]
            shown = ", ".join(f"`{name}`" for name in option.names)
            defaults = ", ".join(default(cls, name) for name in option.names)
            lines.append(f"| {shown} | {defaults} | {marked(option.meaning, names)} |")
        lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
