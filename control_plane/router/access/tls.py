"""TLS for every listener of a router, from files that the operator names. Read and checked before anything listens.

With a list of authorities for clients (`ssl_ca_certs`) everybody who connects must show a certificate; without it,
whoever has an API key may ask. What does not belong here: links between workers, which are another network's.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from control_plane.options import EdgeOptions, OptionError


@dataclass(frozen=True, slots=True)
class Tls:
    """A server's certificate chain and private key, and who may connect."""

    certfile: Path
    keyfile: Path
    ca_certs: Path | None = None

    @classmethod
    def of(cls, options: EdgeOptions) -> Self | None:
        """None where the operator wants none. Raises `OptionError` for files that are no certificates."""
        if options.ssl_certfile is None:
            return None
        tls = cls(options.ssl_certfile, options.ssl_keyfile or options.ssl_certfile, options.ssl_ca_certs)
        tls.context()
        return tls

    def context(self) -> ssl.SSLContext:
        """For HTTP."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certfile, self.keyfile, password=_no_password)
        except (OSError, ValueError):
            raise OptionError("ssl-certfile", "certificate and key cannot be read, or do not belong together") from None
        if self.ca_certs is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.ca_certs)
            except OSError:
                raise OptionError("ssl-ca-certs", "holds no certificates that can be read") from None
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC."""
        roots = self.ca_certs.read_bytes() if self.ca_certs is not None else None
        pair = (self.keyfile.read_bytes(), self.certfile.read_bytes())
        return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


def _no_password() -> str:
    """Instead of asking on the terminal, of which a server has none."""
    raise ValueError("the key is encrypted")
