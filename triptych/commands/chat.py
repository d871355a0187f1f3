"""`triptych chat`: a conversation in the terminal."""

from typing import Annotated

import typer

from triptych.access import URL_DEFAULT, Certificates
from triptych.flags import CacertFlag, CertFlag, CertKeyFlag, KeyFlag


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this, print the answer, end.", metavar="PROMPT", show_default=False)
    ] = None,
    url: Annotated[str, typer.Option(help="The server.", metavar="URL")] = URL_DEFAULT,
    model: Annotated[str | None, typer.Option(help="Default: the server's first.", metavar="NAME")] = None,
    api_key: KeyFlag = None,
    cacert: CacertFlag = None,
    cert: CertFlag = None,
    key: CertKeyFlag = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.", metavar="TEXT")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer; default: the server's.", metavar="N")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy; default: the server's.", metavar="X")] = None,
    timings: Annotated[
        bool | None, typer.Option(help="A line after each answer; default: on a terminal.", show_default=False)
    ] = None,
) -> None:
    """Talk to a model: answers as they are generated, and what each cost. Ctrl-C stops an answer.

    \b
    triptych chat
    triptych chat "What is the capital of France?" --url https://host:8000
    """
    from triptych.chat import ChatOptions, run

    options = ChatOptions(
        url=url,
        model=model,
        api_key=api_key,
        certificates=Certificates(cacert=cacert, cert=cert, key=key),
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        prompt=prompt,
        timings=timings,
    )
    raise typer.Exit(run(options))
