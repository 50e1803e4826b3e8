"""Pages that are made: current, from docstrings and results; and results that lack what they need are refused."""

import dataclasses
import json
import pathlib
import xml.etree.ElementTree

import pytest
from site_pages import configuration, dashboard, markers, plots, results

from scripts import add_result, make_docs

ROOT = pathlib.Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = {
    "time": "2026-11-27",
    "commit": COMMIT,
    "hardware": "1 x a GPU",
    "versions": {"jax": "0.11.2"},
    "command": "bench",
    "figures": {"speed": {"decode": {"value": 4.5, "unit": "ms"}}},
}


def test_made_pages_are_current(capsys):
    assert make_docs.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_is_not_current_is_named_and_written(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("old")
    monkeypatch.setattr(make_docs, "DOCS", page.parent)
    monkeypatch.setattr(make_docs, "made", lambda: {page: "new"})
    assert make_docs.main(["--check"]) == 1
    assert "docs/page.md is not current" in capsys.readouterr().out
    assert page.read_text() == "old"
    assert make_docs.main([]) == 0
    assert page.read_text() == "new"
    assert make_docs.main(["--check"]) == 0


@pytest.mark.parametrize("cls", configuration.SHOWN)
def test_every_field_is_explained_once(cls):
    options = configuration.options(cls)
    assert [name for option in options for name in option.names].count("json") <= 1
    assert {name for option in options for name in option.names} == {field.name for field in dataclasses.fields(cls)}
    assert all(option.meaning for option in options)


def test_a_field_without_an_explanation_is_an_error():
    @dataclasses.dataclass
    class Half:
        """Two of them.

        one    the first,
               in two lines.
        """

        one: int = 1
        two: int = 2

    with pytest.raises(ValueError, match="explains two 0 times"):
        configuration.options(Half)
    Half.__doc__ = f"{Half.__doc__}\n        two    the second.\n"
    assert [option.meaning for option in configuration.options(Half)] == ["the first, in two lines.", "the second."]


def test_meanings_are_text_whatever_is_in_them():
    names = {"max_tokens"}
    assert configuration.marked('max_tokens or "<b>", a*b | `x|y`', names) == (
        '`max_tokens` or `"<b>"`, a\\*b \\| `x\\|y`'
    )
    assert configuration.marked("<script>", names) == "&lt;script>"


@pytest.mark.parametrize("text", ["", "<!-- a: begin -->", "<!-- a: end --><!-- a: begin -->", "<!-- a: begin -->" * 2])
def test_page_without_its_comments_is_an_error(text):
    with pytest.raises(ValueError, match="once each"):
        markers.replaced(text, "a", "new")


def test_every_kept_result_has_what_it_needs_and_stands_where_it_belongs():
    found = results.read_all()
    assert len(found) > 30
    for path, result in found:
        name = path.stem.removesuffix(f"-{result['commit'][:10]}")
        assert results.path_of(result, name) == path


@pytest.mark.parametrize("name", results.NEEDED)
def test_result_that_lacks_something_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        results.write({key: value for key, value in GOOD.items() if key != name}, "run", tmp_path)
    with pytest.raises(ValueError, match=name):
        results.write(GOOD | {name: type(GOOD[name])()}, "run", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hardware": "unknown"}, "hardware must say which"),
        ({"commit": "commit unknown"}, "40 digits"),
        ({"commit": "844be88"}, "40 digits"),
        ({"time": "yesterday"}, "ISO form"),
        ({"versions": {"jax": None}}, "versions must be"),
        ({"figures": {"velocity": GOOD["figures"]["speed"]}}, "allowed: speed"),
        ({"figures": {"speed": {"decode": {"value": float("nan"), "unit": "ms"}}}}, "a number 'value'"),
        ({"figures": {"speed": {"decode": {"value": 1.0}}}}, "a text 'unit'"),
        ({"comment": "x"}, "no comment; allowed: time"),
    ],
)
def test_result_that_cannot_be_read_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        results.check(GOOD | change)


def test_result_is_never_replaced(tmp_path):
    path = results.write(GOOD, "run", tmp_path)
    assert path == tmp_path / "2026-11-27" / "run-0123456789.json"
    with pytest.raises(FileExistsError, match="never replaced"):
        results.write(GOOD, "run", tmp_path)
    assert results.read_all(tmp_path) == [(path, GOOD)]


def test_file_that_is_no_result_is_named(tmp_path):
    path = results.write(GOOD, "run", tmp_path)
    path.write_text(json.dumps(GOOD | {"hardware": ""}))
    with pytest.raises(ValueError, match=r"run-0123456789\.json: a result needs hardware"):
        results.read_all(tmp_path)


@pytest.fixture
def commits(monkeypatch):
    """A repository that knows one commit: that of a clone or of an unpacked source need not be there."""
    monkeypatch.setattr(results, "known_commit", lambda commit: {"HEAD": COMMIT}[commit])


def test_script_adds_a_result_by_its_figures(tmp_path, commits, capsys):
    call = ["gate", "--commit", "HEAD", "--time", "2026-11-27", "--command", "x", "--directory", str(tmp_path)]
    figure = ["--figure", "amd", "k, gfx942", "63", "VGPR"]
    assert add_result.main([*call, *figure, "--versions", "jax=0.10.2"]) == 2
    assert "a result needs hardware" in capsys.readouterr().err
    assert add_result.main([*call, *figure, "--hardware", "none: compiled"]) == 2
    assert "a result needs versions" in capsys.readouterr().err
    rest = ["--versions", "jax=0.10.2", "--hardware", "none: compiled"]
    assert add_result.main([*call, "--figure", "amd", "k", "many", "VGPR", *rest]) == 2
    assert "'many' is no number" in capsys.readouterr().err
    assert add_result.main([*call, *figure, *rest]) == 0
    ((_, result),) = results.read_all(tmp_path)
    assert result["figures"] == {"amd": {"k, gfx942": {"value": 63.0, "unit": "VGPR"}}}


def test_script_takes_what_bench_engine_wrote(tmp_path, commits):
    (path, kept) = next(
        (path, kept) for path, kept in results.read_all() if "tp2-h200" in path.name and "9b" in path.name
    )
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(kept["raw"]))
    call = ["again", "--raw", str(raw), "--commit", "HEAD", "--time", "2026-11-27", "--command", "gdnjax bench engine"]
    assert add_result.main([*call, "--directory", str(tmp_path / "results")]) == 0
    ((_, result),) = results.read_all(tmp_path / "results")
    assert result["figures"] == kept["figures"], path
    assert result["hardware"] == "2 x NVIDIA H200"
    assert result["figures"]["speed"]["qwen3.5-9b, bfloat16, 2 GPUs: decode, 128 requests"]["value"] == 8.231
    with pytest.raises(ValueError, match="no file of gdnjax bench engine"):
        results.of_engine({"device": "x"})


def test_unknown_commit_is_refused():
    with pytest.raises(ValueError, match="git knows no commit"):
        results.known_commit("f" * 40)


def test_page_has_a_plot_where_something_changed_and_the_newest_of_all(tmp_path):
    later = {"speed": {"decode": {"value": 4.0, "unit": "ms"}, "prefill": {"value": 1.0, "unit": "s"}}}
    results.write(GOOD, "run", tmp_path)
    results.write(GOOD | {"time": "2026-11-28", "figures": later}, "run", tmp_path)
    results.write(GOOD | {"time": "2026-11-29", "hardware": "2 x a GPU"}, "run", tmp_path)
    text = dashboard.page(tmp_path)
    assert text.count("<svg") == 1
    assert "| decode | 4 ms | 1 x a GPU | 2026-11-28 `0123456789` |" in text
    assert "| decode | 4.5 ms | 2 x a GPU | 2026-11-29 `0123456789` |" in text
    assert "| prefill | 1 s |" in text


def test_plot_is_whole_and_points_lie_in_the_order_of_their_values():
    points = [("2026-11-21", 10.0), ("2026-11-22T12:00", 4.0), ("2026-11-27", 7.0)]
    picture = xml.etree.ElementTree.fromstring(plots.trend(points, 'a < "b"'))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in picture.iter("circle")]
    assert [x for x, _ in circles] == sorted(x for x, _ in circles)
    (_, ten), (_, four), (_, seven) = circles
    assert ten < seven < four
    assert abs((four - seven) - (seven - ten)) < 0.2
    assert picture.get("aria-label") == 'a < "b"'
    # A fifth of the value at least: noise of a hundredth stays flat.
    flat = xml.etree.ElementTree.fromstring(plots.trend([("2026-11-21", 100.0), ("2026-11-22", 99.0)], "noise"))
    heights = [float(circle.get("cy")) for circle in flat.iter("circle")]
    assert 0 < heights[1] - heights[0] < 10
