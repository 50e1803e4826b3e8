"""What the server says of itself: models, load, settings."""

import dataclasses
from typing import Any

from gdnjax.serving.server.service import Service
from gdnjax.version import __version__


def models(service: Service) -> dict[str, Any]:
    """OpenAI's list, with max_model_len."""
    return {"object": "list", "data": [model(service, name) for name in service.config.served_model_names]}


def model(service: Service, name: str) -> dict[str, Any]:
    """One of them. Raises ApiError for another name."""
    service.check_model(name)
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "gdnjax",
        "root": service.config.served_model_names[0],
        "parent": None,
        "max_model_len": service.llm.llm.max_model_len,
    }


async def information(service: Service) -> dict[str, Any]:
    """Version, settings and what the engine holds. API keys are left out."""
    llm = service.llm
    settings = dataclasses.asdict(service.config)
    settings["api_keys"] = len(service.config.api_keys)
    return {
        "version": __version__,
        "models": list(service.config.served_model_names),
        "max_model_len": llm.llm.max_model_len,
        "engine_config": _plain(dataclasses.asdict(llm.llm.config)),
        "server_config": settings,
        "stats": _plain(await llm.stats()),
    }


def _plain(value: Any) -> Any:
    """What JSON has: paths and keys become texts."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)
