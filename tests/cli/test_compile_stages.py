"""gdnjax/cli/compile_stages.py counts time, not events."""

import time

from gdnjax.cli.compile_stages import STAGES, CompileStages, length


def test_length_of_overlapping_spans_counts_once():
    assert length([]) == 0.0
    assert length([(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (5.0, 6.0)]) == 4.0


def test_stages_add_up_to_the_time_in_which_something_was_compiled(monkeypatch):
    stages = CompileStages()

    def ended(stage, begin, end):
        monkeypatch.setattr(time, "monotonic", lambda: end)
        stages.add(STAGES[stage], end - begin, fun_name="f")

    # A trace within a trace, one within a lowering, and two threads in XLA.
    ended("trace", 1.0, 2.0)
    ended("trace", 0.0, 3.0)
    ended("trace", 4.0, 5.0)
    ended("lowering", 3.0, 6.0)
    ended("xla", 6.0, 8.0)
    ended("xla", 6.0, 9.0)
    stages.add("/jax/something/else", 1.0)
    assert stages.seconds(0.0, 10.0) == {"trace": 3.0, "lowering": 3.0, "xla": 3.0}
    # Only what lies between the two times.
    assert stages.seconds(2.0, 3.5) == {"trace": 1.0, "lowering": 0.5, "xla": 0.0}
