"""Curves: what every level of every codec costs on some texts, for one model. What `measure` and `profile` share.

    texts -> windows of 1,024 tokens -> KV of each prefix -> through the codec's bytes -> KL of the tokens after it

Windows are the outer loop, so that one window's KV and log-probabilities are in memory at a time.

Legend: L layers, H kv heads, P parts (K, V), T tokens, D head dim.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from control_plane.router.text.vocabulary import TokenizerVocabulary
from engine.base.errors import InvalidArgument
from engine.capture import WINDOW_TOKENS, Subject, Window, windows_of
from engine.models.info import ModelInfo
from engine.quality import Judge, Loss, mean_kl, ppl_change
from kv_transfer.calibration import Floats
from kv_transfer.codecs import CodecSet
from kv_transfer.measure import Rates, Received, rates, send
from kv_transfer.profile import Kind, Point

Advance = Callable[[str], None]
"""Called with what is done next, once for each unit of work."""

TEXT_BYTES_MAX: Final = 64 << 20
LEVELS_MAX: Final = 12  # of one codec: about a second for each and window; a budget is met to a quarter of its size


class Level(NamedTuple):
    codec: str
    level: int


@dataclass(frozen=True, slots=True)
class Text:
    """One kind of text, cut into windows. Texts that differ in a byte differ in digest."""

    kind: str
    digest: str
    windows: Sequence[Window]


def read_texts(files: Sequence[Path], model_dir: Path, info: ModelInfo) -> list[Text]:
    """Raises InvalidArgument for a file that cannot be read or is too short, and for a model that is."""
    if info.max_model_len < WINDOW_TOKENS:
        raise InvalidArgument(
            f"model: {info.name} reads {info.max_model_len} tokens at most; measuring takes {WINDOW_TOKENS}",
            field="model",
        )
    if len({file.stem for file in files}) < len(files):
        raise InvalidArgument("text: two files have the same name", field="text")
    vocabulary = TokenizerVocabulary.from_model_dir(model_dir, info.vocab_size)
    return [_read(file, vocabulary) for file in files]


def _read(file: Path, vocabulary: TokenizerVocabulary) -> Text:
    try:
        if file.stat().st_size > TEXT_BYTES_MAX:
            raise ValueError(f"larger than {TEXT_BYTES_MAX >> 20} MiB")
        data = file.read_bytes()
        text = data.decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgument(f"text: {file}: {reason}", field="text") from error
    tokens = vocabulary.encode(text, add_special_tokens=False)
    if not (windows := windows_of(tokens, lead=vocabulary.encode(""))):
        raise InvalidArgument(
            f"text: {file} has {len(tokens):,} tokens of this model; at least {WINDOW_TOKENS:,} are needed",
            field="text",
        )
    return Text(file.stem, hashlib.sha256(data).hexdigest()[:32], windows)


def spread(windows: Sequence[Window], count: int) -> Sequence[Window]:
    """At most `count` of them, from all over the text."""
    return [windows[index * len(windows) // count] for index in range(count)] if count < len(windows) else windows


def levels_of(codecs: CodecSet, names: Sequence[str]) -> list[Level]:
    """Those that the profile has measured, else all; least lossy first, and of very many some from all over."""
    curves = {} if codecs.profile is None else codecs.profile.curves
    measured = {name: [point.level for point in curves.get(name, ())] for name in names}
    return [Level(name, level) for name in names for level in measured[name] or some_of(codecs.get(name).levels)]


def some_of(levels: Sequence[int], most: int = LEVELS_MAX) -> Sequence[int]:
    """The first, the last and some between."""
    return [levels[index * (len(levels) - 1) // (most - 1)] for index in range(most)] if len(levels) > most else levels


# -- measuring ---------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _OnKind:
    """What the windows of one kind have said so far about one level."""

    bits: list[float] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)

    def add(self, received: Received, loss: Loss) -> None:
        self.bits.append(received.bits_per_element)
        self.losses.append(loss)

    def result(self) -> Kind:
        return Kind(
            bits_per_element=sum(self.bits) / len(self.bits),
            kl=mean_kl(self.losses),
            ppl_change=ppl_change(self.losses),
        )


def measure(
    subject: Subject,
    codecs: CodecSet,
    texts: Sequence[Text],
    wanted: Sequence[Level],
    advance: Advance = lambda what: None,
) -> dict[str, list[Point]]:
    """Points by codec, in the order wanted; their kinds are the texts'."""
    gathered = {level: {text.kind: _OnKind() for text in texts} for level in wanted}
    dtype = codecs.stream.dtype
    for kind, window in ((text.kind, window) for text in texts for window in text.windows):
        kv_LHPTD = subject.kv(window.prefix, dtype)
        for level, received, loss in _judged(subject, codecs, window, kv_LHPTD, wanted, advance):
            gathered[level][kind].add(received, loss)
    points: dict[str, list[Point]] = {}
    for level, kinds in gathered.items():
        advance("rates")
        measured = rates(codecs, *level, kv_LHPTD)
        points.setdefault(level.codec, []).append(_point(level, kinds, measured))
    return points


def work_of(texts: Sequence[Text], wanted: Sequence[Level]) -> int:
    """How often `measure` will call `advance`."""
    return len(wanted) * (1 + sum(len(text.windows) for text in texts))


def _judged(
    subject: Subject,
    codecs: CodecSet,
    window: Window,
    kv_LHPTD: Floats,
    wanted: Sequence[Level],
    advance: Advance,
) -> Iterator[tuple[Level, Received, Loss]]:
    judge = Judge(subject, window, kv_LHPTD)
    for level in wanted:
        advance(f"{level.codec} {level.level}")
        received = send(codecs, *level, kv_LHPTD)
        lossless = codecs.get(level.codec).lossless
        yield level, received, judge.no_loss() if lossless else judge.loss(received.kv_LHPTD)


def _point(level: Level, kinds: Mapping[str, _OnKind], measured: Rates) -> Point:
    """The worst kind's figures, each by itself: a budget is kept on every one of them."""
    results = {kind: gathered.result() for kind, gathered in kinds.items()}
    return Point(
        level=level.level,
        bits_per_element=max(result.bits_per_element for result in results.values()),
        kl=max(result.kl for result in results.values()),
        ppl_change=max(result.ppl_change for result in results.values()),
        encode_mb_s=measured.encode_mb_s,
        decode_mb_s=measured.decode_mb_s,
        kinds=results,
    )
