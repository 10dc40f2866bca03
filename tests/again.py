"""``make test`` after failures: runs those tests once more, one by one, with nothing beside them.

Half of the tests wait for real processes, and six of them share two cores. One in some ten
thousand is too late there and passes alone. So a few failures are tried again, both results are
shown, and what passed only now is named: that is a fault of the test, or a race in the gateway, to
be looked for. More than a few are no accident, and stay failures at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FAILED = Path(".pytest_cache/v/failed")
"""What failed in the last run; conftest.py writes it."""
MOST = 3


def main() -> int:
    """Gives pytest's exit status."""
    failed: list[str] = json.loads(FAILED.read_text()) if FAILED.exists() else []
    # A cell of a notebook needs those above it.
    again = list(dict.fromkeys(i.split("::")[0] if ".ipynb::" in i else i for i in failed))
    if not 0 < len(again) <= MOST:
        return 1
    print(f"\nOnce more, alone: {', '.join(again)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", *again]).returncode
    if not status:
        print(f"FAILED BESIDE OTHERS, PASSED ALONE, to be looked for: {', '.join(again)}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
