"""`python -m fuzz`: tries many changed specs on a real API server, prints what does not work, and fails where there is any.

The same seed draws the same specs. With --accepted, the changes that passed are written to a file: the server takes them, Perch
works with them, and whether they mean anything is for a human to see.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.api.test_admission import valid_specs
from tests.apiserver import running

from fuzz.explore import explore
from fuzz.server import Judge, prepare
from perch.api import GROUP, PLURAL
from perch.crd import build_crd


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=3000, help="how many specs to try")
    parser.add_argument("--seed", type=int, default=0, help="what the draw begins with")
    parser.add_argument("--accepted", type=Path, help="file for the changes that passed")
    asked = parser.parse_args()
    passed: list[str] = []
    with ExitStack() as stack:
        api = stack.enter_context(running(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perch-fuzz-")))))
        api.kubectl("apply", "--server-side", "-f", "-", text=json.dumps(build_crd()))
        api.wait_established(f"{PLURAL}.{GROUP}")
        prepare(api)
        judge = Judge(api)
        for spec in valid_specs():
            if not judge.accepts(spec):
                print("a spec to begin with is refused")
                return 1
            judge.try_children(spec)
        found = explore(judge, valid_specs(), asked.examples, asked.seed, passed.append)
    if asked.accepted:
        asked.accepted.write_text("\n".join(passed) + "\n")
    for told in found.values():
        print(told)
    print(f"{asked.examples} specs tried, {len(passed)} accepted and working, {len(found)} kinds of findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
