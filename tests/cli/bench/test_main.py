"""gdnjax bench: which commands there are."""

import pytest

from gdnjax.cli import main as gdnjax
from gdnjax.cli.bench import main as script


def test_help_lists_the_commands(capsys):
    assert gdnjax.main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: gdnjax bench COMMAND")
    assert all(f"\n  {name} " in out for name in script.COMMANDS)


def test_nothing_to_measure_shows_how(capsys):
    assert gdnjax.main(["bench"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("usage: gdnjax bench COMMAND")) == ("", True)


def test_unknown_command_is_named(capsys):
    assert gdnjax.main(["bench", "server"]) == 2
    assert capsys.readouterr().err == (
        "gdnjax bench: error: no command 'server'; allowed: throughput, latency, serve, engine\n"
    )


@pytest.mark.parametrize("name", script.COMMANDS)
def test_commands_have_a_help_with_examples(name, capsys):
    with pytest.raises(SystemExit) as end:
        gdnjax.main(["bench", name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: gdnjax bench {name} ")
    assert f"examples:\n  gdnjax bench {name}" in out
    assert "xit status: 0" in out


@pytest.mark.parametrize("name", script.COMMANDS)
def test_errors_begin_with_the_command(name, capsys):
    flag = "--config" if name == "engine" else "--model"
    assert gdnjax.main(["bench", name, flag, "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gdnjax bench {name}: error: nowhere: no such ")
    assert err.count("\n") == 1
