"""The table of workspaces."""

import measure_workspace
import pytest

from gdnjax.serving import planning


def test_table_has_a_line_for_each_rule_rows_and_drafts(monkeypatch, capsys):
    """Without drafts there is no rule to accept them by."""
    asked = []

    def workspaces(model, config, mesh, max_model_len, params):
        asked.append((config.draft_acceptance, config.max_num_seqs, config.num_speculative_tokens, model.mtp))
        return dict.fromkeys(measure_workspace.STEPS, 3 << 20) | {"decode, full sampler": 5 << 20}

    monkeypatch.setattr(planning, "workspaces", workspaces)
    arguments = ["--rows", "2", "4", "--drafts", "0", "3", "--acceptance", "shared_noise", "rejection", "--layers", "4"]
    assert measure_workspace.main(arguments) == 0
    assert asked == [
        *(("shared_noise", rows, drafts, drafts > 0) for rows in (2, 4) for drafts in (0, 3)),
        *(("rejection", rows, 3, True) for rows in (2, 4)),
    ]
    head, rule, *lines = capsys.readouterr().out.splitlines()
    columns = head.count("|")
    assert [line.count("|") for line in (rule, *lines)] == [columns] * (1 + len(asked))
    one = 2 * 248_320 * 4
    assert lines[0] == f"| 2 | 0 |  | 2 | 3 | 3 | 5 | 3 | 3 | {(5 << 20) / one:.2f} |"


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--drafts", "9"], ["--config", "nothing"]])
def test_what_makes_no_sense_is_an_error(arguments, capsys):
    assert measure_workspace.main([*arguments, "--layers", "4"]) == 2
    assert "measure_workspace.py: error: " in capsys.readouterr().err


def test_more_layers_than_the_model_has_are_an_error(capsys):
    assert measure_workspace.main(["--config", "tiny", "--layers", "99"]) == 2
    assert "--layers must be between 1 and the model's 8, got 99" in capsys.readouterr().err
