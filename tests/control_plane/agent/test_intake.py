"""Intake: what a router asks for, in words of ours; what it should not have asked for is refused and no sequence."""

from itertools import count
from typing import Any

import pytest

from control_plane.agent.intake import Intake, deadline_us
from control_plane.agent.status import Config
from control_plane.wire import session_pb2 as pb
from control_plane.wire.translate import images_to_wire, sampling_to_wire
from engine.base import limits
from engine.base.errors import FrameError
from engine.images import PromptImage, Run
from engine.kv.schema import CacheSchema, Stream
from engine.types import Role, SamplingParams
from kv_transfer.codecs import RAW_ENCODING, CodecSet, Encoding
from kv_transfer.reports import EncodeWork, Work
from tests.scenarios.transfer_scripts import EMBEDDINGS

KV = CacheSchema("m", (Stream(name="kv", layers=2, heads=1, head_dim=8, dtype="bfloat16"),))
IMAGES = (PromptImage(key=b"k" * 16, runs=(Run(1, 2),)),)


def config(**fields: Any) -> Config:
    return Config(
        **{
            "worker_id": "w1",
            "name": "first",
            "address": "w1:1",
            "controller_address": "c:1",
            "roles": frozenset({Role.PREFILL}),
            "model": "m",
            "schema": KV,
            "codecs": CodecSet(KV.kv),
            "vocab_size": 100,
            "max_model_len": 10,
            "block_size": 4,
            "columns": 8,
            "embedding_schema": EMBEDDINGS,
            **fields,
        }
    )


def intake(**fields: Any) -> Intake:
    return Intake(config(**fields), mint=count(1).__next__)


def prefill(**fields: Any) -> pb.Prefill:
    honest = {"token_ids": [1, 2, 3, 4], "prompt_tokens": 4, "sampling": sampling_to_wire(SamplingParams())}
    return pb.Prefill(**{**honest, **fields})


def test_a_prefill() -> None:
    message = prefill(tenant="blue", choices=[0, 2], priority=-3, images=images_to_wire(IMAGES))
    assert intake().prefill_untrusted(message) == Work(
        seq_id=1,
        token_ids=(1, 2, 3, 4),
        prompt_tokens=4,
        sampling=SamplingParams(),
        tenant="blue",
        choices=(0, 2),
        priority=-3,
        images=IMAGES,
    )


def test_a_reserve_of_a_group() -> None:
    choices = [pb.ChoiceAttempt(request=7, choice=0), pb.ChoiceAttempt(request=8, choice=1)]
    message = pb.Reserve(
        token_ids=[1, 2, 3],
        prompt_tokens=3,
        sampling=sampling_to_wire(SamplingParams()),
        choices=choices,
        codec="int8",
        images=images_to_wire(IMAGES),
    )
    ours = intake(embedding_schema=None)  # whose names are all that matters where prompts are not computed
    work, members = ours.reserve_untrusted(message)
    assert (work.choices, work.identity, work.images, members) == ((0, 1), "int8/0", IMAGES, ((7, 0), (8, 1)))
    assert ours.children(work) == (2, 3)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_ids": [100]}, "length"),
        ({"token_ids": [1, 2, 3, 100]}, "token_id"),
        ({"choices": [1, 0]}, "choices"),
        ({"prompt_tokens": 2, "images": images_to_wire(IMAGES)}, "images"),  # in the output
        ({"sampling": pb.Sampling()}, "sampling"),
    ],
)
def test_what_is_refused_is_no_sequence(fields: dict[str, Any], reason: str) -> None:
    ours = intake()
    with pytest.raises(FrameError, match=reason):
        ours.prefill_untrusted(prefill(**fields))
    assert ours.prefill_untrusted(prefill()).seq_id == 1


def test_images_for_a_model_that_does_not_see_are_refused() -> None:
    message = prefill(images=images_to_wire(IMAGES))
    with pytest.raises(FrameError, match="images"):
        intake(embedding_schema=None).prefill_untrusted(message)


ENCODE = pb.Encode(key=b"k" * 16, features=4, width=3, height=2, priority=1)


def test_an_encode() -> None:
    work = intake().encode_untrusted(ENCODE)
    assert work == EncodeWork(seq_id=1, key=b"k" * 16, features=4, width=3, height=2, priority=1)
    assert work.pixel_bytes == 18


def bind(**fields: Any) -> pb.Bind:
    honest = {"target": "w2", "transfer_id": b"t" * 16, "target_epoch": 3, "target_attempt": 2, "skip_tokens": 8}
    return pb.Bind(**{**honest, **fields})


def test_a_binding_goes_through_a_codec_that_is_here() -> None:
    work = intake().prefill_untrusted(prefill())
    binding = intake().binding_untrusted(bind(codec="int8"), work)
    assert (binding.link, binding.epoch, binding.target_attempt, binding.skip_tokens) == ("bulk/w2", 3, 2, 8)
    assert binding.encoding == Encoding("int8")
    assert intake().binding_untrusted(bind(codec="int8", tables=5), work).encoding == RAW_ENCODING


def test_an_embedding_goes_raw_and_whole() -> None:
    ours = intake()
    binding = ours.binding_untrusted(bind(codec="int8"), ours.encode_untrusted(ENCODE))
    assert (binding.encoding, binding.skip_tokens) == (RAW_ENCODING, 0)


def test_a_binding_names_a_transfer() -> None:
    ours = intake()
    with pytest.raises(FrameError, match="transfer"):
        ours.binding_untrusted(bind(transfer_id=b"t"), ours.encode_untrusted(ENCODE))


@pytest.mark.parametrize(
    ("asked_ms", "given_ms"),
    [(0, limits.REQUEST_DEADLINE_MS), (5, 5), (0xFFFF_FFFF, limits.REQUEST_DEADLINE_MS_MAX)],
)
def test_deadlines(asked_ms: int, given_ms: int) -> None:
    assert deadline_us(pb.Encode(deadline_ms=asked_ms), 7) == 7 + given_ms * 1_000


@pytest.mark.parametrize(
    ("roles", "sees", "encodes"),
    [
        ({Role.ENCODE}, True, True),
        ({Role.PREFILL}, True, True),
        ({Role.DECODE}, True, False),
        ({Role.DECODE, Role.PREFILL}, True, True),
        ({Role.PREFILL}, False, False),
    ],
)
def test_who_encodes(roles: set[Role], sees: bool, encodes: bool) -> None:
    embeddings = EMBEDDINGS if sees else None
    assert config(roles=frozenset(roles), embedding_schema=embeddings).encodes is encodes
