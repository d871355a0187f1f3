"""Scripts for Source and Target. Frames and jobs are real: KV is encoded from one arena and decoded into another.

A frame is written `data T1/0 layers=[0,4) tokens=[0,8)`: its kind, transfer, sequence number, and what it carries. Jobs
run when the script says so (`> done 1`), or fail then (`> done 1 error`); `custody` shows whose units are still held.

Source:

    > hold 1 columns=0,1                       optional: final=4 identity=int8/0
    > computed 1 layers=[0,4) tokens=[0,8) / > complete 1 tokens=100 / > drop 1
    > bind 1 to=d1 transfer=T1 attempt=2       optional: epoch= skip= codec=
    > d1: ack T1/0                             an answer; also nack, committed, refused
    > lost d1

Target:

    > open 1 columns=0,1 context=8             optional: skip= epoch= choices= identity=; prints the transfer's name
    > abort 1
    > p1: data T1/0 layers=[0,4) tokens=[0,8)  optional: epoch= schema= codec= level= tables= heads=
                                               damaged=<field or payload>
    > p1: end T1/1 tokens=100 frames=1         with the digest of all frames so far; of=0,1: of these; digest=wrong;
                                               codec=int8 level= tables=: what the KV has come through; delta=
    > lost p1

Branches are written `tokens=100|101`; one that is empty, because its choice is over, `100||102`; none at all, `none`.
`schema=A` is that of KV, and goes without saying; `schema=E` is that of embeddings: one layer, a row for a token.
"""

from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from engine import commands
from engine.base.machine import Command, JobDone, Run, Send
from engine.executors.oracle import oracle_schema
from engine.images import PlacedImage, PromptImage
from engine.kv.arena import Arena, Arenas
from engine.kv.schema import CacheSchema, Stream
from kv_transfer import frame as frames
from kv_transfer.codecs import CodecSet, Encoding
from kv_transfer.custody import Custody
from kv_transfer.frame import End, FrameHeader, FrameKind, TransferRefusal
from kv_transfer.jobs import EncodeJob
from kv_transfer.source import Binding, Delivered, DeliveryFailed, Source
from kv_transfer.target import ArrivalFailed, Arrived, Target
from tests.scenarios.runner import Script, Words
from tests.scenarios.words import (
    Names,
    read_branches,
    read_numbers,
    read_range,
    write_branches,
    write_frame,
    write_numbers,
)

COLUMNS = 16
BLOCK_SIZE = 4
VOCAB_SIZE = 1_000
EMBEDDINGS = CacheSchema(
    "oracle",
    (
        Stream(
            name="image",
            layers=1,
            heads=1,
            parts=1,
            head_dim=4,
            dtype="float32",
            position_encoding="none",
            role="embedding",
        ),
    ),
)
BYTE_OF = {"transfer": 16, "sequence": 40, "layers": 80, "tokens": 96, "payload": -1}  # to damage


def filled_arena(seed: int, schema: CacheSchema) -> Arena:
    arena = Arena(schema, columns=COLUMNS, block_size=BLOCK_SIZE)
    arena.array[:] = np.random.default_rng(seed).integers(0, 256, arena.array.shape, np.uint8)
    return arena


class TransferScript(Script):
    """What every script has in which KV moves: memory, jobs, and peers that speak in frames."""

    def __init__(self) -> None:
        super().__init__()
        self.schema = oracle_schema()
        self.names = Names(A=self.schema.digest, E=EMBEDDINGS.digest)
        self.codecs = CodecSet(self.schema.kv)
        self.arena = filled_arena(1, self.schema)
        self.memory = Arenas(self.arena, filled_arena(1, EMBEDDINGS))
        self.custody = Custody()
        self.counters: Counter[str] = Counter()
        self.jobs: dict[int, Run] = {}
        self.sealed: dict[bytes, dict[int, int]] = {}  # transfer -> sequence -> checksum, of the peers' DATA frames
        self._peers_arena = filled_arena(2, self.schema)
        self._peers_memory = Arenas(self._peers_arena, filled_arena(2, EMBEDDINGS))

    # -- commands ------------------------------------------------------------------------------------------------------
    def job_done(self, words: Words) -> JobDone:
        key = int(words.plain[0])
        job = self.jobs.pop(key).job
        if "error" in words.plain:
            return JobDone(key, error=RuntimeError("as the script says"))
        try:
            return JobDone(key, result=job.run(self.memory))
        except Exception as error:  # what a codec thread does with it
            return JobDone(key, error=error)

    def do_counters(self, _: Words) -> list[str]:
        return [f"{name} {number}" for name, number in sorted(self.counters.items())]

    def do_custody(self, _: Words) -> list[str]:
        return [
            f"{seq_id} jobs={holding.jobs}{' ended' if holding.ended else ''}"
            for seq_id, holding in self.custody._holdings.items()
        ]

    def frame(self, words: Words) -> bytes:
        """What a peer sends."""
        kind, transfer, *rest = words.plain
        name, _, sequence = transfer.partition("/")
        header = FrameHeader(
            kind=FrameKind[kind.upper()],
            transfer_id=self.names.read(name),
            epoch=int(words.keyed.get("epoch", 1)),
            sequence=int(sequence or 0),
            schema_digest=self.names.read(words.keyed.get("schema", "A")),
        )
        if header.kind in (FrameKind.DATA, FrameKind.END):
            header = replace(
                header,
                codec=words.keyed.get("codec", "raw"),
                level=int(words.keyed.get("level", 0)),
                tables=int(words.keyed.get("tables", "0"), 16),
            )
        data = bytearray(self._sealed(header, words, rest))
        if "damaged" in words.keyed:
            data[BYTE_OF[words.keyed["damaged"]]] ^= 1
        return bytes(data)

    def _sealed(self, header: FrameHeader, words: Words, rest: list[str]) -> bytes:
        if header.kind is FrameKind.DATA:
            return self._data(header, words)
        if header.kind is FrameKind.END:
            return frames.seal(header, [self._end(header, words)])
        if header.kind is FrameKind.REFUSED:
            refusal = TransferRefusal[rest[0].upper()]
            return frames.seal_reply(
                header.kind,
                transfer_id=header.transfer_id,
                epoch=header.epoch,
                sequence=header.sequence,
                schema_digest=header.schema_digest,
                refusal=refusal,
            )
        return frames.seal(header, [])

    def _data(self, header: FrameHeader, words: Words) -> bytes:
        """With a codec other than raw, or a schema that nobody has, only the name is another: nobody may look at the
        payload."""
        arena = self._peers_memory.of(EMBEDDINGS.digest if words.keyed.get("schema") == "E" else self.schema.digest)
        layers, tokens = read_range(words.keyed["layers"]), read_range(words.keyed["tokens"])
        heads = read_range(words.keyed.get("heads", f"[0,{arena.schema.kv.heads})"))
        header = replace(
            header,
            layer_start=layers[0],
            layer_end=layers[1],
            token_start=tokens[0],
            token_end=tokens[1],
            head_start=heads[0],
            head_end=heads[1],
        )
        honest = replace(header, codec="raw", tables=0, schema_digest=arena.schema.digest)
        data = EncodeJob(header=honest, table=tuple(range(COLUMNS)), codecs=self.codecs).run(arena)
        if header != honest:
            header = replace(header, raw_bytes=frames.parse_header_untrusted(data).raw_bytes)
            data = frames.seal(header, [frames.payload_of(data)])
        self.sealed.setdefault(header.transfer_id, {})[header.sequence] = frames.checksum_of(data)
        return data

    def _end(self, header: FrameHeader, words: Words) -> bytes:
        sealed = self.sealed.get(header.transfer_id, {})
        digest = 0
        for sequence in read_numbers(words.keyed["of"]) if "of" in words.keyed else sealed:
            digest = frames.combine(digest, sealed[sequence])
        branches = read_branches(words.keyed["tokens"])
        delta = int(words.keyed.get("delta", 0))
        wrong = "digest" in words.keyed
        count = int(words.keyed["frames"])
        return frames.serialize_end(End(branches=branches, frames=count, digest=digest ^ wrong, rope_delta=delta))

    # -- actions -------------------------------------------------------------------------------------------------------
    def show(self, action: Any) -> str | None:
        match action:
            case Send(link, message):
                return f"{link} <- {write_frame(message, self.names)}"
            case Run():
                self.jobs[action.key] = action
                return f"run {action.key}: {self._show_job(action.job)}"
            case Command(command):
                return f"engine <- {show_command(command)}"
            case Delivered():
                return f"delivered {action.seq_id}"
            case DeliveryFailed():
                return f"delivery failed {action.seq_id} attempt={action.target_attempt} {action.reason}"
            case Arrived():
                tokens = write_branches(action.branches)
                return (
                    f"arrived {action.seq_id} tokens={tokens} codec={action.encoding.codec} raw={action.bytes_raw}"
                    f" wire={action.bytes_wire} us={action.transfer_us}"
                )
            case ArrivalFailed():
                return f"arrival failed {action.seq_id} {action.reason}"
        raise AssertionError(f"no words for {action!r}")

    def _show_job(self, job: Any) -> str:
        kind = "encode" if isinstance(job, EncodeJob) else "decode"
        header = job.header
        where = f"layers=[{header.layer_start},{header.layer_end}) tokens=[{header.token_start},{header.token_end})"
        return f"{kind} {self.names.write(header.transfer_id)}/{header.sequence} {where}"


def show_command(command: Any) -> str:
    """What the engine is told. A branch is its sequence, choice and token."""
    match command:
        case commands.AddEncode():
            return f"encode {command.seq_id} key={_key(command.key)} features={command.features}"
        case commands.EncodePixels(seq_id=seq_id, picture=picture):
            return f"pixels {seq_id} {picture.width}x{picture.height}"
        case commands.ReserveEmbeddings(wishes=wishes):
            return " ".join(["reserve_embeddings", *(f"{w.seq_id}:{_key(w.key)}:{w.features}" for w in wishes)])
        case commands.EmbeddingArrived():
            return f"embedding_arrived {command.seq_id}"
        case commands.AddPrefill():
            work = f"tokens={len(command.token_ids)} prompt={command.prompt_tokens}"
            return " ".join([f"prefill {command.seq_id} {work}", *_unusual(command, choices=(0,))])
        case commands.Reserve():
            work = f"context={len(command.token_ids)} growth={command.growth_tokens}"
            return " ".join([f"reserve {command.seq_id} {work}", *_unusual(command, children=())])
        case commands.Activate():
            work = f"tokens={write_numbers(command.token_ids)} prompt={command.prompt_tokens}"
            branches = [f"{branch.seq_id}:{branch.choice}:{branch.token_id}" for branch in command.branches]
            delta = [f"delta={command.rope_delta}"] if command.rope_delta else []
            return " ".join([f"activate {command.seq_id} {work} branches={','.join(branches)}", *delta])
        case commands.MarkBound():
            return f"bound {command.seq_id}"
        case commands.DecodeHere():
            return " ".join([f"decode_here {command.seq_id}", *_unusual(command, children=())])
        case commands.ResetCache():
            return "reset_cache"
        case commands.Pause():
            return f"pause {command.seq_id}"
        case commands.Release():
            return f"release {command.seq_id}"
    raise AssertionError(f"no words for {command!r}")


def _unusual(command: Any, **usual: tuple[int, ...]) -> list[str]:
    """What is not said when it is as nearly always."""
    lists = [(name, getattr(command, name)) for name, value in usual.items() if getattr(command, name) != value]
    texts = [(name, getattr(command, name, None)) for name in ("tenant", "identity", "priority")]
    images = [_image(image) for image in getattr(command, "images", ())]
    return [
        *(f"{name}={write_numbers(value)}" for name, value in lists),
        *(f"{name}={text}" for name, text in texts if text),
        *([f"images={';'.join(images)}"] if images else []),
    ]


def _image(image: PlacedImage | PromptImage) -> str:
    """ "K1", and where it is if it is somewhere: "K1@0,1" """
    if isinstance(image, PromptImage):
        return _key(image.key)
    return f"{_key(image.image.key)}@{write_numbers(image.table)}"


def _key(key: bytes) -> str:
    return key.rstrip(b".").decode()


class SourceScript(TransferScript):
    machine: Source

    def __init__(self) -> None:
        super().__init__()
        self.machine = Source(
            self.schema, codecs=self.codecs, custody=self.custody, job_keys=count(1), counters=self.counters
        )

    def do_hold(self, words: Words) -> list[str]:
        seq_id = int(words.plain[0])
        self.custody.begin(seq_id)
        self.machine.hold(
            seq_id,
            read_numbers(words.keyed["columns"]),
            final_tokens=int(words.keyed.get("final", 0)),
            identity=words.keyed.get("identity", ""),
        )
        return []

    def do_computed(self, words: Words) -> list[str]:
        layers, tokens = read_range(words.keyed["layers"]), read_range(words.keyed["tokens"])
        return self.shown(self.machine.computed(int(words.plain[0]), layers, tokens, self.now_us))

    def do_complete(self, words: Words) -> list[str]:
        branches, delta = read_branches(words.keyed["tokens"]), int(words.keyed.get("delta", 0))
        return self.shown(self.machine.complete(int(words.plain[0]), branches, self.now_us, rope_delta=delta))

    def do_bind(self, words: Words) -> list[str]:
        binding = Binding(
            link=words.keyed["to"],
            transfer_id=self.names.read(words.keyed["transfer"]),
            epoch=int(words.keyed.get("epoch", 1)),
            skip_tokens=int(words.keyed.get("skip", 0)),
            target_attempt=int(words.keyed["attempt"]),
            encoding=Encoding(words.keyed.get("codec", "raw")),
        )
        return self.shown(self.machine.bind(int(words.plain[0]), binding, self.now_us))

    def do_drop(self, words: Words) -> list[str]:
        """As a role does it: the source forgets the sequence, custody ends it."""
        seq_id = int(words.plain[0])
        return self.shown([*self.machine.drop(seq_id), *self.custody.end(seq_id)])

    def do_done(self, words: Words) -> list[str]:
        return self.shown(self.machine.on_job(self.job_done(words), self.now_us))

    def do_lost(self, words: Words) -> list[str]:
        return self.shown(self.machine.on_link_lost(words.plain[0]))

    def said(self, speaker: str, words: Words) -> list[str]:
        return self.shown(self.machine.on_frame(speaker, self.frame(words), self.now_us))

    def tick(self) -> list[str]:
        return self.shown(self.machine.on_tick(self.now_us))


class TargetScript(TransferScript):
    machine: Target

    def __init__(self) -> None:
        super().__init__()
        minted = count(1)
        self.machine = Target(
            self.schema,
            codecs=CodecSet(replace(self.schema.kv, dtype="bfloat16")),  # int8 takes no bytes: only its name matters
            custody=self.custody,
            mint_transfer_id=lambda: self.names.read(f"T{next(minted)}"),
            job_keys=count(1),
            counters=self.counters,
            vocab_size=VOCAB_SIZE,
        )

    def do_open(self, words: Words) -> list[str]:
        seq_id = int(words.plain[0])
        self.custody.begin(seq_id)
        transfer_id = self.machine.open(
            seq_id,
            table=read_numbers(words.keyed["columns"]),
            skip_tokens=int(words.keyed.get("skip", 0)),
            context_tokens=int(words.keyed["context"]),
            epoch=int(words.keyed.get("epoch", 1)),
            choices=int(words.keyed.get("choices", 1)),
            identity=words.keyed.get("identity", ""),
        )
        return [f"transfer {self.names.write(transfer_id)}"]

    def do_abort(self, words: Words) -> list[str]:
        """As a role does it: the target forgets the sequence, custody ends it."""
        seq_id = int(words.plain[0])
        self.machine.abort(seq_id)
        return self.shown(self.custody.end(seq_id))

    def do_done(self, words: Words) -> list[str]:
        return self.shown(self.machine.on_job(self.job_done(words), self.now_us))

    def do_lost(self, words: Words) -> list[str]:
        return self.shown(self.machine.on_link_lost(words.plain[0]))

    def do_memory(self, words: Words) -> list[str]:
        """Whether the KV of these tokens is the peer's, layer by layer."""
        start, end = read_range(words.keyed["tokens"])
        table = read_numbers(words.keyed["columns"])
        heads = (0, self.schema.kv.heads)
        whole = [
            np.array_equal(
                self.arena.read(table, (layer, layer + 1), (start, end), heads),
                self._peers_arena.read(tuple(range(COLUMNS)), (layer, layer + 1), (start, end), heads),
            )
            for layer in range(self.schema.kv.layers)
        ]
        return ["layers " + " ".join("written" if written else "untouched" for written in whole)]

    def said(self, speaker: str, words: Words) -> list[str]:
        return self.shown(self.machine.on_frame(speaker, self.frame(words), self.now_us))

    def tick(self) -> list[str]:
        raise AssertionError("a target waits for nothing: its owner's deadline ends it")

    @property
    def next_deadline_us(self) -> int | None:
        return None
