"""What a person asks `triptych bench serve` for: one frozen, checked value. Names follow `vllm bench serve`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from control_plane.options import OptionError, require_at_least
from triptych.access import URL_DEFAULT, Certificates, require_key, require_url


class Endpoint(StrEnum):
    """Which of the server's two answers is measured."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/completions" if self is Endpoint.COMPLETIONS else "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must keep to count as good. None: no matter."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def __bool__(self) -> bool:
        return not (self.ttft_ms is None and self.tpot_ms is None and self.e2el_ms is None)

    def holds(self, *, ttft_ms: float, tpot_ms: float, e2el_ms: float) -> bool:
        pairs = ((ttft_ms, self.ttft_ms), (tpot_ms, self.tpot_ms), (e2el_ms, self.e2el_ms))
        return all(limit is None or value <= limit for value, limit in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Whom to ask, what, how often, and what to do with the figures."""

    url: str = URL_DEFAULT
    model: str | None = None  # None: the first of /v1/models
    api_key: str | None = field(default=None, repr=False)
    certificates: Certificates = field(default_factory=Certificates)
    endpoint: Endpoint = Endpoint.COMPLETIONS

    requests: int = 1_000
    duration_s: float | None = None  # send nothing after so long; None: until all requests are sent
    rate: float = (
        math.inf
    )  # requests per second, whatever becomes of them; inf: all at once, or as `concurrency` allows
    burstiness: float = 1.0  # of a finite rate: 1 is Poisson, below it bursts, above it evenness
    concurrency: int | None = None  # requests in flight, at most; alone it makes a closed loop
    seed: int = 0

    prompts: Path | None = None  # text, a prompt a line, or .jsonl; None: random tokens
    input_len: int = 1_024  # tokens, after the prefix: as vLLM counts
    output_len: int = 128  # tokens, of prompts that do not say
    range_ratio: float = 0.0  # lengths are uniform in [len * (1 - ratio), len * (1 + ratio)]
    prefix_len: int = 0  # tokens that all random prompts begin with

    ignore_eos: bool = False
    temperature: float = 0.0
    slo: Slo = field(default_factory=Slo)
    slo_headers: bool = False  # tell the server too: x-slo-ttft-ms, x-slo-tpot-ms
    warmup: int = 1  # requests before the first that counts
    timeout_s: float = 600.0  # of one request
    out: Path | None = None  # JSON

    def __post_init__(self) -> None:
        require_url(self.url)
        require_key(self.api_key)
        self._require_load()
        self._require_prompts()
        self._require_figures()
        require_at_least("num-warmups", self.warmup, 0)
        _require_positive("timeout", self.timeout_s)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise OptionError("temperature", f"must be a number, 0 or more, not {self.temperature}")

    def _require_load(self) -> None:
        require_at_least("num-prompts", self.requests, 1)
        if self.duration_s is not None:
            _require_positive("duration", self.duration_s)
        if not self.rate > 0:  # NaN is not
            raise OptionError("request-rate", f"must be a number of requests per second above 0, not {self.rate}")
        _require_positive("burstiness", self.burstiness)
        if self.concurrency is not None:
            require_at_least("max-concurrency", self.concurrency, 1)

    def _require_prompts(self) -> None:
        if self.prompts is not None and not self.prompts.is_file():
            raise OptionError("prompts", f"there is no file '{self.prompts}'")
        require_at_least("random-input-len", self.input_len, 1)
        require_at_least("random-output-len", self.output_len, 1)
        if not 0 <= self.range_ratio < 1:
            raise OptionError("random-range-ratio", f"must be from 0 to below 1, not {self.range_ratio}")
        require_at_least("random-prefix-len", self.prefix_len, 0)

    def _require_figures(self) -> None:
        if self.slo_headers and self.slo.ttft_ms is None and self.slo.tpot_ms is None:
            raise OptionError("slo-headers", "needs --goodput ttft:MS or tpot:MS; there is nothing else to tell")
        if self.out is not None and not self.out.parent.is_dir():
            raise OptionError("result-filename", f"there is no folder '{self.out.parent}'")

    @property
    def closed(self) -> bool:
        """Whether a request is sent when another one ends, not when its time has come."""
        return math.isinf(self.rate) and self.concurrency is not None


def parse_slo(pairs: Sequence[str]) -> Slo:
    """Of `ttft:300 tpot:50 e2el:2000`, in milliseconds, as vLLM's `--goodput` has it."""
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise OptionError("goodput", f"must be ttft, tpot or e2el, a colon and milliseconds, not '{pair}'")
        limits[name] = _milliseconds(text)
    return Slo(ttft_ms=limits.get("ttft"), tpot_ms=limits.get("tpot"), e2el_ms=limits.get("e2el"))


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    _require_positive("goodput", value)
    return value


def _require_positive(option: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise OptionError(option, f"must be a number above 0, not {value}")
