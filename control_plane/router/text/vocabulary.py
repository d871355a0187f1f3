"""Text to token ids and back, and the few facts about the model that the edge checks requests against.

`TokenizerVocabulary` reads a model's `tokenizer.json` with the `tokenizers` library alone. `OracleVocabulary` serves
models that are no models: oracle and paced workers, whose ids mean nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tokenizers import Tokenizer

from control_plane.router.text.detokenizer import (
    REPLACEMENT,
    ByteDetokenizer,
    IncrementalDetokenizer,
    WindowDetokenizer,
)
from control_plane.router.text.special_tokens import SpecialToken, SpecialTokens
from control_plane.router.text.tokenizer_config import public_settings, read_tokenizer_config


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the edge must know about the served model. Made from the model's own description by the composition."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    images_max: int = 0  # in one conversation; 0: it takes text only
    image_token_id: int | None = None  # that stands for images, and that no prompt of ids may hold


COMPOSED_CHARACTERS_MAX: Final = 4  # code points that Unicode's normal forms join into one (U+1F82 is made of four)


class Vocabulary(Protocol):
    """A model's text. Thread-safe: long prompts are encoded off the event loop."""

    @property
    def characters_per_token_max(self) -> int | None:
        """No token stands for more characters of a prompt than this; None where nothing of the kind can be said."""

    @property
    def guarded(self) -> SpecialTokens:
        """The tokens that users cannot write by name."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What clients may know of the tokenizer, in the words of `tokenizer_config.json`."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_naming(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The name of a special token means that token, whoever wrote it. For no text that becomes a prompt."""

    def encode_chat(self, text: str, *, mark: str = "", add_special_tokens: bool = False) -> list[int]:
        """A rendered conversation. The names of special tokens mean those tokens, except where `mark` is inside."""

    def detokenizer(
        self, silent_ids: frozenset[int], *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        """A fresh one for one choice; `silent_ids` end its text without being part of it. `prompt` comes before it."""

    def token_text(self, token_id: int) -> str:
        """One token by itself, special tokens included, for lists of log-probabilities.

        Bytes that are no whole text read `bytes:\\xe2\\x80`, as OpenAI's completions had it. vLLM writes U+FFFD for all
        of them, so that tokens which differ share one key of `top_logprobs` and the likelier ones are lost.
        """

    def token_name(self, token_id: int) -> str:
        """How the vocabulary itself spells it; nothing for an id that only pads the embedding matrix."""


class TokenizerVocabulary:
    """A Hugging Face fast tokenizer.

    The names of special tokens inside a prompt are ordinary text unless the operator permits them: otherwise a user
    could close the system prompt's turn from inside his own (reliability D9). Clients that apply a chat template
    themselves and send the result as a prompt need the permission.
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        *,
        permit_special_tokens: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._naming = _load(path, encode_special_tokens=False)
        self._tokenizer = self._naming if permit_special_tokens else _load(path, encode_special_tokens=True)
        self._special = SpecialTokens(_special_tokens(self._naming))
        self.guarded = SpecialTokens() if permit_special_tokens else self._special
        self.settings: Mapping[str, Any] = public_settings(settings or {})
        self._newline = self._ids(self._tokenizer, "\n", add_special_tokens=False)
        self._joins_plainly = self._starts_pieces_plainly()
        self._vocab_size = vocab_size
        self._token_bytes: list[bytes] | None = None
        self.characters_per_token_max: int | None = None
        if _is_byte_level(self._tokenizer):
            self._token_bytes = self._byte_table()
            self._ordinary_bytes = self._without_special(self._token_bytes)
            self.characters_per_token_max = self._longest_token()
        self._texts: dict[int, str] = {}  # of single tokens; no more of them than there are ids

    @classmethod
    def from_model_dir(
        cls, model_dir: Path, vocab_size: int, *, permit_special_tokens: bool = False
    ) -> "TokenizerVocabulary":
        return cls(
            model_dir / "tokenizer.json",
            vocab_size,
            permit_special_tokens=permit_special_tokens,
            settings=read_tokenizer_config(model_dir),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._ids(self._tokenizer, text, add_special_tokens)

    def encode_naming(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._ids(self._naming, text, add_special_tokens)

    def encode_chat(self, text: str, *, mark: str = "", add_special_tokens: bool = False) -> list[int]:
        if not mark:
            token_ids = self._ids(self._naming, text, add_special_tokens=False)
            # A tokenizer that normalises text first may see names where nobody wrote one, in full-width letters say.
            if not self.guarded.ids or _count(token_ids, self.guarded.ids) <= self.guarded.count(text):
                return self._between_affixes(token_ids) if add_special_tokens else token_ids
        token_ids = self._ids_in_pieces(text, mark)
        return self._between_affixes(token_ids) if add_special_tokens else token_ids

    def detokenizer(
        self, silent_ids: frozenset[int], *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        if self._token_bytes is not None:
            return ByteDetokenizer(self._ordinary_bytes if skip_special_tokens else self._token_bytes, silent_ids)
        return WindowDetokenizer(self._decode if skip_special_tokens else self._decode_all, silent_ids, prompt)

    def token_text(self, token_id: int) -> str:
        if self._token_bytes is not None:
            return _text_of(self._token_bytes[token_id])
        if token_id not in self._texts:
            self._texts[token_id] = self._text_after_anchor(token_id)
        return self._texts[token_id]

    def token_name(self, token_id: int) -> str:
        return self._naming.id_to_token(token_id) or ""

    @staticmethod
    def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call lets go of the GIL, `encode` does not (measured: 10x less progress of other threads).
        return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _ids_in_pieces(self, text: str, mark: str) -> list[int]:
        """Special tokens that the template named, and between them text that holds none, whatever it says."""
        token_ids: list[int] = []
        for piece in self._special.split(text):
            if isinstance(piece, int):
                token_ids.append(piece)
            else:
                plain = piece.replace(mark, "") if mark else piece
                token_ids += self._piece(plain, first=not token_ids)
        return token_ids

    def _piece(self, text: str, *, first: bool) -> list[int]:
        """Some tokenizers put a space before a text, though not after a special token. Behind a line break they do
        not either (the way out that transformers takes, too)."""
        if first or self._joins_plainly:
            return self._ids(self._tokenizer, text, add_special_tokens=False)
        token_ids = self._ids(self._tokenizer, "\n" + text, add_special_tokens=False)
        if token_ids[: len(self._newline)] == self._newline:
            return token_ids[len(self._newline) :]
        return self._ids(self._tokenizer, text, add_special_tokens=False)

    def _starts_pieces_plainly(self) -> bool:
        named = next(iter(_special_tokens(self._naming)), None)
        if named is None:
            return True
        behind = self._ids(self._naming, f"{named.name}a", add_special_tokens=False)[1:]
        return behind == self._ids(self._tokenizer, "a", add_special_tokens=False)

    def _between_affixes(self, token_ids: list[int]) -> list[int]:
        """As the tokenizer puts special tokens around one text."""
        middle = self._ids(self._tokenizer, "a", add_special_tokens=False)
        whole = self._ids(self._tokenizer, "a", add_special_tokens=True)
        starts = range(len(whole) - len(middle) + 1)
        start = next(start for start in starts if whole[start : start + len(middle)] == middle)
        return whole[:start] + token_ids + whole[start + len(middle) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _decode_all(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def _text_after_anchor(self, token_id: int) -> str:
        """What the token adds to a text: decoded alone it would lose the space that it begins with."""
        anchor = self._tokenizer.encode("a", add_special_tokens=False).ids
        text = self._decode_all([*anchor, token_id])[len(self._decode_all(anchor)) :]
        if REPLACEMENT not in text:
            return text
        byte = _FALLBACK_BYTE.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return text if byte is None else _text_of(bytes.fromhex(byte[1]))

    def _longest_token(self) -> int | None:
        """Byte-level tokens stand for their own bytes, hence for no more characters than that, unless text is dropped
        on the way; Unicode's normal forms only join some."""
        description = json.loads(self._tokenizer.to_str())
        if not _keeps_all_text(description):
            return None
        longest = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        return longest if description["normalizer"] is None else COMPOSED_CHARACTERS_MAX * longest

    def _byte_table(self) -> list[bytes]:
        """Bytes of every id; empty for ids that only pad the embedding matrix."""
        alphabet = _byte_alphabet()
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        table = [b""] * max(self._vocab_size, max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            table[token_id] = _token_bytes(token, alphabet)
        return table

    def _without_special(self, table: list[bytes]) -> list[bytes]:
        table = list(table)
        for token_id, added in self._tokenizer.get_added_tokens_decoder().items():
            if added.special:
                table[token_id] = b""
        return table


class OracleVocabulary:
    """A reversible make-believe text: id 123 reads " 123", and such text encodes to its ids again.

    Any other prompt encodes to its UTF-8 bytes (modulo the vocabulary), so that every prompt has some ids.
    """

    _IDS: Final = re.compile(r"(?: [0-9]{1,9})+")

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.guarded = SpecialTokens()
        self.settings: Mapping[str, Any] = {"tokenizer_class": type(self).__name__, "eos_token": None}
        self.characters_per_token_max: int | None = 10  # a space and nine digits, most of them zeros
        self._token_bytes = [b" %d" % token for token in range(vocab_size)]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self._IDS.fullmatch(text):
            token_ids = [int(word) for word in text.split()]
            if max(token_ids) < self._vocab_size:
                return token_ids
        return [byte % self._vocab_size for byte in text.encode()]

    def encode_naming(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encode(text)

    def encode_chat(self, text: str, *, mark: str = "", add_special_tokens: bool = False) -> list[int]:
        return self.encode(text)

    def detokenizer(
        self, silent_ids: frozenset[int], *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        return ByteDetokenizer(self._token_bytes, silent_ids)

    def token_text(self, token_id: int) -> str:
        return _text_of(self._token_bytes[token_id])

    def token_name(self, token_id: int) -> str:
        return self._token_bytes[token_id].decode()


# -- special tokens ----------------------------------------------------------------------------------------------------
def _load(path: Path, *, encode_special_tokens: bool) -> Tokenizer:
    """`encode_special_tokens`: their names are text like any other. One tokenizer cannot do both: it is a setting that
    all threads would share."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = encode_special_tokens
    tokenizer.no_truncation()  # a saved file may carry both; either would change a prompt silently
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(tokenizer: Tokenizer) -> list[SpecialToken]:
    return [
        SpecialToken(token_id, added.content, added.lstrip, added.rstrip, added.single_word)
        for token_id, added in sorted(tokenizer.get_added_tokens_decoder().items())
        if added.special
    ]


def _count(token_ids: list[int], wanted: frozenset[int]) -> int:
    return sum(1 for token_id in token_ids if token_id in wanted)


# -- single tokens -----------------------------------------------------------------------------------------------------
_FALLBACK_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


def _text_of(token_bytes: bytes) -> str:
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join([f"\\x{byte:02x}" for byte in token_bytes])


# -- byte-level tokenizers: GPT-2's printable stand-ins for the 256 bytes ------------------------------------------
def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"


def _keeps_all_text(description: dict[str, Any]) -> bool:
    """No step known to drop characters, and none unknown: then so many characters are at least so many tokens."""
    normalizer, splitter = description["normalizer"], description["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    return (
        (normalizer is None or normalizer["type"] in ("NFC", "NFD", "NFKC", "NFKD"))
        and all(step.get("type") in ("ByteLevel", "Digits", "Split") for step in steps)
        and not any(step.get("behavior") == "Removed" for step in steps)
        and not any(added["lstrip"] or added["rstrip"] for added in description["added_tokens"])
    )


def _byte_alphabet() -> dict[str, int]:
    """Printable characters stand for themselves, the other bytes for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins: Iterator[int] = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}


def _token_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    """As the library's decoder does: a token with any character outside the alphabet is plain text."""
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()
