"""Small questions to an engine over HTTP: bounded, without keep-alive, never raising."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        status: HTTP status; 0 if nothing listens; None if it did not answer in time or broke off.
        content: the parsed JSON body, None if it is not JSON.
    """

    status: int | None
    content: Any = None

    def get(self, *path: str | int) -> Any:
        """Return the value at a path of keys and indices, None if it is not there."""
        value = self.content
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value


NOTHING_LISTENS = 0


class EngineHttp:
    """Asks one engine on a loopback port.

    A connection is opened for each question and closed after it: KoboldCPP gives every open connection one of
    its 24 threads, for ever.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def get(self, port: int, path: str, timeout_s: float, password: str = "") -> Answer:
        """Ask with GET; bounded by `timeout_s` as a whole."""
        return await self._ask("GET", port, path, timeout_s, None, password)

    async def post(
        self, port: int, path: str, body: Mapping[str, Any], timeout_s: float, password: str = ""
    ) -> Answer:
        """Ask with POST and a JSON body; bounded by `timeout_s` as a whole."""
        return await self._ask("POST", port, path, timeout_s, body, password)

    async def _ask(
        self,
        method: str,
        port: int,
        path: str,
        timeout_s: float,
        body: Mapping[str, Any] | None,
        password: str,
    ) -> Answer:
        headers = {"connection": "close"} | ({"authorization": f"Bearer {password}"} if password else {})
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.request(
                    method, f"http://127.0.0.1:{port}{path}", json=body, headers=headers
                )
        except httpx.ConnectError:
            return Answer(NOTHING_LISTENS)
        except (httpx.HTTPError, TimeoutError):
            return Answer(None)
        try:
            return Answer(response.status_code, response.json())
        except ValueError:
            return Answer(response.status_code)


def client() -> httpx.AsyncClient:
    """Return a client for loopback engines: no proxies from the environment, no certificates to load."""
    return httpx.AsyncClient(
        verify=False,  # noqa: S501  # plain HTTP on loopback; loading certificate authorities costs 1 MiB
        trust_env=False,
        timeout=None,  # noqa: S113  # every call is bounded as a whole
        limits=httpx.Limits(max_keepalive_connections=0),
    )
