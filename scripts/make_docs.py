"""Writes the pages of docs/ that are made of the code and of results."""

if __name__ == "__main__":
    from gdnjax.cli import interrupt

    interrupt.expected()

import argparse
import pathlib

from site_pages import configuration, dashboard, markers, recipes

from gdnjax.cli.command import exit_status, run_as_process

DESCRIPTION = """\
Writes what of the site is made: docs/configuration.md from the docstrings of EngineConfig, SamplingParams and
ServerConfig, the tables of memory in docs/recipes/ by gdnjax memory, and docs/results.md from docs/results/.
"""

EXAMPLES = """\
examples:
  python scripts/make_docs.py           write them
  python scripts/make_docs.py --check   say which are not current

Exit status: 0 done, or all are current; 1 some are not; 2 an error, 130 interrupted, 143 terminated.
"""

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is not current")
    arguments = parser.parse_args(argv)
    return exit_status("make_docs.py", lambda: run(arguments.check))


def run(check: bool) -> int:
    old = [path for path, text in made().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if check:
            print(f"{path.relative_to(DOCS.parent)} is not current: python scripts/make_docs.py")
        else:
            path.write_text(made()[path], encoding="utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")
    return 1 if check and old else 0


def made() -> dict[pathlib.Path, str]:
    """Page -> what it should be."""
    pages = {DOCS / "configuration.md": configuration.page(), DOCS / "results.md": dashboard.page()}
    for family in recipes.FAMILIES:
        path = DOCS / "recipes" / f"{family}.md"
        pages[path] = markers.replaced(path.read_text(encoding="utf-8"), recipes.MARK, recipes.table(family))
    return pages


if __name__ == "__main__":
    run_as_process(main)
