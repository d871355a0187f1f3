"""Values survive the wire as they are; what a peer must not send is refused before anybody uses it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from control_plane.wire import session_pb2 as pb
from control_plane.wire.translate import (
    choice_attempts_from_wire_untrusted,
    choices_from_wire_untrusted,
    encoding_from_wire_untrusted,
    first_token_from_wire_untrusted,
    images_from_wire_untrusted,
    images_to_wire,
    logprobs_from_wire_untrusted,
    logprobs_to_wire,
    offers_from_wire_untrusted,
    offers_to_wire,
    report_to_wire,
    sampling_from_wire_untrusted,
    sampling_to_wire,
    scores_from_wire_untrusted,
    tokens_from_wire_untrusted,
    tokens_to_wire,
)
from engine.base import limits
from engine.base.errors import FrameError
from engine.commands import SampledToken
from engine.images import PromptImage, Run
from engine.types import Constraint, ConstraintKind, FinishReason, SamplingParams, TokenLogprobs
from kv_transfer import reports
from kv_transfer.codecs import RAW_ENCODING, Encoding
from kv_transfer.offers import LevelCost, Offer

VOCAB_SIZE = 100
ALL_FIELDS = SamplingParams(
    temperature=0.5,
    top_p=0.75,
    top_k=7,
    min_p=0.1,
    presence_penalty=-1.5,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias=((3, -100.0), (99, 0.1)),
    allowed_token_ids=(1, 2, 3),
    bad_words=((4,), (5, 6)),
    constraint=Constraint(ConstraintKind.REGEX, "[a-z]+é"),
    seed=limits.SEED_MAX,
    max_tokens=9,
    min_tokens=2,
    stop_token_ids=(8, 9),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=5,
)
SCORE = TokenLogprobs(logprob=-0.5, rank=2, top=((7, -0.25), (3, -0.5)))


# -- sampling ----------------------------------------------------------------------------------------------------------
def test_no_field_is_left_at_its_default() -> None:
    """Else the next test says less than it seems to."""
    default = SamplingParams()
    assert all(getattr(ALL_FIELDS, name) != getattr(default, name) for name in SamplingParams.__slots__)


@pytest.mark.parametrize("sampling", [SamplingParams(), ALL_FIELDS], ids=["defaults", "every field"])
def test_sampling_survives(sampling: SamplingParams) -> None:
    message = pb.Sampling.FromString(sampling_to_wire(sampling).SerializeToString())
    assert sampling_from_wire_untrusted(message, VOCAB_SIZE) == sampling


def test_none_and_zero_logprobs_are_different_wishes() -> None:
    for logprobs in (None, 0):
        message = sampling_to_wire(SamplingParams(logprobs=logprobs, prompt_logprobs=logprobs))
        back = sampling_from_wire_untrusted(message, VOCAB_SIZE)
        assert (back.logprobs, back.prompt_logprobs) == (logprobs, logprobs)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.stop_token_ids.append(VOCAB_SIZE), id="stop_token_ids"),
        pytest.param(lambda m: m.allowed_token_ids.append(VOCAB_SIZE), id="allowed_token_ids"),
        pytest.param(lambda m: m.bad_words.add(ids=[1, VOCAB_SIZE]), id="bad_words"),
        pytest.param(lambda m: (m.logit_bias_ids.append(VOCAB_SIZE), m.logit_bias_values.append(1.0)), id="logit_bias"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(change: Callable[[pb.Sampling], object]) -> None:
    message = sampling_to_wire(SamplingParams())
    change(message)
    with pytest.raises(FrameError, match="token_id"):
        sampling_from_wire_untrusted(message, VOCAB_SIZE)
    sampling_from_wire_untrusted(message, VOCAB_SIZE + 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"repetition_penalty": 0.0},
        {"logprobs": limits.LOGPROBS_MAX + 1},
        {"constraint_kind": "prayer"},
        {"constraint_kind": "regex", "constraint_text": "a" * (limits.CONSTRAINT_BYTES_MAX + 1)},
        {"logit_bias_ids": [1]},
        {"logit_bias_values": [1.0]},
        {"logit_bias_ids": [1], "logit_bias_values": [math.inf]},
        {"bad_words": [pb.TokenList()]},
        {"stop_token_ids": [1] * (limits.STOP_TOKEN_IDS_MAX + 1)},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    message = sampling_to_wire(SamplingParams())
    for name in fields:
        message.ClearField(name)  # type: ignore[arg-type]  # names are checked by the constructor below
    message.MergeFrom(pb.Sampling(**fields))
    with pytest.raises(FrameError, match="sampling"):
        sampling_from_wire_untrusted(message, VOCAB_SIZE)


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_valid(data: bytes) -> None:
    try:
        message = pb.Sampling.FromString(data)
    except Exception:  # protobuf's business
        return
    try:
        sampling = sampling_from_wire_untrusted(message, VOCAB_SIZE)
    except FrameError:
        return
    assert all(token < VOCAB_SIZE for _, ids in sampling.token_ids_by_field() for token in ids)


# -- choices -----------------------------------------------------------------------------------------------------------
def test_choices() -> None:
    assert choices_from_wire_untrusted([]) == (0,)
    assert choices_from_wire_untrusted([3]) == (3,)
    assert choices_from_wire_untrusted([0, 2, 15]) == (0, 2, 15)
    children = [pb.ChoiceAttempt(request=9, choice=0), pb.ChoiceAttempt(request=8, choice=2)]
    assert choice_attempts_from_wire_untrusted(children) == ((9, 0), (8, 2))
    assert choice_attempts_from_wire_untrusted([]) == ()


@pytest.mark.parametrize(
    "choices", [[1, 0], [0, 0], [limits.CHOICES_MAX], list(range(limits.CHOICES_MAX + 1))], ids=str
)
def test_choices_that_are_none(choices: list[int]) -> None:
    with pytest.raises(FrameError, match="choices"):
        choices_from_wire_untrusted(choices)
    with pytest.raises(FrameError, match="choices"):
        choice_attempts_from_wire_untrusted([pb.ChoiceAttempt(request=n, choice=n) for n in choices])


def test_two_choices_cannot_be_one_request() -> None:
    with pytest.raises(FrameError, match="choices"):
        choice_attempts_from_wire_untrusted([pb.ChoiceAttempt(request=1, choice=n) for n in (0, 1)])


# -- images ------------------------------------------------------------------------------------------------------------
CAT = PromptImage(key=b"c" * 16, runs=(Run(1, 2), Run(5, 1)))
DOG = PromptImage(key=b"d" * 16, runs=(Run(6, 6),), grid=(2, 3))


def test_images_survive() -> None:
    images = (CAT, DOG)
    assert images_from_wire_untrusted(images_to_wire(images), prompt_tokens=12) == images
    assert images_from_wire_untrusted([], prompt_tokens=1) == ()


def image(**fields: Any) -> pb.PromptImage:
    honest = {"key": bytes(16), "run_starts": [2], "run_tokens": [4], "grid_rows": 2, "grid_columns": 2}
    return pb.PromptImage(**{**honest, **fields})


FLAT = {"grid_rows": 0, "grid_columns": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {"key": b""},
        {"key": bytes(15)},
        {"key": bytes(17)},
        {"run_starts": [], "run_tokens": [], **FLAT},
        {"run_starts": [2, 3]},
        {"run_tokens": [2, 2]},
        {"run_tokens": [0], **FLAT},
        {"run_starts": [7]},  # beyond the prompt
        {"run_starts": [0xFFFF_FFFF]},
        {"run_tokens": [0xFFFF_FFFF], **FLAT},
        {"run_starts": [4, 2], "run_tokens": [1, 1], **FLAT},  # not in order
        {"run_starts": [2, 3], "run_tokens": [2, 1], **FLAT},  # one placeholder twice
        {"run_starts": [2, 4], "run_tokens": [2, 2]},  # a grid in two pieces
        {"grid_rows": 3},
        {"grid_rows": 0},
        {"grid_columns": 0},
        {"grid_rows": 0xFFFF_FFFF, "grid_columns": 0xFFFF_FFFF},
    ],
)
def test_images_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    assert images_from_wire_untrusted([image()], prompt_tokens=10)
    with pytest.raises(FrameError, match="images"):
        images_from_wire_untrusted([image(**fields)], prompt_tokens=10)


def test_images_are_in_order_and_share_no_placeholder() -> None:
    for images in ((DOG, CAT), (CAT, CAT)):
        with pytest.raises(FrameError, match="images"):
            images_from_wire_untrusted(images_to_wire(images), prompt_tokens=12)


def test_images_are_no_more_than_their_limits() -> None:
    def one(start: int, tokens: int = 1) -> pb.PromptImage:
        return image(run_starts=[start], run_tokens=[tokens], **FLAT)

    def tiles(count: int) -> pb.PromptImage:
        return image(run_starts=[2 * n for n in range(count)], run_tokens=[1] * count, **FLAT)

    as_many = [[one(n) for n in range(limits.IMAGES_CEILING)], [one(0, limits.IMAGE_FEATURES_MAX)]]
    for images in (*as_many, [tiles(limits.IMAGE_RUNS_MAX)]):
        assert images_from_wire_untrusted(images, prompt_tokens=1 << 20)
    too_many = [[one(n) for n in range(limits.IMAGES_CEILING + 1)], [one(0, limits.IMAGE_FEATURES_MAX + 1)]]
    for images in (*too_many, [tiles(limits.IMAGE_RUNS_MAX + 1)]):
        with pytest.raises(FrameError, match="images"):
            images_from_wire_untrusted(images, prompt_tokens=1 << 20)


@given(data=st.binary(max_size=60))
def test_garbage_is_no_image(data: bytes) -> None:
    message = pb.PromptImage()
    try:
        message.ParseFromString(data)
        images = images_from_wire_untrusted([message], prompt_tokens=100)
    except (DecodeError, FrameError):
        return
    assert images_from_wire_untrusted(images_to_wire(images), prompt_tokens=100) == images


def test_reports_about_images() -> None:
    names = {"request": 7, "attempt": 2, "epoch": 3}
    wanted = report_to_wire(reports.PixelsWanted(seq_id=1, offset=8, length=5), **names).pixels_wanted
    assert (wanted.request, wanted.attempt, wanted.offset, wanted.length) == (7, 2, 8, 5)
    encoded = report_to_wire(reports.Encoded(seq_id=1, cached=True), **names).encoded
    assert (encoded.request, encoded.attempt, encoded.cached) == (7, 2, True)
    transfers = ((0, b"a" * 16), (2, b"b" * 16))
    images = report_to_wire(reports.ImagesWanted(seq_id=1, transfers=transfers), **names).images_wanted
    assert (images.request, images.attempt, images.epoch) == (7, 2, 3)
    assert list(zip(images.images, images.transfer_ids, strict=True)) == list(transfers)


# -- log-probabilities -------------------------------------------------------------------------------------------------
def test_logprobs_survive_and_rank_0_is_none() -> None:
    assert logprobs_from_wire_untrusted(logprobs_to_wire(SCORE)) == SCORE
    assert logprobs_from_wire_untrusted(logprobs_to_wire(None)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"logprob": math.nan},
        {"logprob": math.inf},
        {"top_ids": [1]},
        {"top_ids": [1], "top_logprobs": [math.nan]},
        {"top_ids": [1] * (limits.LOGPROBS_MAX + 1), "top_logprobs": [-1.0] * (limits.LOGPROBS_MAX + 1)},
    ],
    ids=str,
)
def test_logprobs_that_are_no_numbers_go_no_further(fields: dict[str, Any]) -> None:
    with pytest.raises(FrameError, match="logprobs"):
        logprobs_from_wire_untrusted(pb.TokenLogprobs(rank=1, **fields))


def test_an_impossible_token_has_a_logprob() -> None:
    assert logprobs_from_wire_untrusted(pb.TokenLogprobs(rank=9, logprob=-math.inf)) == TokenLogprobs(-math.inf, 9)


# -- tokens ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scores", [(None, None), (SCORE, None), (SCORE, SCORE)], ids=["none", "some", "all"])
def test_tokens_of_a_step_survive(scores: tuple[TokenLogprobs | None, ...]) -> None:
    tokens = [
        (request, 2, SampledToken(0, 7, 40 + request, finish, logprobs=score))
        for request, finish, score in zip((5, 6), (None, FinishReason.STOP), scores, strict=True)
    ]
    message = tokens_to_wire(tokens)
    assert len(message.logprobs) == (0 if scores == (None, None) else 2)
    assert tokens_from_wire_untrusted(message) == [
        (request, attempt, token.position, token.token_id, token.finish, token.logprobs)
        for request, attempt, token in tokens
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"positions": [1, 2]}, "length"),
        ({"logprobs": [pb.TokenLogprobs()] * 2}, "length"),
        ({"finishes": b"\x03"}, "finish"),
    ],
)
def test_a_step_that_contradicts_itself_is_refused(fields: dict[str, Any], reason: str) -> None:
    step: dict[str, Any] = {"requests": [1], "attempts": [1], "positions": [0], "token_ids": [5], "finishes": b"\0"}
    tokens_from_wire_untrusted(pb.Tokens(**step))
    with pytest.raises(FrameError, match=reason):
        tokens_from_wire_untrusted(pb.Tokens(**{**step, **fields}))


# -- reports -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("score", [None, SCORE], ids=["not asked", "asked"])
def test_first_token(score: TokenLogprobs | None) -> None:
    report = reports.FirstToken(seq_id=1, position=4, token_id=9, finish=FinishReason.LENGTH, choice=3, logprobs=score)
    message = report_to_wire(report, request=7, attempt=2, epoch=1).first_token
    assert (message.request, message.attempt) == (7, 2)
    token = first_token_from_wire_untrusted(message)
    assert (token.position, token.token_id, token.finish) == (4, 9, FinishReason.LENGTH)
    assert (token.choice, token.logprobs) == (3, score)


def test_near_turn_and_scores() -> None:
    near = reports.NearTurn(seq_id=1, context_tokens=20, cached_tokens=16)
    assert report_to_wire(near, request=7, attempt=2, epoch=1).near_turn == pb.NearTurn(
        request=7, attempt=2, context_tokens=20, cached_tokens=16
    )
    scored = reports.PromptScored(seq_id=1, start=3, logprobs=(SCORE, SCORE))
    message = report_to_wire(scored, request=7, attempt=2, epoch=1).prompt_scored
    assert (message.request, message.attempt, message.start) == (7, 2, 3)
    assert scores_from_wire_untrusted(message) == (SCORE, SCORE)


@pytest.mark.parametrize("logprobs", [[], [pb.TokenLogprobs(rank=1), pb.TokenLogprobs()]], ids=["none", "a gap"])
def test_scores_that_are_missing_are_refused(logprobs: list[pb.TokenLogprobs]) -> None:
    with pytest.raises(FrameError, match="logprobs"):
        scores_from_wire_untrusted(pb.PromptScored(start=1, logprobs=logprobs))


# -- encodings ---------------------------------------------------------------------------------------------------------
OFFERS = (
    Offer("raw", costs=(LevelCost(0, 16.0, 0.0),)),
    Offer("transform", 0xFFFF_FFFF, 2, (LevelCost(2, 3.0, 0.002), LevelCost(7, 1.875, 0.0125))),
)


def test_offers_come_through() -> None:
    assert offers_from_wire_untrusted(offers_to_wire(OFFERS)) == {offer.codec: offer for offer in OFFERS}


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "raw"},  # twice
        {"codec": ""},
        {"codec": "Transform"},
        {"codec": "a" * 17},
        {"level": 1 << 16},
        {"costs": [pb.LevelCost(level=1 << 16, bits_per_element=1.0)]},
        {"costs": [pb.LevelCost(bits_per_element=0.0)]},
        {"costs": [pb.LevelCost(bits_per_element=math.inf)]},
        {"costs": [pb.LevelCost(bits_per_element=math.nan)]},
        {"costs": [pb.LevelCost(bits_per_element=1.0, kl=-0.001)]},
        {"costs": [pb.LevelCost(bits_per_element=1.0, kl=math.inf)]},
        {"costs": [pb.LevelCost(bits_per_element=1.0, kl=math.nan)]},
        {"costs": [pb.LevelCost(bits_per_element=1.0)] * (limits.CODEC_LEVELS_MAX + 1)},
    ],
)
def test_an_offer_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    offer = {"codec": "transform", "costs": [pb.LevelCost(level=1, bits_per_element=2.0, kl=0.1)]} | change
    with pytest.raises(FrameError, match=r"offers|codec"):
        offers_from_wire_untrusted([pb.CodecOffer(codec="raw"), pb.CodecOffer(**offer)])


def test_offers_are_no_more_than_their_limit() -> None:
    offers = [pb.CodecOffer(codec=f"c{number}") for number in range(limits.CODEC_OFFERS_MAX + 1)]
    assert len(offers_from_wire_untrusted(offers[1:])) == limits.CODEC_OFFERS_MAX
    with pytest.raises(FrameError, match="offers"):
        offers_from_wire_untrusted(offers)


@pytest.mark.parametrize("kind", [pb.Reserve, pb.Bind])
def test_an_encoding_is_one_that_a_frame_can_name(kind: type[pb.Reserve | pb.Bind]) -> None:
    assert encoding_from_wire_untrusted(kind()) == RAW_ENCODING
    encoding = Encoding("transform", 7, 0x1A2B)
    assert encoding_from_wire_untrusted(kind(codec="transform", level=7, tables=0x1A2B)) == encoding
    for wrong in ({"codec": "int8/0"}, {"codec": "int8", "level": 1 << 16}):
        with pytest.raises(FrameError, match="codec"):
            encoding_from_wire_untrusted(kind(**wrong))  # type: ignore[arg-type]
