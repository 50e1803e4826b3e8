"""gdnjax bench throughput and latency: sections of the engine's benchmark, of a checkpoint; their sizes and errors."""

import json

import pytest

from gdnjax.cli.bench import latency, throughput
from gdnjax.cli.bench.offline import run
from gdnjax.config import ModelConfig
from scripts import make_random_checkpoint

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of two layers, which compile in seconds."""
    directory = tmp_path_factory.mktemp("bench") / "model"
    flags = ["--layers", "2", "--hidden-size", "64"]
    assert make_random_checkpoint.main([str(directory), *flags]) == 0
    return str(directory)


def test_throughput_of_a_checkpoint_is_measured(checkpoint, tmp_path, capsys):
    target = tmp_path / "result.json"
    flags = ["--num-requests", "3", "--input-len", "8", "--output-len", "4", "--max-num-batched-tokens", "64"]
    assert throughput.main(["--model", checkpoint, "--dtype", "float32", *flags, "--output", str(target)]) == 0
    assert "\nthroughput   3 x (8 in, 4 out): " in capsys.readouterr().out
    content = json.loads(target.read_text())
    assert (content["preset"], content["random_weights"], content["dtype"]) == (checkpoint, False, "float32")
    assert list(content["sections"]) == ["throughput"]
    found = content["sections"]["throughput"]["run"]
    assert (found["prompt_tokens"], found["output_tokens"], found["compilations"]) == (24, 12, 0)
    assert found["output_tokens_per_second"] == pytest.approx(12 / found["seconds"])
    # Made for what is measured, and no more.
    (engine,) = content["engines"].values()
    assert (engine["config"]["max_num_seqs"], engine["config"]["max_model_len"]) == (3, 256)
    assert engine["config"]["dtype"] == "float32"


def sizes_of(command, *flags):
    return command.choose_sizes(command.build_parser().parse_args(flags))


def test_defaults_are_smaller_for_the_embedded_model():
    assert sizes_of(throughput).requests == sizes_of(throughput, "--model", "tiny").requests == 16
    assert sizes_of(throughput, "--model", "another").requests == 128
    assert sizes_of(throughput, "--random-weights", "tiny").requests == 128
    assert sizes_of(latency).batches == (8, 1)
    assert sizes_of(latency, "--model", "another").batches == (128, 64, 16, 1)


def test_rows_are_all_requests_or_as_many_as_are_given():
    assert sizes_of(throughput, "--num-requests", "5").batches == (5,)
    assert max(sizes_of(throughput, "--num-requests", "500").batches) == 128
    assert sizes_of(throughput, "--num-requests", "40", "--max-num-seqs", "16").batches == (1, 8, 16)


def test_prompts_of_latency_are_as_long_as_those_that_decode():
    sizes = sizes_of(latency, "--batches", "4,2", "--input-len", "77")
    assert (sizes.prefill_len, sizes.prefill_requests, sizes.rows) == (77, 4, 4)
    arguments = latency.build_parser().parse_args([])
    config = run.read_config(arguments)
    assert isinstance(config, ModelConfig)
    (engine,) = run.choose_engines(arguments, config, sizes, list(latency.SECTIONS), latency.SECTIONS).values()
    # Nothing of longer prompts or of prefixes, which other sections have.
    assert engine.max_model_len == 512


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (throughput, ["--num-requests", "0"], "--num-requests must be at least 1, got 0"),
        (throughput, ["--max-num-seqs", "0"], "--max-num-seqs must be at least 1, got 0"),
        (throughput, ["--max-num-batched-tokens", "0"], "--max-num-batched-tokens must be at least 1, got 0"),
        (
            throughput,
            ["--input-len", "5000"],
            "context of 4096; lower --input-len or --output-len",
        ),
        (throughput, ["--input-len", "3000"], "48000 prompt tokens; there it takes 32768 at most: --num-requests 16"),
        (throughput, ["--model", "tiny", "--random-weights", "tiny"], "leave it or --model out"),
        (throughput, ["--layers", "2"], "--layers is of random weights"),
        (throughput, ["--quantization", "fp8"], "--quantization fp8 is of random weights; of a checkpoint: fp8_per_ch"),
        (
            throughput,
            ["--random-weights", "tiny", "--quantization", "dequantized"],
            "--quantization dequantized is of a checkpoint",
        ),
        (throughput, ["--random-weights", "qwen9"], "qwen9: no such file; a configuration is"),
        (throughput, ["--output", "nowhere/x.json"], "--output nowhere/x.json: no such directory"),
        (latency, ["--batches", "2,0"], "--batches must be at least 1, got 0"),
        (latency, ["--input-len", "4097"], "more than the model's context of 4096; lower --input-len"),
        (latency, ["--model", "nowhere"], "nowhere: no such directory; a model is a local checkpoint directory"),
        (
            latency,
            ["--random-weights", "qwen3.5-9b"],
            "16.7 GiB of weights and 131072 prompt tokens",
        ),
    ],
)
def test_wrong_flag_is_one_line_before_anything_is_loaded(command, flags, message, capsys, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    assert command.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_memory_that_is_too_small_names_the_flags_of_the_command(checkpoint, monkeypatch, capsys):
    from gdnjax import LLM

    def no_room(*_, **__):
        raise MemoryError("7 bytes short")

    monkeypatch.setattr(LLM, "from_model", no_room)
    assert throughput.main(["--model", checkpoint, "--num-requests", "2", "--input-len", "8", "--output-len", "2"]) == 2
    assert "7 bytes short; lower --max-num-seqs, --input-len" in capsys.readouterr().err
