"""One active operator: a coordination.k8s.io Lease, taken before anything is watched; whoever loses it exits.

Times are compared on this process's own clock only, whatever the nodes' clocks say: another holder counts as gone when
its Lease has not changed for the whole duration that it states, as seen from here. The holder stops well before that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any

from perch.kube import SILENCE, ApiError, Kind, Kube

log = logging.getLogger(__name__)

LEASE = Kind("Lease", "coordination.k8s.io/v1", "leases")
DURATION_SECONDS = 15
"""A Lease that did not change for so long is free."""
RENEW_SECONDS = 5
RETRY_SECONDS = 1
DEADLINE_SECONDS = 10
"""A holder that could not renew for so long gives up: before anybody else can believe it gone."""
MARGIN_SECONDS = 1
"""A write is given up so long before the Lease may be another's."""


def _now() -> float:
    """Seconds on a clock that goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseLostError(Exception):
    """This process may no longer act."""


class Lease:
    def __init__(self, kube: Kube, namespace: str, name: str, identity: str) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._held: dict[str, Any] | None = None
        self._renewed = 0.0
        """When the newest write that succeeded was sent: the Lease lasts from then at least."""

    async def acquire(self) -> None:
        """Wait until the Lease is ours. Raises ApiError where Leases may not be used at all."""
        seen, since = "", _now()
        waiting_for = ""
        while True:
            try:
                found = await self._read()
                self._renewed = _now()
                if found is None:
                    self._held = await self._write(None)
                    break
                version = found["metadata"]["resourceVersion"]
                if version != seen:
                    seen, since = version, _now()
                holder = found["spec"].get("holderIdentity") or ""
                stated = found["spec"].get("leaseDurationSeconds", DURATION_SECONDS)
                if holder in ("", self._identity) or _now() - since > stated:
                    self._held = await self._write(found)
                    break
                if holder != waiting_for:
                    log.info("standing by: %s holds Lease %s/%s", holder, self._namespace, self._name)
                    waiting_for = holder
            except ApiError as error:
                if error.status in (401, 403):
                    raise
                log.info("Lease not taken: %s", error)
            except SILENCE as error:
                log.warning("the API server does not answer: %r", error)
            await asyncio.sleep(RETRY_SECONDS)
        log.info("took Lease %s/%s as %s", self._namespace, self._name, self._identity)

    async def hold(self) -> None:
        """Renew until cancelled; raises LeaseLostError when somebody else has it or it could not be renewed in time."""
        while True:
            sent = _now()
            try:
                async with asyncio.timeout(max(DEADLINE_SECONDS - (sent - self._renewed), 0)):
                    await self._renew()
                self._renewed = sent
                await asyncio.sleep(RENEW_SECONDS)
            except ApiError as error:
                log.warning("Lease not renewed: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            except SILENCE as error:
                log.warning("Lease not renewed, the API server does not answer: %r", error)
                await asyncio.sleep(RETRY_SECONDS)
            self.seconds_to_write()

    def seconds_to_write(self) -> float:
        """How long a write that begins now may take before somebody else can hold the Lease.

        Raises LeaseLostError where the Lease may have run out: asked before each write, for a process that was paused. One that
        is paused after it has asked still sends its write: that is what the writes' resourceVersions are for.
        """
        passed = _now() - self._renewed
        if passed > DEADLINE_SECONDS:
            raise LeaseLostError(f"Lease {self._namespace}/{self._name} could not be renewed for {DEADLINE_SECONDS} s")
        return DURATION_SECONDS - MARGIN_SECONDS - passed

    async def release(self) -> None:
        """Let a standby take over at once. Best effort."""
        if self._held is None:
            return
        try:
            self._held["spec"]["holderIdentity"] = ""
            await self._kube.request("PUT", self._path, body=self._held, fenced=False)
        except (ApiError, *SILENCE) as error:
            log.info("Lease not released, it will run out: %s", error)

    async def _renew(self) -> None:
        try:
            self._held = await self._write(self._held)
        except ApiError as error:
            if error.status != 409:
                raise
            await self._look_again()

    async def _look_again(self) -> None:
        """Somebody wrote the Lease: if we are its holder still, this was no loss."""
        found = await self._read()
        if found is None or found["spec"].get("holderIdentity") != self._identity:
            raise LeaseLostError(f"Lease {self._namespace}/{self._name} was taken by another")
        self._held = await self._write(found)

    @property
    def _path(self) -> str:
        return LEASE.path(self._namespace, self._name)

    async def _read(self) -> dict[str, Any] | None:
        try:
            return await self._kube.request("GET", self._path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _write(self, found: dict[str, Any] | None) -> dict[str, Any]:
        """Create the Lease, or renew it on condition that nobody wrote it since it was read."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = found is not None and found["spec"].get("holderIdentity") == self._identity
        before = found["spec"] if found else {}
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_SECONDS,
            "renewTime": now,
            "acquireTime": before.get("acquireTime", now) if mine else now,
            "leaseTransitions": before.get("leaseTransitions", 0) + (0 if mine or not before else 1),
        }
        metadata: dict[str, Any] = {"name": self._name, "namespace": self._namespace}
        if found is None:
            body = {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}
            return await self._kube.request("POST", LEASE.path(self._namespace), body=body, fenced=False)
        metadata["resourceVersion"] = found["metadata"]["resourceVersion"]
        body = {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}
        return await self._kube.request("PUT", self._path, body=body, fenced=False)
