"""What a cluster remembers between commands, in one file of its folder."""

import json
from pathlib import Path
from typing import Any


class Record:
    """A small JSON file, replaced as a whole at each change."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return {}

    def update(self, **changes: object) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps({**self.read(), **changes}, indent=2))
        draft.replace(self._path)
