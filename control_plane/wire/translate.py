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


def report_to_wire(report: reports.AttemptReport, *, request: int, attempt: int, epoch: int) -> pb.WorkerToRouter:
    """One report about one attempt, under the names that its router knows it by."""
    match report:
        case reports.NearTurn():
            near_turn = pb.NearTurn(request=request, attempt=attempt, context_tokens=report.context_tokens)
            return pb.WorkerToRouter(near_turn=near_turn)
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
    raise TypeError(f"not a report about an attempt: {report!r}")


def _first_token(report: reports.FirstToken, request: int, attempt: int) -> pb.FirstToken:
    return pb.FirstToken(
        request=request,
        attempt=attempt,
        position=report.position,
        token_id=report.token_id,
        finish=finish_to_wire(report.finish),
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
        codec=report.codec,
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
