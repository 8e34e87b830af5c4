"""gRPC streams through the gateway: what their client sees when a version that answers them leaves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import tritonclient.grpc

from chaos.stage import NAME, SLOW, Stage, expect, rfc3339_now
from demo import digits
from demo.load import INPUT, Address, grpc_client

STREAMS = 8
EVERY = 0.25
"""Seconds from one request of a stream to its next."""
SILENCE = 10.0
"""Seconds after which a request without an answer, on a stream without an error, counts as lost in silence."""


class Stream:
    """One stream of tritonclient's, which sends an image now and then until it ends."""

    def __init__(self, address: Address, hostname: str) -> None:
        self._client = grpc_client(address, hostname)
        image = digits.held_out()[0][:1]
        self._inputs = [tritonclient.grpc.InferInput(INPUT, list(image.shape), "FP32").set_data_from_numpy(image)]
        self._closed = False
        self.sent = 0
        self.answers: list[tuple[float, str]] = []
        """When, and by which version."""
        self.refusals: list[tuple[float, str]] = []
        """Errors that Triton gave as the answer to one request; the stream goes on."""
        self.end: tuple[float, str] | None = None
        """When the client was told that the stream is over, and how."""
        self._client.start_stream(self._take)

    def send(self) -> None:
        if self.end is None:
            self.sent += 1
            self._client.async_stream_infer(NAME, self._inputs)

    @property
    def open(self) -> int:
        """Requests without an answer of either kind."""
        return self.sent - len(self.answers) - len(self.refusals)

    def close(self) -> None:
        # The client tells of its own cancelling as of an end.
        self._closed = True
        self._client.stop_stream(cancel_requests=True)

    def _take(self, result: Any, error: Any) -> None:
        now = time.monotonic()
        if self._closed:
            return
        if error is None:
            self.answers.append((now, result.get_response().model_version))
        elif error.status() is None:
            self.refusals.append((now, error.message()))
        else:
            self.end = now, str(error)


@contextmanager
def streaming(stage: Stage) -> Iterator[list[Stream]]:
    """So many streams, each on a connection of its own, with requests on all of them."""
    streams = [Stream(stage.cluster.gateway_address(), stage.host) for _ in range(STREAMS)]
    over = Event()

    def work() -> None:
        while not over.wait(EVERY):
            for stream in streams:
                stream.send()

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        yield streams
    finally:
        over.set()
        worker.join()
        # What was sent last is still under way, and to close a stream would cancel it.
        deadline = time.monotonic() + SILENCE
        while any(stream.open and not stream.end for stream in streams) and time.monotonic() < deadline:
            time.sleep(0.1)
        for stream in streams:
            stream.close()


def streams_during_promotion(stage: Stage) -> str:
    """Version 1 has all streams until version 2 is promoted; then new ones go to version 2, and the old ones end with their
    pods."""
    stage.serve(1, canary=2)
    with streaming(stage) as old:
        expect_all(stage, old, 1, "while a canary shares the traffic")
        stage.serve(2)
        promoted = time.monotonic()
        with streaming(stage) as new:
            expect_all(stage, new, 2, "after the promotion")
            gone = (lambda: stage.tenant.get("deployment", f"{NAME}-v1")), (lambda found: found is None)
            stage.wait(*gone, "version 1 goes", every=0.1)
            removed = time.monotonic()
            expect(not any(s.refusals or s.end for s in (*old, *new)), "until then no stream is refused anything, and none ends")
            stage.wait_gone(1)
            time.sleep(SILENCE)
    lost = [f"{len(s.refusals)} refused, end {s.end}, {s.open} open" for s in new if s.refusals or s.end or s.open]
    expect(not lost, f"streams to the version that stays have all their answers: {lost}")
    expect(all(v == "1" for s in old for _, v in s.answers), "a stream stays with the version that it began with")
    expect(all(s.end for s in old), "every stream to the version that went is told its end")
    last = max(s.answers[-1][0] for s in old) - removed
    ends = [s.end[0] - removed for s in old if s.end]
    refusals = Counter(text for s in old for _, text in s.refusals)
    return (
        f"{len(old)} streams to version 1, {len(new)} to version 2, {sum(s.sent for s in (*old, *new))} requests on them. "
        f"The former were answered for {removed - promoted:.0f} s after the promotion, until their pods were told to go, and "
        f"{last:.0f} s more; then {quoted(refusals)}; their end came after {min(ends):.0f} to {max(ends):.0f} s: "
        f"{quoted(Counter(s.end[1] for s in old if s.end))}, with {sum(s.open for s in old)} requests under way. "
        f"The others had an answer to each request"
    )


def streams_during_abort(stage: Stage) -> str:
    """Of a canary that is slow: it never had a stream, and those of stable's do not notice."""
    trial: dict[str, Any] = {"inspectFor": "10s", "retryAt": rfc3339_now()}
    stage.serve(1, canary=SLOW, **trial)
    with streaming(stage) as streams:
        expect_all(stage, streams, 1, "while a canary shares the traffic")
        stage.apply(1, canary=SLOW, **trial, analysis={"maxLatencyRatio": "1.5"})
        stage.wait(stage.condition, lambda c: c.get("reason") == "LatencyHigher", "it is aborted", every=0.1)
        stage.wait_gone(SLOW)
        time.sleep(SILENCE)
        lost = [f"{len(s.refusals)} refused, end {s.end}" for s in streams if s.refusals or s.end]
        expect(not lost, f"every request on every stream is answered: {lost}")
        expect(all(v == "1" for s in streams for _, v in s.answers), "all by version 1")
    return f"{len(streams)} streams, all to stable, {sum(s.sent for s in streams)} requests on them: each had an answer"


def expect_all(stage: Stage, streams: list[Stream], version: int, when: str) -> None:
    stage.wait(lambda: [s.answers[:1] for s in streams], all, "every stream is answered", 30)
    found = Counter(s.answers[0][1] for s in streams)
    expect(set(found) == {str(version)}, f"{when} every new stream goes to version {version}: {dict(found)}")


def quoted(texts: Counter[str]) -> str:
    return ", ".join(f"{count} × “{text}”" for text, count in texts.most_common()) or "nothing"
