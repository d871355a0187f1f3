"""Keys from flags and from a file, read once at start.

    # tenant   key                        role
    acme       sk-3f7a...
    acme       sk-91c2...                             a second key, for a change without a gap
    ops        sk-77aa...                 admin       may also reset the cache

Fields are parted by spaces; `#` after one begins a comment. Errors name the line and never show it: it may hold a key.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from control_plane.options import EdgeOptions, OptionError
from control_plane.router.access.tenants import Keys, Tenant
from engine.base import limits
from engine.base.keys import is_key

OPTION: Final = "api-key-file"
FLAG_TENANT: Final = Tenant("default", admin=True)
ADMIN: Final = "admin"
COMMENT: Final = re.compile(r"(?:^|\s)#")  # inside a word it is part of a key


def read_keys(options: EdgeOptions) -> Keys:
    """Raises `OptionError`."""
    tenants = dict.fromkeys(options.api_keys, FLAG_TENANT)
    if options.api_key_file is not None:
        for number, key, tenant in _entries(_text(options.api_key_file)):
            if key in tenants:
                raise OptionError(OPTION, f"line {number}: this key has been given before")
            tenants[key] = tenant
        if not tenants:
            raise OptionError(OPTION, "holds no key, so nobody could ask for anything")
    if len(tenants) > limits.API_KEYS_MAX:
        raise OptionError(OPTION, f"{len(tenants)} keys; at most {limits.API_KEYS_MAX}")
    return Keys(tenants)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(limits.API_KEY_FILE_BYTES_MAX + 1)
        text = content.decode()
    except OSError as error:
        raise OptionError(OPTION, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(OPTION, "is not UTF-8 text") from None
    if len(content) > limits.API_KEY_FILE_BYTES_MAX:
        raise OptionError(OPTION, f"at most {limits.API_KEY_FILE_BYTES_MAX} bytes")
    return text


def _entries(text: str) -> Iterator[tuple[int, str, Tenant]]:
    for number, line in enumerate(text.splitlines(), start=1):
        fields = COMMENT.split(line, maxsplit=1)[0].split()
        if not fields:
            continue
        if not 2 <= len(fields) <= 3 or fields[2:] not in ([], [ADMIN]):
            raise OptionError(OPTION, f"line {number}: must be TENANT KEY, or TENANT KEY {ADMIN}")
        if not is_key(fields[1]):
            raise OptionError(OPTION, f"line {number}: a key is made of printable ASCII")
        try:
            yield number, fields[1], Tenant(fields[0], admin=len(fields) == 3)
        except ValueError as error:
            raise OptionError(OPTION, f"line {number}: {error}") from None
