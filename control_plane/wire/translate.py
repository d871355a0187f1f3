"""Values of the floors below <-> their protobuf spelling. Total on received messages: FrameError or a valid value."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from control_plane.wire import session_pb2 as pb
from engine.base import limits
from engine.base.errors import FrameError, InvalidArgument
from engine.commands import SampledToken
from engine.images import KEY_BYTES, PromptImage, Run
from engine.types import Constraint, ConstraintKind, FinishReason, SamplingParams, TokenLogprobs
from kv_transfer import reports
from kv_transfer.codecs import RAW, Encoding
from kv_transfer.frame import LEVEL_MAX, fits_codec_name
from kv_transfer.offers import LevelCost, Offer

FINISH_CODES: dict[FinishReason | None, int] = {None: 0, FinishReason.STOP: 1, FinishReason.LENGTH: 2}
FINISH_REASONS: dict[int, FinishReason | None] = {code: reason for reason, code in FINISH_CODES.items()}

RELOCATE_REASONS = {
    reports.RelocateReason.QUIESCING: pb.Relocate.QUIESCING,
    reports.RelocateReason.PREEMPTED: pb.Relocate.PREEMPTED,
    reports.RelocateReason.TRANSFER_FAILED: pb.Relocate.TRANSFER_FAILED,
}


# -- sampling ----------------------------------------------------------------------------------------------------------
def sampling_to_wire(sampling: SamplingParams) -> pb.Sampling:
    constraint = sampling.constraint
    return pb.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias_ids=[token for token, _ in sampling.logit_bias],
        logit_bias_values=[bias for _, bias in sampling.logit_bias],
        allowed_token_ids=sampling.allowed_token_ids,
        bad_words=[pb.TokenList(ids=word) for word in sampling.bad_words],
        constraint_kind=constraint.kind.value if constraint is not None else "",
        constraint_text=constraint.text if constraint is not None else "",
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def sampling_from_wire_untrusted(sampling: pb.Sampling, vocab_size: int) -> SamplingParams:
    """Checked again at the worker: a router's word is not enough for an index kernel (reliability, advisories)."""
    try:
        params = _sampling(sampling)
    except (InvalidArgument, ValueError):  # ValueError: a kind that is none, or parallel arrays that are not
        raise FrameError("sampling") from None
    if any(token >= vocab_size for _, ids in params.token_ids_by_field() for token in ids):
        raise FrameError("token_id")
    return params


def _sampling(sampling: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=tuple(zip(sampling.logit_bias_ids, sampling.logit_bias_values, strict=True)),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        bad_words=tuple(tuple(word.ids) for word in sampling.bad_words),
        constraint=_constraint(sampling.constraint_kind, sampling.constraint_text),
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
    )


def _constraint(kind: str, text: str) -> Constraint | None:
    return Constraint(ConstraintKind(kind), text) if kind else None


# -- requests ----------------------------------------------------------------------------------------------------------
def context_from_wire_untrusted(message: pb.Prefill | pb.Reserve, *, vocab_size: int, max_len: int) -> tuple[int, ...]:
    """The token ids of a Prefill or Reserve, inside the vocabulary and the model's length."""
    count = len(message.token_ids)
    if not 0 < message.prompt_tokens <= count <= max_len:
        raise FrameError("length")
    token_ids = tuple(message.token_ids)
    if max(token_ids) >= vocab_size:
        raise FrameError("token_id")
    return token_ids


def choices_from_wire_untrusted(choices: Sequence[int]) -> tuple[int, ...]:
    """The indices in a Prefill: in order, each once. None at all: a request's only choice."""
    _check_choices_untrusted(choices)
    return tuple(choices) or (0,)


def choice_attempts_from_wire_untrusted(choices: Sequence[pb.ChoiceAttempt]) -> tuple[tuple[int, int], ...]:
    """(request id, choice index) of each child of a Reserve or Bind, in order, each once. None at all: no group."""
    _check_choices_untrusted([child.choice for child in choices])
    children = tuple((child.request, child.choice) for child in choices)
    if len({request for request, _ in children}) != len(children):
        raise FrameError("choices")
    return children


def _check_choices_untrusted(choices: Sequence[int]) -> None:
    in_order = all(low < high for low, high in pairwise(choices))
    if len(choices) > limits.CHOICES_MAX or not in_order or any(choice >= limits.CHOICES_MAX for choice in choices):
        raise FrameError("choices")


# -- images ------------------------------------------------------------------------------------------------------------
def images_to_wire(images: Iterable[PromptImage]) -> list[pb.PromptImage]:
    return [
        pb.PromptImage(
            key=image.key,
            run_starts=[run.token_start for run in image.runs],
            run_tokens=[run.tokens for run in image.runs],
            grid_rows=image.grid[0],
            grid_columns=image.grid[1],
        )
        for image in images
    ]


def images_from_wire_untrusted(images: Sequence[pb.PromptImage], *, prompt_tokens: int) -> tuple[PromptImage, ...]:
    """The images of a Prefill or Reserve: in order, and all of their placeholders within the prompt, each once."""
    if len(images) > limits.IMAGES_CEILING:
        raise FrameError("images")
    prompt_images = tuple(map(_image_untrusted, images))
    bounds = [bound for image in prompt_images for start, tokens in image.runs for bound in (start, start + tokens)]
    if any(low > high for low, high in pairwise((*bounds, prompt_tokens))):
        raise FrameError("images")
    return prompt_images


def _image_untrusted(message: pb.PromptImage) -> PromptImage:
    if len(message.key) != KEY_BYTES or not 1 <= len(message.run_starts) <= limits.IMAGE_RUNS_MAX:
        raise FrameError("images")
    if len(message.run_tokens) != len(message.run_starts) or 0 in message.run_tokens:
        raise FrameError("images")
    runs = tuple(map(Run, message.run_starts, message.run_tokens))
    image = PromptImage(key=message.key, runs=runs, grid=(message.grid_rows, message.grid_columns))
    if image.features > limits.IMAGE_FEATURES_MAX or not _is_laid_out(image):
        raise FrameError("images")
    return image


def _is_laid_out(image: PromptImage) -> bool:
    """A grid has a cell for each placeholder, and these follow one another."""
    rows, columns = image.grid
    return image.grid == (0, 0) or (rows * columns == image.features and len(image.runs) == 1)


def check_encode_untrusted(message: pb.Encode) -> None:
    """An embedding that can be asked for, of pixels that an image may have."""
    sides = (message.width, message.height)
    if len(message.key) != KEY_BYTES or not 1 <= message.features <= limits.IMAGE_FEATURES_MAX:
        raise FrameError("images")
    if min(sides) < 1 or max(sides) > limits.IMAGE_SIDE_MAX or math.prod(sides) > limits.IMAGE_PIXELS_MAX:
        raise FrameError("images")


# -- tokens ------------------------------------------------------------------------------------------------------------
def finish_to_wire(finish: FinishReason | None) -> str:
    return "" if finish is None else finish.value


def finish_from_wire_untrusted(text: str) -> FinishReason | None:
    if text == "":
        return None
    try:
        return FinishReason(text)
    except ValueError:
        raise FrameError("finish") from None


def logprobs_to_wire(logprobs: TokenLogprobs | None) -> pb.TokenLogprobs:
    """Rank 0 says that nobody asked."""
    if logprobs is None:
        return pb.TokenLogprobs()
    return pb.TokenLogprobs(
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_ids=[token for token, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_wire_untrusted(message: pb.TokenLogprobs) -> TokenLogprobs | None:
    """These figures go to a client as they are: what is no number goes no further."""
    if message.rank == 0:
        return None
    if len(message.top_ids) != len(message.top_logprobs) or len(message.top_ids) > limits.LOGPROBS_MAX:
        raise FrameError("logprobs")
    if not all(logprob < math.inf for logprob in (message.logprob, *message.top_logprobs)):
        raise FrameError("logprobs")
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(logprob=message.logprob, rank=message.rank, top=top)


def scores_from_wire_untrusted(message: pb.PromptScored) -> tuple[TokenLogprobs, ...]:
    scores = tuple(score for score in map(logprobs_from_wire_untrusted, message.logprobs) if score is not None)
    if not scores or len(scores) != len(message.logprobs):
        raise FrameError("logprobs")
    return scores


def first_token_from_wire_untrusted(message: pb.FirstToken) -> SampledToken:
    return SampledToken(
        seq_id=0,  # the message names a request
        position=message.position,
        token_id=message.token_id,
        finish=finish_from_wire_untrusted(message.finish),
        choice=message.choice,
        logprobs=logprobs_from_wire_untrusted(message.logprobs),
    )


def tokens_to_wire(tokens: Sequence[tuple[int, int, SampledToken]]) -> pb.Tokens:
    """(request, attempt, token) triples as parallel arrays: one message for a whole step costs microseconds."""
    asked = any(token.logprobs is not None for _, _, token in tokens)
    return pb.Tokens(
        requests=[request for request, _, _ in tokens],
        attempts=[attempt for _, attempt, _ in tokens],
        positions=[token.position for _, _, token in tokens],
        token_ids=[token.token_id for _, _, token in tokens],
        finishes=bytes(FINISH_CODES[token.finish] for _, _, token in tokens),
        logprobs=[logprobs_to_wire(token.logprobs) for _, _, token in tokens] if asked else (),
    )


class ReportedToken(NamedTuple):
    """One token of a step, under the names that the router knows its attempt by. Which choice it belongs to is what
    its request says."""

    request: int
    attempt: int
    position: int
    token_id: int
    finish: FinishReason | None
    logprobs: TokenLogprobs | None


def tokens_from_wire_untrusted(message: pb.Tokens) -> list[ReportedToken]:
    """The inverse."""
    columns = (message.requests, message.attempts, message.positions, message.token_ids, message.finishes)
    count = len(message.requests)
    if any(len(column) != count for column in columns) or len(message.logprobs) not in (0, count):
        raise FrameError("length")
    if not FINISH_REASONS.keys() >= set(message.finishes):
        raise FrameError("finish")
    finishes = map(FINISH_REASONS.__getitem__, message.finishes)
    logprobs = map(logprobs_from_wire_untrusted, message.logprobs) if message.logprobs else [None] * count
    return list(map(ReportedToken._make, zip(*columns[:-1], finishes, logprobs, strict=True)))


# -- encodings ---------------------------------------------------------------------------------------------------------
def encoding_from_wire_untrusted(message: pb.Reserve | pb.Bind) -> Encoding:
    """One that a frame can name. Whether anybody here has such a codec is another question."""
    _check_codec_untrusted(message.codec, message.level)
    return Encoding(message.codec or RAW, message.level, message.tables)


def offers_to_wire(offers: Iterable[Offer]) -> list[pb.CodecOffer]:
    return [
        pb.CodecOffer(
            codec=offer.codec,
            tables=offer.tables,
            level=offer.level,
            costs=[pb.LevelCost(level=c.level, bits_per_element=c.bits_per_element, kl=c.kl) for c in offer.costs],
        )
        for offer in offers
    ]


def offers_from_wire_untrusted(offers: Sequence[pb.CodecOffer]) -> dict[str, Offer]:
    """By codec: each named once, with costs that can be compared."""
    if len(offers) > limits.CODEC_OFFERS_MAX or len({offer.codec for offer in offers}) != len(offers):
        raise FrameError("offers")
    return {offer.codec: _offer_untrusted(offer) for offer in offers}


def _offer_untrusted(offer: pb.CodecOffer) -> Offer:
    _check_codec_untrusted(offer.codec, offer.level)
    if not offer.codec or len(offer.costs) > limits.CODEC_LEVELS_MAX:
        raise FrameError("offers")
    return Offer(offer.codec, offer.tables, offer.level, tuple(map(_cost_untrusted, offer.costs)))


def _cost_untrusted(cost: pb.LevelCost) -> LevelCost:
    if cost.level > LEVEL_MAX or not (0 < cost.bits_per_element < math.inf and 0 <= cost.kl < math.inf):
        raise FrameError("offers")  # NaN is inside nothing
    return LevelCost(cost.level, cost.bits_per_element, cost.kl)


def _check_codec_untrusted(name: str, level: int) -> None:
    if not fits_codec_name(name) or level > LEVEL_MAX:
        raise FrameError("codec")


# -- reports -----------------------------------------------------------------------------------------------------------
def report_to_wire(report: reports.AttemptReport, *, request: int, attempt: int, epoch: int) -> pb.WorkerToRouter:
    """One report about one attempt, under the names that its router knows it by."""
    match report:
        case reports.NearTurn():
            return pb.WorkerToRouter(near_turn=_near_turn(report, request, attempt))
        case reports.PromptScored():
            return pb.WorkerToRouter(prompt_scored=_prompt_scored(report, request, attempt))
        case reports.FirstToken():
            return pb.WorkerToRouter(first_token=_first_token(report, request, attempt))
        case reports.Granted():
            return pb.WorkerToRouter(reserved=_reserved(report, request, attempt, epoch))
        case reports.Full():
            return pb.WorkerToRouter(refused=pb.Refused(request=request, attempt=attempt, reason=pb.FULL))
        case reports.Committed():
            return pb.WorkerToRouter(committed=_committed(report, request, attempt))
        case reports.Relocate():
            return pb.WorkerToRouter(relocate=_relocate(report, request, attempt))
        case reports.PixelsWanted():
            wanted = {"offset": report.offset, "length": report.length}
            return pb.WorkerToRouter(pixels_wanted=pb.PixelsWanted(request=request, attempt=attempt, **wanted))
        case reports.Encoded(cached=cached):
            return pb.WorkerToRouter(encoded=pb.Encoded(request=request, attempt=attempt, cached=cached))
        case reports.ImagesWanted():
            return pb.WorkerToRouter(images_wanted=_images_wanted(report, request, attempt, epoch))
    raise TypeError(f"not a report about an attempt: {report!r}")


def _near_turn(report: reports.NearTurn, request: int, attempt: int) -> pb.NearTurn:
    return pb.NearTurn(
        request=request,
        attempt=attempt,
        context_tokens=report.context_tokens,
        cached_tokens=report.cached_tokens,
    )


def _prompt_scored(report: reports.PromptScored, request: int, attempt: int) -> pb.PromptScored:
    return pb.PromptScored(
        request=request,
        attempt=attempt,
        start=report.start,
        logprobs=[logprobs_to_wire(score) for score in report.logprobs],
    )


def _first_token(report: reports.FirstToken, request: int, attempt: int) -> pb.FirstToken:
    return pb.FirstToken(
        request=request,
        attempt=attempt,
        position=report.position,
        token_id=report.token_id,
        finish=finish_to_wire(report.finish),
        choice=report.choice,
        logprobs=logprobs_to_wire(report.logprobs) if report.logprobs is not None else None,
    )


def _reserved(report: reports.Granted, request: int, attempt: int, epoch: int) -> pb.Reserved:
    return pb.Reserved(
        request=request,
        attempt=attempt,
        transfer_id=report.transfer_id,
        epoch=epoch,
        skip_tokens=report.skip_tokens,
    )


def _committed(report: reports.Committed, request: int, attempt: int) -> pb.Committed:
    return pb.Committed(
        request=request,
        attempt=attempt,
        codec=report.encoding.codec,
        level=report.encoding.level,
        bytes_raw=report.bytes_raw,
        bytes_wire=report.bytes_wire,
        transfer_us=report.transfer_us,
    )


def _relocate(report: reports.Relocate, request: int, attempt: int) -> pb.Relocate:
    return pb.Relocate(
        request=request,
        attempt=attempt,
        reason=RELOCATE_REASONS[report.reason],
        token_ids=report.token_ids,
        target_attempt=report.target_attempt,
    )


def _images_wanted(report: reports.ImagesWanted, request: int, attempt: int, epoch: int) -> pb.ImagesWanted:
    return pb.ImagesWanted(
        request=request,
        attempt=attempt,
        epoch=epoch,
        images=[index for index, _ in report.transfers],
        transfer_ids=[transfer_id for _, transfer_id in report.transfers],
    )
