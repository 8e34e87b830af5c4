"""Where things lie: sources in the checkout, reusable results in the cache, one folder of state for each cluster."""

import os
from pathlib import Path

HACK = Path(__file__).resolve().parent.parent
GO_MODULES = HACK / "go"
MANIFESTS = HACK / "manifests"


def cache_dir() -> Path:
    """Results that any cluster can reuse; safe to delete while no cluster runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perch"


def clusters_dir() -> Path:
    """One folder for each cluster: its PKI, data, logs, and the record of what `down` has to remove."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "perch" / "clusters"
