"""The front port: every request goes to the engine unchanged, and waits while there is none.

An ASGI app between uvicorn and the engine's connections. Bytes pass as they come, in both directions; nothing is
decoded, buffered whole or added.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Route

from emberd.core.access import LOGIN_PATH, LOGOUT_PATH
from emberd.core.errors import NotReady
from emberd.core.generation import changes_cache, needs_engine
from emberd.services import tunnel
from emberd.services.door import Door
from emberd.services.exchange import Exchange, ReplyBrokenOff
from emberd.services.login import Login
from emberd.services.messages import CLIENT_SILENCE_S, Body, Client, ClientGone, ClientSilent
from emberd.services.places import Places

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

    from emberd.core.access import AccessRules
    from emberd.core.settings import EndpointSettings
    from emberd.core.status import RequestStatus
    from emberd.services.gate import Gate
    from emberd.services.recall import Said
    from emberd.services.turns import Knocks, Turns

_FIRST_PART_BYTES = 256 * 1024
"""So much of a body is read before the engine is connected: a client that sends nothing must not occupy one of
its few threads. A body that ends within this can be sent again when the engine dies before it answers."""
_PROMPT_BYTES = 8 * 1024 * 1024
"""The same for requests for text, whose bodies repeat the whole conversation."""
_RETRY_STOPPING_S = 5


class Proxy:
    """The ASGI app that passes requests on.

    Args:
        log: events go here; never a header, a path's query or a body.
        recall: returns the answer to a question while no engine is ready, None if it has to wait.
    """

    def __init__(
        self,
        gate: Gate,
        settings: Callable[[], EndpointSettings],
        rules: Callable[[], AccessRules],
        turns: Turns,
        knocks: Knocks,
        log: FilteringBoundLogger,
        recall: Callable[..., Said | None] = lambda *_, **__: None,
    ) -> None:
        self._gate = gate
        self._settings = settings
        self._rules = rules
        self._turns = turns
        self._knocks = knocks
        self._log = log
        self._recall = recall
        self.door = Door(rules, log)
        self.login = Login(self.door, rules)
        self.places = Places(gate, lambda: settings().max_waiting)
        self._running: dict[Exchange, None] = {}
        self._tunnels = tunnel.Tunnels(gate, self.places, lambda: settings().hold_timeout_s)

    def requests(self) -> tuple[RequestStatus, ...]:
        """Return the requests for text that have not ended, the oldest first."""
        return tuple(each.status() for each in self._running)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        client = Client(send, scope["path"])
        try:
            is_open = self._gate.engine.questions.is_open(scope["method"], scope["path"], scope["query_string"])
            is_known = not is_open or self.door.knows(scope)
            shown = await self.door.admit(scope, send, is_open=is_open)
            if shown is None:
                return
            client = Client(shown, scope["path"])
            if not is_open:
                self._add_password(scope)
            makes_text = changes_cache(scope["method"], scope["path"])
            # Without the key anybody may open a page; that is no sign of the user.
            is_user_back = makes_text or (is_known and self._knocks.knock())
            wakes = needs_engine(scope["method"], scope["path"], is_user_back=is_user_back)
            if not makes_text and await self._recalled(scope, client, wakes=wakes):
                return
            body = Body(receive, _PROMPT_BYTES if makes_text else _FIRST_PART_BYTES)
            await self._serve(scope, body, client, wakes=wakes)
        except (ClientGone, ReplyBrokenOff):
            return  # uvicorn closes the connection without a normal end
        except ClientSilent:
            if not client.has_begun:
                message = f"no more of the request came within {CLIENT_SILENCE_S:g} s"
                await client.answer(408, "request_timeout", message, headers={"connection": "close"})
        except asyncio.CancelledError:
            # Only the end of the endpoint cancels, which waits for this task; raising would be logged as a bug.
            await _refuse_at_end(client)

    def _add_password(self, scope: Scope) -> None:
        """Put the engine's password in the place of emberd's key, which was taken out."""
        password = self._gate.engine.password
        if password and self._rules().key:
            scope["headers"].append((b"authorization", f"Bearer {password}".encode()))

    async def _recalled(self, scope: Scope, client: Client, *, wakes: bool) -> bool:
        """Answer a question that needs no engine, if none is ready; return whether it was one."""
        said = self._recall(scope["method"], scope["path"], wakes=wakes)
        if said is not None:
            await client.send({"type": "http.response.start", "status": said.status, "headers": said.headers})
            await client.send({"type": "http.response.body", "body": said.body})
        return said is not None

    async def _serve(self, scope: Scope, body: Body, client: Client, *, wakes: bool) -> None:
        await body.read_first_part()
        hold_timeout_s = self._settings().hold_timeout_s
        exchange = Exchange(self._gate, self.places, self._turns, self._log, hold_timeout_s)
        if changes_cache(scope["method"], scope["path"]):
            self._running[exchange] = None
        work = self._tunnels if tunnel.is_asked_for(scope) else exchange
        passing = asyncio.create_task(work.run(scope, body, client, wakes=wakes))
        leaving = asyncio.create_task(body.wait_for_client_to_leave())
        try:
            await client.wait_beside((passing, leaving))
        finally:
            self._running.pop(exchange, None)
            for task in (passing, leaving):
                task.cancel()
            ended, _ = await asyncio.gather(passing, leaving, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended


async def _refuse_at_end(client: Client) -> None:
    """Say that emberd ends, to a client that has no answer yet."""
    if not client.has_begun:
        await client.refuse(NotReady("STOPPING", "emberd is shutting down", _RETRY_STOPPING_S))


async def _until_end(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a request of emberd's own pages; the end of the endpoint cancels it, as one in the proxy."""
    client = Client(send, scope["path"])
    try:
        await app(scope, receive, client.send)
    except asyncio.CancelledError:
        await _refuse_at_end(client)


def make_app(
    proxy: ASGIApp,
    state: Callable[[], str],
    is_warm: Callable[[], bool],
    login: ASGIApp | None = None,
    page: ASGIApp | None = None,
) -> ASGIApp:
    """Return the front port's app: /emberd is emberd's own, everything else the engine's.

    Args:
        proxy: what serves the engine's paths.
        state: returns the engine's state.
        is_warm: returns whether the model is warm.
        login: logs browsers in and out.
        page: serves emberd's other paths.
    """

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def readyz(_: Request) -> Response:
        name = state()  # when COOL, only a request starts the engine: whoever asks here must go on sending them
        return JSONResponse({"status": name}, 200 if name in {"READY", "COOL"} else 503)

    async def warmz(_: Request) -> Response:
        is_so = state() == "READY" and is_warm()
        return JSONResponse({"status": "warm" if is_so else "not warm"}, 200 if is_so else 503)

    routes = {"healthz": healthz, "readyz": readyz, "warmz": warmz}
    own = Starlette(routes=[Route(f"/emberd/{name}", answer) for name, answer in routes.items()])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path != "/emberd" and not path.startswith("/emberd/"):
            await proxy(scope, receive, send)
        else:
            await _until_end(serve_own, scope, receive, send)

    async def serve_own(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if login is not None and path in {LOGIN_PATH, LOGOUT_PATH}:
            await login(scope, receive, send)
        elif page is None or path.removeprefix("/emberd/") in routes:
            await own(scope, receive, send)
        elif path == "/emberd":
            await RedirectResponse("/emberd/", 308)(scope, receive, send)
        else:
            await page(scope, receive, send)

    return app
