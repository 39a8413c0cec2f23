"""``python -m benchmarks.worlds``: measure everything anew and write docs/worlds.md and its picture."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.worlds import figure, variance
from benchmarks.worlds.page import REACHED, page, variance_cell
from benchmarks.worlds.problem import Problem
from benchmarks.worlds.rest import Rest, rest
from benchmarks.worlds.rows import ROWS, Row
from rlft.worlds import World

DOCS = Path(__file__).resolve().parents[2] / "docs"


def bandit() -> Problem:
    return Problem.random("bandit", World.bandit(10), seed=0, beta=1.0)


def tokens() -> Problem:
    return Problem.random("tokens", World.autoregressive(vocab=3, length=3, eos=0), seed=1, beta=1.0)


def samplers(problem: Problem) -> dict[str, Tensor | None]:
    """What draws the answers: the policy itself (None), or logits that stay."""
    return {"fresh": None, "from the reference": problem.ref, "from a stranger": problem.stranger()}


def rests(row: Row) -> list[Rest]:
    """Where an objective ends: both worlds, all samplers. Refused where theory says otherwise."""
    found, seen = [], ""
    for problem in (bandit(), tokens()):
        for behaviour in samplers(problem).values():
            found.append(rest(problem, row, behaviour))
            if found[-1].how == "unsettled":
                raise ValueError(f"{row.name}: descent in {problem.name} has not settled; give it more steps")
            seen += _letter(problem, row, behaviour, found[-1], row.reaches.replace(" ", "")[len(seen)])
    if seen != row.reaches.replace(" ", ""):
        raise ValueError(f"{row.name}: expected {row.reaches}, measured {seen}; one of the two is wrong")
    return found


def _letter(problem: Problem, row: Row, behaviour: Tensor | None, found: Rest, expected: str) -> str:
    """Where a policy is: `y` at the target, `-` elsewhere, or the letter that is expected if it is at that policy."""
    if found.kl < row.within:
        return "y"
    if expected in "y-":
        return "-"
    world = problem.world
    apart = world.kl(found.logits, problem.landing(expected, row, behaviour)) / world.kl(problem.ref, problem.best)
    return expected if apart.abs() < row.within else "-"


def collapses(beta: float, worlds: int = 10) -> list[str]:
    """How many random bandits end where, without and with the likelihood-ratio term."""
    cells = [f"{beta:g}"]
    for coefficient in (0.0, 1.0):
        row, reached, wrong, worse = Row("agro_on_policy", {"lr_coef": coefficient}), 0, 0, 0
        for seed in range(worlds):
            problem = Problem.random("bandit", World.bandit(10), seed=100 + seed, beta=beta)
            found = rest(problem, row, None)
            world, ref, rewards = problem.world, problem.ref, problem.rewards
            reached += found.kl < REACHED
            wrong += int(world.answer_logps(found.logits).argmax() != world.answer_logps(problem.best).argmax())
            worse += bool(
                world.objective(found.logits, ref, rewards, beta) < world.objective(ref, ref, rewards, beta) - 1e-9
            )
        cells += [f"{reached}/{worlds}", f"{wrong}/{worlds}", *([f"{worse}/{worlds}"] if coefficient else [])]
    return cells


def variances(
    families: Mapping[str, tuple[Row, ...]], behaviour: Tensor | None
) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Heading -> head and lines of a table of variances; refused where two estimators differ in their mean."""
    problem, found = tokens(), {}
    places = variance.places(problem)
    for heading, rows in families.items():
        lines = []
        first: dict[str, Tensor] = {}
        for row in rows:
            cells = []
            for name, logits in places.items():
                one = variance.spread(problem, row, logits, behaviour)
                mean = first.setdefault(name, one.mean)
                if not torch.allclose(one.mean, mean, rtol=1e-10, atol=1e-12):
                    raise ValueError(f"{row.name}: its mean differs from that of {rows[0].name} at {name}")
                cells.append(variance_cell(one.variance))
            lines.append([f"`{row.objective}`{row.name.removeprefix(row.objective)}", *cells])
        found[heading] = (["estimator", *places], lines)
    return found


def picture() -> bytes:
    """The curves of both worlds under all samplers."""
    panels = {}
    for problem in (bandit(), tokens()):
        for name, behaviour in samplers(problem).items():
            title = f"{problem.name}, {'fresh samples' if behaviour is None else f'samples {name}'}"
            panels[title] = {label: figure.curve(problem, row, behaviour) for label, row in figure.COMPARED.items()}
    return figure.draw(panels)


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worlds", description=__doc__)
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of worlds.md and assets/worlds.png")
    parser.add_argument("--no-picture", action="store_true", help="leave the picture as it is")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # many small tensors: threads would wait for each other
    began = time.monotonic()

    def log(text: str) -> None:
        say(f"{time.monotonic() - began:6.1f} s  {text}")

    found = {}
    for family, rows in ROWS.items():
        found.update({row: rests(row) for row in rows})
        log(family)
    lines = [collapses(beta) for beta in (0.2, 0.5, 1.0, 2.0)]
    log("likelihood-ratio term")
    spreads = {f"Fresh samples: {k[0].lower()}{k[1:]}": v for k, v in variances(variance.FRESH, None).items()}
    for name, behaviour in list(samplers(tokens()).items())[1:]:
        spreads |= {
            f"Samples {name}: {k[0].lower()}{k[1:]}": v for k, v in variances(variance.OTHER, behaviour).items()
        }
    log("variances")
    (options.output / "assets").mkdir(parents=True, exist_ok=True)
    (options.output / "worlds.md").write_text(page(found, lines, spreads), encoding="utf-8")
    if not options.no_picture:
        (options.output / "assets" / "worlds.png").write_bytes(picture())
        log("picture")


if __name__ == "__main__":
    main()
