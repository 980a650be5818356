"""The proof of the cluster key, byte by byte: what goes over the wire, and what makes a proof another."""

import hashlib
import hmac
from dataclasses import replace
from pathlib import Path

import pytest

import cake
from cake.errors import ProtocolError
from cake.protocol.cluster_key import (
    HEAD,
    MAX_CERTIFICATE,
    Handshake,
    Preface,
    derive,
    digest,
    is_preface,
    read_head,
)
from cake.protocol.frames import FrameReader, encode
from cake.protocol.messages import VERSION, Hello

NONCE = bytes(range(32))
KEY = bytes(32)
HANDSHAKE = Handshake(
    master_nonce=NONCE,
    worker_nonce=bytes(32),
    master_certificate=b"the master's",
    worker_certificate=b"the worker's",
    called=digest(b"worker0"),
)


def test_the_preface() -> None:
    data = Preface(NONCE, b"\x30\x03\x02\x01\x05").encode()
    assert data == b"CAKETLS1" + NONCE + b"\x00\x05" + b"\x30\x03\x02\x01\x05"
    assert read_head(data[: HEAD.size]) == (NONCE, 5)
    assert is_preface(data[:16])


@pytest.mark.parametrize("length", [0, MAX_CERTIFICATE + 1, 2**16 - 1])
def test_a_certificate_that_is_empty_or_too_long(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"a certificate of {length} bytes"):
        read_head(HEAD.pack(b"CAKETLS1", NONCE, length))


@pytest.mark.parametrize("opening", [encode(Hello(VERSION, "", "", ""))[0][:16], b"GET / HTTP/1.1\r\n", b""])
def test_what_else_may_come_first(opening: bytes) -> None:
    assert not is_preface(opening)


def test_who_knows_no_cluster_keys_says_what_is_wrong() -> None:
    with pytest.raises(ProtocolError, match="one side has a cluster key and the other has none"):
        list(FrameReader().feed(Preface(NONCE, b"\x30\x00").encode()))


def test_the_proof_is_an_hmac_over_all_of_it() -> None:
    for role in ("master", "worker"):
        parts = [f"cake {role} proof v1".encode(), NONCE, bytes(32)]
        parts += [hashlib.sha256(part).digest() for part in (b"the master's", b"the worker's", b"worker0")]
        assert HANDSHAKE.proof(KEY, role) == hmac.new(KEY, b"".join(parts), hashlib.sha256).digest()
        assert HANDSHAKE.proves(KEY, role, HANDSHAKE.proof(KEY, role))


@pytest.mark.parametrize("field", HANDSHAKE.__dataclass_fields__)
def test_another_of_anything_makes_another_proof(field: str) -> None:
    other = replace(HANDSHAKE, **{field: bytes(31) + b"\x01"})
    assert not other.proves(KEY, "master", HANDSHAKE.proof(KEY, "master"))


def test_another_key_or_role_makes_another_proof() -> None:
    proof = HANDSHAKE.proof(KEY, "master")
    assert not HANDSHAKE.proves(bytes(31) + b"\x01", "master", proof)
    assert not HANDSHAKE.proves(KEY, "worker", proof)
    assert not HANDSHAKE.proves(KEY, "master", proof[:-1])


def test_the_key_is_derived_slowly_and_the_same_everywhere() -> None:
    expected = "0cde8845ae527f95e922229969699b5f19245594aec0ab3fd74a61375ce87f16"
    assert derive("correct horse battery staple").hex() == expected
    assert derive("correct horse battery stapl") != derive("correct horse battery staple")


def test_the_documentation_shows_a_proof_that_is_right() -> None:
    text = (Path(cake.__file__).parent / "protocol" / "PROTOCOL.md").read_text(encoding="utf-8")
    handshake = Handshake(
        master_nonce=bytes([1] * 32),
        worker_nonce=bytes([2] * 32),
        master_certificate=b"master",
        worker_certificate=b"worker",
        called=digest(b"worker0"),
    )
    key = derive("correct horse battery staple")
    shown = " ".join(text.split())
    for value in (key, handshake.called, handshake.proof(key, "master"), handshake.proof(key, "worker")):
        assert value.hex() in shown
