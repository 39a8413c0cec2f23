"""Loops round the objectives, measured: selections on random tables, references, opponents, importance weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlft import kl, losses
from rlft.losses.importance import importance_weights, reweight
from rlft.models import MovingAverage
from rlft.objective import Objective
from rlft.rollout.select import Pairs, keep_best, keep_by_rejection, keep_from, select_pairs
from tests.proofs import changes as c
from tests.proofs.proof import Value, difference, row, step_loss
from tests.proofs.scene import BLANK, F64, Scene, groups, pairs, whole_pairs

B = 0.3


# -- selections, on random tables with unusable answers ---------------------------------------------------------------
def _table(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(40, n, generator=g, dtype=F64), torch.rand(40, n, generator=g) > 0.25


def _of_rewards(scores: Tensor) -> Tensor:
    return scores[:, :, None] - scores[:, None, :]


def _differ(a: Tensor, b: Tensor) -> float:
    """The share of entries that are not the same; both sides have some of each."""
    assert bool(a.any())
    return float((a != b).double().mean())


def _pairs_differ(a: Pairs, b: Pairs) -> float:
    """The share of prompts with other pairs, as sets."""

    def sets(pairs: Pairs) -> list[set[tuple[int, int]]]:
        return [
            {(i, j) for i, j, live in zip(*(x[p].tolist() for x in (pairs.chosen, pairs.rejected, pairs.alive)), strict=True) if live}
            for p in range(len(pairs.chosen))
        ]  # fmt: skip

    mine, others = sets(a), sets(b)
    assert any(mine)
    return sum(x != y for x, y in zip(mine, others, strict=True)) / len(mine)


def two_answers(_: float) -> float:
    scores, usable = _table(2)
    both = [select_pairs(scores, _of_rewards(scores), usable, selection=how) for how in ("best_worst", "all")]
    return _pairs_differ(*both)


def ties(_: float) -> float:
    scores, usable = _table(4)
    found = select_pairs(scores * 0, _of_rewards(scores * 0), usable, selection="best_worst")
    return float(found.alive.double().mean())


def widest_gap(_: float) -> float:
    """Asking for a little less than the widest gap of a prompt, one prompt at a time."""
    scores, usable = _table(5)
    wrong = 0.0
    for p in range(len(scores)):
        one, known = scores[p : p + 1], usable[p : p + 1]
        if int(known.sum()) > 1:
            best = select_pairs(one, _of_rewards(one), known, selection="best_worst")
            gap = float(best.gap) * (1 - 1e-9)
            wrong += _pairs_differ(select_pairs(one, _of_rewards(one), known, selection="all", min_gap=gap), best)
    return wrong


def no_gap(_: float) -> float:
    scores, usable = _table(5)
    found = select_pairs(scores, _of_rewards(scores), usable, selection="all", min_gap=1e-300)
    both = usable[:, :, None] & usable[:, None, :]
    return abs(int(found.alive.sum()) - (int(both.sum()) - int(usable.sum())) / 2)


def judged_like_rewards(_: float) -> float:
    scores, usable = _table(4)
    wins = torch.sigmoid(_of_rewards(scores))
    judged = select_pairs(wins.mean(-1), wins - wins.transpose(1, 2), usable, selection="all")
    return _pairs_differ(judged, select_pairs(scores, _of_rewards(scores), usable, selection="all"))


def sure_judge(sharpness: float) -> float:
    """A judge that grows sure of the better answer prefers like one that always says 1 or 0."""
    scores, usable = _table(4)
    wins = torch.sigmoid(_of_rewards(scores) / sharpness)
    sure = (_of_rewards(scores) > 0).double() + 0.5 * torch.eye(4, dtype=F64)
    off = usable[:, :, None] & usable[:, None, :]
    return float((wins - sure).abs()[off].max())


def one_answer(_: float) -> float:
    scores, usable = _table(1)
    return _differ(keep_best(scores, usable), usable)


def sft_on_one(_: float) -> float:
    """sft on the best of one answer is sft."""
    scene = groups(0)
    one = torch.arange(scene.batch.num_rows)
    kept = keep_best(torch.zeros(len(one), 1), scene.mask.any(-1, keepdim=True)).flatten()
    return difference(row("sft").on(lambda s: s.but(mask=s.mask & kept[:, None])), row("sft"), scene)


def cold(beta: float) -> float:
    scores, usable = _table(4)
    u = torch.full_like(scores, 1e-12)
    return _differ(keep_by_rejection(scores, usable, u, beta=beta), keep_best(scores, usable))


def hot(beta: float) -> float:
    scores, usable = _table(4)
    u = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    return _differ(keep_by_rejection(scores, usable, u, beta=beta), usable)


def low_threshold(threshold: float) -> float:
    scores, usable = _table(4)
    return _differ(keep_from(scores, usable, threshold), usable)


def top_threshold(_: float) -> float:
    scores, usable = _table(4)
    wrong = 0.0
    for p in usable.any(-1).nonzero().flatten().tolist():
        one, known = scores[p : p + 1], usable[p : p + 1]
        top = float(one[known].max())
        wrong += _differ(keep_from(one, known, top), keep_best(one, known))
    return wrong


# -- references, opponents, weights -----------------------------------------------------------------------------------
def at_the_reference(scene: Scene) -> Scene:
    return scene.but(ref_logps=scene.logps)


def fresh_reference(_: float) -> float:
    """With the reference just swapped for the policy, DPO's gradient is beta times REINFORCE with +1 and -1, in sums."""
    signs = row("reinforce", advantage="given").on(
        lambda s: s.but(advantages=(B * (2 * c.is_chosen(s).to(F64) - 1))[:, None].expand(s.mask.shape))
    )
    return difference(row("dpo", beta=B).on(at_the_reference), signs, whole_pairs(0), value=False)


def average(decay: float) -> float:
    """How far the opponent's weights are from the policy's after an update, relative to how far the policy moved."""
    model = nn.Linear(3, 3).double()
    average = MovingAverage(model, decay)
    with torch.no_grad():
        before = model.weight.clone()
        model.weight += torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        after = model.weight.clone()
    average.update()
    with average.applied():
        found = model.weight.detach().clone()
    return float((found - after).abs().max() / (after - before).abs().max())


def weights(cap: float, level: str = "token") -> float:
    """Importance weights against the plain ratio, on tokens that count."""
    s = groups(0)
    assert s.batch.old_logps is not None
    found = importance_weights(s.batch.old_logps, s.ref, s.mask, level=level, mode="truncate", cap=cap)  # type: ignore[arg-type]
    exact = (s.batch.old_logps - s.ref).where(s.mask, 0.0)
    exact = (exact if level == "token" else exact.sum(-1, keepdim=True).expand(s.mask.shape)).exp()
    exact = exact.where(s.mask, 0.0)
    return float(((found - exact).abs() / exact.abs().clamp(min=1e-300)).where(s.mask, 0.0).max())


def own_samples(_: float) -> float:
    """A sampler that is the policy: every weight is 1 and the loss is what it was."""
    s = groups(0)
    assert s.batch.old_logps is not None
    old = s.batch.old_logps
    output = losses.ppo_clip(s.logps, old, s.batch.advantages, s.mask, clip_eps=0.2)  # type: ignore[arg-type]
    kept = reweight(output, importance_weights(old, old, s.mask, level="sequence", mode="mask", cap=2.0))
    assert not bool(s.mask[BLANK].any())
    return float((kept.loss - output.loss).abs().max().detach())


def likelihood_beside(weight: float) -> Value:
    """dpo plus some of the chosen answers' likelihood, as a sum of two objectives."""
    return step_loss(Objective(losses.dpo, beta=B) + weight * Objective(losses.sft, averaging="sequence_mean"))


def sum_is_rpo(_: float) -> float:
    return difference(likelihood_beside(0.7), row("rpo", beta=B, alpha=0.7), whole_pairs(0))


def second_weight(x: float) -> float:
    return difference(likelihood_beside(x), row("dpo", beta=B), pairs(0))


def horizon(x: float) -> float:
    """A proportional controller with a long horizon is a fixed one."""
    moved = kl.ProportionalKL(0.1, 0.05, 1 / x).update(3.0, samples=64)
    return abs(moved.beta - kl.FixedKL(0.1).update(3.0).beta) / 0.1


def inside(_: float) -> float:
    return max(abs(kl.HalveDoubleKL(0.1, 1.0).update(x).beta - 0.1) for x in (0.7, 1.0, 1.49))
