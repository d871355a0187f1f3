"""TracedMachine: the host sees the same machine, and the file says what passed."""

import json
from collections.abc import Sequence
from pathlib import Path

from control_plane.agent.trace import Trace, TracedMachine
from engine.base.errors import FrameError
from engine.base.machine import Command, JobDone, Run, Send, Tick
from engine.commands import (
    Activate,
    Branch,
    Encoded,
    EncodePixels,
    KVComputed,
    Prefilled,
    SampledToken,
    TokensSampled,
)
from engine.executors.oracle import oracle_schema
from engine.images import Picture
from engine.types import SamplingParams
from kv_transfer.codecs import CodecSet
from kv_transfer.frame import FrameHeader, FrameKind
from kv_transfer.jobs import DecodeJob

HEADER = FrameHeader(
    kind=FrameKind.DATA, transfer_id=bytes(16), epoch=1, sequence=0, schema_digest=bytes(16), codec="raw", raw_bytes=96
)

CODECS = CodecSet(oracle_schema().kv)


class Replies:
    """Answers each event with what the test put down for it."""

    next_deadline_us = 7

    def __init__(self, replies: Sequence[Sequence[object]]) -> None:
        self._replies = iter(replies)

    def step(self, event: object, now_us: int) -> Sequence[object]:
        return next(self._replies, [])


def decode(key: int) -> Run:
    return Run(key, DecodeJob(frame=b"", header=HEADER, table=(0,), codecs=CODECS))


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_placed_frames_and_activations_are_noted_and_nothing_is_changed(tmp_path: Path) -> None:
    path, clock_us = tmp_path / "w.jsonl", iter(range(100))
    branches = (Branch(seq_id=4, choice=0, token_id=2), Branch(seq_id=5, choice=2, token_id=7))
    group = Activate(seq_id=3, token_ids=(1,), prompt_tokens=1, sampling=SamplingParams(), branches=branches)
    activate = Command(group)
    send = Send("peer", b"ack")
    pixels = Command(EncodePixels(seq_id=8, picture=Picture(1, 1, b"rgb")))
    replies: list[list[object]] = [[decode(1), decode(2)], [send], [activate], [pixels]]
    trace = Trace(path, lambda: next(clock_us))
    machine = TracedMachine(Replies(replies), trace)
    events = ["frames", JobDone(1, result=5), JobDone(2, error=FrameError("checksum")), JobDone(9, result="encoded")]
    assert [machine.step(event, 0) for event in events] == replies
    assert machine.next_deadline_us == 7
    assert read(path) == []  # a running worker is a heartbeat behind
    machine.step(Tick(), 0)
    assert read(path) == [
        {"us": 0, "event": "placed", "bytes": 96},
        {"us": 1, "event": "placed", "bytes": 0},  # damaged
        {"us": 2, "event": "activated", "seq": 4},
        {"us": 3, "event": "activated", "seq": 5},
        {"us": 4, "event": "pixels", "seq": 8},
    ]
    trace.close()


def test_engine_events_are_noted_when_they_happen(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    trace = Trace(path, lambda: 5)
    token = SampledToken(1, 2, 3, None)
    trace.note_engine(
        (
            KVComputed(seq_id=1, layer_start=0, layer_end=5, token_start=0, token_end=16),
            Prefilled(seq_id=1, tokens=(token,)),
            TokensSampled(tokens=(token, token)),
            Encoded(seq_id=2, block_table=(0,), cached=True),
        )
    )
    trace.close()
    assert read(path) == [
        {"us": 5, "event": "computed", "seq": 1, "layers": [0, 5], "tokens": [0, 16]},
        {"us": 5, "event": "prefilled", "seq": 1},
        {"us": 5, "event": "tokens", "seqs": [1, 1]},
        {"us": 5, "event": "encoded", "seq": 2, "cached": True},
    ]
