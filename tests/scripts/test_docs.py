"""What README.md, WORKSPACE.md and the helps say is there: commands, flags, options, files, tests; examples run."""

import ast
import dataclasses
import importlib
import pathlib
import re

import pytest

from gdnjax.config import SUPPORTED_MODEL_TYPES, EngineConfig

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WORKSPACE = (ROOT / "WORKSPACE.md").read_text()
SCRIPTS = (
    "bench_engine",
    "bench_kernels",
    "bench_pools",
    "bench_scheduler",
    "bench_serving",
    "bench_start",
    "convert",
    "eval",
    "eval_forks",
    "generate",
    "lm_eval_gdnjax",
    "make_random_checkpoint",
    "measure_state",
    "measure_tiny",
    "measure_workspace",
    "profile_step",
    "rocm_gate",
    "serve",
    "soak_server",
    "train_tiny",
)


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _help(script: str, capsys) -> str:
    with pytest.raises(SystemExit):
        importlib.import_module(f"scripts.{script}").main(["--help"])
    return capsys.readouterr().out


def _calls(text: str) -> list[tuple[str, str]]:
    """(script, its flags) of each call of a script, up to the end of the line or the next command."""
    return re.findall(r"python scripts/(\w+)\.py([^\n`|]*?)(?:&&|\||`|$)", text, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help_with_examples(script, capsys):
    text = _help(script, capsys)
    assert "examples:" in text
    assert "xit status: 0" in text


def test_every_script_is_listed_here():
    assert sorted(file.stem for file in (ROOT / "scripts").glob("*.py")) == sorted(SCRIPTS)


def test_flags_of_documented_calls_exist(capsys):
    helps = {script: _help(script, capsys) for script in SCRIPTS}
    calls = [call for text in (README, WORKSPACE, *helps.values()) for call in _calls(text)]
    assert len(calls) > 10
    for script, arguments in calls:
        # What stands behind a bare -- is for another script.
        own, _, others = arguments.partition(" -- ")
        for where, flags in ((script, own), ("generate", others)):
            for flag in re.findall(r"(?<=\s)--?[a-z][a-z_-]*", flags):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps[where]), f"{where}.py has no {flag}"


def test_every_engine_option_and_model_type_is_documented():
    for field in dataclasses.fields(EngineConfig):
        assert f"| `{field.name}`" in README, field.name
    for model_type in SUPPORTED_MODEL_TYPES:
        assert f"`{model_type}`" in README, model_type


@pytest.mark.parametrize("text", [README, WORKSPACE], ids=["README", "WORKSPACE"])
def test_named_files_exist(text):
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|md|toml))`", text)
    for name in {*links, *named}:
        places = [ROOT / name, ROOT / "gdnjax" / name]
        assert any(place.exists() for place in places), name


def test_named_tests_exist():
    sources = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", WORKSPACE):
        assert f"def {name}(" in sources, name


def test_ci_runs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    (install,) = [block for block in _blocks(README, "sh") if "pytest" in block]
    _, _, pip_install, test = install.strip().split(" && ")
    assert pip_install.replace("pip install", "pip install --quiet") in script
    assert script.rstrip().endswith(test)
    for hook in re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text()):
        assert re.search(rf"^{re.escape(hook)}( \.)?$", script, re.MULTILINE), hook


def test_python_fragments_of_the_readme_import_what_there_is():
    """Those that need a model or processes of the reader's."""
    blocks = _blocks(README, "python fragment")
    assert blocks
    for block in blocks:
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


def test_python_examples_of_the_readme_run(capsys):
    """One after another, in one namespace."""
    namespace: dict = {}
    blocks = _blocks(README, "python")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    namespace["llm"].close()
    out = capsys.readouterr().out
    assert "Once upon a time ->" in out
    assert "31 + 46 = 77" in out
    assert namespace["output"].tokens.shape == (2, 24)
    assert "5 + 6 = 11" in out
