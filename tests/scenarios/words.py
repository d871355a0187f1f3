"""Messages, numbers and frames in words and back, the same words in both directions."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from engine.base.errors import FrameError
from kv_transfer import frame as frames
from kv_transfer.codecs import Encoding
from kv_transfer.frame import FrameKind

MessageT = TypeVar("MessageT", bound=Message)
NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}


# -- numbers -----------------------------------------------------------------------------------------------------------
def write_numbers(numbers: Iterable[int]) -> str:
    """1, 2, 3, 4, 9 -> "1..4,9" """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in runs)


def read_numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def write_branches(branches: Iterable[Iterable[int]]) -> str:
    return "|".join(map(write_numbers, branches)) if branches else "none"


def read_branches(text: str) -> tuple[tuple[int, ...], ...]:
    """Those of END: "100|101", "100||102", "none" """
    return () if text == "none" else tuple(map(read_numbers, text.split("|")))


def read_range(text: str) -> tuple[int, int]:
    """ "[0,4)" -> (0, 4)"""
    start, end = text.strip("[)").split(",")
    return int(start), int(end)


# -- bytes that have names ---------------------------------------------------------------------------------------------
class Names:
    """Ids and digests by name: the given ones, and T1, T2... for transfer ids in the order in which they are seen."""

    def __init__(self, **known: bytes) -> None:
        self._bytes = dict(known)

    def write(self, value: bytes) -> str:
        for name, known in self._bytes.items():
            if known == value:
                return name
        name = f"T{sum(name.startswith('T') for name in self._bytes) + 1}"
        self._bytes[name] = value
        return name

    def read(self, name: str) -> bytes:
        return self._bytes.setdefault(name, name.encode().ljust(16, b".")) if name else b""


# -- protobuf ----------------------------------------------------------------------------------------------------------
def write_message(message: Message, names: Names) -> str:
    return " ".join(_write_fields(message, names))


def write_envelope(envelope: Message, names: Names) -> str:
    """The body of an envelope: its name and its fields."""
    kind = envelope.WhichOneof("body")
    return f"{kind} {write_message(getattr(envelope, kind), names)}".rstrip()


def _write_fields(message: Message, names: Names, prefix: str = "") -> Iterable[str]:
    for descriptor, value in message.ListFields():
        name = prefix + descriptor.name
        if _is_map(descriptor):
            yield f"{name}=" + ",".join(f"{key}:{value[key]}" for key in sorted(value))
        elif descriptor.message_type and descriptor.is_repeated:
            yield from (f"{name}=({write_message(item, names)})" for item in value)
        elif descriptor.message_type:
            yield from _write_fields(value, names, f"{name}.")
        else:
            yield f"{name}={_write_value(descriptor, value, names)}"


def _is_map(descriptor: FieldDescriptor) -> bool:
    return bool(descriptor.message_type and descriptor.message_type.GetOptions().map_entry)


def _write_value(descriptor: FieldDescriptor, value: Any, names: Names) -> str:
    if descriptor.name == "finishes":
        return ",".join(map(str, value))
    if descriptor.type == FieldDescriptor.TYPE_BYTES:
        return ",".join(map(names.write, value)) if descriptor.is_repeated else names.write(value)
    if descriptor.enum_type:
        known = descriptor.enum_type.values_by_number.get(value)
        return known.name if known else str(value)
    if descriptor.is_repeated:
        return write_numbers(value) if descriptor.cpp_type in NUMBERS else ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def fill(message: MessageT, fields: dict[str, str], names: Names) -> MessageT:
    """Set the fields named, dotted ones inside nested messages."""
    for path, text in fields.items():
        *outer, name = path.split(".")
        owner: Any = message
        for part in outer:
            owner = getattr(owner, part)
        _set(owner, owner.DESCRIPTOR.fields_by_name[name], text, names)
    return message


def _set(owner: Any, descriptor: FieldDescriptor, text: str, names: Names) -> None:
    if descriptor.is_repeated and descriptor.message_type:
        _extend(getattr(owner, descriptor.name), descriptor.message_type.fields, text, names)
        return
    value = _reader(descriptor, names)(text)
    if descriptor.is_repeated:
        getattr(owner, descriptor.name).extend(value)
    else:
        setattr(owner, descriptor.name, value)


def _extend(messages: Any, fields: Any, text: str, names: Names) -> None:
    """ "7:0,8:1": two messages, their fields in order."""
    for item in text.split(","):
        message = messages.add()
        for field, value in zip(fields, item.split(":"), strict=False):
            _set(message, field, value, names)


def _reader(descriptor: FieldDescriptor, names: Names) -> Callable[[str], Any]:
    if descriptor.name == "finishes":
        return lambda text: bytes(map(int, text.split(",")))
    if descriptor.type == FieldDescriptor.TYPE_BYTES:
        return (lambda text: map(names.read, text.split(","))) if descriptor.is_repeated else names.read
    if descriptor.enum_type:
        numbers = descriptor.enum_type.values_by_name
        return lambda text: numbers[text].number if text in numbers else int(text)
    if descriptor.is_repeated:
        return read_numbers if descriptor.cpp_type in NUMBERS else lambda text: text.split(",")
    return {FieldDescriptor.CPPTYPE_STRING: str, FieldDescriptor.CPPTYPE_DOUBLE: float}.get(descriptor.cpp_type, int)


# -- frames ------------------------------------------------------------------------------------------------------------
def write_frame(data: bytes, names: Names) -> str:
    """ "data T1/0 layers=[0,4) tokens=[0,8) codec=raw": kind, transfer, sequence number, and what it carries."""
    try:
        header = frames.parse_header_untrusted(data)
        frames.verify_checksum_untrusted(data)
    except FrameError as error:
        return f"not a frame ({error.reason})"
    words = [header.kind.name.lower(), f"{names.write(header.transfer_id)}/{header.sequence}"]
    if header.epoch != 1:
        words.append(f"epoch={header.epoch}")
    if (schema := names.write(header.schema_digest)) != "A":
        words.append(f"schema={schema}")
    if header.kind is FrameKind.DATA:
        words += [
            f"layers=[{header.layer_start},{header.layer_end})",
            f"tokens=[{header.token_start},{header.token_end})",
        ]
        words += _write_encoding(header.encoding)
    if header.kind is FrameKind.END:
        end = frames.parse_end_untrusted(frames.payload_of(data))
        words += [f"tokens={write_branches(end.branches)}", f"frames={end.frames}"]
        words += [f"delta={end.rope_delta}"] if end.rope_delta else []
        words += _write_encoding(header.encoding) if header.codec != "raw" else []
    if header.kind is FrameKind.REFUSED:
        words.append(frames.parse_refusal_untrusted(frames.payload_of(data)).name.lower())
    return " ".join(words)


def _write_encoding(encoding: Encoding) -> list[str]:
    level = [f"level={encoding.level}"] if encoding.level else []
    tables = [f"tables={encoding.tables:x}"] if encoding.tables else []
    return [f"codec={encoding.codec}", *level, *tables]
