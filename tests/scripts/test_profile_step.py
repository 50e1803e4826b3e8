"""scripts/profile_step.py: the kernels of a profile, the table of them, and a run where a device has none."""

import json

import profile_step as script
import pytest
from jax.profiler import ProfileData

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EVENTS = "".join(
    f"events {{ metadata_id: {kernel} duration_ps: {1000 * nanoseconds} }} "
    for kernel, nanoseconds in ((1, 2000), (1, 4000), (2, 600), (3, 3400))
)
NAMES = "".join(
    f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }} '
    for i, name in ((1, "fusion.3"), (2, "fusion_12"), (3, "gated_delta_rule_decode"))
)
PROFILE = f"""
planes {{ name: "/device:GPU:0" {NAMES}
  lines {{ name: "Stream #13(Compute)" {EVENTS} }}
  lines {{ name: "XLA Ops" {EVENTS} }} }}
planes {{ name: "/host:CPU" {NAMES} lines {{ name: "Stream #1" {EVENTS} }} }}
"""


@pytest.fixture
def profile(tmp_path):
    """As the profiler leaves it: a stream of a device, the same work by op, and threads of the host."""
    file = tmp_path / "plugins" / "profile" / "now" / "host.xplane.pb"
    file.parent.mkdir(parents=True)
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(PROFILE))
    return tmp_path


def test_kernels_are_those_of_the_devices_streams(profile):
    found = script.kernels_of(str(profile))
    assert {name: count for name, (count, _) in found.items()} == {
        "fusion.3": 2,
        "fusion_12": 1,
        "gated_delta_rule_decode": 1,
    }
    assert found["fusion.3"][1] == pytest.approx(6e-6)


def test_kernels_of_several_devices_are_the_mean(profile):
    """Each rank of a step runs them all."""
    one = script.kernels_of(str(profile))
    file = profile / "plugins" / "profile" / "now" / "host.xplane.pb"
    second = PROFILE.replace("GPU:0", "GPU:1")
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(PROFILE + second))
    both = script.kernels_of(str(profile))
    assert both.keys() == one.keys()
    assert all(both[name] == pytest.approx(one[name]) for name in one)


def test_kernels_of_no_profile_are_none(tmp_path):
    assert script.kernels_of(str(tmp_path)) == {}


def test_table_adds_up_kinds_a_step_and_sorts_them(profile):
    head, *rows = script.table("decode", script.kernels_of(str(profile)), steps=2).splitlines()
    assert head == "decode: 0.01 ms of kernels a step"
    assert [row.split() for row in rows] == [
        ["3.3", "us", "66.0%", "1.5", "x", "fusion"],
        ["1.7", "us", "34.0%", "0.5", "x", "gated_delta_rule_decode"],
    ]


def test_table_is_cut_where_it_was_told_to_be(profile):
    assert len(script.table("decode", script.kernels_of(str(profile)), steps=2, most=1).splitlines()) == 2


def test_table_of_no_kernels_has_no_times():
    assert script.table("decode", {}, steps=8) == "decode: the profile has no kernels of a device"


@pytest.mark.thorough
def test_run_without_kernels_says_so_and_reports_the_clock(capsys, tmp_path):
    """On a CPU no stream of a device is in the profile."""
    target = tmp_path / "profile.json"
    flags = ["--config", "tiny", "--layers", "4", "--requests", "2", "--input-len", "16", "--steps", "4"]
    flags += ["--max-num-batched-tokens", "64", "--kernels", "reference", "--output", str(target)]
    assert script.main(flags) == 0
    out = capsys.readouterr().out
    for what in ("prefill", "decode"):
        assert f"{what}: the profile has no kernels of a device" in out
    assert "us" not in out.split()
    clock, host = out.splitlines()[-2:]
    assert clock.endswith("ms by the clock")
    assert host.startswith("the host in it: plan ")
    figures = json.loads(target.read_text())
    assert figures["decode"] == figures["prefill"] == {}
    assert figures["busy"] is None
    assert figures["wall"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--quantize-activations"], "--quantize-activations is of weights of --quantization fp8_per_channel"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--layers", "0"], "--layers must be at least 1"),
        (["--input-len", "-3"], "--input-len must be at least 1"),
        (["--steps", "many"], "invalid int value"),
    ],
)
def test_flags_that_no_profile_can_have_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kernels", "triton"], "got 'triton'"),
        (["--state-layout", "vv"], "state_layout"),
        (["--memory-fraction", "2"], "--memory-fraction must be in (0, 1]"),
        (["--config", "no-such"], "no such file"),
        (["--spec-acceptance-length", "2"], "spec_acceptance_length"),
        (["--layers", "99"], "--layers must be between 1 and the model's 32, got 99"),
        ([], "JAX runs on a CPU, and this is 16.7 GiB of weights and 131072 prompt tokens; there it takes 1 GiB"),
        (["--config", "tiny"], "32768 at most: --config tiny --requests 8 --input-len 64"),
        (["--output", "/nowhere/profile.json"], "no such directory"),
    ],
)
def test_settings_that_cannot_be_are_errors_before_a_model_is_made(flags, said, capsys, monkeypatch):
    from gdnjax.cli.bench.serving import engines

    monkeypatch.setattr(engines, "load_random", lambda *_, **__: pytest.fail("a model was made"))
    assert script.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("profile_step.py: error: ")
    assert said in err


def test_engines_take_prompts_as_long_as_was_asked_for(monkeypatch):
    """And longer than engines take where nobody says."""
    import gdnjax
    from gdnjax.cli.bench.serving import engines

    class Stop(Exception):
        pass

    def engine(model, params, config, *, max_model_len):
        raise Stop(config.length_within(max_model_len))

    monkeypatch.setattr(engines, "load_random", lambda *_, **__: engines.Loaded(None, {}))
    monkeypatch.setattr(gdnjax.LLM, "from_model", engine)
    monkeypatch.setattr(script, "exit_status", lambda _, run: run())
    with pytest.raises(Stop) as stopped:
        script.main(["--config", "tiny", "--requests", "1", "--input-len", "9000"])
    (length,) = stopped.value.args
    assert length > 9000
