"""What the parts of the server share: its options, the engine, and whether it is leaving."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError
from ..tokenizer import Tokenizer
from .async_engine import AsyncEngine


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server behaves. Raises `ConfigError`.

    api_key          what clients must send; None: anybody may come
    max_body_bytes   of a request
    timeout          seconds that a request may take, waiting and all; None: as long as it needs
    drain_timeout    seconds that requests under way have to finish after a SIGTERM or SIGINT
    """

    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    timeout: float | None = 600.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise ConfigError("the API key is empty: leave it out, or give one.")
        for name, value in (("max_body_bytes", self.max_body_bytes), ("timeout", self.timeout)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} must be above 0.")
        if self.drain_timeout < 0:
            raise ConfigError(f"drain_timeout={self.drain_timeout} must be at least 0.")


@dataclass
class Door:
    """One server. `open` counts requests that are being answered, beside health checks and the like."""

    engine: AsyncEngine
    model: str
    tokenizer: Tokenizer | None = None
    defaults: dict[str, Any] = field(default_factory=dict)  # of sampling, as the checkpoint's authors recommend
    options: ServerOptions = ServerOptions()
    draining: bool = False
    open: int = 0
