"""What a person asks the launcher for: a whole cluster on one machine, checked before any process starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from control_plane.options import (
    ADMIN_PORT,
    GRPC_PORT,
    HTTP_PORT,
    EdgeOptions,
    EngineOptions,
    LogFormat,
    LogLevel,
    OptionError,
    require_at_least,
    require_drain,
    require_ports,
)
from engine.base import limits
from engine.types import Role

_ROLES: Final[Mapping[str, frozenset[Role]]] = {
    "prefill": frozenset({Role.PREFILL}),
    "decode": frozenset({Role.DECODE}),
    "mixed": frozenset({Role.PREFILL, Role.DECODE}),
    "encode": frozenset({Role.ENCODE}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One worker process to start: its name in logs and metrics, and the roles it begins with."""

    name: str
    roles: frozenset[Role]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """A whole cluster on one machine (`triptych serve`)."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    edge: EdgeOptions = field(default_factory=EdgeOptions)
    host: str = "127.0.0.1"
    port: int = HTTP_PORT
    admin_host: str = "127.0.0.1"
    admin_port: int = ADMIN_PORT
    grpc_port: int = GRPC_PORT
    encode: int | None = None  # None: one, if the model sees and there are prefill workers (`fitted`)
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    drain_timeout_s: float = limits.DRAIN_TIMEOUT_MS / 1_000
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.AUTO

    def __post_init__(self) -> None:
        require_ports({"port": self.port, "admin-port": self.admin_port, "grpc-port": self.grpc_port})
        require_drain(self.drain_timeout_s)
        for option, count in (pools := self._pools).items():
            require_at_least(option, count, 0)
        if not self.mixed and not (self.prefill and self.decode):
            missing = "decode" if self.prefill else "prefill"
            raise OptionError(missing, "a request needs a prefill and a decode worker, or a mixed one that does both")
        if (count := sum(pools.values())) > limits.WORKERS_MAX:
            most = max(pools, key=lambda pool: pools[pool])
            raise OptionError(most, f"{count} workers; at most {limits.WORKERS_MAX} in one cluster")

    @property
    def _pools(self) -> dict[str, int]:
        return {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed, "encode": self.encode or 0}

    @property
    def workers(self) -> tuple[WorkerSpec, ...]:
        """The workers to start, in the order in which cores are handed out: where these are too few, an encode worker
        shares one with a prefill worker, which is who waits for it, and not with those that decode."""
        return tuple(
            WorkerSpec(name=f"{pool}-{i}", roles=_ROLES[pool])
            for pool, count in self._pools.items()
            for i in range(count)
        )


def fitted(options: ServeOptions, *, sees: bool) -> ServeOptions:
    """With as many encode workers as this model makes sense of, if nobody said how many. Raises `OptionError`."""
    if options.encode and not sees:
        raise OptionError("encode", "is for images, and this model takes none")
    if options.encode is None:
        return replace(options, encode=1 if sees and options.prefill else 0)
    return options
