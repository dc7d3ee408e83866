"""The fault matrix in full, from a checkout: `python scripts/soak.py rows --output soak.json`.

`rows` runs the cases of some or all rows and goes on where it was stopped; `memory` aligns, evaluates, saves and loads
in one process again and again; `table` puts what the JSON holds into docs/reliability.md.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults import memory, runner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "memory", "table"])
    parser.add_argument("--rows", default=",".join(map(str, runner.ROWS)), help="rows of the matrix, as 1,2,3")
    parser.add_argument("--quick", action="store_true", help="a few cases of each row")
    parser.add_argument("--minutes", type=float, default=120.0, help="of `memory`")
    parser.add_argument("--output", type=Path, default=Path("docs/reliability.json"), help="JSON file of the results")
    parser.add_argument("--page", type=Path, default=Path("docs/reliability.md"), help="page of the table")
    arguments = parser.parse_args()
    if arguments.what == "table":
        runner.write_table(arguments.output, arguments.page)
        return 0
    if arguments.what == "memory":
        return 0 if memory.soak(arguments.minutes, arguments.output) else 1
    rows = [int(row) for row in arguments.rows.split(",")]
    return 0 if runner.run_rows(rows, arguments.output, quick=arguments.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
