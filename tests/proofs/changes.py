"""Changes of a scene that stay differentiable: what "on mean log-probs" or "with the answers swapped" means, in tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft import advantages, kl
from tests.proofs.proof import Change
from tests.proofs.scene import F64, Scene

#: How far log-probs are pushed down so that any number can be written as a log-ratio of two of them.
FAR = 20.0


def but(**changes: Callable[[Scene], Tensor] | Tensor) -> Change:
    """Other outputs or constants, each a tensor or a function of the scene."""
    return lambda s: s.but(**{n: c(s) if callable(c) and not isinstance(c, Tensor) else c for n, c in changes.items()})


def everywhere(number: float) -> Callable[[Scene], Tensor]:
    """One number per answer."""
    return lambda s: torch.full((s.batch.num_rows,), number, dtype=F64)


def everywhere_token(number: float) -> Callable[[Scene], Tensor]:
    """One number per token."""
    return lambda s: torch.full(s.mask.shape, number, dtype=F64)


# -- rows -------------------------------------------------------------------------------------------------------------
def first_pair(scene: Scene) -> Scene:
    """A batch of one pair."""
    return scene.take([0, 1])


def one_pair(k: int) -> Change:
    return lambda s: s.take([2 * k, 2 * k + 1])


def swapped(scene: Scene) -> Scene:
    """Chosen and rejected exchanged."""
    order = torch.arange(scene.batch.num_rows).reshape(-1, 2).flip(-1).flatten()
    return scene.take(order)


def is_chosen(scene: Scene) -> Tensor:
    return torch.arange(scene.batch.num_rows) % 2 == 0


def alive(scene: Scene) -> Tensor:
    """``[P]`` pairs without a blank row."""
    one = scene.mask.any(-1)
    return one[0::2] & one[1::2]


def sign(scene: Scene) -> Tensor:
    """``[B]`` +1 for desirable answers, -1 for the others."""
    assert scene.batch.labels is not None
    return torch.where(scene.batch.labels, 1.0, -1.0).to(F64)


def _masked(scene: Scene, rows: Tensor) -> Scene:
    return scene.but(mask=scene.mask & rows[:, None])


def chosen_alone(scene: Scene) -> Scene:
    """Only the chosen answers of pairs that count are left."""
    return _masked(scene, is_chosen(scene) & alive(scene).repeat_interleave(2))


def desirable_alone(scene: Scene) -> Scene:
    assert scene.batch.labels is not None
    return _masked(scene, scene.batch.labels)


# -- log-probs --------------------------------------------------------------------------------------------------------
def _tokens(scene: Scene, change: Callable[[Tensor], Tensor]) -> Scene:
    """The same change of the log-probs of policy, old policy and reference."""
    assert scene.batch.old_logps is not None
    old, ref = change(scene.batch.old_logps), change(scene.ref)
    return scene.but(logps=change(scene.logps), old_logps=old, ref_logps=ref)


def no_reference(scene: Scene) -> Scene:
    """A reference that gives every answer the same log-prob, 0."""
    return scene.but(ref_logps=torch.zeros_like(scene.ref))


def per_token(scene: Scene) -> Scene:
    """Log-probs divided by the length of their answer: sums become means."""
    return _tokens(scene, lambda x: x / scene.lengths()[:, None])


def folded(scene: Scene) -> Scene:
    """Every answer as one token that carries the sum of its log-probs."""
    own = {n: t for n, t in scene.batch.tensors().items() if not n.startswith("extras.")}
    columns = {n: t[:, :1] for n, t in own.items() if t.shape == scene.mask.shape}
    extras = {n: t[:, :1] if t.shape == scene.mask.shape else t for n, t in scene.batch.extras.items()}
    outputs = {n: t[:, :1] if t.shape == scene.mask.shape else t for n, t in scene.outputs.items()}
    some = scene.mask.any(-1, keepdim=True)
    columns |= {"mask": some, "completion_mask": torch.ones_like(some), "completion_ids": some.long()}
    for name in ("old_logps", "ref_logps"):
        columns[name] = scene.summed(getattr(scene.batch, name))[:, None].where(some, torch.nan)
    outputs["logps"] = scene.summed(scene.logps)[:, None].where(some, torch.nan)
    return Scene(replace(scene.batch, **columns, extras=extras), outputs, scene.leaves)


def log_ratio(scene: Scene) -> Tensor:
    """``[B]`` the answers' log-ratio to the reference, differentiable."""
    return scene.summed(scene.logps - scene.ref)


def as_log_ratios(ratios: Callable[[Scene], Tensor]) -> Change:
    """One token per answer whose log-ratio to the reference is a given number ``[B]``."""

    def change(scene: Scene) -> Scene:
        wanted, s = ratios(scene), folded(scene)
        far = torch.full_like(s.ref, -FAR).where(s.mask, torch.nan)
        return s.but(logps=far + wanted[:, None], ref_logps=far, old_logps=far)

    return change


def with_ratio_of(
    chosen: Callable[[Scene], Tensor] | None = None, rejected: Callable[[Scene], Tensor] | None = None
) -> Change:
    """The answers' log-ratios, those of the chosen or the rejected ones replaced by numbers ``[P]``."""

    def ratios(scene: Scene) -> Tensor:
        own = log_ratio(scene).reshape(-1, 2)
        sides = [own[:, i] if f is None else f(scene).expand(len(own)) for i, f in enumerate((chosen, rejected))]
        return torch.stack(sides, -1).flatten()

    return as_log_ratios(ratios)


def constant(number: float) -> Callable[[Scene], Tensor]:
    return lambda s: torch.tensor(number, dtype=F64)


def ratio(side: int) -> Callable[[Scene], Tensor]:
    """``[P]`` log-ratios of the chosen (0) or the rejected (1) answers."""
    return lambda s: log_ratio(s)[side::2]


def margin(scene: Scene) -> Tensor:
    """``[P]`` h, the chosen log-ratio minus the rejected one."""
    return ratio(0)(scene) - ratio(1)(scene)


def over_pairs(number: Callable[[Scene], Tensor]) -> Callable[[Scene], Tensor]:
    """The mean of a number per pair over the pairs that count."""
    return lambda s: number(s)[alive(s)].mean()


def over_rows(number: Callable[[Scene], Tensor]) -> Callable[[Scene], Tensor]:
    """The mean of a number per answer over those that are not blank."""
    return lambda s: number(s)[s.mask.any(-1)].mean()


# -- rewards and advantages -------------------------------------------------------------------------------------------
def won_and_lost(spread: float) -> Change:
    """Pairs as groups of two with rewards ``+-spread/2``."""
    return lambda s: s.but(
        rewards=torch.where(is_chosen(s), spread / 2, -spread / 2).to(F64).where(s.mask.any(-1), torch.nan)
    )


def scored(scene: Scene) -> Tensor:
    """``[B]`` answers with a reward and a token that counts."""
    return ~scene.rewards.isnan() & scene.mask.any(-1)


def group_sizes(scene: Scene) -> Tensor:
    """``[B]`` how many scored answers the prompt of each answer has."""
    ids, kept = scene.batch.group_ids, scored(scene)
    return torch.stack([(kept & (ids == g)).sum() for g in ids]).to(F64)


def leave_one_out(scene: Scene, rewards: Tensor | None = None) -> Tensor:
    """``[B]`` reward minus the mean of the others', by a loop."""
    rewards = (scene.rewards if rewards is None else rewards).detach()
    kept, found = scored(scene), torch.zeros_like(rewards)
    for i in kept.nonzero().flatten().tolist():
        others = kept & (scene.batch.group_ids == scene.batch.group_ids[i])
        others[i] = False
        found[i] = rewards[i] - rewards[others].mean()
    return found


def whitened(numbers: Tensor) -> Tensor:
    """Mean 0 and variance 1, with 1e-8 added to the variance."""
    return (numbers - numbers.mean()) / (numbers.var() + 1e-8).sqrt()


def whitened_rewards(scene: Scene) -> Tensor:
    """``[B]`` the step's rewards, whitened over its scored answers."""
    kept, found = scored(scene), torch.zeros_like(scene.rewards)
    found[kept] = whitened(scene.rewards[kept])
    return found


def others_mean(scene: Scene, numbers: Tensor) -> Tensor:
    """``[B]`` the mean of the other scored answers of the group."""
    return numbers.detach() - leave_one_out(scene, numbers)


def regularised(beta: float) -> Callable[[Scene], Tensor]:
    """``[B]`` R = r - beta S, a constant."""
    return lambda s: (s.rewards - beta * log_ratio(s)).detach()


def scored_alone(scene: Scene) -> Scene:
    """Unscored answers masked, as an objective on rewards does."""
    return _masked(scene, ~scene.rewards.isnan())


def advantages_are(found: Callable[[Scene], Tensor]) -> Change:
    """Other advantages, and unscored answers masked."""
    return lambda s: scored_alone(s).but(advantages=found(s))


def rewards_near_the_optimum(x: float, beta: float) -> Change:
    """Rewards at which R is nearly the same for all answers of a group: ``beta S + 3 + x noise``."""
    return lambda s: s.but(rewards=(beta * log_ratio(s) + 3 + x * s.rewards).where(~s.rewards.isnan(), torch.nan))


def drifted(x: float) -> Change:
    """The policy that sampled is ``x`` times as far from the policy as in the scene."""

    def change(scene: Scene) -> Scene:
        assert scene.batch.old_logps is not None
        return scene.but(old_logps=scene.logps + x * (scene.batch.old_logps - scene.logps))

    return change


def sampled_fresh(scene: Scene) -> Scene:
    return scene.but(old_logps=scene.logps)


def ratios(scene: Scene) -> Tensor:
    """``[B, T]`` of the policy to the one that sampled."""
    assert scene.batch.old_logps is not None
    return (scene.logps - scene.batch.old_logps).where(scene.mask, 0.0).exp()


def with_gae(gamma: float, lam: float, beta: float) -> Change:
    """Advantages and returns of the critic's values, the KL taken off every token's reward; unscored answers masked."""

    def change(scene: Scene) -> Scene:
        s = scored_alone(scene)
        assert s.batch.old_logps is not None
        assert s.batch.values is not None
        tokens = -beta * kl.k1(s.batch.old_logps, s.ref, s.mask)
        for i, counts in enumerate(s.mask):
            if bool(counts.any()):
                tokens[i, int(counts.nonzero()[-1])] += s.rewards[i]
        found, returns = advantages.gae(tokens, s.batch.values, s.mask, gamma=gamma, lam=lam)
        return s.but(advantages=found, returns=returns)

    return change


# -- answers of one token, as rows of other losses --------------------------------------------------------------------
def flattened(scene: Scene) -> Scene:
    """Every token a row of its own: blank where it did not count."""
    size = scene.mask.numel()
    b = scene.batch

    def column(t: Tensor) -> Tensor:
        wide = t if t.shape == scene.mask.shape else t[:, None].expand(scene.mask.shape)
        return wide.reshape(size, 1)

    kept: dict[str, Any] = {
        name: column(getattr(b, name))
        for name in ("old_logps", "ref_logps", "values", "returns", "completion_ids", "mask")
    }
    kept |= {"completion_mask": torch.ones(size, 1, dtype=torch.bool), "group_ids": torch.arange(size) // 2}
    prompts = torch.zeros((size + 1) // 2, 1, dtype=torch.long)
    kept |= {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts).bool()}
    rows = {n: column(t).flatten() for n, t in (("rewards", scene.rewards), ("labels", b.labels)) if t is not None}
    extras = {n: column(t) if t.ndim == 2 else column(t).flatten() for n, t in b.extras.items()}
    outputs = {n: column(t) if n != "scores" else column(t).flatten() for n, t in scene.outputs.items()}
    return Scene(replace(b, **kept, **rows, advantages=None, extras=extras), outputs, scene.leaves)
