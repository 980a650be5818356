"""The wire, without a wire: bytes in, messages out. No sockets, no asyncio.

`PROTOCOL.md` in this folder describes it for those who write a client in another language.
"""
