"""Objects from before a rule: what does not concern the rule can still be changed, the way back above all."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from perch.api import GROUP, PLURAL
from perch.crd import build_crd
from tests.api.conftest import CRDS
from tests.api.test_admission import (
    COLLECTION,
    NO_ACCELERATOR,
    NO_CANARY,
    NO_CLAIMS,
    NO_GPU,
    both,
    changed,
    create,
    drop,
    full_spec,
    put,
)
from tests.apiserver import running


def without_rules(schema: Any) -> Any:
    if isinstance(schema, list):
        return [without_rules(item) for item in schema]
    if isinstance(schema, dict):
        return {key: without_rules(value) for key, value in schema.items() if key != "x-kubernetes-validations"}
    return schema


def test_an_object_that_breaks_new_rules_can_be_changed_elsewhere_and_reverted(tmp_path: Path) -> None:
    meaningless = both(
        put("versions/0/triton/labels/3", "cat\tdog"),
        put("versions/0/triton/configOverrides", "parameters {"),
        put("versions/0/checkpoint/endpoint", "http://localhost:9000"),
        put("versions/0/verification/parity/minimumCosine", "0"),
        put("repository/endpoint", "http://127.0.0.1:9000"),
        drop("runtime/env/0/value"),
        put("runtime/sharedMemorySize", "9Gi"),
        both(NO_GPU, NO_CLAIMS, NO_ACCELERATOR, drop("versions/1/triton/accelerator"), drop("versions/0/triton/instanceKind")),
    )
    with running(tmp_path) as api:
        former = build_crd()
        former["spec"]["versions"][0]["schema"] = without_rules(copy.deepcopy(former["spec"]["versions"][0]["schema"]))
        assert api.request("POST", CRDS, former).is_success
        api.wait_established(f"{PLURAL}.{GROUP}")
        stored = create(api, "old", changed(full_spec(), meaningless)).json()
        assert api.request("PATCH", f"{CRDS}/{PLURAL}.{GROUP}", {"spec": build_crd()["spec"]}).is_success
        fresh = changed(full_spec(), meaningless)
        # A changed definition takes effect a moment after the answer.
        end = time.monotonic() + 30
        while create(api, "new", fresh, dryRun="All").status_code != 422:
            assert time.monotonic() < end, "the new rules never take effect"
            time.sleep(0.1)

        def apply(change: Any) -> Any:
            return api.request("PUT", f"{COLLECTION}/old", {**stored, "spec": changed(stored["spec"], change)}, dryRun="All")

        for change in (both(), put("builder/activeDeadlineSeconds", 900), put("rollout/paused", False)):
            answer = apply(both(NO_CANARY, change))
            assert answer.is_success, answer.text
        assert apply(both(NO_CANARY, put("versions/0/triton/labels/3", "a\tb"))).status_code == 422
