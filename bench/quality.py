"""What codecs cost on text that none was calibrated on, and whether budgets are kept there. Writes the codecs' plot.

    budget      the level is chosen by the packaged profile, which knows other texts; KL is of the worst text here
    caution     bits that this costs beside the level that would just have fitted here
    retrieval   what the model still finds in KV of the default budget (`bench.retrieval`)

The model, its profile and the texts are those of this repository, so everything but the rates is the same anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench import plot
from bench.figures import FOLDER, Bar, Figure
from bench.retrieval import Context, Found, contexts_of, found
from control_plane.router.text.vocabulary import TokenizerVocabulary
from engine.base import limits
from engine.capture import Subject
from engine.models.checkpoint import ensure_default_model
from engine.models.info import ModelInfo, describe, schema_for
from kv_transfer.codecs import CodecSet
from kv_transfer.measure import send
from kv_transfer.profile import Point, Profile
from kv_transfer.profiles import packaged
from triptych.curves import Level, levels_of, measure, read_texts, spread

TEXTS: Final = Path(__file__).parent / "texts"
PROSE: Final = TEXTS / "whale.txt"  # what questions are asked about
PLOT: Final = FOLDER / "codecs.svg"
WINDOWS: Final = 3  # of each text
CONTEXTS: Final = 5
_RAW_BITS: Final = 16.0  # of a bfloat16: what is sent where no level keeps a budget
BUDGETS: Final = (0.003, 0.01, 0.03)

CACHEGEN = Bar(
    name="cachegen",
    claim="fewest bits per number at KL <= 0.012 on the worst of the unseen texts",
    unit="bits",
    limit=2.8,
)
BEST = Bar(
    name="best codec",
    claim="fewest bits per number at KL <= 0.01 on the worst of the unseen texts",
    unit="bits",
    limit=2.0,
)
BUDGET_BARS = tuple(
    Bar(
        name=f"budget {budget:g}",
        claim="KL of the level that the profile chooses, on the worst of the unseen texts",
        unit="of the budget",
        limit=1.2,
    )
    for budget in BUDGETS
)
RETRIEVAL_BARS = tuple(
    Bar(name=name, claim=f"{claim}, beside exact KV", unit="of it", limit=0.95, at_least=True)
    for name, claim in (
        ("16-token copies", "tokens copied right from KV within the default budget"),
        ("fact retrieval", "facts found in KV within the default budget"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The default model with its packaged profile."""

    path: Path
    info: ModelInfo
    profile: Profile
    codecs: CodecSet

    @classmethod
    def load(cls) -> "World":
        path = ensure_default_model()
        info = describe(path)
        schema = schema_for(info, info.dtype)
        profile = packaged(schema.model)
        if profile is None:
            raise FileNotFoundError("the package has no profile of the default model: run `triptych profile`")
        return cls(path=path, info=info, profile=profile, codecs=CodecSet(schema.kv, profile))


async def measured(picture: Path | None = None) -> list[Figure]:
    return judged(World.load(), sorted(TEXTS.glob("*.txt")), picture)


async def measured_and_drawn() -> list[Figure]:
    return await measured(PLOT)


def judged(world: World, files: Sequence[Path], picture: Path | None) -> list[Figure]:
    texts = read_texts(files, world.path, world.info)
    texts = [replace(text, windows=spread(text.windows, WINDOWS)) for text in texts]
    subject = Subject.load(world.path)
    wanted = [each for each in levels_of(world.codecs, world.codecs.names()) if not _exact(world, each)]
    curves = measure(subject, world.codecs, texts, wanted)
    if picture is not None:
        drawn = {name: [(point.bits_per_element, point.kl) for point in points] for name, points in curves.items()}
        plot.write(picture, drawn, f"{world.info.name}, worst of {len(texts)} kinds of unseen text", limits.KL_BUDGET)
    samples = sum(len(text.windows) for text in texts)
    return [
        *_fewest_bits(curves, samples),
        *(_budget_kept(world.profile, curves, budget, bar, samples) for budget, bar in _budgets()),
        *_retrieval(world, subject, CONTEXTS),
    ]


def _exact(world: World, level: Level) -> bool:
    return world.codecs.get(level.codec).lossless


def _budgets() -> list[tuple[float, Bar]]:
    return list(zip(BUDGETS, BUDGET_BARS, strict=True))


def _one(bar: Bar, value: float, samples: int, **notes: object) -> Figure:
    """There is nothing random in it, so its interval is itself."""
    return Figure(bar=bar, value=value, interval=(value, value), samples=samples, notes=notes)


# -- bits and budgets --------------------------------------------------------------------------------------------------
def _fewest_bits(curves: Mapping[str, Sequence[Point]], samples: int) -> list[Figure]:
    figures = []
    for bar, among, budget in ((CACHEGEN, {"cachegen"}, 0.012), (BEST, set(curves), 0.01)):
        fitting = fewest(curves, budget, among)
        if fitting is None:
            figures.append(_one(bar, _RAW_BITS, samples, level="raw"))
        else:
            level, point = fitting
            figures.append(_one(bar, point.bits_per_element, samples, level=_word(level), **_kinds(point)))
    return figures


def fewest(
    curves: Mapping[str, Sequence[Point]], budget: float, among: set[str] | None = None
) -> tuple[Level, Point] | None:
    """The level of fewest bits whose KL fits, over all codecs or some."""
    fitting = [
        (Level(name, point.level), point)
        for name, points in curves.items()
        if among is None or name in among
        for point in points
        if point.kl <= budget
    ]
    return min(fitting, key=lambda each: each[1].bits_per_element) if fitting else None


def _budget_kept(
    profile: Profile, curves: Mapping[str, Sequence[Point]], budget: float, bar: Bar, samples: int
) -> Figure:
    """A budget that the profile has nothing for is kept by sending raw."""
    chosen, just_fits = fewest(profile.curves, budget), fewest(curves, budget)
    if chosen is None:
        return _one(bar, 0.0, samples, level="raw")
    level = chosen[0]
    here = next(point for point in curves[level.codec] if point.level == level.level)
    caution = here.bits_per_element - (just_fits[1].bits_per_element if just_fits else _RAW_BITS)
    return _one(
        bar,
        here.kl / budget,
        samples,
        level=_word(level),
        bits=round(here.bits_per_element, 3),
        caution_bits=round(caution, 3),
        **_kinds(here),
    )


def _kinds(point: Point) -> dict[str, object]:
    return {kind: f"{of.bits_per_element:.2f} bits, KL {of.kl:.4f}" for kind, of in point.kinds.items()}


def _word(level: Level) -> str:
    return f"{level.codec} {level.level}"


# -- retrieval ---------------------------------------------------------------------------------------------------------
def _retrieval(world: World, subject: Subject, count: int) -> list[Figure]:
    contexts = _contexts(world, count)
    exact = [subject.kv(context.tokens, world.codecs.stream.dtype) for context in contexts]
    before = found(subject, contexts, exact)
    after = {}
    for budget in BUDGETS:
        if fitting := fewest(world.profile.curves, budget):
            level = fitting[0]
            received = [send(world.codecs, *level, kv_LHPTD).kv_LHPTD for kv_LHPTD in exact]
            after[budget] = (level, found(subject, contexts, received))
    return [
        _kept(bar, what, before, after, len(contexts))
        for bar, what in zip(RETRIEVAL_BARS, ("copy", "facts"), strict=True)
    ]


def _contexts(world: World, count: int) -> list[Context]:
    vocabulary = TokenizerVocabulary.from_model_dir(world.path, world.info.vocab_size)
    lines = PROSE.read_text(encoding="utf-8").splitlines()
    return contexts_of(lines, lambda text: vocabulary.encode(text, add_special_tokens=False), count)


def _kept(bar: Bar, what: str, before: Found, after: Mapping[float, tuple[Level, Found]], samples: int) -> Figure:
    shares = {budget: getattr(result, what) for budget, (_, result) in after.items()}
    exact = getattr(before, what)
    notes = {f"{_word(level)}, budget {budget:g}": round(shares[budget], 3) for budget, (level, _) in after.items()}
    kept = shares.get(limits.KL_BUDGET, exact) / exact if exact else 0.0
    return _one(bar, kept, samples, exact=round(exact, 3), **notes)
