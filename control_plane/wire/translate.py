"""Values of the floors below <-> their protobuf spelling. Total on received messages: FrameError or a valid value."""

from control_plane.wire import session_pb2 as pb
from engine.base.errors import FrameError, InvalidArgument
from engine.commands import SampledToken
from engine.types import FinishReason, SamplingParams
from kv_transfer import reports

FINISH_CODES: dict[FinishReason | None, int] = {None: 0, FinishReason.STOP: 1, FinishReason.LENGTH: 2}
FINISH_REASONS: dict[int, FinishReason | None] = {code: reason for reason, code in FINISH_CODES.items()}

RELOCATE_REASONS = {
    reports.RelocateReason.QUIESCING: pb.Relocate.QUIESCING,
    reports.RelocateReason.PREEMPTED: pb.Relocate.PREEMPTED,
    reports.RelocateReason.TRANSFER_FAILED: pb.Relocate.TRANSFER_FAILED,
}


def sampling_to_wire(sampling: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
    )


def sampling_from_wire_untrusted(sampling: pb.Sampling) -> SamplingParams:
    """Checked again at the worker: a router's word is not enough for an index kernel (reliability, advisories)."""
    try:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=tuple(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
        )
    except InvalidArgument:
        raise FrameError("sampling") from None


def context_from_wire_untrusted(message: pb.Prefill | pb.Reserve, *, vocab_size: int, max_len: int) -> tuple[int, ...]:
    """The token ids of a Prefill or Reserve, inside the vocabulary and the model's length."""
    count = len(message.token_ids)
    if not 0 < message.prompt_tokens <= count <= max_len:
        raise FrameError("length")
    token_ids = tuple(message.token_ids)
    if max(token_ids) >= vocab_size:
        raise FrameError("token_id")
    return token_ids


def finish_to_wire(finish: FinishReason | None) -> str:
    return "" if finish is None else finish.value


def finish_from_wire_untrusted(text: str) -> FinishReason | None:
    if text == "":
        return None
    try:
        return FinishReason(text)
    except ValueError:
        raise FrameError("finish") from None


def tokens_to_wire(tokens: list[tuple[int, int, SampledToken]]) -> pb.Tokens:
    """(request, attempt, token) triples as parallel arrays: one message for a whole step costs microseconds."""
    return pb.Tokens(
        requests=[request for request, _, _ in tokens],
        attempts=[attempt for _, attempt, _ in tokens],
        positions=[token.position for _, _, token in tokens],
        token_ids=[token.token_id for _, _, token in tokens],
        finishes=bytes(FINISH_CODES[token.finish] for _, _, token in tokens),
    )
