"""The console script `gdnjax`."""

import pathlib
import tomllib

import pytest

import gdnjax
from gdnjax.cli import main as script

ROOT = pathlib.Path(__file__).parents[2]


def test_wheel_has_the_console_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"gdnjax": "gdnjax.cli.main:run"}
    assert callable(script.run)


def test_help_lists_the_commands(capsys):
    assert script.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in script.COMMANDS)
    assert "examples:" in out


def test_nothing_to_do_shows_how(capsys):
    assert script.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("usage: gdnjax COMMAND")) == ("", True)


def test_version(capsys):
    assert script.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gdnjax {gdnjax.__version__}\n"


def test_unknown_command_is_named(capsys):
    assert script.main(["serv"]) == 2
    assert capsys.readouterr().err == f"gdnjax: error: no command 'serv'; allowed: {', '.join(script.COMMANDS)}\n"


@pytest.mark.parametrize("name", [name for name in script.COMMANDS if name != "bench"])
def test_commands_have_a_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        script.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_errors_begin_with_the_command(capsys, tmp_path):
    assert script.main(["generate", "--model", str(tmp_path / "none"), "x"]) == 2
    assert capsys.readouterr().err.startswith("gdnjax generate: error: ")
    assert script.main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("gdnjax convert: error: ")
