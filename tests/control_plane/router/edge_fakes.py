"""A scripted core, a clock that is a number, and a client that speaks ASGI by hand: what the edge's tests share."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import httpx
import msgspec

from control_plane.router import edge as edge_module
from control_plane.router.access.tenants import Keys
from control_plane.router.edge import Edge
from control_plane.router.http.app import CHAT, COMPLETIONS, Config, admin_app, public_app
from control_plane.router.media.reader import MediaObserver
from control_plane.router.metrics import RouterMetrics
from control_plane.router.requests import (
    Cancel,
    Ended,
    PromptScored,
    RequestStats,
    ResetCache,
    Stop,
    Submit,
    SubmitAll,
    TokensReady,
    WorkerView,
)
from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard, OracleVocabulary, Vocabulary
from control_plane.router.validation import validator as validation
from control_plane.router.validation.image_prompt import Sight
from control_plane.router.validation.validator import Validator
from engine.base.errors import Cancelled, InvalidArgument, TriptychError
from engine.types import Constraint, FinishReason, TokenLogprobs

CARD = ModelCard(name="tiny", vocab_size=1_000, max_model_len=64, eos_token_ids=(999,))
TRANSFER_ID = "0a" * 16
STATS = RequestStats(
    prefill_worker="p1",
    decode_worker="d1",
    codec="raw",
    kv_bytes_raw=4_000,
    kv_bytes_wire=1_000,
    attempts=1,
    cached_tokens=2,
    skipped_tokens=1,
    phase_ms={"queue": 1.0, "prefill": 2.0},
)
WORKER = WorkerView(
    id="w1",
    name="prefill-0",
    address="127.0.0.1:1",
    roles=("prefill",),
    epoch=3,
    state="SERVING",
    connected=True,
    free_columns=7,
    total_columns=9,
    running=2,
    waiting=1,
)


MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@cache
def template() -> ChatTemplate:
    """What users say, and nothing else. Compiled once: it takes longer than most tests."""
    return ChatTemplate(TEMPLATE)


Event = Submit | Stop | Cancel | ResetCache


class FakeCore:
    """Records what the edge delivers. `script`, if set, answers each `Submit`; every `Cancel` is answered `Ended`, and
    so is the `Stop` of a request's last choice."""

    def __init__(self) -> None:
        self.edge: Edge
        self.delivered: list[Event] = []
        self.script: Callable[[FakeCore, int], None] | None = None
        self.open_choices: dict[int, set[int]] = {}
        self.changed = asyncio.Event()

    def deliver(self, event: Event | SubmitAll) -> None:
        if isinstance(event, SubmitAll):
            for submit in event.submits:
                self.deliver(submit)
            return
        self.delivered.append(event)
        self.changed.set()
        match event:
            case Submit():
                self.open_choices[event.key] = set(range(event.choices))
                if self.script is not None:
                    self.script(self, event.key)
            case Stop():
                self.over(event.key, event.choice, FinishReason.STOP)
            case Cancel() if event.key in self.open_choices:
                asyncio.get_running_loop().call_soon(self.end, event.key, Cancelled("cancelled"))

    def tokens(
        self,
        key: int,
        *token_ids: int,
        choice: int = 0,
        finish: FinishReason | None = None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        """What the real core says of one step; with the last choice's `finish`, the ending too."""
        if choice not in self.open_choices.get(key, (choice,)):
            return  # it was stopped
        self.edge.on_output(TokensReady(key, token_ids, choice, finish, tuple(logprobs)))
        if finish is not None:
            self.over(key, choice, finish)

    def scored(self, key: int, start: int, *logprobs: TokenLogprobs) -> None:
        self.edge.on_output(PromptScored(key, start, logprobs))

    def over(self, key: int, choice: int, finish: FinishReason) -> None:
        self.open_choices.get(key, set()).discard(choice)
        if key in self.open_choices and not self.open_choices[key]:
            self.end(key, finish)

    def end(self, key: int, ending: FinishReason | TriptychError = FinishReason.STOP) -> None:
        if self.open_choices.pop(key, None) is None:
            return
        finish = ending if isinstance(ending, FinishReason) else None
        error = ending if isinstance(ending, TriptychError) else None
        self.edge.on_output(Ended(key=key, finish=finish, error=error, stats=STATS, transfer_id=TRANSFER_ID))
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for what the far side of a socket makes us do."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    @property
    def submits(self) -> list[Submit]:
        return [event for event in self.delivered if isinstance(event, Submit)]

    @property
    def stops(self) -> list[Stop]:
        return [event for event in self.delivered if isinstance(event, Stop)]

    @property
    def cancels(self) -> list[Cancel]:
        return [event for event in self.delivered if isinstance(event, Cancel)]


Script = Callable[[FakeCore, int], None]


def answers(*batches: Sequence[int], ending: FinishReason | TriptychError = FinishReason.STOP) -> Script:
    """A script: one batch of tokens per turn of the loop, then the ending."""

    def script(core: FakeCore, key: int) -> None:
        in_turns([*(partial(core.tokens, key, *ids) for ids in batches), partial(core.end, key, ending)])

    return script


def says(*steps: tuple[int, Sequence[int], FinishReason | None]) -> Script:
    """(choice, tokens, finish) in turn, as the real core has it: the last choice's finish brings the ending."""

    def script(core: FakeCore, key: int) -> None:
        in_turns([partial(core.tokens, key, *ids, choice=choice, finish=finish) for choice, ids, finish in steps])

    return script


def in_turns(steps: Sequence[Callable[[], None]]) -> None:
    """One step per turn of the loop, so that a reader sees each by itself."""

    def turn(index: int) -> None:
        steps[index]()
        if index + 1 < len(steps):
            asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, turn, index + 1)

    asyncio.get_running_loop().call_soon(turn, 0)


def score(logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    rank = 1 + sum(1 for _, other in top if other > logprob)
    return TokenLogprobs(logprob, rank, top)


@dataclass
class FakeState:
    ready: bool = True
    in_flight: int = 0
    images_waiting: int = 0
    counted: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)

    def workers(self) -> Sequence[WorkerView]:
        return [WORKER]

    def counters(self) -> Mapping[tuple[str, tuple[tuple[str, str], ...]], float]:
        return self.counted


class Router:
    """The whole edge over a fake core."""

    def __init__(
        self,
        card: ModelCard = CARD,
        vocabulary: Vocabulary | None = None,
        edge_config: edge_module.Config | None = None,
        http_config: Config | None = None,
        validation_config: validation.Config | None = None,
        keys: Keys | None = None,
        chat: ChatTemplate | None = None,
        sight: Callable[[MediaObserver], Sight] | None = None,
    ) -> None:
        self.core = FakeCore()
        self.state = FakeState()
        self.metrics = RouterMetrics()
        self.now_us = 0
        self.constraints: list[Constraint] = []  # that were checked
        ids = itertools.count(1)
        vocabulary = vocabulary or OracleVocabulary(card.vocab_size)
        self.edge = Edge(
            edge_config or edge_module.Config(),
            card=card,
            vocabulary=vocabulary,
            deliver=self.core.deliver,
            observer=self.metrics,
            clock_us=lambda: self.now_us,
            mint_id=lambda: f"id{next(ids)}",
        )
        self.core.edge = self.edge
        self.validator = Validator(
            validation_config or validation.Config(codecs=("raw", "int8")),
            card=card,
            vocabulary=vocabulary,
            draw_seed=lambda: 77,
            count_unknown=self.metrics.unknown_fields,
            check_constraint=self.check_constraint,
            clock_us=lambda: self.now_us,
            chat=chat,
            sight=None if sight is None else sight(self.metrics),
        )
        self.app = public_app(
            edge=self.edge,
            validator=self.validator,
            state=self.state,
            wall_s=lambda: 1_700_000_000.5,
            keys=keys,
            config=http_config,
        )
        self.admin = admin_app(
            state=self.state, metrics=self.metrics, reset_cache=self.edge.reset_cache, abort=self.edge.abort
        )

    def check_constraint(self, constraint: Constraint) -> None:
        self.constraints.append(constraint)
        if "hostile" in constraint.text:
            raise InvalidArgument("constraint: too large when compiled", field="constraint")

    async def request(self, method: str, path: str, *, admin: bool = False, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.admin if admin else self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.request(method, path, **options)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.request("POST", "/v1/completions", json={"prompt": [1, 2, 3], **fields})

    async def converse(self, **fields: Any) -> httpx.Response:
        return await self.request("POST", CHAT, json={"messages": MESSAGES, **fields})

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


class Call:
    """One HTTP request spoken in ASGI messages, so that a test decides when the client reads and when it leaves."""

    def __init__(
        self, app: Any, body: bytes, headers: Sequence[tuple[bytes, bytes]] = (), path: str = COMPLETIONS
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.blocked = False  # in a send that the client does not read
        self._arrived = asyncio.Condition()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": list(headers),
            "query_string": b"",
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.blocked = not self.reading.is_set()
        await self.reading.wait()
        self.blocked = False
        self.sent.append(message)

    def disconnect(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def turns(count: int = 12) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


def body(**fields: Any) -> bytes:
    return msgspec.json.encode({"prompt": [1, 2, 3], "stream": True, **fields})


def chat_body(**fields: Any) -> bytes:
    return msgspec.json.encode({"messages": MESSAGES, "stream": True, **fields})


def events(stream: bytes) -> list[dict[str, Any]]:
    """A strict reader of server-sent events: only `data:` lines, one per event, [DONE] last and once."""
    text = stream.decode("utf-8")
    assert text.endswith("\n\n")
    blocks = text[:-2].split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block and "\r" not in block for block in blocks)
    payloads = [block.removeprefix("data: ") for block in blocks]
    assert payloads[-1] == "[DONE]"
    assert payloads.count("[DONE]") == 1
    return [msgspec.json.decode(payload) for payload in payloads[:-1]]
