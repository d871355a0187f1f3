"""From logits to tokens. A pure function of logits, parameters, seed, choice and position (DESIGN 1).

No sampler state exists, so a request that moves between workers continues the same random sequence. Stop tokens,
stop strings and lengths are not decided here.

Legend: N sequences, V vocabulary, M candidates.
"""

import math
from collections.abc import Sequence

import torch

from engine.counter_random import uniform
from engine.types import SamplingParams

SampleAt = tuple[SamplingParams, int]
"""How to sample a row, and the output position it is for."""


def sample_batch(logits_NV: torch.Tensor, wanted: Sequence[SampleAt]) -> list[int | None]:
    """One token per row. None where the logits are not numbers: that sequence has failed, its neighbours have not."""
    best_N = logits_NV.argmax(dim=-1)
    # argmax takes NaN for the largest value, so looking at the winner finds any NaN of the row.
    sound = logits_NV.gather(1, best_N[:, None])[:, 0].isfinite().tolist()
    return [
        None if not sound[row] else best if params.greedy else _draw(logits_NV[row], params, position, choice=0)
        for row, (best, (params, position)) in enumerate(zip(best_N.tolist(), wanted, strict=True))
    ]


def sample(logits_V: torch.Tensor, params: SamplingParams, position: int, choice: int = 0) -> int | None:
    """One token of one row; None if the logits are not numbers."""
    best = int(logits_V.argmax())
    if not math.isfinite(float(logits_V[best])):
        return None
    return best if params.greedy else _draw(logits_V, params, position, choice)


def _draw(logits_V: torch.Tensor, params: SamplingParams, position: int, choice: int) -> int:
    """Temperature, then nucleus, then the inverse of the cumulative distribution at one uniform number."""
    logits_V = logits_V.double()
    # The largest is subtracted first: a tiny temperature then gives -inf, never inf - inf.
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / params.temperature, dim=-1)
    tokens_M = nucleus(probabilities_V, params.top_p)
    cumulative_M = probabilities_V[tokens_M].cumsum(dim=0)
    # A uniform is at most 1 - 2**-53, so its product with the mass rounds to below the mass: some candidate exceeds it.
    target = uniform(params.seed, choice, position) * float(cumulative_M[-1])
    return int(tokens_M[torch.searchsorted(cumulative_M, target, right=True)])


def nucleus(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest tokens, likeliest first, whose mass reaches `top_p`: the one that crosses the border is in.

    Equal probabilities are taken in token order. With top_p = 1 it is every token, in token order.
    """
    if top_p >= 1.0:
        return torch.arange(probabilities_V.shape[0])
    # Tokens below (1 - p) / V weigh less than 1 - p together, so the nucleus lies within the others: sort only those.
    candidates_M = (probabilities_V >= (1.0 - top_p) / probabilities_V.shape[0]).nonzero()[:, 0]
    sorted_M, order_M = probabilities_V[candidates_M].sort(descending=True, stable=True)
    # A token stays if the mass before it is short of top_p; before the likeliest there is none, so it always stays.
    short = int((sorted_M.cumsum(dim=0)[:-1] < top_p).sum())
    return candidates_M[order_M[: 1 + short]]
