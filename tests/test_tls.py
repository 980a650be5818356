"""TLS over bytes in memory: who is trusted, and what goes through."""

import logging
import random
import ssl
from collections.abc import Iterator

import pytest

from cake.errors import CakeError, ProtocolError
from cake.net.tls import Credentials, Tls, new_credentials

KEY = "correct horse battery staple"


@pytest.fixture(scope="module")
def pair() -> tuple[Credentials, Credentials]:
    """Two processes of one cluster."""
    return new_credentials(KEY), new_credentials(KEY)


def talk(client: Tls, server: Tls) -> None:
    """Carry bytes until nobody has more to say."""
    while client.outgoing.pending or server.outgoing.pending:
        for sender, receiver in ((client, server), (server, client)):
            for _ in receiver.decrypt(sender.outgoing.read()):
                raise AssertionError("nothing was said")


def opened(pair: tuple[Credentials, Credentials]) -> tuple[Tls, Tls]:
    client = Tls(pair[0].context(pair[1].certificate, server=False), server=False)
    server = Tls(pair[1].context(pair[0].certificate, server=True), server=True)
    talk(client, server)
    return client, server


def test_two_that_know_one_anothers_certificate(pair) -> None:
    client, server = opened(pair)
    assert client.established
    assert server.established
    assert client.peer_certificate == pair[1].certificate
    assert server.peer_certificate == pair[0].certificate


def in_pieces(data: bytes, rng: random.Random) -> Iterator[bytes]:
    while data:
        n_bytes = rng.randint(1, 40_000)
        yield data[:n_bytes]
        data = data[n_bytes:]


@pytest.mark.parametrize("n_bytes", [0, 1, 2**14 - 1, 2**14, 2**14 + 1, 2**20 + 7])
def test_bytes_arrive_as_they_were_however_they_are_cut(pair, n_bytes: int) -> None:
    client, server = opened(pair)
    rng = random.Random(n_bytes)
    data = rng.randbytes(n_bytes)
    for sender, receiver in ((client, server), (server, client)):
        sent = b"".join(sender.encrypt(memoryview(data)))
        got = b"".join(bytes(p) for cut in in_pieces(sent, rng) for p in receiver.decrypt(cut))
        assert got == data
        assert data[:64] not in sent or len(data) < 64  # few bytes are there by chance


def test_another_certificate_is_not_trusted(pair) -> None:
    stranger = new_credentials(KEY)  # it even has the key
    client = Tls(stranger.context(pair[1].certificate, server=False), server=False)
    server = Tls(pair[1].context(pair[0].certificate, server=True), server=True)
    with pytest.raises(ProtocolError, match="TLS failed"):
        talk(client, server)
    assert not server.established


def test_one_without_a_certificate_is_not_trusted(pair) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=pair[1].certificate)
    server = Tls(pair[1].context(pair[0].certificate, server=True), server=True)
    with pytest.raises(ProtocolError, match="TLS failed"):
        talk(Tls(context, server=False), server)


def test_older_tls_is_refused(pair) -> None:
    context = pair[0].context(pair[1].certificate, server=False)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    server = Tls(pair[1].context(pair[0].certificate, server=True), server=True)
    with pytest.raises(ProtocolError, match="TLS failed"):
        talk(Tls(context, server=False), server)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\x16\x03\x01\x02\x00" + bytes(512)]
)
def test_noise(pair, data: bytes) -> None:
    server = Tls(pair[1].context(pair[0].certificate, server=True), server=True)
    with pytest.raises(ProtocolError, match="TLS failed"):
        list(server.decrypt(data))


def test_a_record_that_somebody_changed(pair) -> None:
    client, server = opened(pair)
    sent = bytearray(b"".join(client.encrypt(b"hidden states")))
    sent[-1] ^= 1
    with pytest.raises(ProtocolError, match="TLS failed"):
        list(server.decrypt(sent))


@pytest.mark.parametrize("data", [b"\x30", b"noise" * 50, bytes(1024)])
def test_a_certificate_that_is_none(pair, data: bytes) -> None:
    with pytest.raises(ProtocolError, match="the peer's certificate is none"):
        pair[0].context(data, server=True)


def test_certificates_are_small_and_each_process_has_its_own(pair) -> None:
    assert len({credentials.certificate for credentials in pair}) == 2
    assert all(len(credentials.certificate) < 512 for credentials in pair)
    assert pair[0].key == pair[1].key


def test_secrets_do_not_get_into_logs(pair) -> None:
    text = repr(pair[0])
    assert "PRIVATE" not in text
    assert pair[0].key.hex() not in text
    assert repr(pair[0].key) not in text


def test_an_empty_key_is_refused_and_a_short_one_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CakeError, match=r"the cluster key is empty; make one with: python3 -c"):
        new_credentials("")
    new_credentials("fifteen letters")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "short enough to be guessed" in record.getMessage()
    assert "fifteen letters" not in record.getMessage()
    new_credentials("sixteen letters!")
    assert len(caplog.records) == 1
