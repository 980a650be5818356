"""TLS 1.3 between two processes that have each other's certificate, on bytes that somebody else moves.

A process makes its certificate when it starts and tells nobody the private key; a certificate says
nothing of who that is. Knows the cluster key as bytes to keep, not what is proven with it.
"""

import datetime
import logging
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from cake.errors import CakeError, ProtocolError
from cake.protocol.cluster_key import derive
from cake.protocol.messages import Buffer

log = logging.getLogger(__name__)

SHORT_KEY = 16
MAKE_ONE = "python3 -c 'import secrets; print(secrets.token_urlsafe())'"
PIECE_BYTES = 256 * 1024  # encrypted at once, so that sending begins before all is


@dataclass(frozen=True)
class Credentials:
    """What a process proves itself with: the derived cluster key, and its certificate, DER."""

    key: bytes = field(repr=False)
    certificate: bytes
    pem: bytes = field(repr=False)  # the certificate and its private key

    def context(self, peer: bytes, server: bool) -> ssl.SSLContext:
        """Trusts the certificate `peer`, DER, and no other; `ProtocolError` where that is none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # nobody has vouched for names; the proof will
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # no connection resumes another
        try:
            context.load_verify_locations(cadata=peer)
        except (ssl.SSLError, ValueError) as error:
            raise ProtocolError("the peer's certificate is none") from error
        with tempfile.TemporaryDirectory(prefix="cake-") as folder:  # ssl takes a file, and no bytes
            path = Path(folder, "own.pem")
            path.write_bytes(self.pem)
            context.load_cert_chain(path)
        return context


def new_credentials(cluster_key: str) -> Credentials:
    """With a certificate of this process; raises `CakeError` for an empty key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not cluster_key:
        raise CakeError(f"the cluster key is empty; make one with: {MAKE_ONE}")
    if len(cluster_key) < SHORT_KEY:
        log.warning("the cluster key is short enough to be guessed; make a better one with: %s", MAKE_ONE)
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cake")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(1970, 1, 1))  # it lives as long as the process,
        .not_valid_after(datetime.datetime(9999, 12, 31))  # and clocks may be wrong
    )
    certificate = builder.sign(private, hashes.SHA256())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Credentials(
        key=derive(cluster_key),
        certificate=certificate.public_bytes(serialization.Encoding.DER),
        pem=certificate.public_bytes(serialization.Encoding.PEM) + pem,
    )


class Tls:
    """One end of a TLS connection. What it wants to have sent is in `outgoing`."""

    def __init__(self, context: ssl.SSLContext, server: bool) -> None:
        self._incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self.outgoing, server_side=server)
        self._plain = memoryview(bytearray(2**14))  # a record holds no more
        self.established = False
        self._shake_hands()

    @property
    def peer_certificate(self) -> bytes:
        """The certificate that the peer has shown to have the private key of, DER."""
        return self._object.getpeercert(binary_form=True) or b""

    def encrypt(self, data: Buffer) -> Iterator[bytes]:
        """The bytes to send for these, in pieces."""
        view = memoryview(data)
        for start in range(0, len(view), PIECE_BYTES):
            self._object.write(view[start : start + PIECE_BYTES])
            yield self.outgoing.read()

    def decrypt(self, data: Buffer) -> Iterator[memoryview]:
        """What arrived with these bytes, each piece to be used before the next. Raises `ProtocolError`."""
        self._incoming.write(data)
        if not self.established:
            self._shake_hands()
        while self.established:
            try:
                n_bytes = cast("int", self._object.read(len(self._plain), self._plain))
            except ssl.SSLWantReadError:
                return
            except ssl.SSLError as error:
                raise _failure(error) from error
            if not n_bytes:  # the peer has closed its half; the socket will say so
                return
            yield self._plain[:n_bytes]

    def _shake_hands(self) -> None:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise _failure(error) from error
        self.established = True


def _failure(error: ssl.SSLError) -> ProtocolError:
    return ProtocolError(f"TLS failed ({error.reason or 'for no reason given'})")
