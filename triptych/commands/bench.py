"""`triptych bench serve`: measure a server from outside, with the flags that `vllm bench serve` has."""

from pathlib import Path
from typing import Annotated, Any

import typer

from triptych.access import Certificates
from triptych.flags import CacertFlag, CertFlag, CertKeyFlag, KeyFlag
from triptych.load.options import Endpoint, LoadOptions, parse_slo

bench = typer.Typer(help="Measure a server that is running.", no_args_is_help=True)

DEFAULT = LoadOptions()
GOODPUT = "What a good request keeps, in ms: ttft:300, tpot:50 or e2el:2000; may be given again."


def _load(help: str, metavar: str = "N") -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel="Load")


def _prompts(help: str, metavar: str = "N") -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel="Prompts")


def _figures(help: str, metavar: str) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel="Figures")


def _switch(flag: str, help: str) -> Any:
    return typer.Option(flag, help=help, metavar=" ")


@bench.command()
def serve(
    url: Annotated[str, typer.Option(help="The server.", metavar="URL")] = DEFAULT.url,
    model: Annotated[str | None, typer.Option(help="Default: the server's first.", metavar="NAME")] = None,
    api_key: KeyFlag = None,
    cacert: CacertFlag = None,
    cert: CertFlag = None,
    key: CertKeyFlag = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which answer to measure.")] = DEFAULT.endpoint,
    num_prompts: Annotated[int, _load("Requests to send.")] = DEFAULT.requests,
    duration: Annotated[float | None, _load("Send nothing after so long.", "SECONDS")] = None,
    request_rate: Annotated[float, _load("Requests per second, however served; inf: all at once.", "X")] = DEFAULT.rate,
    burstiness: Annotated[float, _load("1: Poisson; below it bursts, above it evenness.", "X")] = DEFAULT.burstiness,
    max_concurrency: Annotated[int | None, _load("Requests in flight; alone it makes a closed loop.")] = None,
    num_warmups: Annotated[int, _load("Requests before the first that counts.")] = DEFAULT.warmup,
    seed: Annotated[int, _load("Of arrivals and prompts.")] = DEFAULT.seed,
    timeout: Annotated[float, _load("Of one request.", "SECONDS")] = DEFAULT.timeout_s,
    prompts: Annotated[Path | None, _prompts("A prompt a line, or .jsonl; default: random tokens.", "FILE")] = None,
    random_input_len: Annotated[int, _prompts("Tokens of a prompt, after its prefix.")] = DEFAULT.input_len,
    random_output_len: Annotated[int, _prompts("Tokens of an answer.")] = DEFAULT.output_len,
    random_range_ratio: Annotated[float, _prompts("Lengths vary by this share.", "X")] = DEFAULT.range_ratio,
    random_prefix_len: Annotated[int, _prompts("Tokens that all prompts begin with.")] = DEFAULT.prefix_len,
    ignore_eos: Annotated[bool, _switch("--ignore-eos", "Answers are as long as asked for.")] = False,
    temperature: Annotated[float, _prompts("0: greedy.", "X")] = DEFAULT.temperature,
    goodput: Annotated[list[str] | None, _figures(GOODPUT, "NAME:MS")] = None,
    slo_headers: Annotated[bool, _switch("--slo-headers", "Tell the server of --goodput too.")] = False,
    result_filename: Annotated[Path | None, _figures("Write the figures as JSON.", "FILE")] = None,
) -> None:
    """Offer load to any OpenAI-compatible server: TTFT, time between tokens, throughput, goodput.

    \b
    triptych bench serve --request-rate 4 --num-prompts 200
    triptych bench serve --max-concurrency 8 --goodput ttft:300 --goodput tpot:50
    """
    options = LoadOptions(
        url=url,
        model=model,
        api_key=api_key,
        certificates=Certificates(cacert=cacert, cert=cert, key=key),
        endpoint=endpoint,
        requests=num_prompts,
        duration_s=duration,
        rate=request_rate,
        burstiness=burstiness,
        concurrency=max_concurrency,
        seed=seed,
        prompts=prompts,
        input_len=random_input_len,
        output_len=random_output_len,
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        ignore_eos=ignore_eos,
        temperature=temperature,
        slo=parse_slo(goodput or ()),
        slo_headers=slo_headers,
        warmup=num_warmups,
        timeout_s=timeout,
        out=result_filename,
    )
    from triptych.load.command import run

    raise typer.Exit(run(options))
