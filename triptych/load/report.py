"""The figures for a person, and as JSON for scripts."""

import datetime
import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from triptych.load.options import LoadOptions

LATENCIES = {
    "ttft": "time to first token",
    "second_token": "first to second token",
    "tpot": "time per output token",
    "itl": "between chunks",
    "e2el": "whole answer",
    "refusal": "until refused",
}
STATISTICS = ("mean", "median", "p90", "p99")
LAG_SHOWN_MS = 10.0  # mean lateness of the sender from which on a person should know
CPU_SHARE_SHOWN = 0.7  # of a core: from here on the generator itself may be what is slow


def show(values: Mapping[str, Any], console: Console) -> None:
    console.print(_counted(values))
    console.print(_timed(values))
    for remark in remarks(values):
        console.print(remark, style="yellow", markup=False, highlight=False)


def _counted(values: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, key in (("completed", "completed"), ("refused (429, 503)", "refused"), ("failed", "failed")):
        table.add_row(name, f"{values[key]:,}")
    table.add_row("seconds", _number(values["duration"]))
    table.add_row("requests/s", _number(values["request_throughput"]))
    if values["request_goodput"] is not None:
        table.add_row("good requests/s", _number(values["request_goodput"]))
    table.add_row("output tokens/s", _number(values["output_throughput"]))
    table.add_row("all tokens/s", _number(values["total_token_throughput"]))
    table.add_row("prompt tokens, cached", f"{values['total_input_tokens']:,}, {values['total_cached_tokens']:,}")
    table.add_row("in flight, at most", f"{values['max_concurrent_requests']:,}")
    table.add_row("generator CPU per chunk, us", _number(values["client_cpu_us_per_chunk"]))
    return table


def _timed(values: Mapping[str, Any]) -> Table:
    table = Table("milliseconds")
    for statistic in STATISTICS:
        table.add_column(statistic, justify="right")
    for name, text in LATENCIES.items():
        if name == "refusal" and not values["refused"]:
            continue
        table.add_row(text, *(_number(values[f"{statistic}_{name}_ms"]) for statistic in STATISTICS))
    return table


def remarks(values: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know before believing the rest."""
    without = values["refused"] - values["refused_with_retry_after"]
    if values["refused"]:
        by_status = ", ".join(f"{count:,} x {status}" for status, count in values["refused_by_status"].items())
        yield f"refused: {by_status}; {without or 'none':} without Retry-After"
    for reason, count in values["failed_by_reason"].items():
        message = values["messages"].get(reason, "")
        yield f"failed: {count:,} x {reason}{': ' if message else ''}{message}"
    if (values["mean_lag_ms"] or 0) > LAG_SHOWN_MS:
        yield (
            f"the generator was late: by {values['mean_lag_ms']:.0f} ms on average, {values['max_lag_ms']:.0f} ms at "
            "most. Latencies contain that; a lower --request-rate or a larger --max-concurrency avoids it."
        )
    if (values["client_cpu_share"] or 0) > CPU_SHARE_SHOWN:
        yield f"the generator used {values['client_cpu_share']:.0%} of a core: it may be what is slow"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def document(options: LoadOptions, model: str, values: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """The keys of vLLM's result files, and ours."""
    return {
        "date": now.strftime("%Y%m%d-%H%M%S"),
        "backend": "openai" if options.endpoint == "completions" else "openai-chat",
        "model_id": model,
        "num_prompts": values["completed"] + values["refused"] + values["failed"],  # not those of an unfinished run
        "request_rate": "inf" if math.isinf(options.rate) else options.rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.concurrency,
        "goodput": {"ttft": options.slo.ttft_ms, "tpot": options.slo.tpot_ms, "e2el": options.slo.e2el_ms},
        **values,
    }
