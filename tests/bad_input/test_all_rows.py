"""Every row of the table of bad inputs has a test that carries its number: ``pytest -k "bad_input and 46"``."""

from __future__ import annotations

import re
from pathlib import Path

#: Rows of the table.
ROWS = 84
#: number -> why there is no test of it. A row may stand here only while the thing it is about does not exist.
ABSENT: dict[int, str] = {}


def test_every_bad_input_has_its_test() -> None:
    found: set[int] = set()
    for path in Path(__file__).parent.glob("test_rows_of_*.py"):
        found |= {
            int(n) for n in re.findall(r"^def test_bad_input_(\d\d)_", path.read_text(encoding="utf-8"), re.MULTILINE)
        }
    assert found | ABSENT.keys() == set(range(1, ROWS + 1))
    assert not found & ABSENT.keys()
    assert all(ABSENT.values())
