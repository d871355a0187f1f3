"""Every setting of every command, said once: its name, what it is for, where help lists it, whether it is a secret.

    name        block-size           from the field's, or given here where vLLM calls the same thing something else
    flag        --block-size
    variable    TRIPTYCH_BLOCK_SIZE
    file        block-size: 16       underscores are as good

Type and default are the options dataclass's own (`control_plane.options`, `deploy.options`), so they cannot disagree
with what a process does. `sources` merges what a person gave in these three ways, `flags` makes the command line.

Not here: what may be combined; the dataclasses check themselves.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, Final, TypeVar, cast

from control_plane.options import (
    MODEL_DEFAULT,
    MODEL_DEMO,
    ControllerOptions,
    EdgeOptions,
    EngineOptions,
    RouterOptions,
    WorkerOptions,
)
from deploy.children import PREFIX
from deploy.options import ServeOptions
from engine.base import limits
from triptych.media_limits import images_allowed

Options = TypeVar("Options")

REQUIRED: Final = dataclasses.MISSING  # the default of what has none

NEEDED = "Needed"
MODEL = "Model"
WORKERS = "Workers"
NETWORK = "Network"
ACCESS = "Keys and certificates"
ANSWERS = "Requests and answers"
KV = "KV cache and transfer"
RUN = "Running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a person reads about one field of an options dataclass."""

    help: str
    panel: str
    name: str = ""  # where it is not the field's
    aliases: tuple[str, ...] = ()  # flags of before: they work, and no help shows them
    secret: bool = False
    metavar: str = ""  # what help calls a value, where its type alone does not say
    spelling: "Spelling | None" = None  # where a value may be written in other ways than its type's


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """Other ways to write one value, as other servers have them."""

    read: Callable[[Any], Any]  # from any of them to what the type's own way has; ValueError: it is none of them
    forms: Any  # as a type: what a file may hold
    accepted: str  # in words


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of an options dataclass, as a person sets it."""

    field: str
    type: Any
    default: Any
    said: Said

    @property
    def name(self) -> str:
        return self.said.name or self.field.replace("_", "-")

    @property
    def key(self) -> str:
        """The name as Python writes it."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def kind(self) -> type:
        """What one value is: `int` of `int | None` and of `tuple[int, ...]`."""
        return cast("type", _without_none(typing.get_args(self.type)[0] if self.several else self.type))

    @property
    def several(self) -> bool:
        return typing.get_origin(self.type) in (tuple, frozenset)


def settings_of(options: type) -> tuple[Setting, ...]:
    """Of this options dataclass and of those within it, in the order of their fields."""
    return tuple(_walk(options))


def build(options: type[Options], values: Mapping[str, Any]) -> Options:
    """The dataclass, and those within it, from values by the settings' names. Raises `OptionError`."""
    types = typing.get_type_hints(options)
    own = {setting.field: values[setting.name] for setting in _own(options)}
    parts = {field: build(types[field], values) for field in _parts(options)}
    return options(**own, **parts)


def setting(options: type, field: str) -> Setting:
    return next(found for found in _own(options) if found.field == field)


def _walk(options: type) -> Iterator[Setting]:
    types = typing.get_type_hints(options)
    for part in _parts(options):
        yield from _walk(types[part])
    yield from _own(options)


def _own(options: type) -> tuple[Setting, ...]:
    types = typing.get_type_hints(options)
    said = SAID[options]
    return tuple(
        Setting(field.name, types[field.name], field.default, said[field.name])
        for field in dataclasses.fields(options)
        if not dataclasses.is_dataclass(types[field.name])
    )


def _parts(options: type) -> tuple[str, ...]:
    types = typing.get_type_hints(options)
    return tuple(field.name for field in dataclasses.fields(options) if dataclasses.is_dataclass(types[field.name]))


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (UnionType, typing.Union):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


# -- what is said ------------------------------------------------------------------------------------------------------
_ENGINE = {
    "model": Said(
        help=f"Checkpoint directory, '{MODEL_DEFAULT}', '{MODEL_DEMO}' (sees) or 'oracle' (no weights).",
        panel=MODEL,
        metavar="MODEL",
    ),
    "executor": Said(help="torch runs the model; oracle and paced need no torch and no weights.", panel=MODEL),
    "dtype": Said(help="Of weights and KV; auto is the checkpoint's.", panel=MODEL),
    "device": Said(help="Where the model runs and its KV lives.", panel=MODEL),
    "max_model_len": Said(help="Tokens of prompt and answer together; default: the checkpoint's.", panel=MODEL),
    "block_size": Said(help="Tokens in one KV block.", panel=KV),
    "kv_cache_mib": Said(help="KV memory per worker; default: a share of what is free.", panel=KV, metavar="MIB"),
    "embedding_cache_mib": Said(
        help="Image embeddings kept per worker; default: a smaller share.", panel=KV, metavar="MIB"
    ),
    "prefix_cache": Said(
        name="enable-prefix-caching", aliases=("prefix-cache",), help="Reuse KV of equal prefixes.", panel=KV
    ),
    "codec": Said(help="How KV travels: raw is bit-exact, auto the fewest bits within the budget.", panel=KV),
    "kl_budget": Said(help=f"Nats per token that a codec may cost; 0: exact. Default: {limits.KL_BUDGET:g}.", panel=KV),
    "profile": Said(help="The model's codec profile; default: the packaged one, if it has one.", panel=KV),
    "layers_per_group": Said(help="Layers computed between two sends; fewer hides more of the transfer.", panel=KV),
    "step_tokens": Said(
        name="max-num-batched-tokens",
        aliases=("step-tokens",),
        help="Token budget of one engine step; longer prompts are chunked.",
        panel=RUN,
    ),
    "batching": Said(help="What one step runs; `triptych methods` lists what there is.", panel=RUN),
    "encode_image_ms": Said(help="What a paced worker takes to encode an image.", panel=RUN, metavar="MS"),
    "tbt_slo_ms": Said(help="Bound on the time between two tokens; needs `triptych fit`.", panel=RUN, metavar="MS"),
}
_IMAGES = Spelling(
    read=images_allowed, forms=int | str | dict[str, int], accepted='a whole number, image=N or {"image": N}'
)
_EDGE = {
    "served_model_name": Said(help="What clients call the model; default: the checkpoint's name.", panel=ANSWERS),
    "chat_template": Said(help="A Jinja file; default: the checkpoint's own.", panel=ANSWERS),
    "permit_special_tokens": Said(help="Text such as <|im_start|> in a prompt means that token.", panel=ANSWERS),
    "queue_timeout_s": Said(
        name="queue-timeout",
        help="How long a request may wait for a worker before it is refused.",
        panel=ANSWERS,
        metavar="SECONDS",
    ),
    "limit_mm_per_prompt": Said(
        help="Images that one request may hold: N, image=N or JSON.", panel=ANSWERS, metavar="N", spelling=_IMAGES
    ),
    "allowed_media_domains": Said(
        help="A host whose images may be fetched; may be given again. None: data URLs only.",
        panel=ANSWERS,
        metavar="HOST",
    ),
    "api_keys": Said(
        name="api-key",
        help=f"A key that clients must show; may be given again. {PREFIX}API_KEY keeps it out of `ps`.",
        panel=ACCESS,
        secret=True,
    ),
    "api_key_file": Said(help="Keys of several tenants, a line each: TENANT KEY, or TENANT KEY admin.", panel=ACCESS),
    "ssl_certfile": Said(help="TLS with this certificate (PEM).", panel=ACCESS),
    "ssl_keyfile": Said(help="Its private key; default: in the same file.", panel=ACCESS),
    "ssl_ca_certs": Said(
        help="Clients must show a certificate of one of these, which must also be the server's own.", panel=ACCESS
    ),
}
_LISTENING = {
    "host": Said(help="Where clients are listened to; 0.0.0.0 opens it to the network.", panel=NETWORK),
    "port": Said(help="OpenAI-compatible HTTP.", panel=NETWORK),
    "admin_host": Said(help="Where the admin port listens, which asks for no key.", panel=NETWORK),
    "admin_port": Said(help="Health, metrics and administration.", panel=NETWORK),
    "grpc_port": Said(help="gRPC inference API.", panel=NETWORK),
}
_LOG = {
    "log_level": Said(help="debug, info, warning or error: what goes to standard error.", panel=RUN, metavar="LEVEL"),
    "log_format": Said(help="How: auto is pretty on a terminal and JSON elsewhere.", panel=RUN),
}
_DRAIN = {
    "drain_timeout_s": Said(
        name="drain-timeout",
        aliases=("drain-timeout-s",),
        help="After SIGTERM, how long running requests may take to end.",
        panel=RUN,
        metavar="SECONDS",
    ),
}
_POOLS = {
    "encode": Said(help="Workers for images; default: one, if the model sees.", panel=WORKERS),
    "prefill": Said(help="Workers that only prefill.", panel=WORKERS),
    "decode": Said(help="Workers that only decode.", panel=WORKERS),
    "mixed": Said(help="Workers that do both.", panel=WORKERS),
}
_CONTROLLER = Said(help="The controller's host:port.", panel=NEEDED, metavar="ADDRESS")
_WORKER = {
    "name": Said(help="The worker's name in logs and metrics.", panel=NEEDED),
    "roles": Said(name="role", help="A role to begin with; may be given more than once.", panel=NEEDED),
    "controller": _CONTROLLER,
    "listen": Said(help="host:port for links; port 0: any.", panel=NETWORK),
    "cores": Said(help="The engine's cores; default: any.", panel=RUN, metavar="N,N,..."),
    "threads": Said(help="Compute threads of one step.", panel=RUN),
}

SAID: Final[Mapping[type, Mapping[str, Said]]] = {
    EngineOptions: _ENGINE,
    EdgeOptions: _EDGE,
    ServeOptions: _POOLS | _LISTENING | _DRAIN | _LOG,
    WorkerOptions: _WORKER | _DRAIN | _LOG,
    RouterOptions: {"controller": _CONTROLLER} | _LISTENING | _DRAIN | _LOG,
    ControllerOptions: {"listen": Said(help="host:port for workers and routers.", panel=NEEDED)} | _LOG,
}


class Command(StrEnum):
    """Those that a file of settings is for."""

    SERVE = "serve"
    WORKER = "worker"
    ROUTER = "router"
    CONTROLLER = "controller"


COMMANDS: Final[Mapping[Command, type]] = {
    Command.SERVE: ServeOptions,
    Command.WORKER: WorkerOptions,
    Command.ROUTER: RouterOptions,
    Command.CONTROLLER: ControllerOptions,
}
