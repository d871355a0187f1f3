"""A model's chat template: from a conversation to the one text that its model was trained to continue.

Templates are jinja programs that come with a checkpoint; transformers' own machinery compiles them (its sandbox, its
filters, its variables), so that they print what `apply_chat_template` prints. A template is a program of somebody
else's all the same: its size is bounded, it is tried once before any client is served, and while it runs both its time
and its output are watched. Requests bring no templates of their own.

What does not belong here: checking messages (`chat_fields`), the ids of the text (`vocabulary`).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from control_plane.router.text.special_tokens import SpecialTokens, unused_mark
from control_plane.router.text.tokenizer_config import read_tokenizer_config, special_names
from control_plane.router.validation.chat_fields import Conversation, texts_of
from control_plane.router.validation.fields import refuse
from engine.base import limits
from engine.base.errors import InvalidArgument

if TYPE_CHECKING:
    import jinja2

TEMPLATE_FILE: Final = "chat_template.jinja"
CONTINUED: Final = "CONTINUE_FINAL_MESSAGE_TAG "  # as transformers has it; the space shows whether a template trims
_WATCH: Final = "triptych_watch"  # the variable that loops of a template call
_PROBE: Final = Conversation(messages=({"role": "user", "content": "quokka"},))


@dataclass(frozen=True, slots=True)
class Rendered:
    """`mark` is inside every name of a special token that users wrote; "": they wrote none."""

    text: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    characters_max: int = limits.CHAT_CHARACTERS_MAX
    render_ms: int = limits.CHAT_RENDER_MS


class ChatTemplate:
    """Thread-safe: long conversations are rendered off the event loop."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        config: Config | None = None,
        clock_s: Callable[[], float] = time.thread_time,
    ) -> None:
        """`special_tokens`: what templates know as `bos_token` and so on. `clock_s`: how long this thread has computed;
        that others did too is no fault of a template's. Raises `InvalidArgument` for a template that cannot be served:
        this is the operator's mistake, and he is there to read about it."""
        self.source = source
        self._variables = dict(special_tokens or {})
        self._config = config or Config()
        self._clock_s = clock_s
        self._template = _compiled(source)
        self._takes_parts = False
        self._try_out()

    @classmethod
    def from_model_dir(cls, model_dir: Path, file: Path | None = None) -> "ChatTemplate | None":
        """The operator's file, else the checkpoint's own; None where there is none."""
        settings = read_tokenizer_config(model_dir)
        source = _read(file) if file is not None else _checkpoints_own(model_dir, settings)
        return None if source is None else cls(source, special_names(settings))

    def render(self, conversation: Conversation, special: SpecialTokens) -> Rendered:
        """Raises `InvalidArgument` for a conversation that the template cannot put into words."""
        mark = _mark_for(conversation, special)
        messages = [_marked(message, special, mark) for message in conversation.messages]
        variables = _marked(conversation.variables, special, mark)
        if self._takes_parts or conversation.images:
            messages = [_with_parts(message) for message in messages]
        final = ""
        if conversation.continue_final_message:
            messages[-1], final = _continued(messages[-1])
        try:
            text = self._run(messages, conversation.add_generation_prompt, variables)
        except InvalidArgument:
            raise
        except Exception:  # a template may raise on purpose, or break on what it did not expect
            raise refuse("messages", "the model's chat template does not take this conversation") from None
        if conversation.continue_final_message:
            text = _cut_at_tag(text, final)
        return Rendered(text, mark)

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        watch = _Watch(self._config, self._clock_s)
        pieces = self._template.generate(
            {
                **variables,
                **self._variables,
                _WATCH: watch,
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return "".join([watch.passes(piece) for piece in pieces])

    def _try_out(self) -> None:
        """One that never ends must not keep the process from saying so: its thread is left behind, after a time by the
        wall that is long enough for a loaded machine."""
        tried: list[bool] = []
        thread = threading.Thread(target=lambda: tried.append(self._is_usable()), name="chat-template", daemon=True)
        thread.start()
        thread.join(10 * self._config.render_ms / 1000)
        if tried != [True]:
            raise _unusable("does not print a conversation of one user's message, or takes too long for it")

    def _is_usable(self) -> bool:
        """Some templates want content as a list of parts, and print nothing of a string or break on it."""
        for self._takes_parts in (False, True):
            with contextlib.suppress(InvalidArgument):
                if _PROBE.messages[0]["content"] in self.render(_PROBE, SpecialTokens()).text:
                    return True
        return False


class _Watch:
    """One rendering's limits. Every turn of a loop and every macro calls it: a loop may print nothing for ever."""

    def __init__(self, config: Config, clock_s: Callable[[], float]) -> None:
        self._config = config
        self._clock_s = clock_s
        self._ends_s = clock_s() + config.render_ms / 1000
        self._characters = 0

    def __call__(self) -> str:
        if self._clock_s() > self._ends_s:
            raise refuse("messages", f"the model's chat template takes longer than {self._config.render_ms} ms")
        return ""

    def passes(self, piece: str) -> str:
        self()
        self._characters += len(piece)
        if self._characters > self._config.characters_max:
            raise refuse("messages", f"at most {self._config.characters_max} characters as the chat template has them")
        return piece


# -- users' text -------------------------------------------------------------------------------------------------------
def _mark_for(conversation: Conversation, special: SpecialTokens) -> str:
    """The common case is that nobody wrote the name of a special token, and the template sees texts as they are."""
    texts = [text for message in conversation.messages for text in texts_of(message)]
    texts += [value for value in conversation.variables.values() if isinstance(value, str)]
    if not any(map(special.touched_by, texts)):
        return ""
    mark = unused_mark(texts)
    if mark is None:
        raise refuse("messages", "hold every one of Unicode's noncharacters; one must be left for us")
    return mark


def _marked(values: Mapping[str, Any], special: SpecialTokens, mark: str) -> dict[str, Any]:
    if not mark:
        return dict(values)
    return {
        name: value if name in ("role", "type") else _marked_value(value, special, mark)
        for name, value in values.items()
    }


def _marked_value(value: Any, special: SpecialTokens, mark: str) -> Any:
    if isinstance(value, str):
        return special.marked(value, mark)
    return [_marked(part, special, mark) for part in value] if isinstance(value, list) else value


# -- contents ----------------------------------------------------------------------------------------------------------
def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _continued(message: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The message with a tag at its end, and the text that the tag stands behind."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + CONTINUED}, content
    *before, last = content
    if "text" not in last:
        raise refuse("continue_final_message", "the final message must end with text")
    return {**message, "content": [*before, {**last, "text": last["text"] + CONTINUED}]}, last["text"]


def _cut_at_tag(text: str, final: str) -> str:
    """The text up to the end of the final message, as transformers cuts it."""
    where = text.rfind(CONTINUED.strip())
    if where < 0 or final.strip() not in text:
        raise refuse("continue_final_message", "the model's chat template changes the final message")
    return text[:where] if text.startswith(CONTINUED, where) else text[:where].rstrip()


# -- templates ---------------------------------------------------------------------------------------------------------
def _compiled(source: str) -> "jinja2.Template":
    if len(source.encode()) > limits.CHAT_TEMPLATE_BYTES_MAX:
        raise _unusable(f"is larger than {limits.CHAT_TEMPLATE_BYTES_MAX} bytes")
    import jinja2
    from transformers.utils import chat_template_utils  # half a second, and no torch

    try:
        environment = chat_template_utils._compile_jinja_template(source).environment
        tree = environment.parse(source)
        for repeated in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro))):
            watch = jinja2.nodes.Call(jinja2.nodes.Name(_WATCH, "load"), [], [], None, None)
            repeated.body.insert(0, jinja2.nodes.Output([watch]))
        template: jinja2.Template = environment.from_string(tree)
    except (jinja2.TemplateError, RecursionError) as error:
        raise _unusable("is not a jinja template") from error
    return template


def _unusable(what: str) -> InvalidArgument:
    return InvalidArgument(f"chat-template: the chat template {what}", field="chat-template")


def _checkpoints_own(model_dir: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own, or an entry of the tokenizer's settings: a text, or a list of named texts."""
    if (model_dir / TEMPLATE_FILE).is_file():
        return _read(model_dir / TEMPLATE_FILE)
    entry = settings.get("chat_template")
    if isinstance(entry, list):
        named = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > limits.CHAT_TEMPLATE_BYTES_MAX:
            raise _unusable(f"is larger than {limits.CHAT_TEMPLATE_BYTES_MAX} bytes")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(f"cannot be read from {file}") from error
