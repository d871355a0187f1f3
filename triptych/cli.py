"""The `triptych` command: options in, one frozen options value out, handed to whoever runs it.

Each command imports what it runs when it is called, so that `--help` needs neither torch nor grpc. Nothing is decided
here: what may be combined is in the two `options` modules, what happens then in `deploy` and `control_plane`. An error
that the person at the terminal can mend is one line and exit status 2; a traceback means a bug of ours.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from control_plane.options import (
    ADMIN_PORT,
    GRPC_PORT,
    HTTP_PORT,
    MODEL_DEFAULT,
    ControllerOptions,
    Device,
    Dtype,
    EngineOptions,
    ExecutorKind,
    LogLevel,
    OptionError,
    RouterOptions,
    WorkerOptions,
)
from deploy.options import ServeOptions
from engine.base import limits
from engine.base.errors import TriptychError
from engine.types import Role
from triptych.options import (
    FitOptions,
    MeasureOptions,
    ProfileOptions,
    codec_engine,
    fit_engine,
    grid_of,
    split_levels,
    split_names,
)

app = typer.Typer(
    name="triptych",
    help="Serve language models from separate prefill and decode workers, with KV streamed between them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it prints local variables: prompts and tokens do not belong on a terminal
)

# -- options that several commands share -------------------------------------------------------------------------------
MODEL = "Model"
NETWORK = "Network"
KV = "KV cache and transfer"
RUN = "Running"

Model = Annotated[
    str, typer.Option(help=f"Checkpoint directory, '{MODEL_DEFAULT}' or 'oracle' (no weights).", rich_help_panel=MODEL)
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Of weights and KV; auto is the checkpoint's.", rich_help_panel=MODEL)
]
Executor = Annotated[
    ExecutorKind,
    typer.Option(help="torch runs the model; oracle and paced need no torch and no weights.", rich_help_panel=MODEL),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer together; default: the checkpoint's.", rich_help_panel=MODEL),
]
BlockSize = Annotated[int, typer.Option(help="Tokens in one KV block.", rich_help_panel=KV)]
KVCacheMiB = Annotated[
    int | None,
    typer.Option("--kv-cache-mib", help="KV memory per worker; default: a share of what is free.", rich_help_panel=KV),
]
Codec = Annotated[
    str,
    typer.Option(help="How KV travels: raw is bit-exact, auto the fewest bits within the budget.", rich_help_panel=KV),
]
KLBudget = Annotated[
    float | None,
    typer.Option(
        "--kl-budget",
        help=f"Nats per token that a codec may cost; 0: exact. Default: {limits.KL_BUDGET:g}.",
        rich_help_panel=KV,
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(help="The model's codec profile; default: the packaged one, if it has one.", rich_help_panel=KV),
]
LayersPerGroup = Annotated[
    int, typer.Option(help="Layers computed between two sends; fewer hides more of the transfer.", rich_help_panel=KV)
]
StepTokens = Annotated[
    int, typer.Option(help="Token budget of one engine step; longer prompts are chunked.", rich_help_panel=KV)
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where the model runs and its KV lives.", rich_help_panel=MODEL)
]
Batching = Annotated[
    str, typer.Option(help="What one step runs: sarathi, prepacking, or a plug-in's name.", rich_help_panel=RUN)
]
TbtSloMs = Annotated[
    float | None,
    typer.Option(help="Bound on the time between two tokens; needs `triptych fit`.", rich_help_panel=RUN),
]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse KV of equal prefixes.", rich_help_panel=KV)
]
Host = Annotated[
    str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.", rich_help_panel=NETWORK)
]
Port = Annotated[int, typer.Option(help="OpenAI-compatible HTTP.", rich_help_panel=NETWORK)]
AdminPort = Annotated[int, typer.Option(help="Health and metrics.", rich_help_panel=NETWORK)]
GrpcPort = Annotated[int, typer.Option(help="gRPC inference API.", rich_help_panel=NETWORK)]
Controller = Annotated[str, typer.Option(help="The controller's host:port.", rich_help_panel=NETWORK)]
DrainTimeout = Annotated[
    float,
    typer.Option(
        "--drain-timeout-s", help="After SIGTERM, how long running requests may take to end.", rich_help_panel=RUN
    ),
]
LogLevelOption = Annotated[
    LogLevel, typer.Option("--log-level", help="What goes to standard error.", rich_help_panel=RUN)
]

DRAIN_TIMEOUT_S = limits.DRAIN_TIMEOUT_MS / 1_000


def _engine_options(
    model: Model = MODEL_DEFAULT,
    dtype: DtypeOption = Dtype.AUTO,
    executor: Executor = ExecutorKind.TORCH,
    max_model_len: MaxModelLen = None,
    block_size: BlockSize = limits.BLOCK_SIZE_TOKENS,
    kv_cache_mib: KVCacheMiB = None,
    codec: Codec = "raw",
    kl_budget: KLBudget = None,
    profile: Profile = None,
    layers_per_group: LayersPerGroup = limits.LAYERS_PER_GROUP,
    step_tokens: StepTokens = limits.STEP_TOKENS_MAX,
    device: DeviceOption = Device.CPU,
    batching: Batching = "sarathi",
    tbt_slo_ms: TbtSloMs = None,
    prefix_cache: PrefixCache = True,
) -> EngineOptions:
    return EngineOptions(
        model=model,
        dtype=dtype,
        executor=executor,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_cache_mib=kv_cache_mib,
        codec=codec,
        kl_budget=kl_budget,
        profile=profile,
        layers_per_group=layers_per_group,
        step_tokens=step_tokens,
        device=device,
        batching=batching,
        tbt_slo_ms=tbt_slo_ms,
        prefix_cache=prefix_cache,
    )


def _with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of `_engine_options` in place of its `engine` parameter: they are written once."""
    flags = inspect.signature(_engine_options).parameters
    own = {name: p for name, p in inspect.signature(command).parameters.items() if name != "engine"}

    @functools.wraps(command)
    def with_flags(**values: object) -> None:
        given = {name: values.pop(name) for name in flags}
        command(engine=_engine_options(**given), **values)  # type: ignore[arg-type]

    # typer reads both; keyword-only, because a flag with a default may come before one without
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*flags.values(), *own.values())]
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_flags


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"triptych {importlib.metadata.version('triptych')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
@_with_engine_options
def serve(
    engine: EngineOptions,
    encode: Annotated[int, typer.Option(help="Workers for images (not yet).", rich_help_panel="Workers")] = 0,
    prefill: Annotated[int, typer.Option(help="Workers that only prefill.", rich_help_panel="Workers")] = 1,
    decode: Annotated[int, typer.Option(help="Workers that only decode.", rich_help_panel="Workers")] = 1,
    mixed: Annotated[int, typer.Option(help="Workers that do both.", rich_help_panel="Workers")] = 0,
    host: Host = "127.0.0.1",
    port: Port = HTTP_PORT,
    admin_port: AdminPort = ADMIN_PORT,
    grpc_port: GrpcPort = GRPC_PORT,
    drain_timeout_s: DrainTimeout = DRAIN_TIMEOUT_S,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run a whole cluster on this machine: controller, router and workers. SIGTERM or Ctrl-C drains and ends it."""
    options = ServeOptions(
        engine=engine,
        host=host,
        port=port,
        admin_port=admin_port,
        grpc_port=grpc_port,
        encode=encode,
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        drain_timeout_s=drain_timeout_s,
        log_level=log_level,
    )
    from deploy.local import serve as run

    raise typer.Exit(run(options))


@app.command()
@_with_engine_options
def worker(
    engine: EngineOptions,
    name: Annotated[str, typer.Option(help="The worker's name in logs and metrics.")],
    controller: Controller,
    role: Annotated[list[Role], typer.Option(help="A role to begin with; may be given more than once.")],
    listen: Annotated[
        str, typer.Option(help="host:port for links; port 0: any.", rich_help_panel=NETWORK)
    ] = "127.0.0.1:0",
    cores: Annotated[str, typer.Option(help="The engine's cores, as in 0,1; default: any.", rich_help_panel=RUN)] = "",
    threads: Annotated[int, typer.Option(help="Compute threads of one step.", rich_help_panel=RUN)] = 1,
    drain_timeout_s: DrainTimeout = DRAIN_TIMEOUT_S,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run one worker and register it with a controller."""
    options = WorkerOptions(
        engine=engine,
        name=name,
        roles=frozenset(role),
        controller=controller,
        listen=listen,
        cores=_core_list(cores),
        threads=threads,
        drain_timeout_s=drain_timeout_s,
        log_level=log_level,
    )
    from control_plane.agent.process import main as run

    raise typer.Exit(run(options))


@app.command()
@_with_engine_options
def router(
    engine: EngineOptions,
    controller: Controller,
    host: Host = "127.0.0.1",
    port: Port = HTTP_PORT,
    admin_port: AdminPort = ADMIN_PORT,
    grpc_port: GrpcPort = GRPC_PORT,
    drain_timeout_s: DrainTimeout = DRAIN_TIMEOUT_S,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run one router: HTTP and gRPC in front, a controller's workers behind."""
    options = RouterOptions(
        engine=engine,
        controller=controller,
        host=host,
        port=port,
        admin_port=admin_port,
        grpc_port=grpc_port,
        drain_timeout_s=drain_timeout_s,
        log_level=log_level,
    )
    from control_plane.router.server import main as run

    raise typer.Exit(run(options))


@app.command()
def controller(
    listen: Annotated[str, typer.Option(help="host:port for workers and routers.")],
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run the controller that workers and routers register with."""
    options = ControllerOptions(listen=listen, log_level=log_level)
    from control_plane.controller.server import main as run

    raise typer.Exit(run(options))


@app.command()
def fit(
    model: Model = MODEL_DEFAULT,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = Device.CPU,
    threads: Annotated[int, typer.Option(help="Compute threads; as many as the worker will have.")] = 1,
    block_size: BlockSize = limits.BLOCK_SIZE_TOKENS,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, a few times: seconds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Longer contexts, larger batches: minutes.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: where workers of this machine look.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure how long engine steps take here and fit the model that schedules by it. Best on an idle machine."""
    options = FitOptions(
        engine=fit_engine(model=model, dtype=dtype, device=device, block_size=block_size),
        threads=threads,
        grid=grid_of(quick=quick, full=full),
        out=out,
        as_json=as_json,
    )
    from triptych.fit import main as run

    raise typer.Exit(run(options))


@app.command()
def measure(
    text: Annotated[list[Path], typer.Option(help="A UTF-8 file; with several, figures are of the worst one.")],
    codecs: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "all",
    levels: Annotated[str, typer.Option(help="Numbers separated by commas; default: those of the profile.")] = "",
    model: Model = MODEL_DEFAULT,
    dtype: DtypeOption = Dtype.AUTO,
    profile: Profile = None,
    windows: Annotated[int, typer.Option(help="Stretches of 1,024 tokens taken from each text, at most.")] = 4,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 2,
    out: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
) -> None:
    """Measure what codecs cost on a text: bits, KL, perplexity, encode and decode rates."""
    options = MeasureOptions(
        engine=codec_engine(model=model, dtype=dtype, profile=profile),
        texts=tuple(text),
        codecs=split_names(codecs),
        levels=split_levels(levels),
        windows=windows,
        threads=threads,
        out=out,
    )
    from triptych.measure import main as run

    raise typer.Exit(run(options))


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help=f"Checkpoint directory or '{MODEL_DEFAULT}'.")] = MODEL_DEFAULT,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 files of different kinds; default: those of the package.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    windows: Annotated[int, typer.Option(help="Stretches of each text to calibrate on, at most.")] = 6,
    held_out: Annotated[int, typer.Option(help="Stretches at each text's end to measure on.")] = 2,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 2,
    out: Annotated[Path | None, typer.Option(help="File to write; default: MODEL.safetensors here.")] = None,
) -> None:
    """Calibrate codecs to a model and measure them. Workers read the file with --profile."""
    from triptych.profile import default_out, default_texts
    from triptych.profile import main as run

    options = ProfileOptions(
        engine=codec_engine(model=model, dtype=dtype),
        texts=tuple(text or default_texts()),
        out=out or default_out(model),
        windows=windows,
        held_out=held_out,
        threads=threads,
    )
    raise typer.Exit(run(options))


def _core_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(core) for core in text.split(",") if core)
    except ValueError:
        raise OptionError("cores", f"must be numbers separated by commas, not '{text}'") from None


def main() -> None:
    """The entry point. Mistakes of the person at the terminal become one line, not a traceback."""
    _tell_mistakes(app)


def _tell_mistakes(run: Callable[[], object]) -> None:
    try:
        run()
    except OptionError as error:
        typer.secho(f"triptych: --{error.option}: {error}", err=True, fg="red")
        raise SystemExit(2) from None
    except TriptychError as error:
        typer.secho(f"triptych: {error.message}", err=True, fg="red")
        raise SystemExit(1) from None
