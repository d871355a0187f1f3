"""Intake: what routers ask for, checked. Their messages -> `Work` for roles, or FrameError.

A router should have refused what is wrong here: its word is not enough for an index kernel (reliability, advisories).
Whether this worker takes work at all is `WorkerCore`'s to say.
"""

from collections.abc import Callable

from control_plane.agent.status import Config
from control_plane.wire import session_pb2 as pb
from control_plane.wire.translate import (
    check_encode_untrusted,
    choice_attempts_from_wire_untrusted,
    choices_from_wire_untrusted,
    context_from_wire_untrusted,
    encoding_from_wire_untrusted,
    images_from_wire_untrusted,
    sampling_from_wire_untrusted,
)
from engine.base import limits
from engine.base.errors import FrameError
from kv_transfer.codecs import RAW_ENCODING
from kv_transfer.frame import TRANSFER_ID_BYTES
from kv_transfer.reports import EncodeWork, Work
from kv_transfer.source import Binding

Members = tuple[tuple[int, int], ...]
"""(request id, choice) of each choice of a group."""


class Intake:
    """`mint` gives sequence ids."""

    def __init__(self, config: Config, mint: Callable[[], int]) -> None:
        self._config = config
        self._mint = mint

    def prefill_untrusted(self, message: pb.Prefill) -> Work:
        if message.images and self._config.embedding_schema is None:
            raise FrameError("images")
        return self._work_untrusted(message, choices_from_wire_untrusted(message.choices))

    def reserve_untrusted(self, message: pb.Reserve) -> tuple[Work, Members]:
        members = choice_attempts_from_wire_untrusted(message.choices)
        identity = encoding_from_wire_untrusted(message).identity
        choices = tuple(choice for _, choice in members) or (0,)
        return self._work_untrusted(message, choices, identity), members

    def encode_untrusted(self, message: pb.Encode) -> EncodeWork:
        check_encode_untrusted(message)
        return EncodeWork(
            seq_id=self._mint(),
            key=message.key,
            features=message.features,
            width=message.width,
            height=message.height,
            priority=message.priority,
        )

    def children(self, work: Work) -> tuple[int, ...]:
        """A sequence for each choice of a group; none for a single choice, which is its own."""
        return tuple(self._mint() for _ in work.choices) if len(work.choices) > 1 else ()

    def _work_untrusted(self, message: pb.Prefill | pb.Reserve, choices: tuple[int, ...], identity: str = "") -> Work:
        vocab_size, max_len = self._config.vocab_size, self._config.max_model_len
        return Work(
            token_ids=context_from_wire_untrusted(message, vocab_size=vocab_size, max_len=max_len),
            prompt_tokens=message.prompt_tokens,
            sampling=sampling_from_wire_untrusted(message.sampling, vocab_size),
            tenant=message.tenant,
            priority=message.priority,
            choices=choices,
            images=images_from_wire_untrusted(message.images, prompt_tokens=message.prompt_tokens),
            identity=identity,
            seq_id=self._mint(),  # last: of what is refused, there is no sequence
        )

    def binding_untrusted(self, message: pb.Bind, work: Work | EncodeWork) -> Binding:
        """To another worker. An encoding that is not here, or means nothing for what moves: `raw` (DESIGN 2.6)."""
        if len(message.transfer_id) != TRANSFER_ID_BYTES:
            raise FrameError("transfer")
        encoding = encoding_from_wire_untrusted(message)
        usable = isinstance(work, Work) and self._config.codecs.has(encoding)
        return Binding(
            link=f"bulk/{message.target}",
            transfer_id=message.transfer_id,
            epoch=message.target_epoch,
            skip_tokens=message.skip_tokens if isinstance(work, Work) else 0,
            target_attempt=message.target_attempt,
            encoding=encoding if usable else RAW_ENCODING,
        )


def deadline_us(message: pb.Prefill | pb.Reserve | pb.Encode, now_us: int) -> int:
    deadline_ms = min(message.deadline_ms or limits.REQUEST_DEADLINE_MS, limits.REQUEST_DEADLINE_MS_MAX)
    return now_us + deadline_ms * 1_000
