"""Random JSON schemas that some value satisfies, for tests of constrained output. Same seed, same schema."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_PATTERNS = ("^[a-c]{2,5}$", "^(on|off)-[0-9]{1,3}$", "^x*y$", r"^\d{4}-\d{2}$", "^[^a-z]{1,4}$")
_NAMES = ("id", "name", "a b", "ünïcode", 'quo"te', "tags", "left", "right", "value")


def random_schema(seed: int) -> Schema:
    """A schema with `$defs`, one of them recursive, around a random one."""
    generator = random.Random(seed)
    schema = _any(generator, depth=3)
    schema["$defs"] = {
        "leaf": _any(generator, depth=0),
        "tree": {
            "type": "object",
            "properties": {"leaf": {"$ref": "#/$defs/leaf"}, "next": {"$ref": "#/$defs/tree"}},
            "required": ["leaf"],
            "additionalProperties": False,
        },
    }
    return schema


def _any(generator: random.Random, depth: int) -> Schema:
    inner = (_object, _array, _object, _array, _any_of, _ref)
    leaves = (_integer, _number, _string, _pattern, _enum, _const, _boolean_or_null)
    kind: Callable[[random.Random, int], Schema] = generator.choice(leaves if depth == 0 else (*inner, *leaves))
    return kind(generator, depth)


def _object(generator: random.Random, depth: int) -> Schema:
    names = generator.sample(_NAMES, generator.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(generator, depth - 1) for name in names},
        "required": generator.sample(names, generator.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(generator: random.Random, depth: int) -> Schema:
    fewest = generator.randint(0, 3)
    schema = {"type": "array", "items": _any(generator, depth - 1), "minItems": fewest}
    return schema | {"maxItems": fewest + generator.randint(0, 3)}


def _any_of(generator: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(generator, depth - 1) for _ in range(generator.randint(1, 3))]}


def _ref(generator: random.Random, depth: int) -> Schema:
    return {"$ref": generator.choice(("#/$defs/leaf", "#/$defs/tree"))}


def _integer(generator: random.Random, depth: int) -> Schema:
    low = generator.randint(-300, 300)
    bounds = {"minimum": low, "maximum": low + generator.randint(10, 400)}
    return {"type": "integer"} | generator.choice(({}, bounds, {"multipleOf": 7}, bounds | {"multipleOf": 5}))


def _number(generator: random.Random, depth: int) -> Schema:
    low = generator.randint(-30, 30) / 4
    return {"type": "number"} | generator.choice(({}, {"minimum": low, "maximum": low + 12.5}, {"exclusiveMinimum": 0}))


def _string(generator: random.Random, depth: int) -> Schema:
    shortest = generator.randint(0, 6)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + generator.randint(0, 20)}


def _pattern(generator: random.Random, depth: int) -> Schema:
    return {"type": "string", "pattern": generator.choice(_PATTERNS)}


def _enum(generator: random.Random, depth: int) -> Schema:
    return {"enum": generator.sample(["red", "a\nb", 1, 2.5, None, True, [1, "x"], {"k": 0}], generator.randint(1, 5))}


def _const(generator: random.Random, depth: int) -> Schema:
    return {"const": generator.choice(["fixed", 12, False, '\\ and " and é'])}


def _boolean_or_null(generator: random.Random, depth: int) -> Schema:
    return {"type": generator.choice(["boolean", "null", ["boolean", "null"]])}
