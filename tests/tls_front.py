"""TLS for the tests: a front that ends it before a real Redis server."""

import asyncio
import ssl
import threading
from pathlib import Path
from typing import Self

from cache_store.embedded_redis import RedisServer
from tests.certificates import Authority


class TlsFront:
    """TLS in front of a server that may have been built without: ends it, and passes the bytes on."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self._server = server
        authority = Authority(folder)
        self._ca = authority.ca
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*authority.issue("redis"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls-front")
        self._port = 0

    @property
    def url(self) -> str:
        return f"rediss://127.0.0.1:{self._port}?ssl_ca_certs={self._ca}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._listener = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._pass_on, "127.0.0.1", ssl=self._context), self._loop
        ).result()
        self._port = self._listener.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._listener.close()
        mine = asyncio.all_tasks() - {asyncio.current_task()}
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        pumps = [_pump(reader, inner_writer), _pump(inner_reader, writer)]
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
