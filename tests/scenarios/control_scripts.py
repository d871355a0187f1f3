"""Scripts for the router and the controller. Their peers are sessions of the script, so sequence numbers are right.

Router: workers are called by their ids, the controller `controller`, clients by the keys of their requests.

    > router [requests_max=.. attempts_max=..]   starts the machine; also any other number of its Config, codec=
                                                 kl_budget=
    > cluster p1:prefill d1:decode ...           starts it with these workers, connected and serving (prints nothing)
    > up d1 / > lost d1 reason                   a link opens, is lost
    > table term=2 p1:prefill d1:decode ...      the controller publishes; optional: max_len= block= (tokens in a block)
                                                 lossy=transform/7@1a2b:0.005 (what all offer but raw, and its KL)
                                                 images=100 (columns for embeddings, of all that encode or prefill)
    > d1: committed request=1 attempt=2          a worker says something; with gap=1 a sequence number is missing, and
                                                 logprobs=-1,-2 are of so many tokens, each the likeliest
    > submit 1 tokens=1..8 max=4 / > cancel 1 / > stop 1 choice=1 / > reset_cache / > shutdown
                                                 submit 1+2: two alike, of one call
                                                 submit also: n= priority= tenant= logprobs= scores= deadline_ms=
                                                 codec= kl_budget= ttft_slo_ms=
                                                 images=a@2..5,b@7..8 (keys, and their placeholders' positions)
                                                 picture=4x2 (the size of each)
    > requests / > workers / > counters          what the router believes
    > transfers                                  of each client that has ended: the transfer that its log line names

Controller: peers are called as they introduce themselves.

    > controller                                 starts the machine
    > up w1 worker / > up r1 router              a link opens (version=, kind= or garbage=1 for a bad introduction)
    > w1: register info.worker=w1 ...            a message; > again w1#2 worker is a second link of the same sender
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message

from control_plane.controller.core import Config as ControllerConfig
from control_plane.controller.core import ControllerCore
from control_plane.router.core import Config, RouterCore, StopAdmitting
from control_plane.router.dispatch.links import CONTROLLER
from control_plane.router.dispatch.live_request import Stage
from control_plane.router.dispatch.workers import LINK_PREFIX, Worker
from control_plane.router.requests import (
    Cancel,
    EndAll,
    Ended,
    PromptScored,
    ResetCache,
    Stop,
    Submit,
    SubmitAll,
    SubmittedImage,
    TokensReady,
)
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, parse_hello_untrusted
from control_plane.wire.translate import offers_to_wire
from engine.base.errors import Unavailable
from engine.base.machine import Close, Dial, LinkLost, LinkUp, Received, Send, Started
from engine.images import PIXEL_BYTES, Picture, PromptImage, Run
from engine.types import SamplingParams, TokenLogprobs
from kv_transfer.codecs import Encoding
from kv_transfer.offers import LevelCost, Offer
from tests.scenarios.runner import Script, Words
from tests.scenarios.words import Names, fill, read_numbers, write_envelope, write_numbers

SCHEMA_DIGEST = b"schema of A".ljust(16)
OTHER_SCHEMA_DIGEST = b"schema of B".ljust(16)
EMBEDDING_DIGESTS = {SCHEMA_DIGEST: b"embeddings of A".ljust(16), OTHER_SCHEMA_DIGEST: b"embeddings of B".ljust(16)}
NUMBERS_OF_CLUSTER = ("block", "lossy", "images")


def names() -> Names:
    of_a, of_b = EMBEDDING_DIGESTS.values()
    return Names(A=SCHEMA_DIGEST, B=OTHER_SCHEMA_DIGEST, AE=of_a, BE=of_b)


def write_hello(introduction: bytes) -> str:
    hello = parse_hello_untrusted(introduction)
    return f"{pb.Hello.Kind.Name(hello.kind).lower()} {hello.sender}"


class RouterScript(Script):
    machine: RouterCore

    def __init__(self) -> None:
        super().__init__()
        self.names = names()
        self.peers: dict[str, Session] = {}
        self.ended: dict[int, str] = {}  # key -> transfer id

    # -- commands ------------------------------------------------------------------------------------------------------
    def do_router(self, words: Words) -> list[str]:
        readers = {"codec": str, "kl_budget": float}
        options = {key: readers.get(key, int)(v) for key, v in words.keyed.items() if key not in NUMBERS_OF_CLUSTER}
        self.machine = RouterCore(Config(router_id="r1", controller_address="controller:50051", **options))
        return self.step(Started())

    def do_cluster(self, words: Words) -> list[str]:
        self.do_router(Words([], words.keyed))
        self.do_up(Words([CONTROLLER]))
        self.do_table(Words(words.plain, {"term": "1"} | _only(words.keyed, *NUMBERS_OF_CLUSTER)))
        for worker_id, roles, _ in map(_worker, words.plain):
            self.do_up(Words([worker_id]))
            self.said(
                worker_id, Words.parse(["status", f"worker={worker_id}", "epoch=1", "state=SERVING", f"roles={roles}"])
            )
        return []

    def do_up(self, words: Words) -> list[str]:
        link = _link(words.plain[0])
        self.peers[link] = Session()
        return self.step(LinkUp(link))

    def do_lost(self, words: Words) -> list[str]:
        reason = words.plain[1] if len(words.plain) > 1 else "reset"
        return self.step(LinkLost(_link(words.plain[0]), reason))

    def do_table(self, words: Words) -> list[str]:
        table = pb.WorkerTable(term=int(words.keyed["term"]))
        for worker_id, roles, model in map(_worker, words.plain):
            digest = OTHER_SCHEMA_DIGEST if model == "B" else SCHEMA_DIGEST
            columns = int(words.keyed.get("images", 0)) if {"encode", "prefill"} & set(roles.split(",")) else 0
            table.workers.add(
                worker=worker_id,
                name=worker_id,
                address=f"{worker_id}:50051",
                epoch=1,
                state="SERVING",
                roles=roles.split(","),
                schema_digest=digest,
                block_size_tokens=int(words.keyed.get("block", 0)),
                total_columns=100,
                max_model_len=int(words.keyed.get("max_len", 0)),
                embedding_digest=EMBEDDING_DIGESTS[digest] if columns else b"",
                embedding_columns=columns,
                offers=offers_to_wire([Offer("raw"), *map(_offer, filter(None, [words.keyed.get("lossy")]))]),
            )
        return self._receive(CONTROLLER, pb.ControllerToRouter(table=table))

    def said(self, speaker: str, words: Words) -> list[str]:
        link = _link(speaker)
        envelope = pb.ControllerToRouter() if link == CONTROLLER else pb.WorkerToRouter()
        fields = dict(words.keyed)
        for _ in range(int(fields.pop("gap", 0))):
            self.peers[link].seal(pb.WorkerToRouter())  # sealed and never sent
        if "garbage" in fields:
            return self.step(Received(link, b"\xff\xff"))
        logprobs = [float(text) for text in fields.pop("logprobs", "").split(",") if text]
        for kind in words.plain:
            getattr(envelope, kind).SetInParent()
            _add_logprobs(getattr(envelope, kind), logprobs)
            fill(getattr(envelope, kind), fields, self.names)
        return self._receive(link, envelope)

    def _receive(self, link: str, envelope: pb.ControllerToRouter | pb.WorkerToRouter) -> list[str]:
        return self.step(Received(link, self.peers[link].seal(envelope)))

    def do_submit(self, words: Words) -> list[str]:
        texts = ("tokens", "tenant", "codec", "kl_budget", "images", "picture")
        asked = {key: int(value) for key, value in words.keyed.items() if key not in texts}
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=asked.get("max", 4),
            logprobs=asked.get("logprobs"),
            prompt_logprobs=asked.get("scores"),
        )
        first, *others = map(int, words.plain[0].split("+"))
        submit = Submit(
            key=first,
            token_ids=read_numbers(words.keyed["tokens"]),
            sampling=sampling,
            tenant=words.keyed.get("tenant", ""),
            deadline_ms=asked.get("deadline_ms", 0),
            ttft_slo_ms=asked.get("ttft_slo_ms"),
            choices=asked.get("n", 1),
            priority=asked.get("priority", 0),
            codec=words.keyed.get("codec", ""),
            kl_budget=float(words.keyed["kl_budget"]) if "kl_budget" in words.keyed else None,
            images=self._images(words.keyed.get("images", ""), words.keyed.get("picture", "4x2")),
        )
        return self.step(SubmitAll((submit, *(replace(submit, key=key) for key in others))) if others else submit)

    def _images(self, text: str, size: str) -> tuple[SubmittedImage, ...]:
        width, height = map(int, size.split("x"))
        picture = Picture(width, height, bytes(width * height * PIXEL_BYTES))
        pairs = (item.split("@") for item in re.findall(r"\w+@[\d.,]*\d", text))
        return tuple(
            SubmittedImage(PromptImage(key=self.names.read(key), runs=_runs(read_numbers(positions))), picture)
            for key, positions in pairs
        )

    def do_cancel(self, words: Words) -> list[str]:
        return self.step(Cancel(int(words.plain[0])))

    def do_stop(self, words: Words) -> list[str]:
        return self.step(Stop(int(words.plain[0]), int(words.keyed.get("choice", 0))))

    def do_reset_cache(self, _: Words) -> list[str]:
        return self.step(ResetCache())

    def do_end_all(self, _: Words) -> list[str]:
        return self.step(EndAll(Unavailable("shutting down")))

    def do_shutdown(self, _: Words) -> list[str]:
        return self.step(StopAdmitting())

    def do_requests(self, _: Words) -> list[str]:
        return [self._show_request(request) for request in self.machine._register.requests.values()]

    def do_workers(self, _: Words) -> list[str]:
        return [
            f"{worker.id} {worker.info.state} {','.join(worker.info.roles)} connected={worker.session is not None}"
            f" prefill_tokens={worker.prefill_tokens} bound={worker.bound}{_show_images(worker)}"
            for worker in self.machine.pool
        ]

    def do_counters(self, _: Words) -> list[str]:
        counters = sorted(self.machine.counters.items())
        return [f"{name}{{{label}}} {count}" if label else f"{name} {count}" for (name, label), count in counters]

    def do_transfers(self, _: Words) -> list[str]:
        named = {key: self.names.write(bytes.fromhex(id)) if id else "none" for key, id in self.ended.items()}
        return [f"client {key}: {transfer}" for key, transfer in named.items()]

    @staticmethod
    def _show_request(request) -> str:  # type: ignore[no-untyped-def]
        places = [
            f"{name}={place.worker}/{place.attempt}"
            for name, place in (("source", request.source), ("target", request.target))
            if place is not None
        ]
        places += [
            f"image{each.index}={each.place.worker}/{each.place.attempt}{' encoded' if each.encoded else ''}"
            for each in request.images
            if each.place is not None
        ]
        several = request.submit.choices > 1
        words = [str(request.submit.key)]
        words += [f"choice={','.join(map(str, request.choices))}"] if several else []
        return " ".join(
            [*words, request.stage.value, *places, f"losses={request.losses} emitted={len(request.emitted)}"]
        )

    # -- actions -------------------------------------------------------------------------------------------------------
    def show(self, action: object) -> str | None:
        match action:
            case Dial(link, address, introduction):
                return f"dial {_name(link)} at {address} as {write_hello(introduction)}"
            case Send(link, message):
                kind = pb.RouterToController if link == CONTROLLER else pb.RouterToWorker
                return f"{_name(link)} <- {self._write(self.peers[link].open_untrusted(kind, message))}"
            case Close(link, reason):
                return f"close {_name(link)}: {reason}"
            case TokensReady():
                return self._show_tokens(action)
            case PromptScored(key, start, scores):
                assert key not in self.ended, "scores after the ending"
                return f"client {key} <- scores of [{start},{start + len(scores)}): {_write_scores(scores)}"
            case Ended():
                return self._show_ended(action)
        raise AssertionError(f"no words for {action!r}")

    def _write(self, envelope: Message) -> str:
        if not (isinstance(envelope, pb.RouterToWorker) and envelope.WhichOneof("body") == "pixels"):
            return write_envelope(envelope, self.names)
        piece = envelope.pixels
        end = piece.offset + len(piece.data)
        return f"pixels request={piece.request} attempt={piece.attempt} bytes=[{piece.offset},{end})"

    def _show_tokens(self, ready: TokensReady) -> str:
        assert ready.key not in self.ended, "a token after the ending"
        choice = f".{ready.choice}" if ready.choice else ""
        scores = f" logprobs {_write_scores(ready.logprobs)}" if ready.logprobs else ""
        finish = f" ({ready.finish})" if ready.finish else ""
        return f"client {ready.key}{choice} <- tokens {write_numbers(ready.token_ids)}{scores}{finish}"

    def _show_ended(self, ended: Ended) -> str:
        assert ended.key not in self.ended, "I1: one ending"
        self.ended[ended.key] = ended.transfer_id
        assert (ended.finish is None) != (ended.error is None)
        if ended.error is None:
            stats = ended.stats
            reused = f" cached={stats.cached_tokens}" if stats.cached_tokens else ""
            reused += f" skipped={stats.skipped_tokens}" if stats.skipped_tokens else ""
            reused += f" {stats.codec}/{stats.level}" if stats.level else ""
            reused += f" encoded at {','.join(stats.encode_workers)}" if stats.encode_workers else ""
            reused += f" image_tokens={stats.image_tokens} hits={stats.image_hits}" if stats.image_tokens else ""
            return f"client {ended.key} <- ended {ended.finish} attempts={stats.attempts}{reused}"
        retry = f" (retry after {ended.error.retry_after_ms} ms)" if ended.error.retry_after_ms else ""
        return f"client {ended.key} <- ended {ended.error.status}: {ended.error.message}{retry}"

    def check(self) -> None:
        """Each worker's load is the sum of what the requests there add to it, so an idle router believes in none."""
        requests = self.machine._register.requests.values()
        for worker in self.machine.pool:
            bound = sum(r.target is not None and r.target.worker == worker.id for r in requests)
            prefill = sum(r.prefill_load_tokens for r in requests if r.source and r.source.worker == worker.id)
            assert (worker.bound, worker.prefill_tokens) == (bound, prefill), f"{worker.id}: load is off"
            self._check_images(worker)
        lines = [len(line.queue) for line in self.machine._lines]
        in_line = [sum(r.in_line and r.stage is stage for r in requests) for stage in (Stage.ENCODING, Stage.QUEUED)]
        assert lines == in_line, f"{lines} wait in lines, but {in_line} believe so"
        held = Counter[str]()
        for request in requests:
            held[request.submit.tenant] += request.decode_tokens
        assert self.machine._holders.decode_memory.shares._held == +held, "decode memory is off"

    def _check_images(self, worker: Worker) -> None:
        here = [i for i in self.machine._register.images.values() if i.place and i.place.worker == worker.id]
        columns = sum(worker.columns_for(each.image.features) for each in here)
        ahead = sum(each.image.features for each in here if not each.encoded)
        load = worker.images
        assert (load.held_columns, load.ahead_tokens) == (columns, ahead), f"{worker.id}: load of images is off"
        assert load.held.keys() == {each.id for each in here}


def _show_images(worker: Worker) -> str:
    load = worker.images
    return f" image_tokens={load.ahead_tokens} embedding_columns={load.held_columns}" if worker.sees else ""


def _runs(positions: Sequence[int]) -> tuple[Run, ...]:
    """Positions in a row are one run."""
    runs: list[Run] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1] = Run(runs[-1].token_start, runs[-1].tokens + 1)
        else:
            runs.append(Run(position, 1))
    return tuple(runs)


def _only(keyed: dict[str, str], *names: str) -> dict[str, str]:
    return {name: keyed[name] for name in names if name in keyed}


def _offer(text: str) -> Offer:
    """ "transform/7@1a2b:0.005" """
    identity, _, kl = text.partition(":")
    encoding = Encoding.of(identity)
    return Offer(encoding.codec, encoding.tables, 0, (LevelCost(encoding.level, 2.0, float(kl)),))


def _add_logprobs(message: Any, logprobs: list[float]) -> None:
    """Of each token of a message, or of its only one."""
    for logprob in logprobs:
        entry = message.logprobs if isinstance(message, pb.FirstToken) else message.logprobs.add()
        entry.logprob, entry.rank = logprob, 1


def _write_scores(scores: Sequence[TokenLogprobs]) -> str:
    return ",".join(f"{score.logprob:g}" for score in scores)


def _link(name: str) -> str:
    return name if name == CONTROLLER else LINK_PREFIX + name


def _name(link: str) -> str:
    return link.removeprefix(LINK_PREFIX)


def _worker(word: str) -> tuple[str, str, str]:
    """ "d1:decode" or "d1:decode:B" (it serves model B)"""
    worker_id, roles, model = (*word.split(":"), "A")[:3]
    return worker_id, roles, model


class ControllerScript(Script):
    machine: ControllerCore

    def __init__(self) -> None:
        super().__init__()
        self.names = names()
        self.peers: dict[str, tuple[str, Session]] = {}

    def do_controller(self, _: Words) -> list[str]:
        self.machine = ControllerCore(ControllerConfig())
        return self.step(Started())

    def do_up(self, words: Words) -> list[str]:
        """`w1#2` is a second link of w1."""
        link, kind = words.plain
        kinds = {"worker": pb.Hello.WORKER_TO_CONTROLLER, "router": pb.Hello.ROUTER_TO_CONTROLLER}
        hello = pb.Hello(
            wire_version=int(words.keyed.get("version", 1)),
            kind=kinds.get(kind, pb.Hello.WORKER_TO_WORKER),
            sender=link.split("#")[0],
        )
        self.peers[link] = (kind, Session())
        introduction = b"\xff\xff" if "garbage" in words.keyed else hello.SerializeToString()
        return self.step(LinkUp(f"in/{link}", introduction))

    def do_lost(self, words: Words) -> list[str]:
        return self.step(LinkLost(f"in/{words.plain[0]}", "reset"))

    def said(self, speaker: str, words: Words) -> list[str]:
        kind, session = self.peers[speaker]
        envelope = pb.WorkerToController() if kind == "worker" else pb.RouterToController()
        fields = dict(words.keyed)
        for _ in range(int(fields.pop("gap", 0))):
            session.seal(pb.WorkerToController())  # sealed and never sent
        for body in words.plain:
            getattr(envelope, body).SetInParent()
            fill(getattr(envelope, body), fields, self.names)
        return self.step(Received(f"in/{speaker}", session.seal(envelope)))

    def do_workers(self, _: Words) -> list[str]:
        return [f"{worker} {state}" for worker, state in self.machine.workers.items()]

    def do_phase(self, _: Words) -> list[str]:
        return [f"{self.machine.phase.value} term={self.machine.term}"]

    def show(self, action: object) -> str | None:
        match action:
            case Send(link, message):
                name = link.removeprefix("in/")
                kind, session = self.peers[name]
                body = pb.ControllerToWorker if kind == "worker" else pb.ControllerToRouter
                return f"{name} <- {write_envelope(session.open_untrusted(body, message), self.names)}"
            case Close(link, reason):
                return f"close {link.removeprefix('in/')}: {reason}"
        raise AssertionError(f"no words for {action!r}")
