"""What a person asks one process for: one frozen, checked value per command. Knows no process, no torch, no network.

The command line and launchers build these, processes read them. A combination that cannot work is refused here, in
words meant for the person who typed it (`OptionError`), before any process starts.
"""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from engine.base import limits
from engine.base.keys import is_key
from engine.base.registry import Registry
from engine.batching import batchings
from engine.types import Role
from kv_transfer.codecs import codecs
from kv_transfer.offers import AUTO

MODEL_DEFAULT = "smollm2"  # the test model that `make install` converts; anything else is a checkpoint directory
MODEL_DEMO = (
    "demo-vlm"  # the same with eyes: put together from it and from what the package has (engine.models.demo_vlm)
)
MODEL_ORACLE = "oracle"  # no weights at all: the next token is a digest of every KV byte read

HTTP_PORT = 8000
ADMIN_PORT = 8001
GRPC_PORT = 50051
PORT_MAX = 65_535

# Of RFC 1123, in small letters, as URLs are compared: no scheme, no port, no wildcard.
_HOST_NAME: Final = re.compile(r"(?=.{1,253}\Z)(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9-]{1,63}(?<!-))*")


class OptionError(ValueError):
    """An option, or a combination of options, that cannot work. `option` is the flag's name without dashes."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Dtype(StrEnum):
    """What weights and KV are computed in; `auto` is the checkpoint's own."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Device(StrEnum):
    """Where the model runs and its KV lives."""

    CPU = "cpu"
    CUDA = "cuda"


class ExecutorKind(StrEnum):
    """What runs a step (DESIGN 3)."""

    TORCH = "torch"  # the real model
    ORACLE = "oracle"  # torch-free: any stale or foreign KV byte changes the tokens
    PACED = "paced"  # oracle tokens after a fitted step time


class LogLevel(StrEnum):
    """How much a process says about itself on standard error."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How lines of the log are written."""

    AUTO = "auto"  # pretty on a terminal, JSON elsewhere
    JSON = "json"
    PRETTY = "pretty"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What every worker of a cluster shares: two workers that differ in any of these cannot exchange KV."""

    model: str = MODEL_DEFAULT
    executor: ExecutorKind = ExecutorKind.TORCH
    dtype: Dtype = Dtype.AUTO
    block_size: int = limits.BLOCK_SIZE_TOKENS
    max_model_len: int | None = None  # None: the checkpoint's own
    kv_cache_mib: int | None = None  # None: a share of the machine's free memory
    embedding_cache_mib: int | None = None  # of workers that encode or take embeddings; None: a smaller share
    encode_image_ms: float | None = None  # one image in a paced worker's tower; None: the executor's own
    codec: str = "raw"  # of requests that name none; "auto": the fewest bits within the budget
    kl_budget: float | None = None  # of requests that name none; None: KL_BUDGET, for what was measured
    profile: Path | None = None  # what the model's codecs were calibrated to; None: the packaged one, if any
    layers_per_group: int = limits.LAYERS_PER_GROUP
    step_tokens: int = limits.STEP_TOKENS_MAX
    device: Device = Device.CPU
    batching: str = "sarathi"  # engine.batching
    tbt_slo_ms: float | None = None  # time between two tokens: bounds the steps that hold decodes; None: step_tokens
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        require_at_least("block-size", self.block_size, 1)
        require_at_least("layers-per-group", self.layers_per_group, 1)
        require_at_least("max-num-batched-tokens", self.step_tokens, 1)
        if self.max_model_len is not None:
            require_at_least("max-model-len", self.max_model_len, 2)  # a prompt token and an answer token
        for option, size_mib in (
            ("kv-cache-mib", self.kv_cache_mib),
            ("embedding-cache-mib", self.embedding_cache_mib),
        ):
            if size_mib is not None:
                require_at_least(option, size_mib, 1)
        _require_plugin("batching", batchings, self.batching)
        _require_plugin("codec", codecs, self.codec, AUTO)
        if self.kl_budget is not None and not 0 <= self.kl_budget <= limits.KL_BUDGET_MAX:
            raise OptionError("kl-budget", f"must be from 0 to {limits.KL_BUDGET_MAX:g}, not {self.kl_budget}")
        _require_milliseconds("tbt-slo-ms", self.tbt_slo_ms)
        _require_milliseconds("encode-image-ms", self.encode_image_ms)
        if self.encode_image_ms is not None and self.executor is not ExecutorKind.PACED:
            raise OptionError(
                "encode-image-ms", "is what executor 'paced' takes for an image; others take what they need"
            )
        if self.device is not Device.CPU and self.executor is not ExecutorKind.TORCH:
            raise OptionError("device", f"executor '{self.executor.value}' runs on the cpu only")
        if self.model == MODEL_ORACLE and self.executor is ExecutorKind.TORCH:
            raise OptionError("executor", "model 'oracle' has no weights: use --executor oracle or paced")


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeOptions:
    """What clients meet: who may ask, under which name the model answers, how long they may wait."""

    served_model_name: str | None = None  # None: the checkpoint's own name
    chat_template: Path | None = None  # None: the checkpoint's own
    permit_special_tokens: bool = False  # the names of special tokens inside a prompt's text mean those tokens
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # of one tenant, "default", who is an admin
    api_key_file: Path | None = None  # keys of several tenants (control_plane.router.access.key_file)
    ssl_certfile: Path | None = None  # TLS on every listener; with it comes
    ssl_keyfile: Path | None = None  # its private key, unless it is in the same file
    ssl_ca_certs: Path | None = None  # clients must show a certificate that one of these has signed
    queue_timeout_s: float = limits.QUEUE_TIMEOUT_MS / 1_000  # for a prefill worker; a longer wait is refused at once
    limit_mm_per_prompt: int = limits.IMAGES_MAX  # images of one request, with a model that sees
    allowed_media_domains: tuple[str, ...] = ()  # hosts whose images may be fetched; none: data URLs only

    def __post_init__(self) -> None:
        for option, path in self._files.items():
            if path is not None and not path.is_file():
                raise OptionError(option, f"there is no file '{path}'")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise OptionError("ssl-certfile", "is needed by --ssl-keyfile and --ssl-ca-certs")
        if not all(map(is_key, self.api_keys)):
            raise OptionError("api-key", "a key is made of printable ASCII without spaces")
        if not (math.isfinite(self.queue_timeout_s) and self.queue_timeout_s > 0):
            raise OptionError("queue-timeout", f"must be a number of seconds above 0, not {self.queue_timeout_s}")
        if not 0 <= self.limit_mm_per_prompt <= limits.IMAGES_CEILING:
            allowed = f"from 0 to {limits.IMAGES_CEILING} images"
            raise OptionError("limit-mm-per-prompt", f"must allow {allowed}, not {self.limit_mm_per_prompt}")
        for host in self.allowed_media_domains:
            if not _HOST_NAME.fullmatch(host):
                example = "a host's name in small letters, such as images.example.org"
                raise OptionError("allowed-media-domains", f"must be {example}, not '{host}'")

    @property
    def _files(self) -> dict[str, Path | None]:
        return {
            "chat-template": self.chat_template,
            "api-key-file": self.api_key_file,
            "ssl-certfile": self.ssl_certfile,
            "ssl-keyfile": self.ssl_keyfile,
            "ssl-ca-certs": self.ssl_ca_certs,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """One worker process (`triptych worker`)."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    name: str
    roles: frozenset[Role]
    controller: str  # host:port of the controller to register with
    listen: str = "127.0.0.1:0"  # host:port for links; port 0 lets the kernel choose
    cores: tuple[int, ...] = ()  # cores of the engine thread; empty: wherever the kernel puts it
    threads: int = 1  # of one engine step; never torch's default
    drain_timeout_s: float = limits.DRAIN_TIMEOUT_MS / 1_000
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.AUTO

    def __post_init__(self) -> None:
        require_address("controller", self.controller)
        require_address("listen", self.listen)
        require_at_least("threads", self.threads, 1)
        require_drain(self.drain_timeout_s)
        if not self.roles:
            raise OptionError("role", "a worker begins with at least one role")
        if any(core < 0 for core in self.cores):
            raise OptionError("cores", "core numbers start at 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """One router process (`triptych router`)."""

    controller: str
    engine: EngineOptions = field(default_factory=EngineOptions)  # the model it speaks for, the codec it asks for
    edge: EdgeOptions = field(default_factory=EdgeOptions)
    host: str = "127.0.0.1"
    port: int = HTTP_PORT
    admin_host: str = "127.0.0.1"  # not opened with `host`: that port asks for no key
    admin_port: int = ADMIN_PORT
    grpc_port: int = GRPC_PORT
    drain_timeout_s: float = limits.DRAIN_TIMEOUT_MS / 1_000
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.AUTO

    def __post_init__(self) -> None:
        require_address("controller", self.controller)
        require_ports({"port": self.port, "admin-port": self.admin_port, "grpc-port": self.grpc_port})
        require_drain(self.drain_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """The controller process (`triptych controller`)."""

    listen: str
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.AUTO

    def __post_init__(self) -> None:
        require_address("listen", self.listen)


def require_at_least(option: str, value: int, low: int) -> None:
    if value < low:
        raise OptionError(option, f"must be at least {low}, not {value}")


def _require_milliseconds(option: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise OptionError(option, f"must be a number of milliseconds above 0, not {value}")


def _require_plugin(option: str, registry: Registry[Any], name: str, *others: str) -> None:
    if name not in (known := (*registry.names(), *others)):
        raise OptionError(option, f"must be one of {', '.join(known)}, not '{name}'")


def require_drain(seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise OptionError("drain-timeout", f"must be a number of seconds, 0 or more, not {seconds}")


def require_ports(ports: dict[str, int]) -> None:
    """Each in range (0 lets the kernel choose), and no two the same."""
    taken: dict[int, str] = {}
    for option, port in ports.items():
        if not 0 <= port <= PORT_MAX:
            raise OptionError(option, f"must be a port from 0 to {PORT_MAX}, not {port}")
        if port and port in taken:
            raise OptionError(option, f"port {port} is already --{taken[port]}")
        taken[port] = option


def require_address(option: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > PORT_MAX:
        raise OptionError(option, f"must be host:port, not '{address}'")
