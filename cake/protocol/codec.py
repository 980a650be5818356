"""Messages to bytes and back: a msgpack map for what a message says, and its tensor's bytes beside it.

msgspec reads, checks and writes the map by the annotations of `messages`, several times faster than Python
would, and every token waits for that in every stage.
"""

import threading

from msgspec import DecodeError, Struct, convert, msgpack

from cake.errors import ProtocolError
from cake.protocol.messages import (
    MESSAGES,
    VERSION,
    AnyMessage,
    Buffer,
    Forward,
    Hello,
    Message,
    Result,
    Welcome,
    Whole,
    WireTensor,
    shortened,
)

MAX_WORDS = 200  # characters of an explanation that may quote the peer
# Another version may add fields to these: who it is must be understood before it is refused.
GREETINGS = {greeting.__name__.lower() for greeting in (Hello, Welcome)}


class TensorHeader(Struct, frozen=True, forbid_unknown_fields=True):
    """What the map says of a tensor."""

    dtype: str
    shape: tuple[Whole, ...]


class _Arriving(threading.local):
    """The payload of the message that this thread decodes, which its tensor takes."""

    payload: Buffer = b""


def pack(message: Message) -> tuple[bytes, Buffer]:
    """The header of a message, and the payload that follows it (empty without a tensor)."""
    payload = message.hidden.data if isinstance(message, Forward | Result) else b""
    return _ENCODER.encode(message), payload


def unpack(header: Buffer, payload: Buffer) -> Message:
    """The message that a header and its payload spell; `ProtocolError` when they spell none."""
    _arriving.payload = payload
    try:
        message: Message = _DECODER.decode(header)
    except (DecodeError, UnicodeError, RecursionError) as error:
        raise _reason(header, error) from error
    finally:
        _arriving.payload = b""
    if payload and not isinstance(message, Forward | Result):
        raise ProtocolError(f"a {message.kind} message has no payload")
    return message


def _describe(tensor: object) -> TensorHeader:
    assert isinstance(tensor, WireTensor)  # all else in a message is of types that msgspec knows
    return TensorHeader(tensor.dtype, tensor.shape)


def _tensor(_: type, description: object) -> WireTensor:
    header = convert(description, TensorHeader)
    return WireTensor(header.dtype, header.shape, _arriving.payload)


def _reason(header: Buffer, error: Exception) -> ProtocolError:
    """Why these bytes are no message. Slow, but a connection ends with it."""
    try:
        fields = msgpack.decode(header)
    except (DecodeError, UnicodeError, RecursionError):
        return ProtocolError("a frame's header is not msgpack")
    if not isinstance(fields, dict):
        return ProtocolError("a frame's header must be a map")
    kind, version = fields.get("kind"), fields.get("version")
    if not isinstance(kind, str) or kind not in MESSAGES:
        return ProtocolError(f"a message of unknown kind {shortened(kind)}")
    if kind in GREETINGS and version not in (None, VERSION):
        return ProtocolError(
            f"the {kind} is of protocol version {shortened(version)}, this side speaks {VERSION}; "
            "run the same Cake on both"
        )
    return ProtocolError(f"a malformed {kind} message: {ascii(str(error))[1:-1]:.{MAX_WORDS}}")


_arriving = _Arriving()
_ENCODER = msgpack.Encoder(enc_hook=_describe)
_DECODER = msgpack.Decoder(AnyMessage, dec_hook=_tensor)
