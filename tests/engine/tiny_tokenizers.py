"""A tokenizer of single printable characters, as a file: what a grammar needs to know what tokens spell."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = 0
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SIZE = 1 + len(CHARACTERS)  # `tiny_models.VOCAB`


def save_tokenizer(folder: Path) -> Path:
    alphabet = {"\n": "Ċ", " ": "Ġ"}  # ByteLevel's stand-ins
    vocab = {"<eos>": EOS, **{alphabet.get(each, each): 1 + index for index, each in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def ids_of(text: str) -> list[int]:
    return [1 + CHARACTERS.index(character) for character in text]


def text_of(tokens: list[int]) -> str:
    return "".join(CHARACTERS[token - 1] for token in tokens if token != EOS)
