"""One draw from a row: temperature, min_p, top_k, top_p, then the inverse of the cumulative distribution.

A token's *weight* is exp((logit - largest) / temperature): 1 for the likeliest, and never normalised. Rows without
truncation draw in two steps, all together: the block that the uniform number falls into, then the token inside it.
Rows with truncation find a short list first, which a cut-off keeps short (`_cutoff`), and draw from that.

Weights are float32, every sum of many is float64, and each row's arithmetic is its own: the neighbours in the batch
cannot change a draw. Torch's exp may differ in its last bit from one kind of machine to another; a draw then differs
if the uniform number falls between the two, which is once in ten million.

Legend: R rows, D draws, V tokens in B blocks of S, M tokens of a short list.
"""

from collections.abc import Sequence
from typing import Final

import torch

from engine.counter_random import uniform
from engine.sampling.row import Row
from engine.sampling.scores import BLOCK_TOKENS
from engine.types import SamplingParams

_TEMPERATURE_MIN: Final = 1e-30  # smaller is zero in float32; at this one any two different logits are worlds apart
_BELOW_ONE: Final = 1.0 - 2.0**-53
_SLACK: Final = 1e-9  # of the mass: the nucleus is found by sorting, whatever order a histogram is summed in


def draw(scores_RBS: torch.Tensor, best_R: torch.Tensor, rows: Sequence[Row]) -> list[list[int]]:
    """For each row, whose best score is given, one token per choice. Overwrites the scores: they become weights."""
    weights_RBS = _weigh(scores_RBS, best_R, [row.params.temperature for row in rows])
    sums_RB = weights_RBS.sum(dim=-1).double()
    whole = [index for index, row in enumerate(rows) if not _truncates(row.params)]
    tokens = dict(zip(whole, _draw_whole(weights_RBS, sums_RB, rows, whole), strict=True))
    for index, row in enumerate(rows):
        if index not in tokens:
            tokens[index] = _draw_short(weights_RBS[index], sums_RB[index], row)
    return [tokens[index] for index in range(len(rows))]


def _weigh(scores_RBS: torch.Tensor, best_R: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """The best is subtracted first: a tiny temperature then gives -inf, never inf - inf."""
    inverse = [1.0 / max(temperature, _TEMPERATURE_MIN) for temperature in temperatures]
    inverse_R = torch.tensor(inverse, device=scores_RBS.device)
    return scores_RBS.sub_(best_R[:, None, None]).mul_(inverse_R[:, None, None]).exp_()


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _uniforms(row: Row) -> list[float]:
    return [uniform(row.params.seed, choice, row.position) for choice in row.choices]


def _pick(cumulative_DM: torch.Tensor, targets_D: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above its target. A target is below the last entry, so there always is one, and an
    entry without weight is never above the one before it."""
    return torch.searchsorted(cumulative_DM, targets_D[:, None], right=True)[:, 0]


# -- without truncation ------------------------------------------------------------------------------------------------
def _draw_whole(
    weights_RBS: torch.Tensor, sums_RB: torch.Tensor, rows: Sequence[Row], whole: Sequence[int]
) -> list[list[int]]:
    """All draws of all these rows at once: first the block, then the token within."""
    if not whole:
        return []
    uniforms = [_uniforms(rows[index]) for index in whole]
    row_D = torch.tensor([index for index, drawn in zip(whole, uniforms, strict=True) for _ in drawn], dtype=torch.long)
    uniform_D = torch.tensor([number for drawn in uniforms for number in drawn], dtype=torch.float64)
    tokens = iter(_locate(weights_RBS, sums_RB, row_D.to(sums_RB.device), uniform_D.to(sums_RB.device)).tolist())
    return [[next(tokens) for _ in drawn] for drawn in uniforms]


def _locate(
    weights_RBS: torch.Tensor, sums_RB: torch.Tensor, row_D: torch.Tensor, uniform_D: torch.Tensor
) -> torch.Tensor:
    """A uniform is at most 1 - 2**-53, so its product with the mass rounds to below the mass."""
    cumulative_DB = sums_RB.cumsum(dim=-1)[row_D]
    target_D = uniform_D * cumulative_DB[:, -1]
    block_D = _pick(cumulative_DB, target_D)
    sum_D = sums_RB[row_D, block_D]
    before_D = cumulative_DB.gather(1, block_D[:, None])[:, 0] - sum_D
    fraction_D = ((target_D - before_D) / sum_D).clamp(0.0, _BELOW_ONE)
    cumulative_DS = weights_RBS[row_D, block_D].double().cumsum(dim=-1)
    return block_D * BLOCK_TOKENS + _pick(cumulative_DS, fraction_D * cumulative_DS[:, -1])


# -- with truncation ---------------------------------------------------------------------------------------------------
def _draw_short(weights_BS: torch.Tensor, sums_B: torch.Tensor, row: Row) -> list[int]:
    tokens_M, weights_M = shortlist(weights_BS, sums_B, row.params)
    cumulative_M = weights_M.double().cumsum(dim=0)
    uniform_D = torch.tensor(_uniforms(row), dtype=torch.float64, device=cumulative_M.device)
    index_D = torch.searchsorted(cumulative_M, uniform_D * cumulative_M[-1], right=True)
    drawn: list[int] = tokens_M[index_D].tolist()
    return drawn


def shortlist(
    weights_BS: torch.Tensor, sums_B: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """What truncation leaves, likeliest first and equals in token order: token ids and weights.

    min_p first, top_k of those, and of those the fewest whose mass reaches top_p: the one that crosses it is in.
    """
    peaks_B = weights_BS.amax(dim=-1)
    tokens_M, weights_M = _at_least(weights_BS, peaks_B, _cutoff(weights_BS, peaks_B, params))
    weights_M, order_M = weights_M.sort(descending=True, stable=True)
    tokens_M = tokens_M[order_M]
    if params.top_k:
        tokens_M, weights_M = tokens_M[: params.top_k], weights_M[: params.top_k]
    if params.top_p < 1.0:
        mass_M = weights_M.double().cumsum(dim=0)
        mass = mass_M[-1] if params.top_k or params.min_p else sums_B.sum()
        # A token stays if the mass before it is short of top_p; before the likeliest there is none, so it always stays.
        kept = 1 + int((mass_M[:-1] < params.top_p * mass).sum())
        tokens_M, weights_M = tokens_M[:kept], weights_M[:kept]
    return tokens_M, weights_M


def _at_least(weights_BS: torch.Tensor, peaks_B: torch.Tensor, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of at least this weight, in token order, looking only into blocks whose peak reaches it."""
    blocks_B = (peaks_B >= cutoff).nonzero()[:, 0]
    candidates_BS = weights_BS.index_select(0, blocks_B)
    block_M, offset_M = (candidates_BS >= cutoff).nonzero(as_tuple=True)
    return blocks_B[block_M] * BLOCK_TOKENS + offset_M, candidates_BS[block_M, offset_M]


def _cutoff(weights_BS: torch.Tensor, peaks_B: torch.Tensor, params: SamplingParams) -> float:
    """A weight that every token of the short list reaches; the higher, the shorter the list before it is sorted."""
    if params.top_k or params.min_p:
        return max(params.min_p, _kth_peak(peaks_B, params.top_k))
    return _nucleus_cutoff(weights_BS, params.top_p)


def _kth_peak(peaks_B: torch.Tensor, k: int) -> float:
    """k blocks have a token of at least this weight, so the k best tokens have it."""
    return float(peaks_B.topk(k).values[-1]) if 0 < k <= len(peaks_B) else 0.0


def _nucleus_cutoff(weights_BS: torch.Tensor, top_p: float) -> float:
    """Tokens of at least this weight have a mass of top_p, and hardly more: a bin is less than 1 % wide.

    The bits of positive floats are in the order of the floats; their upper half, as bfloat16 has it, is the bin.
    """
    bins_V = weights_BS.view(-1).view(torch.int32) >> 16
    mass_bins = torch.bincount(bins_V, weights_BS.view(-1).double()).flip(0).cumsum(0)
    short = int((mass_bins < (top_p + _SLACK) * mass_bins[-1]).sum())
    lowest_bin = max(0, len(mass_bins) - 1 - short)
    return float(torch.tensor(lowest_bin << 16, dtype=torch.int32).view(torch.float32))
