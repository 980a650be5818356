"""The proof of the cluster key, as bytes: what two processes that have one say before any frame.

    master -> worker    preface: magic "CAKETLS1" | nonce, 32 bytes | length, u16 | certificate, DER
    worker -> master    its own preface
                        from here on TLS 1.3, each trusting the certificate of the other's preface alone
    master -> worker    SHA-256 of the node's name that it calls, 32 bytes | proof, 32 bytes
    worker -> master    proof, 32 bytes

A proof is an HMAC over everything that must not differ between the two ends: the certificates that TLS
has seen, so that nobody without the key sits in between; the nonces, so that nothing is replayed; the
role, so that nothing is reflected. Knows nothing of sockets, of TLS, or of what a certificate says.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import NamedTuple

from cake.errors import ProtocolError
from cake.protocol.frames import KEYED_MAGIC, PREFIX
from cake.protocol.states import Role

HEAD = struct.Struct(">8s32sH")
OPENING_BYTES = PREFIX.size  # enough to tell a preface from a frame
NONCE_BYTES = 32
DIGEST_BYTES = 32
MAX_CERTIFICATE = 1024
MAX_UNPROVEN = 4096  # bytes that either side takes before the proof, those of TLS among them
SALT = b"cake cluster key v1"
BOTH_NEED_IT = "give both the same (CAKE_CLUSTER_KEY or --cluster-key)"


def derive(cluster_key: str) -> bytes:
    """The HMAC key: 32 bytes that are slow to compute, so that guessing is slow too."""
    text = cluster_key.encode("utf-8", "surrogateescape")
    return hashlib.scrypt(text, salt=SALT, n=2**14, r=8, p=1, dklen=32)


class Preface(NamedTuple):
    """The first that either side says; the certificate is DER."""

    nonce: bytes
    certificate: bytes

    def encode(self) -> bytes:
        """Its bytes."""
        return HEAD.pack(KEYED_MAGIC, self.nonce, len(self.certificate)) + self.certificate


def is_preface(opening: bytes) -> bool:
    """Whether somebody's first bytes are those of a preface."""
    return opening.startswith(KEYED_MAGIC)


def read_head(head: bytes) -> tuple[bytes, int]:
    """The nonce of a preface and its certificate's length; `ProtocolError` where that is too much."""
    _, nonce, length = HEAD.unpack(head)
    if not 0 < length <= MAX_CERTIFICATE:
        raise ProtocolError(f"a certificate of {length} bytes is over the limit {MAX_CERTIFICATE}, or empty")
    return nonce, length


def digest(data: bytes) -> bytes:
    """SHA-256: a certificate's fingerprint, or what stands for a node's name."""
    return hashlib.sha256(data).digest()


@dataclass(frozen=True)
class Handshake:
    """What one end knows of a handshake; both ends of an honest one know the same.

    Certificates are DER, as TLS has seen them; `called` is the digest of the name that the master calls.
    """

    master_nonce: bytes
    worker_nonce: bytes
    master_certificate: bytes
    worker_certificate: bytes
    called: bytes

    def proof(self, key: bytes, role: Role) -> bytes:
        """That whoever is in this role knows the key."""
        parts = (
            f"cake {role} proof v1".encode(),
            self.master_nonce,
            self.worker_nonce,
            digest(self.master_certificate),
            digest(self.worker_certificate),
            self.called,
        )
        return hmac.digest(key, b"".join(parts), "sha256")

    def proves(self, key: bytes, role: Role, proof: bytes) -> bool:
        """Whether this is that proof, in a time that does not tell how nearly."""
        return hmac.compare_digest(self.proof(key, role), proof)
