"""Runs the settings by turns on one workload."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gdnjax.cli.bench.serving import driver, engines, figures, workloads
from gdnjax.cli.bench.serving.engines import Arm, Loaded, Sizes
from gdnjax.cli.bench.serving.figures import Figures
from gdnjax.cli.bench.serving.report import ArmReport
from gdnjax.cli.bench.serving.workloads import Conversation, Spec

if TYPE_CHECKING:
    from gdnjax.sampling_params import SamplingParams
    from gdnjax.serving.llm import LLM


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured. `options` are fields of EngineConfig that all settings share."""

    arms: Sequence[Arm]
    sizes: Sizes
    conversations: Sequence[Conversation]
    options: dict[str, Any]
    temperature: float = 0.0
    repeat: int = 1
    progress: bool = False

    def sampling(self, max_tokens: int) -> "SamplingParams":
        """All output tokens are produced, so that a workload is the same work whatever the model says."""
        from gdnjax.sampling_params import SamplingParams

        return SamplingParams(temperature=self.temperature, max_tokens=max_tokens, ignore_eos=True)


def compare(loaded: Loaded, plan: Plan) -> list[ArmReport]:
    """All repetitions of all settings. Their engines are there at once, so that settings take turns."""
    with contextlib.ExitStack() as stack:
        made = [engines.build(loaded, arm, plan.sizes, plan.options) for arm in plan.arms]
        for llm, _ in made:
            stack.enter_context(llm)
            _rehearse(llm, plan)
        logs: list[list[driver.Log]] = [[] for _ in made]
        for i in range(plan.repeat):
            for arm, (llm, _), own in zip(plan.arms, made, logs, strict=True):
                llm.reset_prefix_cache()
                name = f"{arm.name}, run {i + 1} of {plan.repeat}"
                log = driver.run(llm, plan.conversations, plan.sampling, description=name, progress=plan.progress)
                if log.stats["num_compilations"]:
                    print(f"{name}: steps were compiled while the clock ran", file=sys.stderr)
                own.append(log)
    return [ArmReport(arm, pools, own) for arm, (_, pools), own in zip(plan.arms, made, logs, strict=True)]


def host_work(loaded: Loaded, plan: Plan) -> tuple[dict[str, Figures], int]:
    """What a step costs the host while all requests of the workload decode, and over how many steps. One setting."""
    llm, _ = engines.build(loaded, plan.arms[0], plan.sizes, plan.options)
    with llm:
        _rehearse(llm, plan)
        steps = driver.host_seconds(
            llm, plan.conversations, plan.sampling, description="decoding", progress=plan.progress
        )
    return figures.of_steps(steps), len(steps)


def _rehearse(llm: "LLM", plan: Plan) -> None:
    """Serves a request that the workload does not have: what runs for the first time is slow, compiled or not."""
    first = plan.conversations[0].turns[0]
    spec = Spec(num_requests=1, input_len=len(first.token_ids), output_len=min(2, first.max_tokens), seed=1)
    driver.run(llm, workloads.draw(spec, llm.model.vocab_size), plan.sampling)
