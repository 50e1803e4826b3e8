"""scripts/eval.py: what counts as an answer, as a prompt, as agreement; and its exit status."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import evaluation.progress
import numpy as np
import pytest
from evaluation import agreement, cells, problems, report, scoring
from evaluation.cells import Cell, CellRun, Completion, Workload
from evaluation.problems import Problem
from evaluation.progress import Progress

from gdnjax import EngineConfig, SamplingParams
from gdnjax.assets import model_directory
from gdnjax.serving.tokenizer import Tokenizer
from scripts import eval as script

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = pathlib.Path(__file__).parents[2]

SOLVE = [
    Problem("Ann has 2 apples and buys 3 more. How many has she?", "2 + 3 = <<2+3=5>>5\n#### 5"),
    Problem("Ben sells 1,200 pears at $2. What does he earn?", "1200 * 2 = 2400\n#### 2,400"),
]
SHOTS = [
    Problem("What is 1 + 1?", "1 + 1 = 2\n#### 2"),
    Problem("What is 3 - 5?", "3 - 5 = -2\n#### -2"),
]


def _write(file: pathlib.Path, items: list[Problem]) -> pathlib.Path:
    file.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in items), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval")
    return {"data": _write(directory / "data.jsonl", SOLVE), "shots": _write(directory / "shots.jsonl", SHOTS)}


@pytest.fixture(scope="module")
def flags(random_model, files):
    """A run of two cells that takes seconds."""
    chosen = ("--cells", "f32-batched,f32-device-loop", "--max-num-seqs", "2", "--max-tokens", "8")
    return ["--model", str(random_model), "--data", str(files["data"]), "--form", "plain", *chosen]


@pytest.fixture(scope="module")
def loaded(random_model):
    with cells.load(random_model, "float32") as llm:
        yield llm


# What an answer is.


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("5 * 8 = 40\n#### 40", "40", "40"),
        ("#### -3", "-3", "-3"),
        ("#### 1,234.", "1,234.", "1,234."),
        ("####40", None, "40"),
        ("#### $40", None, "$40"),
        ("#### 4\n\nNo, #### 5", "4", "5"),
        ("The answer is 7.", None, "7."),
        ("He pays $18.50 and leaves", None, "$18.50"),
        ("between 3-5", None, "-5"),
        ("x, y, z.", None, None),
        ("7 apples, and that is all, ok...", None, "..."),
        ("", None, None),
        ("no digits", None, None),
        # Digits of other scripts are no digits here.
        ("#### ٣", None, None),
    ],
)
def test_answers_are_taken_as_lm_eval_takes_them(completion, strict, flexible):
    assert scoring.strict_answer(completion) == strict
    assert scoring.flexible_answer(completion) == flexible


@pytest.mark.parametrize(
    ("answer", "reference", "matches"),
    [
        ("40", "5 * 8 = 40\n#### 40", True),
        ("1,234", "#### 1234", True),
        ("1234.", "#### 1,234", True),
        ("$18", "#### 18", True),
        ("18.00", "#### 18", False),
        ("-2", "#### 2", False),
        ("4", "2 + 2 = 4\n#### 5", False),
        (None, "#### 5", False),
    ],
)
def test_answers_are_compared_without_commas_dollars_and_full_stop(answer, reference, matches):
    assert scoring.is_match(answer, reference) is matches


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes, trials, low, high):
    assert scoring.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = scoring.wilson(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert min(*mirrored) >= 0
    assert max(*mirrored) <= 1


# What a prompt is.


@pytest.mark.parametrize(
    ("form", "shots", "text"),
    [
        ("plain", [], SOLVE[0].question),
        (
            "few-shot",
            SHOTS,
            "Question: What is 1 + 1?\nAnswer: 1 + 1 = 2\n#### 2\n\n"
            "Question: What is 3 - 5?\nAnswer: 3 - 5 = -2\n#### -2\n\n"
            "Question: Ann has 2 apples and buys 3 more. How many has she?\nAnswer:",
        ),
        ("few-shot", [], "Question: Ann has 2 apples and buys 3 more. How many has she?\nAnswer:"),
        (
            "chat",
            SHOTS[:1],
            "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n1 + 1 = 2\n#### 2<|im_end|>\n"
            "<|im_start|>user\nAnn has 2 apples and buys 3 more. How many has she?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_prompts_are_these_texts(random_model, form, shots, text):
    tokenizer = Tokenizer.from_directory(random_model)
    (prompt,) = problems.make_prompts(SOLVE[:1], shots, form, tokenizer)
    assert prompt.text == text
    assert prompt.token_ids == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{good}", "", "not json"], "data.jsonl:3: not JSON"),
        (["[1]"], "data.jsonl:1: expected"),
        (["{good}", '{"question": "x"}'], 'data.jsonl:2: no "answer"'),
        (['{"question": 7, "answer": "#### 7"}'], 'data.jsonl:1: no "question", or one that is not a text'),
        (['{"question": "x", "answer": "it is 7"}'], 'data.jsonl:1: the answer does not end with "#### " and a number'),
        ([""], "data.jsonl: no problems in it"),
    ],
)
def test_bad_line_is_named(tmp_path, lines, message):
    good = json.dumps(dataclasses.asdict(SOLVE[0]))
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(good if line == "{good}" else line for line in lines))
    with pytest.raises(ValueError, match=r"data\.jsonl") as error:
        problems.read_problems(file)
    assert message in str(error.value)


def test_problems_are_read_as_they_are_written(tmp_path):
    # U+2028 ends a line for str.splitlines and is an ordinary character in JSON; \r\n is what Windows writes.
    items = [Problem("a\u2028b\n?", "#### 1"), Problem("ü", "x\n#### -1,000")]
    file = tmp_path / "data.jsonl"
    text = "\r\n".join(json.dumps(dataclasses.asdict(item), ensure_ascii=False) for item in items)
    file.write_text(text + "\r\n", encoding="utf-8", newline="")
    assert problems.read_problems(file) == items


# What agreement is.


def _judge(logits: list[float]) -> agreement.Judge:
    return lambda _problem, _position, token, other: agreement.gap_of(logits, token, other)


def test_near_tie_is_counted_and_no_failure():
    logits = [0.0, 5.0, 5.0 - agreement.NEAR_TIE / 2]
    (found,) = agreement.compare([[7, 1, 3]], [[7, 2, 4, 4]], _judge(logits))
    assert (found.problem, found.position, found.tokens, found.near_tie) == (0, 1, (1, 2), True)


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param([0.0, 5.0, 5.0 - 2 * agreement.NEAR_TIE], id="the other is worse"),
        pytest.param([0.0, 5.0 - 2 * agreement.NEAR_TIE, 5.0], id="the reference is worse"),
        # Two wrong tokens that are equally bad are no excuse for each other.
        pytest.param([5.0, 1.0, 1.0], id="both are far from the best"),
    ],
)
def test_real_difference_is_no_near_tie(logits):
    (found,) = agreement.compare([[1]], [[2]], _judge(logits))
    assert not found.near_tie


def test_cell_that_ends_early_is_no_near_tie():
    always_tied = _judge([1.0] * 8)
    found = agreement.compare([[1, 2, 3], [1], [4, 5]], [[1, 2], [1, 6], [4, 5]], always_tied)
    assert [(item.problem, item.position, item.tokens) for item in found] == [(0, 2, (3, None)), (1, 1, (None, 6))]
    assert not any(item.near_tie for item in found)


def test_only_the_first_differing_token_is_judged():
    asked = []

    def judge(*where):
        asked.append(where)
        return 0.0

    agreement.compare([[1, 2, 3], [1, 2]], [[1, 4, 5], [1, 2]], judge)
    assert asked == [(0, 1, 2, 4)]


@pytest.mark.thorough
def test_teacher_measures_the_engines_own_gap(loaded):
    """The gap of the two best tokens is that of the log-probabilities that the engine reports for them."""
    prompt = loaded.tokenizer.encode("One request has one slot, and one slot")
    prefixes = [prompt[:length] for length in (1, 3, len(prompt))]
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2)
    outputs = loaded.generate(prefixes, params, use_tqdm=False)
    # The end of each prompt stands for output that is common.
    teacher = agreement.Teacher(loaded, [prefix[:1] for prefix in prefixes], [prefix[1:] for prefix in prefixes])
    for problem, output in enumerate(outputs):
        (entry,) = output.outputs[0].logprobs
        best, second = sorted(entry, key=lambda token: -entry[token].logprob)
        gap = entry[best].logprob - entry[second].logprob
        # Two paths of float32 on a small model; logits are of the order of 1.
        assert teacher(problem, len(prefixes[problem]) - 1, best, second) == pytest.approx(gap, abs=1e-5)


def _run_of(name: str, dtype: str, *outputs: tuple[str, tuple[int, ...]]) -> CellRun:
    completions = [Completion(text, ids, "stop") for text, ids in outputs]
    return CellRun(Cell(name=name, dtype=dtype), dtype, completions, 2.0)


def test_report_counts_matches_same_answers_and_failures():
    reference = report.report_cell(
        _run_of("one", "float32", ("#### 5", (1, 2)), ("so 2400", (3, 4))), SOLVE, None, None
    )
    assert (reference.strict, reference.flexible) == (0.5, 1.0)
    changed = _run_of("two", "float32", ("#### 5", (1, 2)), ("so 7", (3, 9)))
    judged = report.report_cell(changed, SOLVE, reference, lambda *_: 1.0)
    assert (judged.same_answers, len(judged.differences), len(judged.failures)) == (1, 1, 1)
    tied = report.report_cell(changed, SOLVE, reference, lambda *_: 0.0)
    assert (len(tied.near_ties), tied.failures) == (1, [])
    # bfloat16 may differ; the table says so.
    free = report.report_cell(changed, SOLVE, reference, None)
    assert (len(free.differences), free.failures) == (1, [])
    (complaint,) = script.verdict([reference, judged, tied, free], None)
    assert complaint.startswith("two: 1 of 2 completions differ beyond near ties, first problem 2 at output token 1")
    assert script.verdict([reference, tied, free], 0.5) == []
    assert script.verdict([reference], 0.51) == ["one: strict match 0.5000 is below --floor 0.51"]
    answers, runs = report.table([reference, judged]).split("\n\n")
    above, header, first, _ = answers.splitlines()
    assert (above.split(), header.split()[:2]) == (["strict", "flexible", "same", "same", "near"], ["cell", "dtype"])
    assert "0.500 [0.095, 0.905]" in first
    assert header.index("differ") + len("differ") == len(first)
    header, first, _ = runs.splitlines()
    assert header.index("tokens/s") + len("tokens/s") == len(first)


def test_tables_fit_120_columns():
    longest = max(cells.BY_NAME, key=len)
    run = _run_of(longest, "bfloat16", ("#### 5", (1, 2)), ("so 2400", (3, 4)))
    reports = [report.report_cell(run, SOLVE, None, None)]
    reports.append(report.report_cell(run, SOLVE, reports[0], lambda *_: 0.0))
    assert max(map(len, report.table(reports).splitlines())) <= 120


@pytest.mark.thorough
def test_device_loop_ends_where_the_engine_ends(loaded):
    """With a stop string that one output runs into, one that it holds at its end, and no stop string."""
    prompts = [loaded.tokenizer.encode(problem.question) for problem in SOLVE]
    free = Workload(prompts=prompts, max_tokens=24, max_num_seqs=2)
    engine, loop = Cell(name="engine"), Cell(name="loop", driver="device loop")
    whole = cells.run_cell(engine, "float32", loaded, free).completions
    assert cells.run_cell(loop, "float32", loaded, free).completions == whole
    long = whole[0].text
    middle = long[len(long) // 2 :][:2]
    stopping = dataclasses.replace(free, stop=(middle,))
    expected = cells.run_cell(engine, "float32", loaded, stopping).completions
    assert cells.run_cell(loop, "float32", loaded, stopping).completions == expected
    assert expected[0].text == long[: long.index(middle)]
    assert expected[0].finish_reason == "stop"


def test_completion_keeps_its_eos_and_shows_none(loaded):
    (eos, *_) = loaded.eos_token_ids
    tokens = loaded.tokenizer.encode("One slot")
    ended = cells.close([*tokens, eos], loaded.tokenizer, Workload(prompts=[], max_tokens=99), loaded.eos_token_ids)
    assert ended == Completion("One slot", (*tokens, eos), "stop")
    cut = cells.close(tokens, loaded.tokenizer, Workload(prompts=[], max_tokens=99), loaded.eos_token_ids)
    assert cut == Completion("One slot", tuple(tokens), "length")


def test_cells_have_names_of_their_own_and_fit_their_driver():
    every = [cells.DEFAULT, *cells.MATRIX, *(cell for cell in cells.COVERING if cell not in cells.MATRIX)]
    assert len(cells.BY_NAME) == len(every)
    assert cells.MATRIX[0].dtype == "float32"
    with pytest.raises(ValueError, match="no engine options"):
        Cell(name="x", driver="device loop", options={"seed": 1})
    with pytest.raises(ValueError, match="driver must be one of"):
        Cell(name="x", driver="host loop")


def test_every_two_settings_of_the_cross_meet_in_the_covering_cells():
    def settings(cell):
        return cell.name.removeprefix("f32-").split("-")[:4]

    for first, second in itertools.combinations(range(4), 2):
        meetings = {(settings(cell)[first], settings(cell)[second]) for cell in cells.CROSS}
        assert meetings == {(settings(cell)[first], settings(cell)[second]) for cell in cells.COVERING}
    assert len(cells.CROSS) == 24


def test_keys_of_8_bits_meet_both_dtypes_the_cache_and_drafts():
    found = [cell for cell in cells.MATRIX if cells.rounds_keys(cell)]
    assert {cell.options["kv_cache_dtype"] for cell in found} == {"fp8", "int8"}
    assert {cell.dtype for cell in found} == {"float32", "bfloat16"}
    assert any(cell.repeat for cell in found)
    assert any(map(cells.speculates, found))
    assert cells.MATRIX[0] not in found


def test_weights_of_8_bits_meet_keys_of_8_bits_and_drafts():
    found = [cell for cell in cells.MATRIX if cells.rounds_weights(cell)]
    assert [cells.rounds_keys(cell) for cell in found] == [cells.speculates(cell) for cell in found] == [False, True]


def test_drafts_meet_the_cache_and_the_mixed_layout():
    """In the matrix all three at once, in the covering cells by pairs."""

    def settings(cell):
        _, layout, _, cache, _, drafts = cell.name.split("-")
        return drafts, layout, cache

    found = {settings(cell) for cell in cells.SPECULATING}
    assert found == set(itertools.product(("k1", "k2", "k3"), ("kv", "mixed"), ("fresh", "cached")))
    covering = [settings(cell) for cell in cells.COVERING if cells.speculates(cell)]
    assert {drafts for drafts, layout, _ in covering if layout == "mixed"} == {"k1", "k2", "k3"}
    assert {(drafts, cache) for drafts, _, cache in covering} == set(
        itertools.product(("k1", "k2", "k3"), cells.CACHES)
    )


def test_flags_of_speculation_make_one_cell_of_their_own():
    given = ("--num-speculative-tokens", "2", "--draft-acceptance", "rejection")
    (cell,) = script.choose_cells(script.build_parser().parse_args(given))
    assert (cell.name, cells.speculates(cell)) == ("batched-k2", True)
    assert cell.options == {"num_speculative_tokens": 2, "draft_acceptance": "rejection"}
    assert script.choose_cells(script.build_parser().parse_args(["--num-speculative-tokens", "0"])) == [cells.DEFAULT]


def test_several_devices_do_without_the_device_loop():
    def chosen(*flags):
        return script.choose_cells(script.build_parser().parse_args(["--tensor-parallel-size", "2", *flags]))

    assert {cell.driver for cell in chosen("--pairwise")} == {"engine"}
    assert len(chosen("--matrix")) == len(cells.MATRIX) - 2
    assert chosen("--cells", "f32-batched") == [cells.BY_NAME["f32-batched"]]
    with pytest.raises(
        ValueError, match="--cells: f32-device-loop runs on one device, got --tensor-parallel-size above"
    ):
        chosen("--cells", "f32-batched,f32-device-loop")


def test_engines_of_cells_are_shared_out_as_the_parameters_are():
    loaded = SimpleNamespace(config=EngineConfig(dtype="float32", tensor_parallel_size=4, enable_expert_parallel=True))
    config = cells._engine_config(cells.DEFAULT, loaded, Workload(prompts=[[1]], max_tokens=8))
    assert (config.tensor_parallel_size, config.enable_expert_parallel) == (4, True)


ENGINES = [cell for cell in cells.BY_NAME.values() if cell.driver == "engine"]


@pytest.mark.parametrize("cell", ENGINES, ids=lambda cell: cell.name)
def test_engine_of_every_cell_is_valid_and_holds_the_workload(cell, loaded):
    work = Workload(prompts=[[1] * 700, [1]], max_tokens=256, max_num_seqs=4)
    config = cells._engine_config(cell, loaded, work)
    assert config.max_model_len >= 956
    assert config.max_num_seqs == (cell.max_num_seqs or 4)
    assert len(config.prefill_buckets) == len(config.decode_buckets) == 1


# The command.


def test_help_explains_by_examples(capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "few-shot", "near tie", "f32-one-by-one", "Exit status: 0"):
        assert word in text


def test_parsing_imports_no_jax():
    code = "import sys; sys.path.append('scripts'); import eval; eval.build_parser(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "{tmp}/none", "--data", "{data}"], "no such directory; a model is a local"),
        (["--model", "{model}"], "no --data: pass a file"),
        (["--model", "{model}", "--data", "{tmp}/none.jsonl"], "none.jsonl: No such file or directory"),
        (["--model", "{model}", "--data", "{data}"], "no --shots: pass a file"),
        (["--model", "{model}", "--data", "{data}", "--shots", "{shots}"], "5 shots are wanted, and 2 problems"),
        (["--model", "{model}", "--data", "{data}", "--form", "plain", "--num-shots", "2"], "plain has no place"),
        (["--model", "{model}", "--data", "{data}", "--no-thinking"], "--no-thinking needs --form chat"),
        (["--model", "{model}", "--data", "{data}", "--limit", "0"], "--limit must be at least 1"),
        (["--model", "{model}", "--data", "{data}", "--floor", "95"], "--floor must be in [0, 1], got 95"),
        (["--model", "{model}", "--data", "{data}", "--cells", "f32"], "no cell 'f32'; allowed: batched, f32-one"),
        (["--model", "{model}", "--data", "{data}", "--cells", "batched", "--matrix"], "give one of them"),
        (["--model", "{model}", "--data", "{data}", "--pairwise", "--matrix"], "give one of them"),
        (["--pairwise", "--num-speculative-tokens", "2"], "--pairwise and --cells say themselves what drafts"),
        (["--num-speculative-tokens", "8"], "num_speculative_tokens must be at most 7, got 8"),
        (["--adaptive-speculation"], "--adaptive-speculation needs --num-speculative-tokens above 0"),
        (["--model", "{model}", "--data", "{data}", "--brief"], "--brief needs --output FILE"),
        (["--model", "{model}", "--data", "{data}", "--output", "{tmp}/none/x.json"], "no such directory"),
        (["--model", "{model}", "--data", "{data}", "--memory-fraction", "2", "--num-shots", "0"], "(0, 1], got 2"),
        (["--model", "{model}", "--data", "{data}", "--num-shots", "0", "--max-tokens", "5000"], "context of 4096"),
    ],
)
def test_mistake_is_one_line_and_status_2(capsys, random_model, files, tmp_path, given, message):
    places = {"tmp": tmp_path, "model": random_model, **files}
    assert script.main([flag.format_map(places) for flag in given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("eval.py: error: ")
    assert err.count("\n") == 1


@pytest.mark.thorough
def test_cells_of_one_dtype_agree_and_the_result_is_complete(capsys, flags, tmp_path):
    output = tmp_path / "result.json"
    assert script.main([*flags, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    told = [re.sub(r"\d+ s$", "S", line) for line in err.splitlines()]
    assert told[:3] == [
        "loading the model in float32",
        "f32-batched (float32): compiling, S",
        "f32-batched (float32): answering, S",
    ]
    assert told[-1] == "f32-device-loop (float32): 2 of 2 answers, strict match 0.000, S"
    named = [line.split()[0] for line in out.splitlines() if line.startswith(("cell", "f32"))]
    assert named == ["cell", "f32-batched", "f32-device-loop"] * 2
    result = json.loads(output.read_text())
    assert (result["complete"], result["partial_cell"], result["not_run"]) == (True, None, [])
    assert {"model", "device", "jax", "gdnjax", "form", "max_tokens", "near_tie"} <= set(result["settings"])
    assert [item["prompt"] for item in result["problems"]] == [problem.question for problem in SOLVE]
    first, second = result["cells"]
    assert first["outputs"] == second["outputs"]
    assert (second["same_tokens"], second["same_answers"], second["failures"]) == (2, 2, 0)
    assert first["output_tokens"] == sum(len(item["token_ids"]) for item in first["outputs"]) <= 16
    assert first["strict_match"]["of"] == 2
    assert np.isfinite(first["tokens_per_second"])


def _comparison(out: str, cell: str) -> list[str]:
    """Same answers, same tokens, near ties and differ of a cell's line in the first table."""
    return next(line for line in out.splitlines() if line.startswith(cell)).split()[-4:]


@pytest.mark.thorough
def test_limit_takes_the_first_problems_and_a_floor_fails_noise(capsys, flags, tmp_path):
    output = tmp_path / "result.json"
    # The later --cells wins: the default cell's name, in the checkpoint's dtype.
    status = script.main([*flags, "--cells", "batched", "--limit", "1", "--floor", "0.95", "--output", str(output)])
    out, err = capsys.readouterr()
    assert status == 1
    assert err.endswith("\neval.py: batched: strict match 0.0000 is below --floor 0.95\n")
    result = json.loads(output.read_text())
    assert [item["question"] for item in result["problems"]] == [SOLVE[0].question]
    assert result["cells"][0]["dtype"] == "float32"
    assert [line.split()[0] for line in out.splitlines() if line.startswith("batched")] == ["batched"] * 2


def test_wrong_token_in_one_cell_is_status_1(capsys, flags, monkeypatch):
    drive = cells.DRIVERS["device loop"]

    def faulty(cell, dtype, loaded, work, watcher):
        run = drive(cell, dtype, loaded, work, watcher)
        tokens = list(run.completions[1].token_ids)
        tokens[3] = (tokens[3] + 1) % loaded.model.vocab_size
        run.completions[1] = dataclasses.replace(run.completions[1], token_ids=tuple(tokens))
        return run

    monkeypatch.setitem(cells.DRIVERS, "device loop", faulty)
    assert script.main(flags) == 1
    out, err = capsys.readouterr()
    message = "eval.py: f32-device-loop: 1 of 2 completions differ beyond near ties, first problem 2 at output token 3"
    assert f"\n{message}" in err
    assert _comparison(out, "f32-device-loop") == ["2/2", "1/2", "0", "1"]


@pytest.fixture
def interruptible():
    """Whoever was started in the background ignores SIGINT, tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.thorough
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status", "brief"), [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)])
def test_interrupted_run_leaves_what_it_has(capsys, flags, monkeypatch, tmp_path, number, status, brief):
    """The cell that had ended, and one of two answers of the one that was running."""
    output = tmp_path / "result.json"
    done = Progress.done

    def interrupt(progress, problem, completion):
        if progress.name == "f32-device-loop" and problem == 1:
            os.kill(os.getpid(), number)
        done(progress, problem, completion)

    monkeypatch.setattr(Progress, "done", interrupt)
    names = ("--cells", "f32-batched,f32-device-loop,bf16-batched")
    assert script.main([*flags, *names, "--output", str(output), *(["--brief"] if brief else [])]) == status
    out, _ = capsys.readouterr()
    named = [line.split()[0] for line in out.splitlines() if line.startswith(("cell", "f32", "partial"))]
    assert named == ["cell", "f32-batched"] * 2 + ["partial:"]
    last = "partial: 1 of 3 cells, and of f32-device-loop 1 of 2 answers, strict match 0.000"
    assert out.splitlines()[-1] == last
    result = json.loads(output.read_text())
    assert (result["complete"], result["not_run"]) == (False, ["bf16-batched"])
    (whole,), part = result["cells"], result["partial_cell"]
    assert (part["name"], part["answers"], part["of"]) == ("f32-device-loop", 1, 2)
    assert part["strict_match"]["of"] == 1
    if not brief:
        (answer,) = part["outputs"]
        assert answer.pop("problem") == 0
        assert answer == whole["outputs"][0]


@pytest.mark.thorough
def test_file_is_written_while_a_cell_runs(flags, monkeypatch, tmp_path):
    """Who is killed without a word has it."""
    output = tmp_path / "result.json"
    monkeypatch.setattr(evaluation.progress, "EVERY_S", 0.0)
    found = []
    done = Progress.done

    def look(progress, problem, completion):
        done(progress, problem, completion)
        result = json.loads(output.read_text())
        found.append((len(result["cells"]), result["partial_cell"]["name"], result["partial_cell"]["answers"]))

    monkeypatch.setattr(Progress, "done", look)
    assert script.main([*flags, "--output", str(output)]) == 0
    one, other = "f32-batched", "f32-device-loop"
    assert found == [(0, one, 1), (0, one, 2), (1, other, 1), (1, other, 2)]


@pytest.mark.thorough
def test_parameters_are_loaded_once_for_each_dtype(capsys, flags, monkeypatch):
    loads = []
    load = cells.load

    def counted(directory, dtype, progress=False, **options):
        loads.append(dtype)
        return load(directory, dtype, progress, **options)

    monkeypatch.setattr(cells, "load", counted)
    # float32 first, whatever the order: the others are compared with it.
    names = "bf16-batched,f32-batched,f32-device-loop,batched"
    assert script.main([*flags, "--cells", names, "--max-tokens", "4"]) == 0
    assert loads == ["float32", "bfloat16"]
    out = capsys.readouterr().out
    named = [line.split()[0] for line in out.splitlines() if line.startswith(tuple(names.split(",")))]
    assert named == names.split(",") * 2
    assert _comparison(out, "f32-batched") == ["-", "-", "-", "-"]
    # Nobody judges a bfloat16 cell; float32 ones are judged, the default cell among them.
    others = ("bf16-batched", "f32-device-loop", "batched")
    assert [_comparison(out, cell)[2] for cell in others] == ["-", "0", "0"]


@pytest.mark.thorough
def test_weights_of_8_bits_are_loaded_apart_and_not_judged(capsys, flags):
    """Named first they are computed last: they are compared with the plain cell."""
    assert script.main([*flags, "--cells", "f32-weights-fp8,f32-batched", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert _comparison(printed.out, "f32-batched") == ["-", "-", "-", "-"]
    assert _comparison(printed.out, "f32-weights-fp8")[2] == "-"
    assert "made float8_e4m3fn by row" in printed.err


def test_embedded_model_brings_its_own_problems():
    packaged = problems.problem_file("tiny", None, "problems.jsonl", "--data")
    assert packaged == model_directory("tiny") / "problems.jsonl"
    assert len(problems.read_problems(packaged)) == 500
    assert problems.problem_file("tiny", "mine.jsonl", "problems.jsonl", "--data") == pathlib.Path("mine.jsonl")
    arguments = script.build_parser().parse_args([])
    script.check_arguments(arguments)
    assert (arguments.form, arguments.num_shots) == ("plain", 0)
