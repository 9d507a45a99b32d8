"""The least that Granian and aiohttp cost whatever is built on them: bytes in, bytes out.

    python floor.py PORT UPSTREAM_PORT

One `send` for every read from the upstream, and a task that waits for the browser to leave. Nothing
is read, checked, limited, counted or logged, so this is no proxy to use: it measures the ground
that proxy.py stands on. The settings of the server and of the client are those of proxy.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from typing import Any

import aiohttp
from granian import Granian
from granian.constants import HTTPModes, Interfaces, Loops
from yarl import URL

PLACES = 10_000  # as proxy.serve reckons them: twice run.py's limits.concurrent_total
HEADERS = {"content-type": "application/json", "anthropic-version": "2023-06-01", "x-api-key": "-"}
AUTOMATIC = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class Floor:
    session: aiohttp.ClientSession

    def __init__(self, upstream_port: int) -> None:
        self.url = URL(f"http://127.0.0.1:{upstream_port}/v1/messages")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        elif scope["method"] == "POST":
            with contextlib.suppress(asyncio.CancelledError):
                await self.forward(receive, send)
        else:  # /health
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok", "more_body": False})

    async def live(self, receive: Any, send: Any) -> None:
        await receive()
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        cookies, patience = aiohttp.DummyCookieJar(), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            connector=connector, cookie_jar=cookies, timeout=patience, skip_auto_headers=AUTOMATIC
        ) as self.session:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def forward(self, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        watcher = asyncio.create_task(leave_with_browser(receive, asyncio.current_task()))
        try:
            async with self.session.post(self.url, data=body, headers=HEADERS) as answer:
                kind, more = answer.headers["content-type"].encode(), True
                headers = [(b"content-type", kind)]
                start = {"type": "http.response.start", "status": answer.status, "headers": headers}
                await send(start)
                while more:
                    chunk = await answer.content.readany()
                    more = not answer.content.at_eof()
                    await send({"type": "http.response.body", "body": chunk, "more_body": more})
        finally:
            watcher.cancel()


async def leave_with_browser(receive: Any, task: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def serve(port: int, upstream_port: int) -> None:
    granian = Granian(
        "floor", port=port, interface=Interfaces.ASGI, websockets=False, loop=Loops.uvloop,
        http=HTTPModes.http1, backlog=PLACES, backpressure=PLACES, log_enabled=False,
        respawn_failed_workers=True, workers_kill_timeout=30,
    )  # fmt: skip
    granian.serve(target_loader=functools.partial(Floor, upstream_port), wrap_loader=False)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
