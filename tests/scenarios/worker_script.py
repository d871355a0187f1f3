"""The script for a whole worker: its lease, its roles, its Source and Target, over an engine that the script plays.

Links are called `controller`, `bulk/d2` (we send KV there), and by their senders when they come in: `r1`, `p2`.

    > worker roles=decode,prefill               starts the machine; optional: growth=, sees=1 for a model that does
    > up controller / > up bulk/d2              a link that the worker dialled is open
    > up r1 router / > up p2 source             somebody dials the worker; optional: version= garbage=1
    > lost r1
    > r1: prefill request=1 attempt=1 ...       a router's message; gap=1 leaves out a number, garbage=1 is no message;
                                                sampling is as by default where nothing else is said
    > p2: data T1/0 ... / > bulk/d2: ack T1/0   frames, as in `transfer_scripts`
    > controller: welcome term=1
    > engine: admitted 1 columns=0,1 context=8  what the engine reports; also computed, prefilled, scored, reserved,
                                                paused (with images delta=), tokens 1@0=100 2@3=107/stop, failed
    > engine: pixels_needed 1 / > engine: encoded 1 columns=0 (or `cached`)
    > engine: embeddings 2:0,1 3:4/cached       memory for a prompt's images: sequence, columns, and whether it is here

Images of a prompt are said as `images=K1:2:4:2:2,K2:6:1`: key, first placeholder, placeholders, grid. What `pixels`
carry is said in bytes: `data=12`. The tokens of `prefilled` are written `tokens=0:100,2:101/stop`: choice, token, and
why it is over.

    > drain 10000ms / > done 1 / > counters / > custody / > held
"""

import re
from random import Random
from typing import Any

from control_plane.agent.core import Config, Drain, Drained, WorkerCore
from control_plane.agent.lease import CONTROLLER
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session
from control_plane.wire.translate import sampling_to_wire
from engine import commands
from engine.base.machine import Close, Dial, EngineEvents, LinkLost, LinkUp, Received, Send, Started
from engine.types import FinishReason, Role, SamplingParams, TokenLogprobs
from tests.scenarios.control_scripts import write_hello
from tests.scenarios.runner import Words, milliseconds
from tests.scenarios.transfer_scripts import BLOCK_SIZE, COLUMNS, EMBEDDINGS, VOCAB_SIZE, TransferScript
from tests.scenarios.words import fill, read_numbers, read_range, write_envelope

KINDS = {
    "router": pb.Hello.ROUTER_TO_WORKER,
    "source": pb.Hello.WORKER_TO_WORKER,
    "controller": pb.Hello.WORKER_TO_CONTROLLER,
}


class WorkerScript(TransferScript):
    machine: WorkerCore

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[str, Session] = {}  # of routers and the controller; other peers speak in frames

    # -- commands ------------------------------------------------------------------------------------------------------
    def do_worker(self, words: Words) -> list[str]:
        config = Config(
            worker_id="w1",
            name="first",
            address="w1:50051",
            controller_address="controller:50051",
            roles=frozenset(map(Role, words.keyed["roles"].split(","))),
            model="oracle",
            schema=self.schema,
            codecs=self.codecs,
            vocab_size=VOCAB_SIZE,
            max_model_len=64,
            block_size=BLOCK_SIZE,
            columns=COLUMNS,
            growth_tokens=int(words.keyed.get("growth", 4)),
            embedding_schema=EMBEDDINGS if "sees" in words.keyed else None,
            embedding_columns=COLUMNS if "sees" in words.keyed else 0,
        )
        self.machine = WorkerCore(config, random=Random(1))
        self.custody, self.counters = self.machine.custody, self.machine.counters
        return self.step(Started())

    def do_up(self, words: Words) -> list[str]:
        name, *kind = words.plain
        if not kind:
            if name == CONTROLLER:
                self.sessions[name] = Session()
            return self.step(LinkUp(name))
        hello = pb.Hello(wire_version=int(words.keyed.get("version", 1)), kind=KINDS[kind[0]], sender=name)
        if kind == ["router"]:
            self.sessions[name] = Session()
        introduction = b"\xff\xff" if "garbage" in words.keyed else hello.SerializeToString()
        return self.step(LinkUp(_link(name), introduction))

    def do_lost(self, words: Words) -> list[str]:
        self.sessions.pop(words.plain[0], None)
        return self.step(LinkLost(_link(words.plain[0]), "reset"))

    def do_done(self, words: Words) -> list[str]:
        return self.step(self.job_done(words))

    def do_drain(self, words: Words) -> list[str]:
        return self.step(Drain(milliseconds(words.plain[0]) // 1_000))

    def do_held(self, _: Words) -> list[str]:
        return [f"held {self.machine.held}"]

    # -- what others say -----------------------------------------------------------------------------------------------
    def said(self, speaker: str, words: Words) -> list[str]:
        if speaker == "engine":
            return self.step(EngineEvents((_engine_event(words),)))
        if speaker not in self.sessions:
            return self.step(Received(_link(speaker), self.frame(words)))
        if "garbage" in words.keyed:
            return self.step(Received(_link(speaker), b"\xff\xff"))
        envelope: Any = pb.ControllerToWorker() if speaker == CONTROLLER else pb.RouterToWorker()
        fields = dict(words.keyed)
        for _ in range(int(fields.pop("gap", 0))):
            self.sessions[speaker].seal(pb.RouterToWorker())  # sealed and never sent
        if "pixels" in words.plain:
            envelope.pixels.data = bytes(int(fields.pop("data")))
        for body in words.plain:
            getattr(envelope, body).SetInParent()
            if body in ("prefill", "reserve"):
                getattr(envelope, body).sampling.CopyFrom(sampling_to_wire(SamplingParams()))
            fill(getattr(envelope, body), fields, self.names)
        return self.step(Received(_link(speaker), self.sessions[speaker].seal(envelope)))

    # -- actions -------------------------------------------------------------------------------------------------------
    def show(self, action: Any) -> str | None:
        match action:
            case Dial(link, address, introduction):
                return f"dial {link} at {address} as {write_hello(introduction)}"
            case Send(link, message) if (name := _name(link)) in self.sessions:
                kind = pb.WorkerToController if name == CONTROLLER else pb.WorkerToRouter
                return f"{name} <- {write_envelope(self.sessions[name].open_untrusted(kind, message), self.names)}"
            case Send(link, message):
                return super().show(Send(_name(link), message))
            case Close(link, reason):
                return f"close {_name(link)}: {reason}"
            case Drained():
                return "drained"
        return super().show(action)

    def check(self) -> None:
        """Whoever has an attempt has custody of its units and gathers its images', and nobody else has, but for jobs
        that still run."""
        gathering = self.machine._prefill._images
        images = set(gathering._by_image) if gathering is not None else set()
        attempts = set(self.machine._attempts._by_sequence) | images
        holdings = self.machine.custody._holdings
        assert attempts == {seq_id for seq_id, holding in holdings.items() if not holding.ended}, "attempts and custody"
        assert all(holding.jobs for holding in holdings.values() if holding.ended), "held by nobody"


def _link(name: str) -> str:
    return name if name == CONTROLLER or name.startswith("bulk/") else f"in/{name}"


def _name(link: str) -> str:
    return link.removeprefix("in/")


def _engine_event(words: Words) -> Any:
    kind, *rest = words.plain
    keyed = words.keyed
    seq_id = int(re.split("[,:]", rest[0])[0]) if rest else 0
    columns = read_numbers(keyed["columns"]) if "columns" in keyed else None
    match kind:
        case "admitted":
            context_tokens, cached_tokens = int(keyed["context"]), int(keyed.get("cached", 0))
            return commands.Admitted(
                seq_id=seq_id, block_table=columns or (), context_tokens=context_tokens, cached_tokens=cached_tokens
            )
        case "computed":
            (layer_start, layer_end), (token_start, token_end) = (
                read_range(keyed["layers"]),
                read_range(keyed["tokens"]),
            )
            return commands.KVComputed(
                seq_id=seq_id,
                layer_start=layer_start,
                layer_end=layer_end,
                token_start=token_start,
                token_end=token_end,
            )
        case "prefilled":
            position = int(keyed.get("position", 0))
            tokens = tuple(_first_token(seq_id, position, item) for item in keyed["tokens"].split(","))
            return commands.Prefilled(seq_id=seq_id, tokens=tokens)
        case "scored":
            logprobs = tuple(TokenLogprobs(float(item), rank=1) for item in keyed["logprobs"].split(","))
            return commands.PromptScored(seq_id=seq_id, start=int(keyed["start"]), logprobs=logprobs)
        case "reserved":
            return commands.Reserved(seq_id=seq_id, block_table=columns, cached_tokens=int(keyed.get("cached", 0)))
        case "tokens":
            return commands.TokensSampled(tokens=tuple(_token(*item) for item in keyed.items()))
        case "paused":
            return commands.Paused(
                seq_id=seq_id,
                token_ids=read_numbers(keyed["tokens"]),
                block_table=columns or (),
                preempted="preempted" in rest,
                rope_delta=int(keyed.get("delta", 0)),
            )
        case "failed":
            return commands.StepFailed(seq_ids=read_numbers(rest[0]), reason=keyed.get("reason", "step_raised"))
        case "pixels_needed":
            return commands.PixelsNeeded(seq_id=seq_id)
        case "encoded":
            return commands.Encoded(seq_id=seq_id, block_table=columns or (), cached="cached" in rest)
        case "embeddings":
            return commands.EmbeddingsReserved(grants=tuple(map(_grant, rest)))
        case "load":
            return commands.EngineLoad(**{name: int(value) for name, value in keyed.items()})  # type: ignore[arg-type]
    raise AssertionError(f"not an engine event: {kind}")


def _grant(item: str) -> commands.EmbeddingGrant:
    """ "2:0,1", "3:4/cached" """
    seq_id, _, where = item.partition(":")
    columns, _, cached = where.partition("/")
    return commands.EmbeddingGrant(int(seq_id), read_numbers(columns), cached == "cached")


def _first_token(seq_id: int, position: int, item: str) -> commands.SampledToken:
    """ "100", "2:101/stop" """
    choice, _, token = item.rpartition(":")
    token_id, _, finish = token.partition("/")
    reason = FinishReason(finish) if finish else None
    return commands.SampledToken(seq_id, position, int(token_id), reason, choice=int(choice or 0))


def _token(place: str, token: str) -> commands.SampledToken:
    """ "2@3", "107/stop" """
    seq_id, position = place.split("@")
    token_id, _, finish = token.partition("/")
    return commands.SampledToken(int(seq_id), int(position), int(token_id), FinishReason(finish) if finish else None)
