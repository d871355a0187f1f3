"""Our own knobs: how a request's KV travels, how long it may take, how soon it is wanted.

They are keys of the `triptych` object, where an unknown one is a typo. Clients that can only send vLLM's fields write
them as `vllm_xargs`; that object holds others' knobs as well, so what is unknown there is none of our business.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from control_plane.router.access.caller import Caller
from control_plane.router.validation.fields import (
    Fields,
    integer,
    object_or_empty,
    optional_integer,
    optional_number,
    refuse,
)
from engine.base import limits
from engine.base.errors import InvalidArgument

XARGS: Final = ("codec", "deadline_ms", "kl_budget")
KEYS: Final = (*XARGS, "slo")
SLO_KEYS: Final = ("ttft_ms", "tpot_ms")


@dataclass(frozen=True, slots=True)
class Knobs:
    deadline_ms: int
    travel: Mapping[str, Any]  # arguments of `ValidatedRequest`


def read_knobs(
    fields: Fields,
    caller: Caller,
    *,
    codecs: Sequence[str],
    deadline_ms_default: int,
    note_unknown: Callable[[Iterable[str]], None],
) -> Knobs:
    ours, theirs = object_or_empty(fields, "triptych"), object_or_empty(fields, "vllm_xargs")
    _refuse_typos(ours, KEYS, "triptych")
    note_unknown(f"vllm_xargs.{name}" for name in sorted(theirs.keys() - set(XARGS)))

    def said(name: str) -> tuple[Fields, str]:
        """Where `name` is written, and what comes before it there."""
        return (theirs, "vllm_xargs.") if ours.get(name) is None and name in theirs else (ours, "triptych.")

    knobs, prefix = said("codec")
    codec = knobs.get("codec")
    if codec is not None and codec not in codecs:
        raise refuse(f"{prefix}codec", f"must be one of: {', '.join(codecs)}")
    knobs, prefix = said("kl_budget")
    kl_budget = optional_number(knobs, "kl_budget", 0, limits.KL_BUDGET_MAX, prefix=prefix)
    knobs, prefix = said("deadline_ms")
    deadline_ms = integer(knobs, "deadline_ms", deadline_ms_default, 1, limits.REQUEST_DEADLINE_MS_MAX, prefix=prefix)
    ttft_ms, tpot_ms = _slo(ours, caller)
    travel = {"codec": codec or "", "kl_budget": kl_budget, "ttft_slo_ms": ttft_ms, "tpot_slo_ms": tpot_ms}
    return Knobs(deadline_ms, travel)


def _slo(ours: Fields, caller: Caller) -> tuple[int | None, int | None]:
    """The body's, else what the caller's headers say; both within the limits."""
    slo = object_or_empty(ours, "slo", prefix="triptych.")
    _refuse_typos(slo, SLO_KEYS, "triptych.slo")
    headers = {"x-slo-ttft-ms": caller.ttft_slo_ms, "x-slo-tpot-ms": caller.tpot_slo_ms}
    said = [optional_integer(slo, name, 1, limits.SLO_MS_MAX, prefix="triptych.slo.") for name in SLO_KEYS]
    beside = [optional_integer(headers, name, 1, limits.SLO_MS_MAX) for name in headers]
    ttft_ms, tpot_ms = (of_body if of_body is not None else other for of_body, other in zip(said, beside, strict=True))
    return ttft_ms, tpot_ms


def _refuse_typos(knobs: dict[str, Any], known: Sequence[str], where: str) -> None:
    for name in sorted(knobs.keys() - set(known)):
        short = name[:64]
        nearest = difflib.get_close_matches(short, known, n=1, cutoff=0.0)[0]
        shown = msgspec.json.encode(short).decode()
        raise InvalidArgument(f"{where}: unknown key {shown}; did you mean {nearest!r}?", field=f"{where}.{short}")
