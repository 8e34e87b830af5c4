"""Questions over HTTP to pods and to Prometheus servers that users name: bounded in time and size, and discreet.

A user chooses the address and reads the trouble in a status, while the operator stands in a network that the user may not reach.
So nothing of what an address answers is repeated: only numbers that were asked for, HTTP statuses, and words of our own.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import aiohttp
from yarl import URL

from perch import metrics

POD_SECONDS = 2
PROMETHEUS_SECONDS = 5
POD_BYTES = 128 * 1024
"""Triton's text about one model has some kilobytes. A user's own image may serve what takes the parser quadratic time."""
PROMETHEUS_BYTES = 2**20
CONNECTIONS = 256
ERROR_TYPES = frozenset(
    ("timeout", "canceled", "execution", "bad_data", "internal", "unavailable", "not_found", "not_acceptable")
)
"""What Prometheus calls its errors; anything else in that place could be somebody's secret."""


class NoAnswerError(Exception):
    """There is no usable answer. Its text is fit for a status: see the module."""


def open_session() -> aiohttp.ClientSession:
    """One session for all questions. It takes no proxy from the environment, keeps no cookies and unpacks nothing."""
    return aiohttp.ClientSession(
        trust_env=False,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity", "User-Agent": "perch"},
        timeout=aiohttp.ClientTimeout(total=None),
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
    )


async def ask_pod(session: aiohttp.ClientSession, address: str, port: int) -> str:
    """The metrics that a pod serves, as text. Raises NoAnswerError."""
    with _counted("triton"):
        url = URL.build(scheme="http", host=address, port=port, path="/metrics")
        status, body = await _get(session, url, {}, POD_SECONDS, POD_BYTES)
        if status != 200:
            raise NoAnswerError(f"it answered HTTP {status}")
        return body.decode(errors="replace")


async def ask_prometheus(session: aiohttp.ClientSession, address: str, query: str, at: datetime | None = None) -> float:
    """The one finite value of an instant query, at a time or now. Raises NoAnswerError."""
    with _counted("prometheus"):
        asked = {"query": query} | ({"time": f"{at.timestamp():.3f}"} if at else {})
        try:
            url = URL(f"{address.rstrip('/')}/api/v1/query")
        except ValueError:
            raise NoAnswerError("it is no address") from None
        status, body = await _get(session, url, asked, PROMETHEUS_SECONDS, PROMETHEUS_BYTES)
        return read_value(status, body)


def read_value(status: int, body: bytes) -> float:
    """The value in an answer of Prometheus' API: a scalar, or the only sample of an instant vector. Raises NoAnswerError."""
    try:
        answer = json.loads(body)
        if status != 200 or answer["status"] != "success":
            kind = answer.get("errorType")
            raise NoAnswerError(f"it answered HTTP {status}" + (f", {kind}" if kind in ERROR_TYPES else ""))
        value = float(_sample(answer["data"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise NoAnswerError(f"it answered HTTP {status}, and not as Prometheus does") from None
    if not math.isfinite(value):
        raise NoAnswerError("the value is not finite")
    return value


def _sample(data: Any) -> str:
    if data["resultType"] == "scalar":
        return str(data["result"][1])
    if data["resultType"] != "vector":
        raise NoAnswerError("the query yields neither a scalar nor an instant vector")
    if len(data["result"]) != 1:
        hint = "" if data["result"] else ": append 'or vector(0)' where nothing means zero"
        raise NoAnswerError(f"the query yields {len(data['result'])} samples and must yield one{hint}")
    return str(data["result"][0]["value"][1])


async def _get(session: aiohttp.ClientSession, url: URL, asked: dict[str, str], seconds: float, most: int) -> tuple[int, bytes]:
    """Status and body of a GET within its time and size. Redirects are not followed."""
    try:
        async with asyncio.timeout(seconds), session.get(url, params=asked, allow_redirects=False) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > most:
                    response.close()
                    raise NoAnswerError(f"it answered more than {most >> 10} KiB")
            return response.status, bytes(body)
    except TimeoutError:
        raise NoAnswerError(f"it did not answer within {seconds} s") from None
    except (aiohttp.ClientError, OSError, ValueError, OverflowError) as error:
        raise NoAnswerError(_say(error)) from None


def _say(error: Exception) -> str:
    """What went wrong, in words of our own: an HTTP parser's error quotes the bytes that it could not read."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name is not known"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return "its TLS certificate is not trusted, or it speaks no TLS"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "it takes no connections"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | OSError):
        return "it broke the connection off"
    if isinstance(error, aiohttp.ClientResponseError):
        return "it does not speak HTTP"
    return "it is no address"


@contextmanager
def _counted(source: str) -> Iterator[None]:
    with metrics.SCRAPE_SECONDS.labels(source).time():
        try:
            yield
        except NoAnswerError:
            metrics.SCRAPES.labels(source, "failed").inc()
            raise
    metrics.SCRAPES.labels(source, "done").inc()
