"""What README.md, WORKSPACE.md, the pages of docs/ and the helps say is there: commands, flags, options, files, tests,
messages; examples run."""

import ast
import dataclasses
import importlib.util
import pathlib
import re
import shlex
import tomllib

import pytest

from gdnjax.cli import generate, serve
from gdnjax.cli.bench import engine as bench_engine
from gdnjax.cli.bench import latency as bench_latency
from gdnjax.cli.bench import serve as bench_serve
from gdnjax.cli.bench import throughput as bench_throughput
from gdnjax.config import SUPPORTED_MODEL_TYPES, EngineConfig
from gdnjax.memory import __main__ as memory

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WORKSPACE = (ROOT / "WORKSPACE.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
TEXTS = {"README.md": README, "WORKSPACE.md": WORKSPACE, **PAGES}
SCRIPTS = (
    "add_result",
    "bench_collectives",
    "bench_dispatch",
    "bench_engine",
    "bench_kernels",
    "bench_pools",
    "bench_scheduler",
    "bench_server_overhead",
    "bench_serving",
    "bench_start",
    "check_tests",
    "convert",
    "eval",
    "eval_forks",
    "generate",
    "lm_eval_gdnjax",
    "make_docs",
    "make_random_checkpoint",
    "measure_state",
    "measure_tiny",
    "measure_workspace",
    "profile_step",
    "rocm_gate",
    "serve",
    "soak_server",
    "train_tiny",
    "triton_gate",
)


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _python(text: str) -> tuple[list[str], list[str]]:
    """Blocks that run, and those behind <!-- fragment -->, which need what a reader has."""
    parts = re.findall(r"(<!-- fragment -->\n\n)?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for mark, block in parts if not mark], [block for mark, block in parts if mark]


def _help(script: str, capsys, folder: str = "scripts") -> str:
    with pytest.raises(SystemExit):
        importlib.import_module(f"{folder}.{script}").main(["--help"])
    return capsys.readouterr().out


def _calls(text: str) -> list[tuple[str, str]]:
    """(script, its flags) of each call of a script, up to the end of the line or the next command."""
    return re.findall(r"python scripts/(\w+)\.py([^\n`|]*?)(?:&&|\||`|$)", _joined(text), re.MULTILINE)


def _joined(text: str) -> str:
    """Lines that end in a backslash with the next."""
    return re.sub(r"\\\n\s*", " ", text)


def _commands(name: str) -> list[list[str]]:
    """The arguments of each `gdnjax NAME` in the shell blocks of all texts."""
    lines = [line for text in TEXTS.values() for block in _blocks(text, "sh") for line in _joined(block).split("\n")]
    found = [re.search(rf"\bgdnjax {name}\b(?P<rest>[^|]*)", line) for line in lines]
    split = [shlex.split(match["rest"], comments=True) for match in found if match]
    # "..." stands for what a reader adds, "&" for the background.
    return [[word for word in words if word not in ("...", "&")] for words in split]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help_with_examples(script, capsys):
    text = _help(script, capsys)
    assert "examples:" in text
    assert "xit status: 0" in text


def test_every_script_is_listed_here():
    assert sorted(file.stem for file in (ROOT / "scripts").glob("*.py")) == sorted(SCRIPTS)


def test_readme_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 150


def test_readme_leads_to_every_page_and_so_does_the_navigation():
    """By a link of its own, or by the first page of a folder."""
    linked = set(re.findall(r"\]\((docs/[\w./-]+\.md)", README))
    navigation = (ROOT / "zensical.toml").read_text()
    for name in PAGES:
        assert f'"{name.removeprefix("docs/")}"' in navigation, name
        folder = pathlib.PurePath(name).parent.as_posix()
        home = folder == "docs" and pathlib.PurePath(name).stem in ("index", "map", "kernels", "models", "notebook")
        assert home or name in linked or f"{folder}/index.md" in linked, name


def test_flags_of_documented_calls_exist(capsys):
    helps = {script: _help(script, capsys) for script in SCRIPTS}
    calls = [call for text in (*TEXTS.values(), *helps.values()) for call in _calls(text)]
    assert len(calls) > 40
    for script, arguments in calls:
        # What stands behind a bare -- is for another script.
        own, _, others = arguments.partition(" -- ")
        for where, flags in ((script, own), ("generate", others)):
            for flag in re.findall(r"(?<=\s)--?[a-z][a-z_-]*", flags):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps[where]), f"{where}.py has no {flag}"


def test_documented_examples_are_there_and_have_their_flags(capsys):
    calls = {
        call
        for text in TEXTS.values()
        for call in re.findall(r"python examples/(\w+)\.py([^\n`]*)", _joined(text), re.MULTILINE)
    }
    assert {name for name, _ in calls} == {path.stem for path in (ROOT / "examples").glob("*.py")}
    for name, arguments in sorted(calls):
        text = _help(name, capsys, "examples")
        for flag in re.findall(r"(?<=\s)--?[a-z][a-z-]*", arguments):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{name}.py has no {flag}"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("generate", generate),
        ("serve", serve),
        ("memory", memory),
        ("bench throughput", bench_throughput),
        ("bench latency", bench_latency),
        ("bench serve", bench_serve),
        ("bench engine", bench_engine),
    ],
)
def test_documented_commands_are_parsed(name, module):
    commands = _commands(name)
    assert commands
    for words in commands:
        module.build_parser().parse_args(words)


def test_documented_memory_commands_run(capsys):
    for words in _commands("memory"):
        assert memory.main(words) in (0, 1), words
        assert "weights" in capsys.readouterr().out


def test_every_engine_option_and_model_type_is_documented():
    for field in dataclasses.fields(EngineConfig):
        assert f"| `{field.name}`" in PAGES["docs/configuration.md"], field.name
    for model_type in SUPPORTED_MODEL_TYPES:
        assert f"`{model_type}`" in README, model_type
        assert f"`{model_type}`" in PAGES["docs/models.md"], model_type


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    """Links, and paths in backticks; the site's own test has the anchors."""
    text = TEXTS[name]
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|md|toml|ipynb|json|yaml))`", text):
        places = [ROOT / path, ROOT / "gdnjax" / path, ROOT / "docs" / path]
        assert any(place.exists() for place in places), path


def test_named_extras_markers_and_modules_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = set(project["project"]["optional-dependencies"])
    markers = {marker.partition(":")[0] for marker in project["tool"]["pytest"]["ini_options"]["markers"]}
    for name, text in TEXTS.items():
        for named in re.findall(r"(?:\.|gdnjax)\[([a-z-]+(?:,[a-z-]+)*)\]", text):
            assert set(named.split(",")) <= extras, f"{name}: [{named}]"
        for marker in re.findall(r"pytest -m (\w+)", text):
            assert marker in markers, f"{name}: -m {marker}"
        for module in re.findall(r"python -m ((?:gdnjax|tests)[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{name}: {module}"
    for extra in extras:
        assert f"`{extra}`" in PAGES["docs/install.md"] or extra in ("test-server",), extra


def test_named_tests_exist():
    sources = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for text in TEXTS.values():
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in sources, name


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    (install,) = [block for block in _blocks(README, "sh") if "pytest" in block]
    _, _, pip_install, test = install.strip().split(" && ")
    assert pip_install == 'pip install -e ".[test]"'
    assert re.search(r'^pip install .* -e "\.\[test,eval\]"$', script, re.MULTILINE)
    assert script.rstrip().endswith(f"\n{test}")
    # And the tier that it leaves out.
    assert f'\n{test} --jaxtyping-packages= -m "thorough and not browser and not optional"\n' in script
    for hook in re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text()):
        assert re.search(rf"^{re.escape(hook)}( \.)?$", script, re.MULTILINE), hook


def _said(node: ast.AST) -> str | None:
    """A text in the source as a user reads it, with … where a value stands; None of what is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(value.value if isinstance(value, ast.Constant) else "…" for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (_said(left) or "…") + (_said(right) or "…")
    return None


def test_messages_of_the_troubleshooting_page_are_in_the_source():
    """Each whole, with … for its values: a message that is changed changes the page."""
    quoted = re.findall(r"^- (`+)(.+)\1$", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 40
    files = [*(ROOT / "gdnjax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    said = "\n".join(text for text in map(_said, nodes) if text)
    for _, message in quoted:
        assert len(message.replace("…", "").strip()) > 8, message
        assert message in said, message


def test_python_fragments_import_what_there_is():
    """Those that need a model or processes of the reader's."""
    fragments = [(name, block) for name, text in TEXTS.items() for block in _python(text)[1]]
    assert len(fragments) > 4
    for name, block in fragments:
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), name, "exec"), {})


SAID = {
    "README.md": ("Once upon a time ->",),
    "docs/batches.md": ("Once upon a time ->", "31 + 46 = 77", "5 + 6 = 11"),
    "docs/prefix-cache.md": ("0 of 73: nothing cached begins like it\n64 of 73: None\n",),
}
"""By the examples in Python of each page that has some."""


def test_pages_with_examples_in_python_are_known():
    assert [name for name, text in TEXTS.items() if _python(text)[0]] == list(SAID)


@pytest.mark.short_cases("README.md")
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", SAID)
def test_python_examples_run(name, capsys):
    """A page's one after another, in one namespace."""
    space: dict = {}
    for block in _python(TEXTS[name])[0]:
        exec(compile(block, name, "exec"), space)
    if name == "docs/batches.md":
        space["llm"].close()
        assert space["output"].tokens.shape == (2, 24)
    out = capsys.readouterr().out
    for text in SAID[name]:
        assert text in out
