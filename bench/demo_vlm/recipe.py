"""Every number of the training, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionStage:
    """What the frozen language model has to read to answer right. No picture is drawn."""

    steps: int = 80
    scenes: int = 6  # per step
    questions: int = 4  # about each
    rate: float = 8e-3
    noise: float = 0.03  # added to the embeddings, whose elements are about 0.13: a tower never says them exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class SightStage:
    """Tower and projector learn to say that of pictures. The language model is not run."""

    pictures: int = 16_000
    more_digits: int = 5_000  # ten digits are a fifth of the pictures otherwise, six shapes the rest
    steps: int = 3_000
    batch: int = 64
    rate: float = 1.2e-3
    warm_up_steps: int = 50
    weight_decay: float = 0.02
    figure_weight: float = 2.0  # which of sixteen figures is the hardest to see
    between_weight: float = 5.0  # the vectors between the slots are most of what is read


@dataclass(frozen=True, slots=True, kw_only=True)
class TogetherStage:
    """Tower, projector and frozen language model, answers only: LLaVA's own training, short."""

    steps: int = 60
    pictures: int = 8  # per step
    questions: int = 3  # about each
    projector_rate: float = 1e-4
    tower_rate: float = 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The whole training. The seed draws weights, pictures and batches."""

    seed: int = 1
    caption: CaptionStage = CaptionStage()
    sight: SightStage = SightStage()
    together: TogetherStage = TogetherStage()
