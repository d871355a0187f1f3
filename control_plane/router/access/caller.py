"""Caller: what a request says of itself beside its body, over whichever protocol it came."""

from dataclasses import dataclass

from control_plane.router.access.tenants import EVERYBODY, Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, when it came, and how soon they want it. `slo_*`: from the headers `x-slo-ttft-ms` and
    `x-slo-tpot-ms`; the body's own `triptych.slo` comes before them."""

    tenant: Tenant = EVERYBODY
    label: str = ""  # the client's own id: printed, never a key
    arrived_us: int | None = None  # by the validator's clock; None: now
    ttft_slo_ms: int | None = None
    tpot_slo_ms: int | None = None
