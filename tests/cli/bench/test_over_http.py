"""gdnjax bench serve --url: a workload on a server, here over the device of plain Python."""

import asyncio
import itertools
import json
import sys

import pytest

from gdnjax.cli.bench import serve as script
from gdnjax.cli.bench.serving import figures, over_http, workloads
from gdnjax.cli.bench.serving.driver import Trace
from gdnjax.cli.bench.serving.figures import Goals
from gdnjax.cli.bench.serving.workloads import Conversation, Spec, Turn
from gdnjax.serving.server.app import make_app
from gdnjax.serving.server.settings import ServerConfig
from tests.serving.fronts import front
from tests.serving.server.conftest import serving

PATIENT = ["--input-len", "12", "--output-len", "5", "--num-requests", "6"]


@pytest.fixture(scope="module")
def url():
    """Of a server that knows 26 tokens and answers at once."""
    with front(blocks=200, seqs=8) as llm, serving(make_app(llm, ServerConfig(served_model_names=("paper",)))) as found:
        yield found


def ask(url, spec, **fields):
    server = over_http.Server(url, "paper", **fields)
    return asyncio.run(over_http.run(server, workloads.draw(spec, 26)))


def test_every_token_is_noted_when_it_came(url):
    log = ask(url, Spec(num_requests=10, input_len=12, output_len=7))
    assert [trace.output_tokens for trace in log.traces] == [7] * 10
    for trace in log.traces:
        assert trace.prompt_tokens == 12
        assert trace.times[0] > 0
        assert trace.times == sorted(trace.times)
        assert trace.times[-1] <= log.seconds
    assert sum(sample.tokens for sample in log.samples) == 70
    assert max(sample.running for sample in log.samples) == 10
    assert min(sample.running for sample in log.samples) == 0
    found = figures.of_requests(log)
    assert found["output_throughput"] == pytest.approx(70 / log.seconds)
    assert "goodput" not in found


def test_conversation_goes_on_behind_its_replies_and_finds_them_cached(url):
    spec = Spec(kind="multi-turn", num_requests=2, input_len=16, output_len=8, turns=3, turn_growth=2.0)
    log = ask(url, spec)
    for conversation in range(2):
        traces = [trace for trace in log.traces if trace.conversation == conversation]
        assert [trace.turn for trace in traces] == [0, 1, 2]
        assert [trace.prompt_tokens for trace in traces] == [16, 16 + 8 + 32, 16 + 8 + 32 + 8 + 64]
        assert all(before.times[-1] <= after.arrival for before, after in itertools.pairwise(traces))
        # All but the last token of each reply, which was never fed, in whole blocks or with its tail.
        assert all(trace.cached_tokens >= 16 for trace in traces[1:])


def test_arrivals_are_kept(url):
    turns = [Turn([1, 2, 3], 2)]
    conversations = [Conversation(turns, 0.0), Conversation(turns, 0.4)]
    log = asyncio.run(over_http.run(over_http.Server(url, "paper"), conversations))
    assert [trace.arrival for trace in log.traces] == [0.0, 0.4]
    assert log.traces[1].times[0] > 0.4
    assert log.seconds > 0.4


def test_goodput_counts_requests_that_keep_every_goal():
    traces = [
        Trace(0, 0, 0.0, 5, 3, 0, [0.1, 0.2, 0.3]),
        Trace(1, 0, 0.0, 5, 3, 0, [0.3, 0.4, 0.5]),
        Trace(2, 0, 0.0, 5, 3, 0, [0.1, 0.6, 1.1]),
        Trace(3, 0, 0.0, 5, 1, 0, [0.1]),
    ]
    assert [Goals(ttft_ms=200.0).are_met(trace) for trace in traces] == [True, False, True, True]
    assert [Goals(tpot_ms=110.0).are_met(trace) for trace in traces] == [True, True, False, True]
    assert [Goals(e2el_ms=400.0).are_met(trace) for trace in traces] == [True, False, False, True]
    assert [Goals(ttft_ms=200.0, tpot_ms=110.0).are_met(trace) for trace in traces] == [True, False, False, True]
    assert not Goals()


def test_run_on_a_server_is_complete(url, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(script.workloads, "draw", lambda spec, _, draw=workloads.draw: draw(spec, 26))
    output, plot = tmp_path / "result.json", tmp_path / "result.png"
    flags = ["--url", url, *PATIENT, "--repeat", "2", "--goodput", "ttft:60000", "tpot:60000"]
    assert script.main([*flags, "--output", str(output), "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert "goodput" in table
    assert "median TTFT (ms)" in table
    found = json.loads(output.read_text())
    assert len(found["runs"]) == 2
    median = found["median"]
    assert median["goodput"] == pytest.approx(median["request_throughput"])
    assert len(found["runs"][0]["requests"]) == 6
    assert found["settings"]["url"] == url
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_a_server_refuses_is_one_line(url, capsys):
    # Its vocabulary is not the embedded model's.
    assert script.main(["--url", url, *PATIENT]) == 2
    error = capsys.readouterr().err
    assert "status 400" in error
    assert "outside the vocabulary" in error
    assert script.main(["--url", url, "--served-model-name", "another", *PATIENT]) == 2
    assert "status 404" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "127.0.0.1:8000"], "expected http://HOST:PORT"),
        (["--url", "http://127.0.0.1:1", "--compare", "prefix-cache"], "--compare is the server's to decide"),
        (["--url", "http://127.0.0.1:1", "--max-num-seqs", "8"], "--max-num-seqs is the server's to decide"),
        (["--url", "http://127.0.0.1:1", "--goodput", "itl:5"], "--goodput itl:5: a goal is NAME:MILLISECONDS"),
        (["--url", "http://127.0.0.1:1", "--goodput", "ttft"], "--goodput ttft: a goal is NAME:MILLISECONDS"),
        (["--goodput", "ttft:5"], "--goodput is about a server; give --url, too"),
        (["--url", "http://127.0.0.1:1"], "--url http://127.0.0.1:1:"),
        (["--turn-growth", "2"], "--turn-growth is nothing of this workload"),
    ],
)
def test_mistake_is_one_line_and_status_2(flags, message, capsys):
    assert script.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, sys.stderr.write(error)
