"""A run, from its options to its figures: which model, warm-up, load. Knows no terminal."""

import asyncio
import math
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any, Final

import httpx
import msgspec

from control_plane.router.http.server import raise_open_files_limit
from triptych.dialect import first_model
from triptych.load.arrivals import arrival_times_s
from triptych.load.client import Client, Connections, MakeTransport, headers, http_transports, told
from triptych.load.clock import Clock, WallClock, cpu_s
from triptych.load.figures import Effort, figures
from triptych.load.options import LoadOptions
from triptych.load.prompts import bodies
from triptych.load.samples import Outcome, Sample, Samples
from triptych.load.sender import IN_FLIGHT_MAX, Sender

MODELS_TIMEOUT_S: Final = 10.0
WARM_UP_TOGETHER: Final = 8
WARM_UP_SEED: Final = 1 << 40  # beyond what anybody types


class ServerTrouble(Exception):
    """The server cannot be measured: one line for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run's figures, and whether somebody ended it early."""

    model: str
    values: dict[str, Any]
    interrupted: bool


async def measure(
    options: LoadOptions,
    *,
    clock: Clock | None = None,
    transports: MakeTransport | None = None,
    on_sample: Callable[[Sample], None] = lambda sample: None,
) -> Measured:
    """Ctrl-C ends the load, not the program. Raises `ServerTrouble`, and `OptionError` for bad files of prompts."""
    raise_open_files_limit()
    clock, transports = clock or WallClock(), transports or http_transports(options.certificates.context())
    connections = Connections(transports)
    try:
        model = options.model or await listed_model(options, connections)
        client = Client(options, connections, clock)
        await _warm_up(options, model, client, clock)
        return await _load(options, model, client, clock, on_sample)
    finally:
        await connections.close()


async def _load(
    options: LoadOptions, model: str, client: Client, clock: Clock, on_sample: Callable[[Sample], None]
) -> Measured:
    samples, before_s = Samples(options.slo, options.seed), cpu_s()

    def take(sample: Sample) -> None:
        samples.add(sample)
        on_sample(sample)

    in_flight_max = options.concurrency or IN_FLIGHT_MAX
    sender = Sender(client.ask, clock, take, in_flight_max=in_flight_max, closed=options.closed)
    times_s = arrival_times_s(options.rate, options.burstiness, options.seed)
    asked = islice(bodies(options, model), options.requests)
    interrupted = await _unless_interrupted(sender.send(asked, times_s, options.duration_s or math.inf))
    effort = Effort(cpu_s=cpu_s() - before_s, in_flight_highest=sender.in_flight_highest)
    return Measured(model=model, values=figures(samples, effort, has_slo=bool(options.slo)), interrupted=interrupted)


async def _unless_interrupted(work: Coroutine[Any, Any, None]) -> bool:
    """Whether Ctrl-C has ended the work."""
    loop, task, interrupted = asyncio.get_running_loop(), asyncio.ensure_future(work), False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return interrupted


async def _warm_up(options: LoadOptions, model: str, client: Client, clock: Clock) -> None:
    """With other prompts than the load's, where they are random: a server that remembers prefixes would know them."""
    trouble: list[Sample] = []

    def take(sample: Sample) -> None:
        if sample.outcome is not Outcome.COMPLETED:
            trouble.append(sample)

    sender = Sender(client.ask, clock, take, in_flight_max=WARM_UP_TOGETHER, closed=True)
    others = replace(options, seed=options.seed + WARM_UP_SEED)
    await sender.send(islice(bodies(others, model), options.warmup), repeat(0.0))
    if trouble:
        first = trouble[0]
        raise ServerTrouble(_with_words(f"{options.url}: the warm-up did not succeed: {first.failure}", first.text))


# -- the server's model ------------------------------------------------------------------------------------------------
async def listed_model(options: LoadOptions, connections: Connections) -> str:
    """The first that the server lists. Raises `ServerTrouble`."""
    request = httpx.Request("GET", options.url.rstrip("/") + "/v1/models", headers=headers(options))
    try:
        async with asyncio.timeout(MODELS_TIMEOUT_S), connections.one() as transport:
            response = await transport.handle_async_request(request)
            body = await response.aread()
            await response.aclose()
    except (httpx.TransportError, TimeoutError) as error:
        raise ServerTrouble(f"{options.url} cannot be reached: {str(error) or 'no answer in time'}") from error
    if response.status_code != httpx.codes.OK:
        raise ServerTrouble(_with_words(f"{options.url}/v1/models: status {response.status_code}", told(body)))
    try:
        model = first_model(body)
    except msgspec.MsgspecError:
        model = None
    if model is None:
        raise ServerTrouble(f"{options.url}/v1/models lists no model")
    return model


def _with_words(sentence: str, words: str) -> str:
    """`words`: the server's own, if it had any."""
    return f"{sentence}: {words}" if words else sentence
