"""What to send: prompts from a seed or a file, and the bodies that ask for them.

Random prompts are token ids, so that their length is exact without a tokenizer. Chats take text only; there it is short
common words, a token each in most vocabularies, and what they came to is in the usage that the server reports.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec

from control_plane.options import OptionError
from triptych.load.options import Endpoint, LoadOptions

TOKEN_IDS: Final = range(300, 1_000)  # of every vocabulary, and above the special tokens and bytes that some begin with
_COMMON: Final = (
    "the of and to in is it you that he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could"
)
WORDS: Final = tuple(_COMMON.split())
FILE_BYTES_MAX: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text, token ids or messages, and how long the answer may be."""

    content: str | Sequence[int] | Sequence[dict[str, Any]]
    max_tokens: int


def prompts(options: LoadOptions) -> Iterator[Prompt]:
    """Endlessly. A file is read, and found wanting, at once."""
    if options.prompts is None:
        return random_prompts(options)
    return cycle(read_prompts(options.prompts, options.endpoint, options.output_len))


# -- random ------------------------------------------------------------------------------------------------------------
def random_prompts(options: LoadOptions) -> Iterator[Prompt]:
    draw = Random(options.seed)
    vocabulary: Sequence[Any] = WORDS if options.endpoint is Endpoint.CHAT else TOKEN_IDS
    prefix = draw.choices(vocabulary, k=options.prefix_len)
    while True:
        own_tokens = drawn_length(draw, options.input_len, options.range_ratio)
        output_tokens = drawn_length(draw, options.output_len, options.range_ratio)
        tokens = prefix + draw.choices(vocabulary, k=own_tokens)
        yield Prompt(" ".join(tokens) if options.endpoint is Endpoint.CHAT else tokens, output_tokens)


def drawn_length(draw: Random, length: int, ratio: float) -> int:
    return max(1, draw.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))))


# -- files -------------------------------------------------------------------------------------------------------------
class _Line(msgspec.Struct):
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None


def read_prompts(file: Path, endpoint: Endpoint, output_len: int) -> list[Prompt]:
    """Every line that is not blank. Raises `OptionError`."""
    lines = [line for line in _content(file).splitlines() if line.strip()]
    if not lines:
        raise OptionError("prompts", f"'{file}' holds no prompt")
    if file.suffix != ".jsonl":
        return [Prompt(line, output_len) for line in lines]
    return [_prompt(line, endpoint, output_len, f"'{file}' line {number}") for number, line in enumerate(lines, 1)]


def _content(file: Path) -> str:
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise OptionError("prompts", f"'{file}' is larger than {FILE_BYTES_MAX} bytes")
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("prompts", f"'{file}' cannot be read as UTF-8 text") from error


def _prompt(line: str, endpoint: Endpoint, output_len: int, place: str) -> Prompt:
    try:
        fields = msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError as error:
        raise OptionError("prompts", f"{place}: must be an object with 'prompt' or 'messages'") from error
    content = fields.messages if endpoint is Endpoint.CHAT and fields.messages else fields.prompt
    if not content or (endpoint is Endpoint.CHAT and isinstance(fields.prompt, list) and not fields.messages):
        wanted = "'messages', or a 'prompt' of text" if endpoint is Endpoint.CHAT else "a 'prompt'"
        raise OptionError("prompts", f"{place}: {endpoint} needs {wanted}")
    return Prompt(content, fields.max_tokens or output_len)


# -- bodies ------------------------------------------------------------------------------------------------------------
def bodies(options: LoadOptions, model: str) -> Iterator[bytes]:
    """Endlessly. Raises `OptionError` at once, not at the first body."""
    settings = {
        "model": model,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if options.ignore_eos else {}),
    }
    return (msgspec.json.encode(settings | _asked(prompt, options.endpoint)) for prompt in prompts(options))


def _asked(prompt: Prompt, endpoint: Endpoint) -> dict[str, Any]:
    if endpoint is Endpoint.COMPLETIONS:
        return {"prompt": prompt.content, "max_tokens": prompt.max_tokens}
    is_text = isinstance(prompt.content, str)
    messages = [{"role": "user", "content": prompt.content}] if is_text else prompt.content
    return {"messages": messages, "max_completion_tokens": prompt.max_tokens}
