"""docs/proofs.md is the registry's table, but for figures, which depend on the machine's last bits."""

from __future__ import annotations

from tests.proofs.page import BLANK, FIGURE, PAGE, blanks, figure, page, without_figures
from tests.proofs.registry import ROWS


def test_the_page_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert without_figures(written) == without_figures(page(blanks(), 0.0)), "run `python -m tests.proofs`"


def test_the_page_holds_figures_that_were_measured() -> None:
    lines = {
        line.split("`")[1]: line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    }
    for name in ROWS:
        assert len(FIGURE.findall(lines[name].rsplit(" | ", 1)[1])) >= 2, f"{name}: run `python -m tests.proofs`"


def test_figures_are_told_from_words() -> None:
    for error in (0.0, 3e-18, 2.4e-16, 1e-4, 0.5):
        assert without_figures(f"= {figure(error)} at delta 1e4, 0.28 and 3") == f"= {BLANK} at delta 1e4, 0.28 and 3"
    assert without_figures("power 0.50; power 2") == f"{BLANK}; power 2"
