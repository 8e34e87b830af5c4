"""Durations as the API writes them."""

from __future__ import annotations

import re
from datetime import timedelta


def parse_duration(text: str) -> timedelta:
    """A Gateway API duration such as 1h30m. The schema has checked its form."""
    units = {"h": 3600, "m": 60, "s": 1}
    return timedelta(seconds=sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([hms])", text)))
