"""The operator's process: `python -m perch`, in the cluster (the chart runs it) or outside against any kubeconfig.

Order: probes and metrics answer, the CRD is there, the Lease is ours, then the watches. It exits, to be started again, whenever
it may no longer act or can no longer see: a lost Lease, a removed CRD, a broken watch of kopf's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from perch import __version__, metrics
from perch.api import GROUP, PLURAL
from perch.handlers import WatchEndedError, Watches, can_list
from perch.kube import NAMESPACE, SILENCE, ApiError, Kube
from perch.lease import Lease, LeaseLostError
from perch.observed import Installation
from perch.reconcile import Reconciler
from perch.settings import Settings, SettingsError, read_settings

log = logging.getLogger("perch")
CRD_RETRY_SECONDS = 5


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def build_app(reconciler: Reconciler) -> web.Application:
    """/healthz, /readyz and /metrics. A standby is ready too: it is there when it is needed. The leader is, once it can see."""

    async def ready(_: web.Request) -> web.Response:
        if reconciler.leading and not reconciler.cache.is_synced:
            return web.Response(status=503, text="the caches are not filled yet\n")
        return web.Response(text="ok\n")

    async def well(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def scrape(_: web.Request) -> web.Response:
        reconciler.count()
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", well), web.get("/readyz", ready), web.get("/metrics", scrape)])
    return app


async def wait_for_crd(kube: Kube, settings: Settings) -> None:
    """Wait until ModelDeployments can be listed, in one of the namespaces at least, saying what is missing."""
    while True:
        for scope in settings.namespaces or (None,):
            try:
                await can_list(kube, scope)
                return
            except ApiError as error:
                what = f"install the CRD {PLURAL}.{GROUP}" if error.status == 404 else "check the operator's RBAC"
                log.warning("ModelDeployments cannot be listed: %s: %s", error, what)
            except SILENCE as error:
                log.warning("the API server does not answer: %r", error)
        await asyncio.sleep(CRD_RETRY_SECONDS)


async def find_cluster(kube: Kube, settings: Settings) -> str:
    """The cluster's lasting name, which the manifests of its artefacts carry."""
    if settings.cluster_name:
        return settings.cluster_name
    try:
        return str((await kube.get(NAMESPACE, None, "kube-system"))["metadata"]["uid"])
    except ApiError as error:
        raise SettingsError(
            f"PERCH_CLUSTER_NAME is not set and namespace kube-system cannot be read ({error}): set clusterName"
        ) from error


async def run(settings: Settings) -> int:
    """Run until a signal (0) or until this process may no longer act (1)."""
    stopped = asyncio.Event()

    def take_signals() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    take_signals()
    kube = await Kube.connect()
    work = asyncio.create_task(_work(kube, settings, take_signals))
    stop = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
            return 0
        work.result()
    except* WatchEndedError as ended:
        log.error("%s: exiting, to be started again", _first(ended))
    except* LeaseLostError as lost:
        log.error("%s: exiting, so that only one operator acts", _first(lost))
    finally:
        stop.cancel()
        await kube.close()
    return 1


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _work(kube: Kube, settings: Settings, take_signals: Callable[[], None]) -> None:
    reconciler = Reconciler(kube, await _installation(kube, settings), settings.namespaces)
    runner = web.AppRunner(build_app(reconciler))
    await runner.setup()
    await web.TCPSite(runner, port=settings.http_port).start()
    log.info("perch %s watches %s", __version__, ", ".join(settings.namespaces) or "all namespaces")
    lease = Lease(kube, settings.namespace, settings.lease_name, settings.identity)
    try:
        await wait_for_crd(kube, settings)
        await lease.acquire()
        metrics.LEADER.set(1)
        kube.seconds_to_write = lease.seconds_to_write
        reconciler.leading = True
        async with asyncio.TaskGroup() as group:
            group.create_task(lease.hold(), name="lease")
            group.create_task(reconciler.run(), name="reconciler")
            # Kopf puts its own handlers in the place of ours: a signal would end its watch, not our work.
            watches = Watches(kube, reconciler, settings.namespaces, take_signals)
            group.create_task(watches.run(), name="kopf")
    finally:
        await lease.release()
        await runner.cleanup()


async def _installation(kube: Kube, settings: Settings) -> Installation:
    return Installation(
        cluster=await find_cluster(kube, settings),
        exporter_image=settings.exporter_image,
        artifacts_image=settings.artifacts_image,
        triton_image=settings.triton_image,
        image_pull_policy=settings.image_pull_policy,
    )


def main() -> None:
    try:
        settings = read_settings()
        set_up_logging(settings)
        code = asyncio.run(run(settings))
    except SettingsError as error:
        print(f"perch: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
