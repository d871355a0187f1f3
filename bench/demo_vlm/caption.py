"""What the tower has to say of a picture: one vector for each of LLaVA's image tokens.

It begins as plain words, the embeddings of

    shape: circle. Colour: red. Number: 3. Position: top left. Answer with one word.

since a frozen model of this size reads text better than anything else. Training moves these vectors (`train`): the ones
of a slot, of which each picture has one of several, and the ones between, which are the same for all pictures.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from triptych.demo.scenes import COLOURS, COUNT_MAX, DIGITS, SHAPES, Scene

TEMPLATE: Final = "<kind>: <figure>. Colour: <colour>. Number: <count>. Position: <place> <side>. Answer with one word."
WORDS: Final[Mapping[str, Sequence[str]]] = {
    "kind": (" shape", " digit"),
    "figure": (*(f" {shape}" for shape in SHAPES), *DIGITS),
    "colour": tuple(f" {colour}" for colour in COLOURS),
    "count": tuple(str(count) for count in range(1, COUNT_MAX + 1)),
    "place": (" top", " bottom", " left", " right", " middle", " none"),  # none: several things, or a digit
    "side": (" left", " right", " "),
}
_FIGURES: Final = (*SHAPES, *DIGITS)
_SHARPNESS: Final = 8.0  # of choosing by distance, relative to the embeddings' mean square

Tokenize = Callable[[str], list[int]]


class Caption(nn.Module):
    """The vectors, learned once and then fixed."""

    def __init__(self, embeddings: Tensor, tokenize: Tokenize, image_tokens: int) -> None:
        super().__init__()
        ids, self.slots = _laid_out(tokenize, image_tokens)
        self.tables = nn.ParameterDict(
            {slot: embeddings[_ids(words, tokenize)].float() for slot, words in WORDS.items()}
        )
        self.between = nn.Parameter(embeddings[ids].float())
        self.fixed = [index for index in range(image_tokens) if index not in self.slots.values()]

    def of(self, scenes: Sequence[Scene]) -> Tensor:
        """[scenes, image tokens, hidden]"""
        said = self.between.expand(len(scenes), -1, -1).clone()
        for slot, choices in labels(scenes).items():
            said[:, self.slots[slot]] = self.tables[slot][choices]
        return said

    def choices(self, said: Tensor, slot: str) -> Tensor:
        """Logits of what a vector in this slot says: the nearer, the likelier."""
        table = self.tables[slot]
        return -_SHARPNESS * torch.cdist(said[:, self.slots[slot]], table).square() / self.mean_square()

    def mean_square(self) -> Tensor:
        """Of an embedding's length."""
        return torch.cat(list(self.tables.values())).square().sum(-1).mean().detach()


def labels(scenes: Iterable[Scene]) -> dict[str, Tensor]:
    """For each slot the index of the right word, scene by scene."""
    rows = [_labels(scene) for scene in scenes]
    return {slot: torch.tensor([row[slot] for row in rows]) for slot in WORDS}


def _labels(scene: Scene) -> dict[str, int]:
    count = len(scene.marks)
    place, _, side = scene.position.partition(" ") if count == 1 and not scene.is_digit else ("none", "", "")
    return {
        "kind": int(scene.is_digit),
        "figure": _FIGURES.index(scene.figure),
        "colour": COLOURS.index(scene.colour),
        "count": count - 1,
        "place": WORDS["place"].index(f" {place}"),
        "side": WORDS["side"].index(f" {side}"),
    }


def _laid_out(tokenize: Tokenize, image_tokens: int) -> tuple[list[int], dict[str, int]]:
    """The template's token ids, filled up in front with line ends, and each slot's index among them."""
    ids: list[int] = []
    slots: dict[str, int] = {}
    for piece in re.split(r"( ?<\w+>)", TEMPLATE):
        slot = re.fullmatch(r" ?<(\w+)>", piece)
        if slot is None:
            ids += tokenize(piece)
            continue
        if slot[1] == "count":
            ids += tokenize(" ")  # digits have no variant with a space
        slots[slot[1]] = len(ids)
        ids.append(0)
    (line_end,), spare = tokenize("\n"), image_tokens - len(ids)
    return [line_end] * spare + ids, {slot: index + spare for slot, index in slots.items()}


def _ids(words: Sequence[str], tokenize: Tokenize) -> list[int]:
    ids = []
    for word in words:
        (token,) = tokenize(word)
        ids.append(token)
    return ids
