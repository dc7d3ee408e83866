"""Row 10, as cases: every seeded defect is found."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dmc_hub.data import validate_dataset
from tests.faults.cases import Case, must
from tests.faults.dataset_defects import BOUNDS, CASES


def found(name: str, folder: Path) -> None:
    make, kind, where = CASES[name]
    defects = [defect for defect in validate_dataset(make(), action_bounds=BOUNDS) if defect.kind == kind]
    must(len(defects) == 1 and where in defects[0].message, f"found {defects}")


def cases(quick: bool) -> Iterator[Case]:
    """One for each defect."""
    for name in CASES:
        yield Case(10, name, partial(found, name))
