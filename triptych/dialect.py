"""What servers that speak OpenAI's dialect say beside the text: usage, errors, which models they have.

Fields that are not here are no matter. Every function raises `msgspec.MsgspecError` for what is not this dialect.
"""

import msgspec


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None

    @property
    def output_tokens(self) -> int:
        return self.completion_tokens or 0

    @property
    def cached_tokens(self) -> int:
        """0 also where the server does not say."""
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details is not None else 0


class Error(msgspec.Struct):
    message: str = ""


class _Refusal(msgspec.Struct):
    error: Error


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_refusal = msgspec.json.Decoder(_Refusal)
_models = msgspec.json.Decoder(_Models)


def error_message(body: bytes) -> str:
    """The server's own sentence."""
    return _refusal.decode(body).error.message


def first_model(body: bytes) -> str | None:
    """Of /v1/models; None: it has none."""
    models = _models.decode(body).data
    return models[0].id if models else None
