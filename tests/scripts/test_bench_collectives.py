"""scripts/bench_collectives.py: sums over devices, checked before they are timed; its times are nobody's promise."""

import json

import bench_collectives as script
import profile_step
import pytest

SMALL = ["--tensor-parallel-size", "2", "--width", "16", "--rows", "1,3", "--sums", "2", "--runs", "1"]


@pytest.fixture
def kernels(monkeypatch):
    """What the profiler of a GPU tells of two sums: (launches, seconds) by kernel."""
    found = {
        "psum_112_0_fusion_1": (1, 11e-6),
        "psum_113_0_fusion_1": (1, 13e-6),
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": (2, 6e-6),
        "loop_multiply_fusion": (2, 5e-6),
    }
    monkeypatch.setattr(profile_step, "kernels_of", lambda directory: found)


def test_sums_are_timed_by_every_way(kernels, tmp_path, capsys):
    file = tmp_path / "sums.json"
    assert script.main([*SMALL, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert (written["devices"], written["width"]) == (2, 16)
    assert [(one["way"], one["rows"]) for one in written["sums"]] == [
        (way, rows) for rows in (1, 3) for way in ("psum", "scatter-gather")
    ]
    for one in written["sums"]:
        assert one["clock_us"] > 0
        # A sum's share, and nothing of the multiplication.
        assert one["device_us"] == pytest.approx(15)
        assert one["kernels"] == ["ncclDevKernel_AllGather_RING_LL", "psum"]
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_wrong_sums_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr("gdnjax.sharding.psum", lambda x, tp: x)
    assert script.main(SMALL) == 1
    assert "psum of 1 rows: wrong sums" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tensor-parallel-size", "1"], "--tensor-parallel-size must be at least 2, got 1"),
        (["--rows", "1,x"], "--rows is a list of integers like 1,16,128, got '1,x'"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--width", "33"], "--width 33 is no multiple of --tensor-parallel-size 2"),
        (["--sums", "0"], "--sums must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(flags, said, capsys):
    with pytest.raises(SystemExit):
        script.main(flags)
    assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "none" / "figures.json"
    assert script.main(["--json", str(file)]) == 2
    said = capsys.readouterr()
    assert "--json" in said.err
    assert str(file) in said.err
    assert not said.out
