"""Cleanup: erases an artefact, and only when its manifest, or the claim of an unfinished one, says that it is ours.

The manifest goes first, so that nobody starts to read what is being erased; the claim goes last, so that a cleanup
that died half-way still knows whose the rest is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from perch_exporter.artifact import claimed, owned_manifest
from perch_exporter.contract import Claim, DeleteRequest, Manifest
from perch_exporter.store import open_store, repository_credentials

log = logging.getLogger(__name__)


def delete(request: DeleteRequest, environment: Mapping[str, str]) -> int:
    """How many objects were erased; 0 where there was nothing of ours."""
    store = open_store(request.destination, repository_credentials(environment))
    owner = (request.owner, request.artifact_revision)
    if owned_manifest(store, *owner) is None and not claimed(store, *owner):
        log.info("nothing of %s at %s", request.owner, store.where())
        return 0
    place = {Manifest.FILE_NAME: 0, Claim.FILE_NAME: 2}
    keys = sorted(store.sizes(), key=lambda key: (place.get(key, 1), key))
    store.delete(keys)
    log.info("erased %d objects at %s", len(keys), store.where())
    return len(keys)
