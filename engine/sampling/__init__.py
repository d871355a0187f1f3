"""From logits to tokens: a pure function of logits, parameters, seed, choice, position and the tokens so far.

No sampler state exists (DESIGN 1), so a request that moves between workers continues the same random sequence. The
order of operations is vLLM's, so that parameters mean here what they mean there:

    log-probabilities    of the raw logits, before anything below                       `logprobs`
    constraint mask, allowed ids, bad words, min_tokens, logit_bias, penalties          `adjustments`
    greedy: the likeliest token | temperature, min_p, top_k, top_p, one draw            `drawing`

Where it differs from vLLM, on purpose:
  * One uniform number per (seed, choice, position), mapped through the cumulative distribution, instead of a generator.
  * Equal logits are taken in token order: top_k = 5 keeps five tokens, never six.
  * No temperature is rounded: 0 is greedy, every other one is used as it is.
  * A token's rank is 1 + the number of likelier tokens; vLLM also counts equal ones. The argmax has rank 1.
  * A constraint's mask does not show in log-probabilities.
  * `min_tokens` gives way where nothing but an end is possible: a complete JSON value can only stop.

Stop tokens, stop strings and lengths are not decided here. Neither is the grammar: its mask comes in with the row.

Legend: N rows of a step, R those that draw, V vocabulary, B blocks of S tokens (`scores`).
"""

from collections.abc import Sequence
from enum import StrEnum

import torch

from engine.commands import Sampled
from engine.sampling import scores
from engine.sampling.adjustments import adjust
from engine.sampling.drawing import draw
from engine.sampling.logprobs import score
from engine.sampling.row import Row
from engine.types import TokenLogprobs

__all__ = ["Failure", "Row", "sample_batch", "score"]


class Failure(StrEnum):
    """Why a row gave no token. `StepOutput.failed`, hence a metric label: the whole set."""

    NAN_LOGITS = "nan_logits"  # NaN or infinity: broken weights, or KV that was damaged
    NOTHING_ALLOWED = "nothing_allowed"  # the parameters forbid every token


@torch.inference_mode()
def sample_batch(
    logits_NV: torch.Tensor, rows: Sequence[Row], eos_token_ids: Sequence[int] = ()
) -> list[tuple[Sampled, ...] | Failure]:
    """For each row one token per choice, or why there is none. No row can spoil another."""
    if not rows:
        return []
    scores_NBS = scores.blocks_of(logits_NV)
    peaks_NB = scores_NBS.amax(dim=-1)
    failures = _failed(peaks_NB, range(len(rows)), Failure.NAN_LOGITS)
    changed = [index for index, row in enumerate(rows) if row.adjusted and index not in failures]
    for index in changed:
        adjust(scores_NBS[index].view(-1)[: logits_NV.shape[1]], rows[index], eos_token_ids)
        peaks_NB[index] = scores_NBS[index].amax(dim=-1)
    failures |= _failed(peaks_NB, changed, Failure.NOTHING_ALLOWED)
    tokens = _pick(scores_NBS, peaks_NB, rows, failures)
    logprobs = _logprobs(logits_NV, rows, tokens)
    return [
        failures.get(index) or tuple(map(Sampled, tokens[index], logprobs.get(index, [None] * len(row.choices))))
        for index, row in enumerate(rows)
    ]


def _failed(peaks_NB: torch.Tensor, indices: Sequence[int], reason: Failure) -> dict[int, Failure]:
    """Rows whose largest logit is no number. NaN wins every comparison for the largest, so one is always found."""
    if not indices:
        return {}
    sound = peaks_NB.amax(dim=-1).isfinite().tolist()
    return {index: reason for index in indices if not sound[index]}


def _pick(
    scores_NBS: torch.Tensor, peaks_NB: torch.Tensor, rows: Sequence[Row], failures: dict[int, Failure]
) -> dict[int, list[int]]:
    """Row -> a token for each of its choices: all greedy rows in one go, then all that draw."""
    best = scores.argmax(scores_NBS, peaks_NB).tolist()
    sound = [index for index in range(len(rows)) if index not in failures]
    tokens = {index: [best[index]] * len(rows[index].choices) for index in sound}
    random = [index for index in sound if not rows[index].params.greedy]
    if random:
        best_R = _rows(peaks_NB, random).amax(dim=-1)
        drawn = draw(_rows(scores_NBS, random), best_R, [rows[index] for index in random])
        tokens.update(zip(random, drawn, strict=True))
    return tokens


def _rows(tensor_N: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """These rows: no copy if it is all of them, because a copy costs as much as the softmax."""
    if len(indices) == len(tensor_N):
        return tensor_N
    return tensor_N.index_select(0, torch.tensor(indices, device=tensor_N.device))


def _logprobs(
    logits_NV: torch.Tensor, rows: Sequence[Row], tokens: dict[int, list[int]]
) -> dict[int, list[TokenLogprobs]]:
    """Of rows that ask. Each is scored alone: few ask, and what one asks for shall not widen another's work."""
    return {
        index: score(logits_NV[index].expand(len(picked), -1), picked, top)
        for index, picked in tokens.items()
        if (top := rows[index].params.logprobs) is not None
    }
