"""What a person asks the launcher for: a whole cluster on one machine, checked before any process starts."""

from dataclasses import dataclass, field

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
    encode: int = 0
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    drain_timeout_s: float = limits.DRAIN_TIMEOUT_MS / 1_000
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.AUTO

    def __post_init__(self) -> None:
        require_ports({"port": self.port, "admin-port": self.admin_port, "grpc-port": self.grpc_port})
        require_drain(self.drain_timeout_s)
        for option in ("encode", "prefill", "decode", "mixed"):
            require_at_least(option, getattr(self, option), 0)
        if self.encode:
            raise OptionError("encode", "encode workers (images) are not there yet; leave --encode at 0")
        if not self.mixed and not (self.prefill and self.decode):
            missing = "decode" if self.prefill else "prefill"
            raise OptionError(missing, "a request needs a prefill and a decode worker, or a mixed one that does both")
        pools = {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}
        if (count := sum(pools.values())) > limits.WORKERS_MAX:
            most = max(pools, key=lambda pool: pools[pool])
            raise OptionError(most, f"{count} workers; at most {limits.WORKERS_MAX} in one cluster")

    @property
    def workers(self) -> tuple[WorkerSpec, ...]:
        """The workers to start, in the order in which cores are handed out."""
        pools = (
            ("prefill", self.prefill, frozenset({Role.PREFILL})),
            ("decode", self.decode, frozenset({Role.DECODE})),
            ("mixed", self.mixed, frozenset({Role.PREFILL, Role.DECODE})),
        )
        return tuple(WorkerSpec(name=f"{pool}-{i}", roles=roles) for pool, count, roles in pools for i in range(count))
