"""Frames: what is sealed is what is parsed, the bytes are these and no others, and every field has bounds."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base import limits
from engine.base.errors import FrameError
from engine.kv.schema import Stream
from kv_transfer import frame as frames
from kv_transfer.frame import HEADER_BYTES, End, FrameHeader, FrameKind, TransferRefusal

TRANSFER = bytes(range(16))
SCHEMA = bytes(range(16, 32))
STREAM = Stream(name="kv", layers=4, heads=2, head_dim=8, dtype="bfloat16")
ATOM = FrameHeader(
    kind=FrameKind.DATA,
    transfer_id=TRANSFER,
    epoch=3,
    sequence=7,
    schema_digest=SCHEMA,
    codec="raw",
    layer_start=1,
    layer_end=3,
    token_start=16,
    token_end=21,
    head_end=2,
    raw_bytes=2 * 5 * STREAM.token_layer_bytes,
)
CONTROL = FrameHeader(kind=FrameKind.ACK, transfer_id=TRANSFER, epoch=3, sequence=7, schema_digest=SCHEMA)


def ranges(end_max: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.lists(st.integers(0, end_max), min_size=2, max_size=2, unique=True).map(lambda pair: tuple(sorted(pair)))


@st.composite
def atom_headers(draw: st.DrawFn) -> FrameHeader:
    (layer_start, layer_end), (head_start, head_end) = draw(ranges(0xFFFF)), draw(ranges(0xFFFF))
    token_start, token_end = draw(ranges(limits.PROMPT_TOKENS_MAX + limits.OUTPUT_TOKENS_MAX))
    tp_rank, tp_size = draw(ranges(0xFFFF))
    return FrameHeader(
        kind=FrameKind.DATA,
        transfer_id=draw(st.binary(min_size=16, max_size=16)),
        epoch=draw(st.integers(0, (1 << 64) - 1)),
        sequence=draw(st.integers(0, (1 << 32) - 1)),
        schema_digest=draw(st.binary(min_size=16, max_size=16)),
        codec=draw(st.from_regex(r"[a-z0-9_-]{1,16}", fullmatch=True)),
        level=draw(st.integers(0, 0xFFFF)),
        stream=draw(st.integers(0, 0xFFFF)),
        layer_start=layer_start,
        layer_end=layer_end,
        head_start=head_start,
        head_end=head_end,
        token_start=token_start,
        token_end=token_end,
        tp_rank=tp_rank,
        tp_size=tp_size,
        raw_bytes=draw(st.integers(1, limits.FRAME_PAYLOAD_BYTES_MAX)),
        tables=draw(st.integers(0, (1 << 32) - 1)),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(header=atom_headers(), parts=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4))
def test_what_is_sealed_is_what_is_parsed(header: FrameHeader, parts: list[bytes]) -> None:
    data = frames.seal(header, parts)
    frames.verify_checksum_untrusted(data)
    assert frames.payload_of(data) == b"".join(parts)
    assert frames.parse_header_untrusted(data) == replace(header, payload_bytes=len(b"".join(parts)))


def test_the_bytes_on_the_wire_are_these() -> None:
    """Version 1. If this fails, WIRE_VERSION has to change."""
    data = frames.seal(replace(ATOM, codec="int8", level=2, tp_size=4, tp_rank=1), [b"pay", memoryview(b"load")])
    assert len(data) == HEADER_BYTES + 7 == 112 + 7
    expected = (
        "544b563101000100 55423857c5840c5e "
        "0001020304050607 08090a0b0c0d0e0f 0300000000000000 07000000 "
        "1011121314151617 18191a1b1c1d1e1f 696e743800000000 0000000000000000 0200 "
        "0000 01000300 00000200 01000400 1000000015000000 07000000 80020000 00000000 "
        "7061796c6f6164"
    )
    assert data.hex() == expected.replace(" ", "")
    with_tables = frames.seal(replace(ATOM, codec="transform", tables=0x1A2B3C4D), [b"payload"])
    assert with_tables[108:112].hex() == "4d3c2b1a"


def test_a_payload_in_parts_is_the_payload() -> None:
    assert frames.seal(ATOM, [b"a", b"", memoryview(b"bc")]) == frames.seal(ATOM, [b"abc"])


def test_the_largest_frame_is_allowed_and_no_larger() -> None:
    data = frames.seal(ATOM, [bytes(limits.FRAME_PAYLOAD_BYTES_MAX)])
    assert frames.parse_header_untrusted(data).payload_bytes == limits.FRAME_PAYLOAD_BYTES_MAX
    with pytest.raises(ValueError, match="length"):
        frames.seal(ATOM, [bytes(limits.FRAME_PAYLOAD_BYTES_MAX), b"x"])
    with pytest.raises(FrameError, match="length"):
        frames.parse_header_untrusted(data + b"x")


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("range", {"layer_start": 3}),
        ("range", {"layer_start": 4}),
        ("range", {"head_start": 2}),
        ("range", {"token_start": 21}),
        ("range", {"token_end": limits.PROMPT_TOKENS_MAX + limits.OUTPUT_TOKENS_MAX + 1}),
        ("range", {"tp_size": 0}),
        ("range", {"tp_rank": 1}),
        ("length", {"raw_bytes": 0}),
        ("length", {"raw_bytes": limits.FRAME_PAYLOAD_BYTES_MAX + 1}),
        ("length", {"transfer_id": b"short"}),
        ("length", {"schema_digest": b""}),
        ("codec", {"codec": ""}),
        ("codec", {"codec": "Raw"}),
        ("codec", {"codec": "raw\0"}),
        ("codec", {"codec": "größe"}),
        ("codec", {"codec": "a" * 17}),
        ("argument out of range|format", {"level": 1 << 16}),
        ("argument out of range|format", {"tables": 1 << 32}),
        ("argument out of range|format", {"epoch": -1}),
    ],
)
def test_nothing_is_sealed_that_nobody_would_take(reason: str, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"not a frame \(.*({reason})"):
        frames.seal(replace(ATOM, **change), [b"x"])


@pytest.mark.parametrize("kind", [kind for kind in FrameKind if kind is not FrameKind.DATA])
def test_without_a_codec_there_are_no_tables(kind: FrameKind) -> None:
    body = {FrameKind.END: [b"body"], FrameKind.REFUSED: [b"\1\0"]}.get(kind, [])
    assert frames.seal(replace(CONTROL, kind=kind, codec="x", tables=1), body)
    with pytest.raises(ValueError, match="codec"):
        frames.seal(replace(CONTROL, kind=kind, tables=1), body)


@pytest.mark.parametrize("kind", [kind for kind in FrameKind if kind is not FrameKind.DATA])
@pytest.mark.parametrize("field", ["stream", "layer_end", "token_end", "head_end", "tp_rank", "raw_bytes"])
def test_only_data_is_about_an_atom(kind: FrameKind, field: str) -> None:
    body = {FrameKind.END: [b"body"], FrameKind.REFUSED: [b"\1\0"]}.get(kind, [])
    header = replace(CONTROL, kind=kind)
    assert frames.parse_header_untrusted(frames.seal(header, body)).kind is kind
    with pytest.raises(ValueError, match="range"):
        frames.seal(replace(header, **{field: 1}), body)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FrameKind.DATA, b""),
        (FrameKind.END, b""),
        (FrameKind.ACK, b"x"),
        (FrameKind.REFUSED, b""),
        (FrameKind.REFUSED, b"123"),
    ],
)
def test_each_kind_has_its_body(kind: FrameKind, body: bytes) -> None:
    header = ATOM if kind is FrameKind.DATA else replace(CONTROL, kind=kind)
    with pytest.raises(ValueError, match="length"):
        frames.seal(header, [body])


@pytest.mark.parametrize("kind", [FrameKind.ACK, FrameKind.NACK, FrameKind.COMMITTED])
def test_replies_name_what_they_answer(kind: FrameKind) -> None:
    data = frames.seal_reply(kind, transfer_id=TRANSFER, epoch=3, sequence=7, schema_digest=SCHEMA)
    frames.verify_checksum_untrusted(data)
    assert frames.parse_header_untrusted(data) == replace(CONTROL, kind=kind)


@pytest.mark.parametrize("refusal", TransferRefusal)
def test_a_refusal_says_why(refusal: TransferRefusal) -> None:
    data = frames.seal_reply(
        FrameKind.REFUSED, transfer_id=TRANSFER, epoch=3, sequence=0, schema_digest=SCHEMA, refusal=refusal
    )
    assert frames.parse_header_untrusted(data).kind is FrameKind.REFUSED
    assert frames.parse_refusal_untrusted(frames.payload_of(data)) is refusal


@pytest.mark.parametrize(
    ("name", "fits"),
    [("", True), ("raw", True), ("a" * 16, True), ("a" * 17, False), ("Raw", False), ("a/0", False), ("raw\0", False)],
)
def test_what_a_codec_may_be_called(name: str, fits: bool) -> None:
    assert frames.fits_codec_name(name) == fits


@pytest.mark.parametrize("payload", [b"", b"\1", b"\0\0", b"\xff\xff", b"\1\0\0"])
def test_an_unknown_refusal_is_no_refusal(payload: bytes) -> None:
    with pytest.raises(FrameError, match="payload"):
        frames.parse_refusal_untrusted(payload)


# -- END ---------------------------------------------------------------------------------------------------------------
tokens = st.integers(0, (1 << 32) - 1)
branches = st.lists(st.lists(tokens, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple).filter(any)
deltas = st.integers(-(1 << 31), (1 << 31) - 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    branches=branches | st.just(()),
    count=st.integers(0, (1 << 32) - 1),
    digest=st.integers(0, (1 << 64) - 1),
    delta=deltas,
)
def test_end_comes_back(branches: tuple[tuple[int, ...], ...], count: int, digest: int, delta: int) -> None:
    end = End(branches=branches, frames=count, digest=digest, rope_delta=delta)
    assert frames.parse_end_untrusted(memoryview(frames.serialize_end(end))) == end


@settings(max_examples=300, deadline=None, derandomize=True)
@given(branches=branches | st.just(()), cut=st.integers(0, 200), extra=st.binary(max_size=9))
def test_an_end_of_another_length_is_refused(branches: tuple[tuple[int, ...], ...], cut: int, extra: bytes) -> None:
    body = frames.serialize_end(End(branches=branches, frames=1, digest=2))
    changed = body[:cut] + extra
    if len(changed) != len(body):
        with pytest.raises(FrameError, match="payload"):
            frames.parse_end_untrusted(changed)


@pytest.mark.parametrize("branches", [((1, 2), ()), ((), (1,)), ((),) * (limits.CHOICES_MAX - 1) + ((1,),)])
def test_a_choice_that_is_over_has_an_empty_branch(branches: tuple[tuple[int, ...], ...]) -> None:
    end = End(branches=branches, frames=1, digest=2)
    assert frames.parse_end_untrusted(frames.serialize_end(end)) == end


@pytest.mark.parametrize("branches", [((),), ((), ()), ((),) * limits.CHOICES_MAX + ((1,),)])
def test_an_end_without_a_token_to_go_on_from_or_with_too_many_choices_is_refused(
    branches: tuple[tuple[int, ...], ...],
) -> None:
    with pytest.raises(FrameError, match="payload"):
        frames.parse_end_untrusted(frames.serialize_end(End(branches=branches, frames=1, digest=2)))


def test_the_schema_is_named_where_the_header_has_it() -> None:
    header = FrameHeader(kind=FrameKind.ABORT, transfer_id=bytes(16), epoch=1, sequence=2, schema_digest=b"s" * 16)
    assert frames.schema_named_untrusted(frames.seal(header, [])) == b"s" * 16
    assert frames.schema_named_untrusted(b"") == b""


@given(checksums=st.lists(st.integers(0, (1 << 64) - 1), max_size=6), order=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_digest_does_not_depend_on_the_order(checksums: list[int], order: object) -> None:
    shuffled = list(checksums)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    digests = []
    for sequence in (checksums, shuffled):
        digest = 0
        for checksum in sequence:
            digest = frames.combine(digest, checksum)
        digests.append(digest)
    assert digests[0] == digests[1] == sum(checksums) % (1 << 64)


# -- the schema --------------------------------------------------------------------------------------------------------
def test_an_atom_of_the_stream_is_taken() -> None:
    shape = frames.check_atom_untrusted(ATOM, STREAM)
    assert (shape.layers, shape.tokens, shape.heads) == ((1, 3), (16, 21), (0, 2))
    assert shape.raw_bytes == ATOM.raw_bytes


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("kind", {"kind": FrameKind.END}),
        ("range", {"stream": 1}),
        ("range", {"layer_end": 5}),
        ("range", {"head_end": 3}),
        ("length", {"raw_bytes": ATOM.raw_bytes - 1}),
        ("length", {"layer_end": 4}),
        ("length", {"head_start": 1}),
        ("length", {"token_end": 22}),
    ],
)
def test_an_atom_outside_the_stream_or_of_another_size_is_refused(reason: str, change: dict[str, object]) -> None:
    with pytest.raises(FrameError, match=reason):
        frames.check_atom_untrusted(replace(ATOM, **change), STREAM)


# -- drafts ------------------------------------------------------------------------------------------------------------
def test_a_draft_is_sealed_to_the_same_bytes_in_the_memory_it_was_written_to() -> None:
    draft = frames.Draft(ATOM.raw_bytes)
    draft.payload[:] = bytes(range(256)) * (ATOM.raw_bytes // 256) + bytes(ATOM.raw_bytes % 256)
    address = np.frombuffer(draft.payload, np.uint8).ctypes.data
    expected = frames.seal(ATOM, [bytes(draft.payload)])
    sealed = draft.seal(ATOM)
    assert sealed == expected
    assert np.frombuffer(sealed, np.uint8).ctypes.data + frames.HEADER_BYTES == address


def test_whoever_kept_a_view_of_a_draft_cannot_change_the_sealed_frame() -> None:
    draft = frames.Draft(ATOM.raw_bytes)
    view = np.frombuffer(draft.payload, np.uint8)
    sealed = draft.seal(ATOM)
    view[:] = 1
    assert sealed == frames.seal(ATOM, [bytes(ATOM.raw_bytes)])
