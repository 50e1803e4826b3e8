"""What other processes than process 0 run, where several share a model: they follow the engine that process 0 has."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from gdnjax.config import DEFAULT_MAX_MODEL_LEN, EngineConfig
from gdnjax.models import Model
from gdnjax.serving.opening import Opened, check_model, open_checkpoint, open_model
from gdnjax.serving.processes import Leader, check_same, find_leader, telling
from gdnjax.shapes import Params

Open = contextlib.AbstractContextManager[tuple[Opened, Params]]


def follow(model: str | pathlib.Path, **settings: Any) -> bool:
    """Takes part in the next LLM that process 0 makes of this checkpoint, until that is closed: for every process but
    process 0, each with its own devices and its own copy of `model`.

    The engine's settings are those of process 0; what is given here, by EngineConfig's names, must be the same.
    Returns True, or False where process 0 has ended without another LLM. Raises ValueError that names what differs,
    and ProcessLostError where process 0, or another process, is gone or has failed.
    """

    @contextlib.contextmanager
    def opened(config: EngineConfig, _: int | None, leader: Leader) -> Iterator[tuple[Opened, Params]]:
        fields = dataclasses.asdict(config)
        if unknown := [name for name in settings if name not in fields]:
            raise ValueError(f"unknown engine options: {', '.join(unknown)}; allowed: {', '.join(fields)}")
        check_same({name: fields[name] for name in settings}, settings)
        with open_checkpoint(model, config, leader) as checkpoint:
            yield checkpoint, checkpoint.load(progress=False)[0]

    return _follow(opened)


def follow_model(model_for: Callable[[EngineConfig], tuple[Model, Params]]) -> bool:
    """The same for an LLM that process 0 makes by `LLM.from_model`: `model_for` is given the engine's settings, and
    returns what process 0 has given there. Parameters are global arrays, of which this process has its part.
    """

    @contextlib.contextmanager
    def opened(config: EngineConfig, context: int | None, leader: Leader) -> Iterator[tuple[Opened, Params]]:
        model, params = model_for(config)
        check_model(model, config)
        yield open_model(model, params, config, context or DEFAULT_MAX_MODEL_LEN, leader)

    return _follow(opened)


def _follow(opened: Callable[[EngineConfig, int | None, Leader], Open]) -> bool:
    leader = find_leader()
    if leader is None:
        return False
    with telling(leader):
        config, context = leader.engine()
        with opened(config, context, leader) as (found, params):
            runner = found.runner(params)
        leader.follow(runner)
        runner.close()
    leader.close()
    return True
