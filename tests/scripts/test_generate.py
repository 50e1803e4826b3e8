"""scripts/generate.py as its users meet it: output, notes, and one line for every mistake."""

import argparse
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from safetensors.numpy import load_file, save_file

from gdnjax import LLM, RequestMetrics, RequestOutput
from gdnjax.assets import model_directory
from gdnjax.cli import command, generate
from gdnjax.serving.tokenizer import Tokenizer
from scripts import generate as script

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"
GOLDEN = ROOT / "tests" / "golden" / "parity" / "qwen3_5"


def _arguments(*flags: str) -> argparse.Namespace:
    return generate.build_parser().parse_args(flags)


def _run(capsys, *flags: str) -> tuple[str, str]:
    """stdout and stderr of a run that succeeds."""
    status = script.main(list(flags))
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def test_help_explains_by_examples(capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "--chat", "-p -", "XLA_PYTHON_CLIENT_MEM_FRACTION", "embedded", "130"):
        assert word in text


def test_parsing_imports_no_jax():
    code = "import sys; from gdnjax.cli import generate; generate.build_parser(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_flag_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--no-such-flag"])
    assert end.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


REGEX = pytest.param(
    ["--model", "{model}", "x", "--regex", "[a"], "structured_outputs.regex is no grammar: ", marks=pytest.mark.thorough
)
"""Found out by the engine, when its steps have been compiled."""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{tmp}/none", "-p", "x"], "no such directory; a model is a local checkpoint directory"),
        (["--model", "{tmp}", "-p", "x"], "no config.json here"),
        (["--model", "{golden}", "-p", "x"], "no tokenizer here"),
        (["--model", "{model}"], "no prompt: give PROMPT or -p TEXT"),
        (["--model", "{model}", "-p", ""], "prompt 1 is empty"),
        (["--model", "{model}", "--prompts-file", "{none}"], "none.jsonl holds no prompt"),
        (["--model", "{model}", "-p", "-", "-p", "-"], "stdin can be read once"),
        (["--model", "{model}", "-p", "x", "--prompts-file", "{tmp}/none.txt"], "none.txt: No such file or directory"),
        (["--model", "{model}", "-p", "x", "--chat", "--ignore-chat-template"], "contradicts --chat"),
        (["--model", "{model}", "-p", "x", "--top-p", "3"], "top_p must be"),
        (["--model", "{model}", "-p", "x", "--max-tokens", "0"], "max_tokens must be"),
        (["-p", "x", "--num-speculative-tokens", "8"], "num_speculative_tokens must be at most 7, got 8"),
        (["-p", "x", "--num-speculative-tokens", "-1"], "num_speculative_tokens must be an integer of at least 0"),
        (["-p", "x", "--draft-head", "fp8"], "--draft-head needs --num-speculative-tokens above 0"),
        (["-p", "x", "--draft-acceptance", "rejection"], "--draft-acceptance needs --num-speculative-tokens above 0"),
        (["-p", "x", "--adaptive-speculation"], "--adaptive-speculation needs --num-speculative-tokens above 0"),
        (["--model", "{model}", "-p", "x", "--num-speculative-tokens", "2"], "needs a model with an MTP head"),
        (["--model", "{model}", "-p", "x", "--memory-fraction", "2"], "--memory-fraction must be in (0, 1]"),
        (["--model", "{model}", "-p", "x", "--tensor-parallel-size", "64"], "needs 64 devices"),
        (["--model", "{model}", "-p", "x", "--enable-expert-parallel"], "needs a model with a mixture of experts"),
        (["--model", "{model}", "-p", "x", "--kernels", "pallas"], "allowed: 'auto', 'reference'"),
        (["--model", "{model}", "-p", "x", "--max-num-seqs", "0"], "max_num_seqs must be"),
        (["--model", "{model}", "-p", "x", "--max-model-len", "5000"], "exceeds the model's context"),
        (["--model", "{model}", "--stats-json", "{tmp}/none/x.json", "x"], "--stats-json {tmp}/none/x.json: no such"),
        (["--model", "{model}", "-p", "\udcff"], "prompt 1 is not UTF-8 text (at character 1)"),
        (
            ["--model", "{model}", "x", "--system-prompt", "a\udcff"],
            "--system-prompt is not UTF-8 text (at character 2)",
        ),
        (["--model", "{model}", "x", "--stop", "\udcff"], "is no valid text"),
        (["--model", "{model}", "x", "--presence-penalty", "3"], "presence_penalty must be a finite number in [-2, 2]"),
        (["--model", "{model}", "x", "--regex", "a", "--choice", "b"], "--regex and --choice contradict one another"),
        REGEX,
        (["--model", "{model}", "x", "--regex", "\udcff"], "--regex is not UTF-8 text (at character 1)"),
        (["--model", "{model}", "x", "--json-schema", "{tmp}/none.json"], "none.json: No such file or directory"),
        (["--model", "{model}", "x", "--json-schema", "{ids}"], "ids.jsonl: json is no JSON text"),
        (["--model", "{model}", "-n", "2000", "x"], "n must be at most 1024"),
        (["--model", "{model}", "x", "--no-thinking", "--ignore-chat-template"], "contradicts --chat"),
        (["--model", "{model}", "--prompts-file", "{ids}"], "ids.jsonl: line 2 has token id 99999, outside the vocab"),
        (["--model", "{model}", "--prompts-file", "{ids}", "--chat"], "ids.jsonl: line 1 is token ids, which no chat"),
        (["--model", "{model}", "-p", "x " * 4096], "the model's context is 4096 tokens"),
        (["--model", "{model}", "-p", "x " * 40, "--max-model-len", "20"], "a length of 20 leaves no room"),
    ],
)
def test_mistake_is_one_line_and_status_2(capsys, random_model, tmp_path, flags, message):
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"prompt_token_ids": [1]}\n{"prompt_token_ids": [1, 99999]}\n')
    none = tmp_path / "none.jsonl"
    none.write_text("\n")
    places = {"tmp": tmp_path, "golden": GOLDEN, "model": random_model, "ids": ids, "none": none}
    assert script.main([flag.format_map(places) for flag in flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message.replace("{tmp}", str(tmp_path)) in err
    # Nothing before the error, whose line is the only one.
    assert err.startswith("generate.py: error: ")
    assert err.count("\n") == 1


def test_structure_without_its_library_is_refused_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(generate, "start", lambda *_: pytest.fail("a model was loaded"))
    assert script.main(["x", "--regex", "a+"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "generate.py: error: --regex needs llguidance, which is not installed: pip install 'gdnjax[structured]'\n"
    )


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--regex", "(", "structured_outputs.regex is no grammar: at 1(8): invalid regex"),
        (
            "--json-schema",
            '{"type": "strin"}',
            "{tmp}/schema.json: structured_outputs.json is no grammar: Invalid",
        ),
    ],
)
def test_what_is_no_grammar_is_refused_before_a_model_is_loaded(capsys, monkeypatch, tmp_path, flag, value, said):
    monkeypatch.setattr(generate, "start", lambda *_: pytest.fail("a model was loaded"))
    if flag == "--json-schema":
        file = tmp_path / "schema.json"
        file.write_text(value)
        value = str(file)
    assert script.main(["x", flag, value]) == 2
    assert said.replace("{tmp}", str(tmp_path)) in capsys.readouterr().err


@pytest.mark.thorough
def test_without_flags_the_embedded_model_tells_a_story(capsys):
    out, note = _run(capsys)
    assert "no prompt: continuing 'Once upon a time'\n" in note
    assert len(out.split()) > 30
    assert out.rstrip().endswith((".", "!", '"'))
    # The note and the closing line.
    assert note.count("\n") == 2


@pytest.mark.thorough
def test_output_is_what_the_flags_ask_for(capsys, tmp_path):
    out, _ = _run(capsys, "Is 7 more than 5?", "--choice", "yes", "--choice", "no")
    assert out in ("yes\n", "no\n")
    out, _ = _run(capsys, "Is 7 more than 5?", "--regex", "[0-9]{3}")
    assert len(out) == 4
    assert out.strip().isdecimal()
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"pens": {"type": "integer"}}, "required": ["pens"]}')
    out, _ = _run(capsys, "How many pens?", "--json-schema", str(schema), "--temp", "0", "--jsonl")
    assert isinstance(json.loads(json.loads(out)["text"])["pens"], int)


@pytest.mark.thorough
def test_embedded_model_counts_apples(capsys):
    question = "A box has 3 apples. 4 more are put in. How many apples are in the box?"
    out, _ = _run(capsys, "--prompt", question, "--temperature", "0")
    assert out.rstrip().endswith("#### 7")


def test_stdin_is_a_prompt_like_any_other(capsys, monkeypatch, random_model, tmp_path):
    flags = ("--model", str(random_model), "--max-tokens", "12", "--stats-json", str(tmp_path / "stats.json"))
    given, note = _run(capsys, *flags, "-p", "One request")
    monkeypatch.setattr(sys, "stdin", io.StringIO("One request\n"))
    read, _ = _run(capsys, *flags, "-p", "-")
    # Sampled, by the checkpoint's own values: runs without a seed repeat each other.
    assert given == read
    assert given.strip()
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert 1 <= stats["generation_tokens"] <= 12
    assert min(stats["prompt_rate"], stats["time_to_first_token"], stats["compile_time"], stats["peak_bytes"]) > 0
    for words in ("prompt ", " tok/s", "generation ", "first token after", "start-up", "peak memory"):
        assert words in note
    assert note.count("\n") == 1


@pytest.mark.thorough
def test_several_prompts_come_under_headers_in_order(capsys, random_model):
    flags = ("--model", str(random_model), "--system-prompt", "Answer.", "--max-tokens", "4", "--temp", "0")
    out, note = _run(capsys, *flags, "-p", "first", "-p", "second\nline")
    assert out.index("==> 1: first <==\n") < out.index("==> 2: second line <==\n")
    assert "generation" in note


@pytest.mark.thorough
@pytest.mark.parametrize("flags", [(), ("--adaptive-speculation",)], ids=["always", "adaptive"])
def test_drafts_compile_nothing_more_after_what_was_prepared(flags, capsys):
    directory = model_directory("tiny")
    arguments = _arguments("--max-tokens", "40", "--num-speculative-tokens", "2", *flags)
    llm, (prompt,) = generate.start(arguments, directory, [generate.Prompt(text="Once upon a time")], generate.Start())
    with llm:
        # With a penalty the adaptive one, which takes a row of the vocabulary and the other sampler.
        params = llm.default_sampling_params(max_tokens=40, ignore_eos=True, presence_penalty=0.1 * len(flags))
        llm.engine.prepare([1], [params])
        compiled = llm.stats()["num_compilations"]
        generate.stream(llm, prompt, params)
        assert llm.stats()["num_compilations"] == compiled
    assert capsys.readouterr().out


@pytest.mark.thorough
def test_long_prompt_streams_what_the_engine_generates_and_compiles_nothing_more(random_model, capsys):
    arguments = _arguments("--model", str(random_model), "--max-tokens", "20")
    clock = generate.Start()
    llm, (prompt,) = generate.start(
        arguments, random_model, [generate.Prompt(text="One request has one slot. " * 160)], clock
    )
    with llm:
        assert len(prompt.token_ids) > llm.config.max_num_batched_tokens
        params = llm.default_sampling_params(max_tokens=20, temperature=0.0, ignore_eos=True)
        llm.engine.prepare([1], [params])
        compiled = llm.stats()["num_compilations"]
        (output,) = generate.stream(llm, prompt, params)
        assert llm.stats()["num_compilations"] == compiled
        (again,) = llm.generate({"prompt_token_ids": prompt.token_ids}, params, use_tqdm=False)
    assert clock.seconds["import"] >= 0
    assert output.outputs[0].token_ids == again.outputs[0].token_ids
    assert len(output.outputs[0].token_ids) == 20
    assert capsys.readouterr().out == f"{output.outputs[0].text}\n"


def test_defaults_are_the_checkpoint_s_own(random_model):
    given = generate.given_sampling(_arguments("--top-k", "5", "--max-tokens", "7"))
    assert given == {"top_k": 5, "max_tokens": 7}
    llm = LLM(random_model, max_num_seqs=1, max_model_len=64, warmup=False, use_tqdm=False)
    params = llm.default_sampling_params(**given)
    llm.close()
    assert (params.top_k, params.top_p, params.temperature, params.max_tokens) == (5, 0.95, 1.0, 7)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (0, "shared_noise", False)),
        (("--num-speculative-tokens", "0"), (0, "shared_noise", False)),
        (("--num-speculative-tokens", "3"), (3, "shared_noise", False)),
        (
            ("--num-speculative-tokens", "2", "--draft-acceptance", "rejection", "--adaptive-speculation"),
            (2, "rejection", True),
        ),
    ],
)
def test_flags_of_speculation_reach_the_engine(flags, expected):
    config = generate.fit_engine(_arguments(*flags), [70], 4096)
    assert (config.num_speculative_tokens, config.draft_acceptance, config.adaptive_speculation) == expected


def _output(**counted):
    metrics = RequestMetrics(
        arrival_time=0.0, first_token_time=1.0, finished_time=3.0, num_prompt_tokens=5, num_output_tokens=9, **counted
    )
    return RequestOutput("0", None, (), None, (), finished=True, metrics=metrics)


@pytest.mark.parametrize("count", [1, 2])
def test_closing_line_says_what_became_of_the_drafts(count):
    rest = {"import_time": 1.0, "load_time": 1.0, "compile_time": 1.0, "peak_bytes": 1, "peak_of": "of a device"}
    outputs = [_output(num_draft_tokens=12, num_accepted_draft_tokens=6, num_decode_steps=4)] * count
    drafting = generate.Stats(**generate.measure(outputs), **rest)
    assert (drafting.draft_acceptance_rate, drafting.mean_acceptance_length) == (0.5, 2.5)
    assert " tok/s | drafts accepted 50%, 2.5 tokens a step | first token after " in str(drafting)
    plain = generate.Stats(**generate.measure([_output()] * count), **rest)
    assert (plain.draft_acceptance_rate, plain.mean_acceptance_length) == (None, None)
    assert str(plain) == str(drafting).replace("drafts accepted 50%, 2.5 tokens a step | ", "")


@pytest.mark.thorough
def test_drafts_change_nothing_but_the_closing_line(capsys):
    flags = ("-p", "A box has 3 apples. 4 more are put in. How many apples are in the box?", "--temp", "0")
    plain, _ = _run(capsys, *flags)
    drafted, note = _run(capsys, *flags, "--num-speculative-tokens", "2")
    assert drafted == plain
    assert "drafts accepted " in note
    assert note.count("\n") == 1


def test_chat_template_is_applied_on_request_only(random_model):
    tokenizer = Tokenizer.from_directory(random_model)
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    for flags, expected in (
        ((), tokenizer.encode("Hi")),
        (("--ignore-chat-template",), tokenizer.encode("Hi")),
        (("--chat",), tokenizer.apply_chat_template([user])),
        (("--system-prompt", "Be brief."), tokenizer.apply_chat_template([system, user])),
    ):
        assert generate.encode(tokenizer, generate.Prompt(text="Hi"), _arguments(*flags)) == expected


def test_thinking_is_told_to_templates_that_know_it(random_model):
    tokenizer = Tokenizer.from_directory(random_model)
    prompt, user = generate.Prompt(text="Hi"), {"role": "user", "content": "Hi"}
    with pytest.raises(ValueError, match="neither the chat template nor chat knows 'enable_thinking'"):
        generate.encode(tokenizer, prompt, _arguments("--no-thinking"))
    tokenizer.hf.chat_template += "{% if not enable_thinking %}No thinking.{% endif %}"
    for flag, value in (("--thinking", True), ("--no-thinking", False)):
        expected = tokenizer.apply_chat_template([user], enable_thinking=value)
        assert generate.encode(tokenizer, prompt, _arguments(flag)) == expected
        assert ("No thinking." in tokenizer.decode(expected)) is not value


def test_standard_output_that_is_closed_is_told(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert script.main(["x"]) == 2
    assert capsys.readouterr().err == "generate.py: error: standard output is closed\n"


def test_prompts_files_give_one_prompt_a_line(tmp_path):
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("first\n\n  second\n")
    objects.write_text('{"prompt": "first"}\n\n{"prompt": "two\\nlines", "id": 2}\n{"prompt_token_ids": [1, 2]}\n')
    assert [prompt.text for prompt in generate.read_prompts_file(lines)] == ["first", "  second"]
    found = generate.read_prompts_file(objects)
    assert [(prompt.text, prompt.token_ids) for prompt in found] == [("first", []), ("two\nlines", []), (None, [1, 2])]
    assert found[-1].origin == f"{objects}: line 4"


class _Closed:
    """A standard input that fails as the system's does."""

    closed = False

    def __init__(self, error):
        self.error = error

    def read(self):
        raise self.error


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (None, "standard input is closed"),
        (_Closed(OSError(9, "Bad file descriptor")), "standard input cannot be read: Bad file descriptor"),
        (io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"), "standard input is not UTF-8 text"),
    ],
)
def test_standard_input_that_is_no_text_is_named(capsys, monkeypatch, random_model, stdin, message):
    monkeypatch.setattr(sys, "stdin", stdin)
    assert script.main(["--model", str(random_model), "-p", "-"]) == 2
    assert capsys.readouterr().err.startswith(f"generate.py: error: -p -: {message}")


def test_prompts_may_stand_anywhere(tmp_path):
    arguments = generate.build_parser().parse_intermixed_args(["--temp", "0", "a", "-p", "b", "c", "--jsonl"])
    assert (arguments.text, arguments.prompt, arguments.temperature) == (["a", "c"], ["b"], 0)


@pytest.mark.thorough
def test_samples_and_files_come_as_json_lines(capsys, random_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6]}\n')
    flags = ["--model", str(random_model), "One", "--prompts-file", str(prompts), "-n", "2", "--max-tokens", "9999"]
    out, note = _run(capsys, *flags, "--jsonl", "--max-model-len", "16")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [line.get("prompt") for line in lines] == ["One", "One", None, None]
    assert lines[2]["prompt_token_ids"] == [5, 6]
    assert all(line["num_prompt_tokens"] + line["num_output_tokens"] <= 16 for line in lines)
    # What was asked for and cannot be is said.
    assert "--max-tokens 9999: --max-model-len leaves room for 1" in note


@pytest.mark.parametrize(
    "content", ['{"text": "x"}', '"x"', "[1]", "{", '{"prompt": 3}', "\xff", '{"prompt_token_ids": [1, true]}']
)
def test_damaged_prompts_file_is_named(tmp_path, content):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"prompts\.jsonl: line 2: "):
        generate.read_prompts_file(file)


@pytest.mark.parametrize("lengths", [(1,), (64,), (65, 3), (1, 2, 3), (300,) * 20, (3000,)])
@pytest.mark.parametrize("max_tokens", [1, 256, 5000])
def test_engine_holds_the_prompts_or_as_much_as_the_model_can(lengths, max_tokens):
    context = 4096
    config = generate.fit_engine(_arguments("--max-tokens", str(max_tokens)), lengths, context)
    assert config.max_model_len is not None
    assert config.max_model_len >= min(context, max(lengths) + max_tokens)
    assert config.max_model_len <= context
    assert config.max_num_seqs >= min(len(lengths), 8)
    assert config.prefill_buckets == (config.max_num_batched_tokens,)


def test_nearby_prompts_share_their_compiled_shapes():
    flags = _arguments("--max-tokens", "100")
    assert generate.fit_engine(flags, [70], 4096) == generate.fit_engine(flags, [250], 4096)
    assert generate.fit_engine(flags, [5, 5], 4096) == generate.fit_engine(flags, [9, 9, 9], 4096)


@pytest.mark.parametrize(
    ("flags", "already", "expected"),
    [((), None, "0.9"), ((), "0.5", "0.5"), (("--memory-fraction", "0.3"), "0.5", "0.3")],
)
def test_memory_fraction_is_set_for_jax(monkeypatch, flags, already, expected):
    if already is not None:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", already)
    command.prepare_environment(_arguments(*flags).memory_fraction)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == expected


@pytest.mark.parametrize(
    ("gib", "already", "expected"), [(20, None, None), (80, None, "104"), (80, "90", "90"), (0, None, None)]
)
def test_memory_that_may_be_pinned_is_set_for_jax(monkeypatch, gib, already, expected):
    name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    if already is not None:
        monkeypatch.setenv(name, already)
    command.prepare_environment(host_cache_gib=_arguments("--host-cache-gib", str(gib)).host_cache_gib)
    assert os.environ.get(name) == expected
    with pytest.raises(ValueError, match="--host-cache-gib must be a number of GiB, 0 or more, got -1"):
        command.prepare_environment(host_cache_gib=-1)


def test_interrupt_ends_with_status_130(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupted)
    assert script.main(["-p", "x"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.thorough
def test_closed_pipe_ends_without_a_word(random_model):
    command = [sys.executable, str(SCRIPT), "--model", str(random_model), "-p", "One", "--max-tokens", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1), process.stderr.read().decode()
        process.stdout.close()
        # Where compiling takes its time, how far it is.
        said = process.stderr.read().splitlines()
        assert [line for line in said if not line.startswith(b"compiling steps: ")] == []
    assert process.returncode == 141


def _prompts_in(file: pathlib.Path, count: int = 5) -> pathlib.Path:
    lines = [json.dumps({"prompt_token_ids": list(range(4, 8 + index))}) for index in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.thorough
def test_output_file_goes_on_where_it_was_cut_off(capsys, random_model, tmp_path):
    """Drawn samples, so that noise which is not the whole run's would show."""
    prompts, file = _prompts_in(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    flags = ["--model", str(random_model), "--input-file", str(prompts), "--output-file", str(file)]
    flags += ["--max-tokens", "6", "-n", "2", "--temp", "1"]
    out, _ = _run(capsys, *flags)
    whole = file.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert not out
    assert [(line["index"], line["sample"]) for line in lines] == [(i, j) for i in range(5) for j in range(2)]
    assert len({line["text"] for line in lines}) > 5
    # Cut off in the middle of the second sample of the third prompt: that prompt is done anew.
    file.write_bytes(b"\n".join(whole.split(b"\n")[:5]) + b'\n{"index": 2, "sam')
    _, err = _run(capsys, *flags)
    assert "goes on behind 2 prompts" in err
    assert file.read_bytes() == whole
    _, err = _run(capsys, *flags)
    assert "all of 5 prompts are done" in err
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flags, prompts: [*flags, "--temp", "0.5"], "'settings' differs"),
        (lambda flags, prompts: [*flags, "-n", "2"], "'settings' differs"),
        (lambda flags, prompts: _prompts_in(prompts, 2).write_text('{"prompt": "x"}\n') and flags, "'prompt' differs"),
        (lambda flags, prompts: [*flags, "--jsonl"], "--output-file contradicts --jsonl"),
    ],
    ids=["sampling", "samples", "prompts", "two outputs"],
)
def test_output_file_of_another_run_is_left_as_it_is(change, message, capsys, random_model, tmp_path):
    prompts, file = _prompts_in(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    flags = [
        "--model",
        str(random_model),
        "--input-file",
        str(prompts),
        "--output-file",
        str(file),
        "--max-tokens",
        "2",
    ]
    lines = [{"prompt_token_ids": list(range(4, 8 + index))} for index in range(2)]
    given = generate.given_sampling(_arguments(*flags))
    settings = generate.settings(_arguments(*flags), random_model, given)
    with generate.opened(file, lines, 1, settings) as output:
        for _ in lines:
            output.add([{"text": ""}])
    before = file.read_bytes()
    assert script.main(change(flags, prompts)) == 2
    assert message in capsys.readouterr().err
    assert file.read_bytes() == before


def test_settings_tell_weights_and_tokenizers_apart(random_model, tmp_path):
    def named(directory: pathlib.Path, *flags: str) -> str:
        return generate.settings(_arguments("x", *flags), directory, {})

    other = tmp_path / "other"
    shutil.copytree(random_model, other)
    assert named(other) == named(random_model)
    assert named(other, "--tokenizer", "tiny") != named(random_model)
    (file,) = other.glob("*.safetensors")
    tensors = {name: 2 * value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert named(other) != named(random_model)


def test_output_file_has_one_writer(tmp_path):
    file = tmp_path / "out.jsonl"
    with generate.opened(file, [], 1, ""), pytest.raises(ValueError, match="another process"):
        generate.opened(file, [], 1, "").__enter__()


@pytest.mark.parametrize(("count", "flags", "rows"), [(63, (), 8), (64, (), 64), (9, ("--max-num-seqs", "32"), 32)])
def test_rows_are_by_the_number_of_completions(count, flags, rows):
    assert generate.fit_engine(_arguments(*flags), [5] * count, 4096).max_num_seqs == rows
