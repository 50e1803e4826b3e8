"""How the server is set up: frozen, and validated at construction."""

import dataclasses
import math
import numbers
from typing import Any

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What clients meet. A bad value raises a ValueError that names it.

    served_model_names          what clients may call the model; the first is what answers call it.
    api_keys                    one of them is wanted as a bearer token, but for probes and metrics; empty: none is.
    max_queue                   samples that may wait for a place in the engine; beyond it clients get 429.
    max_body_bytes              of one request; beyond it clients get 413.
    body_timeout                seconds in which a request's body has to arrive.
    request_timeout             seconds that an answer may take, waiting included; None: as long as it takes.
    structure_timeout           seconds of the processor that compiling a structure may take; beyond it clients get 400.
    keep_alive_interval         seconds of silence after which a stream says a comment, so that proxies keep it open.
    shutdown_timeout            seconds for which a server that is to end lets answers finish.
    cors_origins                origins of pages that may call the server ("*": all); empty: none but its own.
    trust_request_chat_template requests may bring a chat_template: a program that runs here, in jinja's sandbox.
    host, port                  where it listens; port 0 is any that is free.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_queue: int = 1024
    max_body_bytes: int = 32 * MIB
    body_timeout: float = 60.0
    request_timeout: float | None = None
    structure_timeout: float = 10.0
    keep_alive_interval: float = 15.0
    shutdown_timeout: float = 30.0
    cors_origins: tuple[str, ...] = ()
    trust_request_chat_template: bool = False
    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        for name in ("served_model_names", "api_keys", "cors_origins"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, str) and value for value in values):
                raise ValueError(f"{name} must be a tuple of non-empty texts, got {values!r}")
        if not self.served_model_names:
            raise ValueError("served_model_names is empty; the model needs a name that clients can call it by")
        if not all(key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            # Without the key itself: messages end in logs.
            raise ValueError("an API key must be of printable ASCII characters without spaces")
        _integer("max_queue", self.max_queue, 0)
        _integer("max_body_bytes", self.max_body_bytes, 1)
        _integer("port", self.port, 0)
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if self.request_timeout is not None:
            _seconds("request_timeout", self.request_timeout)
        for name in ("body_timeout", "structure_timeout", "keep_alive_interval"):
            _seconds(name, getattr(self, name))
        _seconds("shutdown_timeout", self.shutdown_timeout, least=0.0)
        if not self.host:
            raise ValueError("host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 whoever can reach it")


def _integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _seconds(name: str, value: Any, least: float | None = None) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (value <= 0 if least is None else value < least):
        raise ValueError(
            f"{name} must be a number of seconds {'above 0' if least is None else 'from 0 on'}, got {value!r}"
        )
