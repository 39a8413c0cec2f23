"""``python -m tests.proofs``: measure every proof, print the errors and write docs/proofs.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping

import torch

from tests.proofs import contract, loops
from tests.proofs.page import PAGE, figure, page
from tests.proofs.proof import Found, Measured, Row, central_differences, check_equal, check_limit
from tests.proofs.registry import ROWS


def _falls(found: list[Found]) -> str:
    """The last error on the way to each limit, with the power it falls with."""
    words = [figure(f.last) + ("" if f.order is None else f", power {f.order:.2f}") for f in found]
    return "; ".join(words)


def measured(proved: Row) -> dict[str, str]:
    """The figures of one objective, by mark."""
    figures: dict[str, str] = {}
    if proved.differentiable:
        figures["∂"] = figure(max(central_differences(proved, hyper) for hyper in proved.differentiable))
    if proved.expected:
        figures["E"] = figure(max(check_limit(proved, expected).last for expected in proved.expected))
    figures["="] = figure(max(check_equal(proved, equal).last for equal in proved.equals))
    figures["→"] = _falls([check_limit(proved, limit) for limit in proved.limits])
    for hyper in proved.hyper:
        contract.check_masks(proved, hyper)
        contract.check_blank_rows(proved, hyper)
    splits = [contract.check_split(proved, hyper) for hyper in proved.hyper]
    kept = [s for s in splits if s is not None]
    return {**figures, "÷": figure(max(kept))} if kept else figures


def measured_loop(loop: loops.Loop) -> dict[str, str]:
    """The figures of one loop."""
    figures = {}
    for mark, proofs in (("=", loop.equals), ("→", loop.limits)):
        found = [loops.check(loop, proof) for proof in proofs if isinstance(proof, Measured)]
        if found:
            figures[mark] = figure(max(errors[-1] for errors in found))
    return figures


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs", description=__doc__)
    parser.add_argument("names", nargs="*", help="objectives to measure, without writing the page; all by default")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - ROWS.keys()):
        parser.error(f"no proofs of {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    start = time.process_time()
    found: dict[str, Mapping[str, str]] = {}
    for name in args.names or ROWS:
        found[name] = measured(ROWS[name])
        print(f"{name:30}", "  ".join(f"{mark} {value}" for mark, value in found[name].items()), flush=True)
    if args.names:
        return
    for loop in loops.LOOPS:
        found[loop.name] = measured_loop(loop)
        print(f"{loop.name:45}", "  ".join(f"{mark} {value}" for mark, value in found[loop.name].items()), flush=True)
    PAGE.write_text(page(found, time.process_time() - start), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
