"""What every client command asks a person for: where the server is, the key that it wants, the certificates.

Here it is checked, in words for whoever typed it (`OptionError`); who connects is another matter.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from control_plane.options import OptionError
from deploy.children import PREFIX
from engine.base.keys import is_key

URL_DEFAULT: Final = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Files in PEM, called as curl calls them."""

    cacert: Path | None = None  # who may have signed the server's certificate; None: the system's authorities
    cert: Path | None = None  # the client's own, for a server that asks for one
    key: Path | None = None  # its private key; None: in the same file

    def __post_init__(self) -> None:
        for option, path in (("cacert", self.cacert), ("cert", self.cert), ("key", self.key)):
            if path is not None and not path.is_file():
                raise OptionError(option, f"there is no file '{path}'")
        if self.key is not None and self.cert is None:
            raise OptionError("cert", "is needed by --key")

    def context(self) -> ssl.SSLContext:
        """Raises `OptionError` for files that are no certificates. Takes 10 ms."""
        try:
            context = ssl.create_default_context(cafile=self.cacert)
        except OSError:
            raise OptionError("cacert", "holds no certificates that can be read") from None
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key, password=_no_password)
            except (OSError, ValueError):
                raise OptionError("cert", "certificate and key cannot be read, or do not belong together") from None
        return context


def _no_password() -> str:
    """Instead of asking on the terminal: what reads there is the conversation."""
    raise ValueError("the key is encrypted")


def require_url(url: str) -> None:
    """Of a server: no name that cannot be looked up, no port that cannot be."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna"))
        usable = usable and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        usable = False
    if not usable:
        raise OptionError("url", f"must begin with http:// or https:// and name a host, not '{url}'")


def require_key(key: str | None) -> None:
    """It goes into a header. A server's variable of the same name may hold several; a client has one."""
    if key is not None and not is_key(key):
        raise OptionError("api-key", f"must be one key, of printable ASCII without spaces; so must {PREFIX}API_KEY")
