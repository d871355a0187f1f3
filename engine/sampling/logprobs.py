"""How likely the model itself found a token: log-probabilities of raw logits, for output and prompt tokens alike.

Legend: T rows, V vocabulary, K likeliest tokens.
"""

from collections.abc import Sequence
from typing import Final

import torch

from engine.types import TokenLogprobs

_ROWS: Final = (
    32  # scored together: a chunk of a prompt times a vocabulary in float32 is 100 MB, and none of it is kept
)


@torch.inference_mode()
def score(logits_TV: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """One entry per row, for its token; with the `top` likeliest tokens of each, equals in token order."""
    entries: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _ROWS):
        entries += _score(logits_TV[start : start + _ROWS].float(), tokens[start : start + _ROWS], top)
    return entries


def _score(logits_TV: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    tokens_T1 = torch.tensor(tokens, dtype=torch.long, device=logits_TV.device)[:, None]
    own_T1 = logits_TV.gather(1, tokens_T1)
    mass_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
    ranks = (1 + (logits_TV > own_T1).sum(dim=-1)).tolist()
    best_TK = logits_TV.topk(min(top, logits_TV.shape[1]), dim=-1)
    columns = zip(
        (own_T1 - mass_T1)[:, 0].tolist(),
        ranks,
        best_TK.indices.tolist(),
        (best_TK.values - mass_T1).tolist(),
        strict=True,
    )
    return [TokenLogprobs(own, rank, _ordered(ids, logprobs)) for own, rank, ids, logprobs in columns]


def _ordered(ids: Sequence[int], logprobs: Sequence[float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda entry: (-entry[1], entry[0])))
