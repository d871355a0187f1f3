"""Quality: what lossy KV of a prefix does to the next-token distributions after it, teacher-forced.

    KL          mean over scored tokens of KL(with the KV as stored || with the lossy KV), in nats: the quality budget
    perplexity  of the text itself, before and after; noisier than KL, and what papers print

Everything runs in float32: in bfloat16 two equal runs over differently rounded KV are 0.001 nats apart, which would
drown a budget of 0.003 (SmolLM2-135M; the same in float32: 1e-8). Nothing here knows what made the KV lossy.

Legend: S scored tokens, V vocabulary; kv_LHPTD as in `engine.capture`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum

import torch

from engine.capture import Floats, Subject, Window


@dataclass(frozen=True, slots=True)
class Loss:
    """What one window lost."""

    kl: float  # nats per token
    nats_before: float  # of the text's own next token, on average
    nats_after: float


class Judge:
    """One window and its KV as stored. Holds a table of log-probabilities, 50 MB for 49,152 words: make, ask, drop."""

    def __init__(self, subject: Subject, window: Window, kv_LHPTD: Floats) -> None:
        self._subject = subject
        self._window = window
        self._before_SV = subject.log_probs(kv_LHPTD, window.scored)

    def loss(self, kv_LHPTD: Floats) -> Loss:
        after_SV = self._subject.log_probs(kv_LHPTD, self._window.scored)
        return Loss(
            kl=max(_kl(self._before_SV, after_SV), 0.0),  # rounding may leave -1e-8
            nats_before=self._nats(self._before_SV),
            nats_after=self._nats(after_SV),
        )

    def no_loss(self) -> Loss:
        """Of KV that is just as it was."""
        nats = self._nats(self._before_SV)
        return Loss(kl=0.0, nats_before=nats, nats_after=nats)

    def _nats(self, log_probs_SV: torch.Tensor) -> float:
        """Of the scored tokens after the first; the last one's successor is not in the window."""
        successors_S1 = torch.tensor(self._window.scored[1:])[:, None]
        return -float(log_probs_SV[:-1].gather(1, successors_S1).mean())


def _kl(before_SV: torch.Tensor, after_SV: torch.Tensor) -> float:
    return float((before_SV.exp() * (before_SV - after_SV)).sum(dim=-1).mean())


def mean_kl(losses: Sequence[Loss]) -> float:
    return fsum(loss.kl for loss in losses) / len(losses)


def ppl_change(losses: Sequence[Loss]) -> float:
    """Of all windows together: 0.01 is 1 % more."""
    return exp(fsum(loss.nats_after - loss.nats_before for loss in losses) / len(losses)) - 1
