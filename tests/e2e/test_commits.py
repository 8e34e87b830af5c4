"""Commits in the middle of a rollout: the latest one wins, and the weights never go anywhere they should not, on the way either.

As the table in docs/rollouts.md has it, "When you change the spec in mid-rollout".
"""

from __future__ import annotations

import time
from typing import Any

from demo.load import Load
from demo.manifests import deployment, upload_digits
from devcluster.tenant import CHECKPOINTS, MODELS, Tenant

from .test_journey import host, pod_uids
from .watching import Watch

STEPS = [{"weight": 20, "hold": "1h"}, {"weight": 100}]


def test_whatever_is_committed_in_mid_rollout_the_weights_are_never_wrong_on_the_way(tenant: Tenant) -> None:
    """argo-rollouts#4534: a new spec in mid-canary kills the old canary at once. #3941: a fast rollback goes to pods that are not
    ready. #4828, #3681: stable is scaled down before the proxies converge."""
    entries = upload_digits(tenant)

    def commit(stable: int, canary: int | None = None, **more: Any) -> None:
        rollout = {"steps": STEPS, "scaleDownDelay": "10s", **more}
        tenant.apply(deployment(tenant, entries, stable, canary, rollout=rollout))

    def settled(weights: dict[int, int]) -> None:
        """The Gateway has accepted these weights for what was committed last."""
        wanted = [{"version": v, "weight": w} for v, w in sorted(weights.items())]

        def accepted() -> Any:
            found = tenant.get("modeldeployment", "digits") or {}
            if found["status"].get("observedGeneration") != found["metadata"]["generation"]:
                return None
            return [w for w in found["status"]["weights"]["accepted"] if w["weight"]]

        tenant.wait(accepted, lambda seen: seen == wanted, 120)

    commit(1)
    tenant.wait_ready("digits", "Serving")
    published = {"Serving", "Published"}
    tenant.wait(lambda: {v["phase"] for v in tenant.status("digits")["versions"]}, lambda seen: seen == published, 120)
    entries.append(ready_made(tenant, entries[1]))
    commit(1)
    tenant.wait(lambda: {v["phase"] for v in tenant.status("digits")["versions"]}, lambda seen: seen == published, 120)
    with (
        Watch(tenant) as watch,
        Load(tenant.cluster.gateway_address(), host(tenant), "digits", grpc_rate=20, rest_rate=5) as load,
    ):
        commit(1, canary=2)
        settled({1: 80, 2: 20})
        # The rollout edited in flight: it goes on from where it is, and no pod is started again.
        pods, until = pod_uids(tenant), tenant.status("digits")["step"]["until"]
        commit(1, canary=2, steps=[{"weight": 10, "hold": "1m"}, {"weight": 20, "hold": "2h"}, {"weight": 100}])
        tenant.wait(lambda: tenant.status("digits")["step"], lambda step: step["index"] == 1 and step["until"] > until, 30)
        assert pod_uids(tenant) == pods
        # A revert in mid-rollout.
        commit(1)
        settled({1: 100})
        # Once more, and another canary in mid-rollout.
        commit(1, canary=2)
        settled({1: 80, 2: 20})
        commit(1, canary=3)
        settled({1: 80, 3: 20})
        # The canary changed while the rollout is paused: nothing rises before it is let go on.
        commit(1, canary=2, paused=True)
        settled({1: 100})
        tenant.wait_ready("digits", "Paused")
        time.sleep(5)
        assert watch.shares(2)[-1] == 0
        commit(1, canary=2)
        settled({1: 80, 2: 20})
        # Both changed at once: the promotion of the canary, and the next canary.
        commit(2, canary=3)
        settled({2: 80, 3: 20})
        # Stable changed where there is no canary any more, to a version that had no traffic.
        commit(2)
        settled({2: 100})
        commit(1)
        settled({1: 100})
    watch.check()
    assert watch.shares(3) == [0, 20, 0, 20, 0]
    assert [a for a in load.results() if not a.ok] == []


def ready_made(tenant: Tenant, entry: dict[str, Any]) -> dict[str, Any]:
    """A version 3 whose checkpoint is what version 2's export has made: an ONNX file, as a user would bring one."""
    published = tenant.keys()
    (key,) = [key for key in published if f"/{tenant.namespace}/" in key and key.endswith("/2/model.onnx")]
    content = tenant.store.get_object(Bucket=MODELS, Key=key)["Body"].read()
    name = f"{tenant.namespace}/v3.onnx"
    checkpoint = {"uri": f"s3://{CHECKPOINTS}/{name}", "format": "ONNX", "sha256": tenant.upload(name, content)}
    made = {**entry, "version": 3, "checkpoint": checkpoint}
    del made["architecture"]
    return made
