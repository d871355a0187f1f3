"""What request parameters do to logits: tokens that are forbidden, preferred or penalised.

Works on one row in place: each row has its own ids. Ids beyond the vocabulary are ignored, because the vocabulary is
the model's business and a row must not be able to stop a step; the router's edge refuses them with a message.

Legend: V vocabulary, M tokens named by a parameter.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

import numpy as np
import torch

from engine.sampling.row import Row

_LARGEST: Final = 1e30  # biases and penalties end here: beyond float32 lies infinity, and NaN behind it


def adjust(scores_V: torch.Tensor, row: Row, eos_token_ids: Sequence[int]) -> None:
    """Everything but temperature and truncation, in vLLM's order."""
    params = row.params
    if row.mask is not None:
        _forbid_unmasked(scores_V, row.mask)
    if params.allowed_token_ids:
        _forbid_others(scores_V, params.allowed_token_ids)
    _forbid(scores_V, _completions(params.bad_words, row.output) if params.bad_words else ())
    if row.position < params.min_tokens:
        _forbid_end(scores_V, (*eos_token_ids, *params.stop_token_ids))
    _bias(scores_V, params.logit_bias)
    if params.repetition_penalty != 1.0:
        _penalise_repetition(scores_V, row.context, params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        _penalise_output(scores_V, row.output, params.frequency_penalty, params.presence_penalty)


# -- forbidding --------------------------------------------------------------------------------------------------------
def _forbid(scores_V: torch.Tensor, tokens: Iterable[int]) -> None:
    scores_V[_ids(scores_V, tokens)] = -torch.inf


def _forbid_others(scores_V: torch.Tensor, allowed: Iterable[int]) -> None:
    allowed_M = _ids(scores_V, allowed)
    kept_M = scores_V[allowed_M]
    scores_V.fill_(-torch.inf)
    scores_V[allowed_M] = kept_M


def _forbid_unmasked(scores_V: torch.Tensor, mask: bytes) -> None:
    """Bit t of the mask allows token t. Tokens that the mask does not reach are forbidden."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: len(scores_V)]
    forbidden_V = torch.from_numpy(bits == 0).to(scores_V.device)
    scores_V[: len(bits)].masked_fill_(forbidden_V, -torch.inf)
    scores_V[len(bits) :] = -torch.inf


def _forbid_end(scores_V: torch.Tensor, ends: Iterable[int]) -> None:
    """Not yet: unless nothing else is possible, because a grammar is complete."""
    ends_M = _ids(scores_V, ends)
    before_M = scores_V[ends_M]
    scores_V[ends_M] = -torch.inf
    if bool(scores_V.amax() == -torch.inf):
        scores_V[ends_M] = before_M


def _completions(bad_words: Iterable[tuple[int, ...]], output: list[int]) -> Iterator[int]:
    """The last tokens of words whose other tokens are the end of the output. What the prompt says is not looked at."""
    for *begin, last in bad_words:
        if output[len(output) - len(begin) :] == begin:
            yield last


# -- preferring --------------------------------------------------------------------------------------------------------
def _bias(scores_V: torch.Tensor, logit_bias: Iterable[tuple[int, float]]) -> None:
    """An id that is named twice gets both biases."""
    total: dict[int, float] = {}
    for token, bias in logit_bias:
        total[token] = total.get(token, 0.0) + bias
    known = {token: bias for token, bias in total.items() if token < len(scores_V)}
    if known:
        tokens_M = _ids(scores_V, known)
        _store(scores_V, tokens_M, scores_V[tokens_M].double() + _doubles(scores_V, known.values()))


def _penalise_repetition(scores_V: torch.Tensor, context: Sequence[int], penalty: float) -> None:
    """Tokens of prompt and output: a positive logit is divided, a negative one multiplied."""
    seen_M = _ids(scores_V, set(islice(context, None)))
    scores_M = scores_V[seen_M].double()
    _store(scores_V, seen_M, torch.where(scores_M > 0, scores_M / penalty, scores_M * penalty))


def _penalise_output(scores_V: torch.Tensor, output: Iterable[int], frequency: float, presence: float) -> None:
    """Tokens of the output: once for being there, and for each time they are."""
    seen_M, counts_M = torch.unique(_ids(scores_V, output), return_counts=True)
    _store(scores_V, seen_M, scores_V[seen_M].double() - frequency * counts_M - presence)


def _store(scores_V: torch.Tensor, tokens_M: torch.Tensor, scores_M: torch.Tensor) -> None:
    """Float64 in between: a penalty of 1e-300 would be 0 in float32, and 0 / 0 is NaN."""
    scores_V[tokens_M] = scores_M.clamp(max=_LARGEST).float()


def _ids(scores_V: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    known = [token for token in tokens if token < len(scores_V)]
    return torch.tensor(known, dtype=torch.long, device=scores_V.device)


def _doubles(scores_V: torch.Tensor, values: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=scores_V.device)
