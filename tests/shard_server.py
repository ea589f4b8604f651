"""A web server on the loopback that serves a folder of shards, counts, and misbehaves on request."""

from __future__ import annotations

import asyncio
import collections
import threading
from pathlib import Path

from aiohttp import web


class Server:
    """Serves a folder below /set until it is closed.

    Attributes:
        requests: of each file, how many.
        answers: what the next requests of a file get instead of it: a status, a body (with the status 200), or what
            a coroutine function of the request and the file's content makes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: collections.Counter[str] = collections.Counter()
        self.answers: dict[str, list] = {}
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self.thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_get("/set/{name}", self._get)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.loop.run_until_complete(self.runner.setup())
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/set"
        started.set()
        self.loop.run_forever()
        self.loop.run_until_complete(self.runner.cleanup())

    async def _get(self, request):
        name = request.match_info["name"]
        self.requests[name] += 1
        path = self.folder / name
        size_only = request.method == "HEAD"  # a stream's client asks for it first: a status alone can answer
        if self.answers.get(name) and not (size_only and not isinstance(self.answers[name][0], int)):
            answer = self.answers[name].pop(0)
            if callable(answer):
                return await answer(request, path.read_bytes())
            return web.Response(status=answer) if isinstance(answer, int) else web.Response(body=answer)
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def in_pieces(pieces: int, pause: float, stop: int | None = None, hang: bool = False):
    """An answer of so many pieces, with a pause after each; after `stop` of them the connection ends, or hangs."""

    async def answer(request, content):
        content, status = content[request.http_range], 206 if "Range" in request.headers else 200
        response = web.StreamResponse(status=status, headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        size = -(-len(content) // pieces)
        for number in range(pieces if stop is None else stop):
            await response.write(content[number * size : (number + 1) * size])
            await asyncio.sleep(pause)
        if hang:
            await asyncio.sleep(600)  # closing ends it
        elif stop is not None:
            request.transport.abort()
        return response

    return answer


def changed(change):
    """An answer whose body is `change` of what was asked for."""

    async def answer(request, content):
        body = change(content[request.http_range])
        return web.Response(status=206 if "Range" in request.headers else 200, body=body)

    return answer


async def whole(_request, content):
    """An answer of a server that knows no ranges."""
    return web.Response(body=content)


def redirect(location: str):
    """An answer that sends the client elsewhere."""

    async def answer(_request, _content):
        return web.Response(status=302, headers={"Location": location})

    return answer
