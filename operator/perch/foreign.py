"""Text that others wrote: containers, the scheduler, the kubelet, gateways, the API server. Pure.

It reaches status, events and the log, which people read at a terminal. A line break there would forge a line of the log, an
escape code would repaint the screen, and a bidirectional mark would turn words around. So each reader of such text takes it
through `clean` first; nothing behind the readers has to think of it.
"""

from __future__ import annotations

import unicodedata

from perch_exporter.contract import shorten

LONGEST = 1000
"""Characters that are kept. A status holds dozens of such texts, and etcd takes 1.5 MB for all of an object."""
_DROPPED = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode categories: control and format characters, halves of pairs, private and unassigned ones, line and paragraph breaks."""


def clean(text: str, limit: int = LONGEST) -> str:
    """The text on one line, without what a terminal would obey, and of at most `limit` characters.

    Runs of white space and of dropped characters become one space.
    """
    # A foreign text may be megabytes long; what is cut off below needs no look.
    head, tail = text[: 4 * limit], text[-4 * limit :] if len(text) > 8 * limit else text[4 * limit :]
    plain = "".join(" " if unicodedata.category(c) in _DROPPED else c for c in head + tail)
    return shorten(" ".join(plain.split()), limit)
