"""Seconds in which JAX traced, lowered and compiled, as its monitoring events tell. Imports jax late."""

import time

STAGES = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "xla": "/jax/core/compile/backend_compile_duration",
}
"""What each is called by JAX; "xla" is reading from the persistent cache, too."""

Span = tuple[float, float]


class CompileStages:
    """Listens from `listen` on, in this process.

    A function within another is an event within another, kernels are traced while their callers are, and steps are
    compiled by several threads: so it is not durations that are added up, but time in which a stage was under way.
    """

    def __init__(self):
        self._spans: dict[str, list[Span]] = {event: [] for event in STAGES.values()}

    def listen(self) -> None:
        """Begins. There is no end: JAX has no public way to stop listening."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(self.add)

    def add(self, event: str, duration_secs: float, **_: object) -> None:
        """What JAX tells when something has ended."""
        if event in self._spans:
            now = time.monotonic()
            self._spans[event].append((now - duration_secs, now))

    def seconds(self, begin: float, end: float) -> dict[str, float]:
        """Of each stage between two times of time.monotonic. They add up: where several were under way at once, it
        counts as the last of them that is named in STAGES.
        """
        found, later, counted = {}, [], 0.0
        for name, event in reversed(STAGES.items()):
            # A copy: threads may be compiling.
            later += [(max(a, begin), min(b, end)) for a, b in tuple(self._spans[event])]
            covered = length(later)
            found[name] = covered - counted
            counted = covered
        return {name: found[name] for name in STAGES}


def length(spans: list[Span]) -> float:
    """Of what a set of spans covers."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
