"""The binding of names to tensors, the four axes, and denominators that do not depend on how a step is cut."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from rlft import advantages, losses, recipes, reduce
from rlft.objective import Objective, entropy_bonus
from rlft.types import Batch, LossOutput

F64 = torch.float64


def make_batch(seed: int = 0, *, groups: int = 4, size: int = 4, width: int = 5) -> tuple[Batch, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    exists = torch.arange(width)[None] < lengths[:, None]

    def logps() -> Tensor:
        return -torch.rand(rows, width, generator=g, dtype=F64) - 0.05

    batch = Batch(
        prompt_ids=torch.zeros(groups, 2, dtype=torch.long),
        prompt_mask=torch.ones(groups, 2, dtype=torch.bool),
        completion_ids=torch.zeros(rows, width, dtype=torch.long),
        completion_mask=exists,
        mask=exists,
        group_ids=torch.arange(groups).repeat_interleave(size),
        rewards=torch.rand(rows, generator=g, dtype=F64),
        old_logps=logps(),
        ref_logps=logps(),
        values=torch.randn(rows, width, generator=g, dtype=F64),
        labels=torch.rand(rows, generator=g) > 0.5,
        extras={
            "kl_baseline": torch.full((rows,), 0.1, dtype=F64),
            "margin": torch.rand(rows, generator=g, dtype=F64),
            "win_rates": torch.rand(rows, generator=g, dtype=F64),
            "weights": torch.rand(rows, generator=g, dtype=F64),
            "step_labels": (torch.rand(rows, width, generator=g) > 0.5).to(F64),
        },
    )
    outputs = {
        "logps": logps().requires_grad_(),
        "token_kl": torch.rand(rows, width, generator=g, dtype=F64).requires_grad_(),
        "entropy": torch.rand(rows, width, generator=g, dtype=F64).requires_grad_(),
        "values": torch.randn(rows, width, generator=g, dtype=F64).requires_grad_(),
        "scores": torch.randn(rows, generator=g, dtype=F64).requires_grad_(),
    }
    for name in ("behaviour_log_ratio", "behaviour_log_ratio_sq", "token_log_ratio_sq", "teacher_kl"):
        outputs[name] = torch.rand(rows, width, generator=g, dtype=F64).requires_grad_()
    return batch, outputs


#: Enough hyper-parameters to build any objective by name.
HYPER = {
    "beta": 0.3, "clip_eps": 0.2, "length": 7, "delta": 1.0, "tau": 0.3, "lam": 0.95, "gamma": 0.99,
    "divergence": "js", "f": "logistic", "label_smoothing": 0.1,
}  # fmt: skip


def build(name: str) -> Objective:
    parameters = inspect.signature(recipes.RECIPES.get(name) or getattr(losses, name)).parameters.values()
    needed = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    return recipes.build(name, **{k: HYPER.get(k, 0.5) for k in needed})


def gradient(objective: Objective, batch: Batch, outputs: dict[str, Tensor], pieces: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the step's loss computed piece by piece (row indices)."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in outputs.items()}
    parts = [batch.select(rows) for rows in pieces]
    counts = sum(objective.denominators(part) for part in parts)
    for rows, part in zip(pieces, parts, strict=True):
        width = part.completion_ids.shape[1]
        local = {n: t[rows][:, :width] if t.ndim > 1 else t[rows] for n, t in leaves.items()}
        loss, _ = objective.compute(local, part, counts)
        if loss.requires_grad:
            loss.backward()
    return {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}


@pytest.mark.parametrize("name", recipes.names())
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str) -> None:
    objective = build(name)
    batch, outputs = make_batch(size=2)
    batch = objective.prepare(batch) if objective.advantage != "given" else batch.replace(advantages=batch.rewards)
    if "returns" in objective.needs and batch.returns is None:
        batch = batch.replace(returns=batch.values)
    whole = gradient(objective, batch, outputs, [torch.arange(8)])
    if objective.couples_rows:  # refused with accumulation; see setup
        assert name in ("aot", "aot_unpaired")
        return
    assert any(g.abs().max() > 1e-6 for g in whole.values()), "no gradient at all: the comparison would be empty"
    for sizes in ([2, 2, 2, 2], [4, 4], [6, 2]):
        cut = gradient(objective, batch, outputs, list(torch.arange(8).split(sizes)))
        for key, value in whole.items():
            torch.testing.assert_close(cut[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", recipes.names())
def test_a_blank_micro_batch_adds_nothing(name: str) -> None:
    objective = build(name)
    batch, outputs = make_batch(size=2)
    batch = objective.prepare(batch) if objective.advantage != "given" else batch.replace(advantages=batch.rewards)
    if "returns" in objective.needs and batch.returns is None:
        batch = batch.replace(returns=batch.values)
    blank = batch.replace(mask=torch.zeros_like(batch.mask))
    assert objective.denominators(blank).tolist() == [0.0] * len(objective.terms)
    loss, _ = objective.compute(outputs, blank, objective.denominators(batch))
    assert float(loss.detach()) == 0.0
    grads = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    assert all(g is None or g.abs().max() == 0 for g in grads)


def test_grpo_is_clip_plus_k3_on_the_axes() -> None:
    batch, outputs = make_batch()
    whole = recipes.build("grpo", beta=0.3, clip_eps=0.2)
    axes = Objective(
        losses.ppo_clip,
        advantage="group_norm",
        kl="loss",
        kl_value="k3",
        beta=0.3,
        averaging="sequence_mean",
        clip_eps=0.2,
    )
    for objective in (whole, axes):
        prepared = objective.prepare(batch)
        objective.grad = gradient(objective, prepared, outputs, [torch.arange(16)])["logps"]
    torch.testing.assert_close(whole.grad, axes.grad, rtol=1e-12, atol=1e-14)


def test_reinforce_with_kl_in_the_reward_is_rloo_on_fresh_samples() -> None:
    batch, outputs = make_batch()
    batch = batch.replace(old_logps=outputs["logps"].detach())
    reinforce = recipes.build("reinforce", advantage="leave_one_out", kl="reward", kl_value="k1", beta=0.3)
    rloo = recipes.build("rloo", beta=0.3)
    rows = [torch.arange(16)]
    a = gradient(reinforce, reinforce.prepare(batch), outputs, rows)["logps"]
    b = gradient(rloo, rloo.prepare(batch), outputs, rows)["logps"]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_averaging_replaces_the_loss_own() -> None:
    batch, outputs = make_batch()
    batch = batch.replace(advantages=batch.rewards)
    by_hand = losses.reinforce(outputs["logps"], batch.advantages, batch.mask)
    for averaging, length in (
        ("token_mean", None),
        ("sequence_mean", None),
        ("sequence_sum", None),
        ("fixed_length", 9),
    ):
        objective = Objective(losses.reinforce, averaging=averaging, length=length)
        loss, _ = objective.compute(outputs, batch, objective.denominators(batch))
        expected = reduce.average(by_hand.loss, batch.mask, averaging, length=length)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_gae_puts_the_score_on_the_last_trained_token() -> None:
    batch, _ = make_batch()
    objective = recipes.build("ppo", beta=0.1, gamma=1.0, lam=1.0)
    prepared = objective.prepare(batch)
    token = -0.1 * (batch.old_logps - batch.ref_logps).where(batch.mask, 0.0)
    last = batch.mask.sum(-1) - 1
    token[torch.arange(16), last] += batch.rewards
    to_go = token.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(
        prepared.returns.where(batch.mask, 0.0), to_go.where(batch.mask, 0.0), rtol=1e-12, atol=1e-12
    )


def test_unscored_rows_leave_the_group_and_the_count() -> None:
    batch, outputs = make_batch()
    rewards = batch.rewards.clone()
    rewards[1] = float("nan")  # one sibling of group 0
    rewards[4:7] = float("nan")  # group 1 keeps one member: no baseline
    objective = recipes.build("grpo", beta=0.0)
    prepared = objective.prepare(batch.replace(rewards=rewards))
    assert prepared.mask.any(-1).tolist() == [True, False, True, True] + [False] * 4 + [True] * 8
    grad = gradient(objective, prepared, outputs, [torch.arange(16)])["logps"]
    assert (grad[~prepared.mask] == 0).all()
    kept = torch.tensor([0, 2, 3, *range(8, 16)])
    alone = objective.prepare(batch.select(kept))
    width = alone.completion_ids.shape[1]
    local = {n: t[kept][:, :width] if t.ndim > 1 else t[kept] for n, t in outputs.items()}
    expected = gradient(objective, alone, local, [torch.arange(11)])["logps"]
    torch.testing.assert_close(grad[kept][:, :width], expected, rtol=1e-12, atol=1e-14)


def test_a_users_function_is_taken_as_it_is() -> None:
    def my_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, mask: Tensor, *, scale: float) -> Tensor:
        return -(logps - ref_logps) * rewards[:, None] * scale

    objective = Objective(my_loss, scale=2.0)
    assert objective.needs == {"logps", "ref_logps", "rewards", "mask"}
    assert objective.terms[0].reduction == "token_mean"
    batch, outputs = make_batch()
    loss, _ = objective.compute(outputs, batch, objective.denominators(batch))
    by_hand = (-(outputs["logps"] - batch.ref_logps) * batch.rewards[:, None] * 2.0)[batch.mask].mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)


def test_a_users_column_becomes_a_parameter() -> None:
    def weighted(logps: Tensor, difficulty: Tensor, mask: Tensor) -> LossOutput:
        return LossOutput((-logps * difficulty[:, None]).where(mask, 0.0), {}, "sequence_mean", mask)

    objective = Objective(weighted)
    batch, outputs = make_batch()
    batch = batch.replace(extras={"difficulty": torch.arange(16, dtype=F64)})
    loss, _ = objective.compute(outputs, batch, objective.denominators(batch))
    rows = (-outputs["logps"]).where(batch.mask, 0).sum(-1) / batch.mask.sum(-1) * torch.arange(16)
    torch.testing.assert_close(loss, rows.mean(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"needs 'difficulty'.*add a numeric dataset column"):
        objective.compute(outputs, batch.replace(extras={}), objective.denominators(batch))


def test_objectives_add_up_with_their_own_denominators() -> None:
    batch, outputs = make_batch(size=2)
    total = 0.8 * Objective(losses.dpo, beta=0.3) + 0.2 * Objective(losses.sft)
    loss, results = total.compute(outputs, batch, total.denominators(batch))
    parts = [o.mean() for o in results]
    torch.testing.assert_close(loss, 0.8 * parts[0] + 0.2 * parts[1], rtol=1e-12, atol=0)


def test_no_reference_is_asked_for_at_beta_zero() -> None:
    for name in ("grpo", "rloo", "agro_off_policy", "dr_grpo"):
        extra = {"length": 8} if name == "dr_grpo" else {}
        objective = recipes.build(name, beta=0.0, **extra)
        assert not objective.needs_reference, name
        batch, outputs = make_batch()
        loss, _ = objective.compute(
            outputs, objective.prepare(batch.replace(ref_logps=None)), objective.denominators(batch)
        )
        assert torch.isfinite(loss)
    assert recipes.build("rloo", beta=0.1).needs_reference


def test_entropy_asks_for_its_gradient() -> None:
    objective = recipes.build("ppo", beta=0.0, entropy_coef=0.01)
    assert "entropy_grad" in objective.forward_needs
    assert any(term.function is entropy_bonus for term in objective.terms)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.build("gropo"), "did you mean 'grpo'"),
        (lambda: recipes.build("dpo"), "needs beta"),
        (lambda: recipes.build("dpo", beta=0.1, clip_eps=0.2), "does not use clip_eps"),
        (lambda: recipes.build("dpo", bta=0.1, beta=0.1), "did you mean 'beta'"),
        (lambda: Objective(losses.dpo, beta=0.1, advantage="group_norm"), "takes no advantages"),
        (lambda: Objective(losses.reinforce, advantage="group_nrm"), "did you mean 'group_norm'"),
        (lambda: Objective(losses.reinforce, averaging="tokn_mean"), "did you mean 'token_mean'"),
        (lambda: Objective(losses.dpo, beta=0.1, averaging="token_mean"), "does not fit"),
        (lambda: Objective(losses.reinforce, averaging="fixed_length"), "give length > 0"),
        (lambda: Objective(losses.reinforce, length=3), "does nothing"),
        (lambda: Objective(losses.rloo, beta=0.1, kl="loss"), "count it twice"),
        (lambda: Objective(losses.reinforce, kl_gradient="k2"), "kl_gradient='k2' does nothing"),
        (lambda: Objective(losses.reinforce, kl_value="k1"), "kl_value='k1' does nothing"),
        (lambda: Objective(losses.reinforce, advantage="reward", kl="reward"), "needs beta"),
        (lambda: Objective(losses.reinforce, kl="reward", beta=0.1), "computes no advantages"),
        (lambda: Objective(lambda *args: 0), r"takes \*args"),
        (lambda: Objective(lambda: 0), "takes no tensors"),
        (lambda: Objective(lambda logps, mask: logps.mean()), "unreduced"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_groups_of_one_are_refused() -> None:
    batch, _ = make_batch(size=1)
    with pytest.raises(ValueError, match="set num_generations >= 2"):
        recipes.build("grpo").prepare(batch)


def test_advantages_follow_permuted_rows() -> None:
    batch, _ = make_batch()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    objective = recipes.build("grpo")
    shuffled = objective.prepare(batch.select(order))
    torch.testing.assert_close(shuffled.advantages, objective.prepare(batch).advantages[order])
    expected = advantages.group_norm(batch.rewards, batch.group_ids)
    torch.testing.assert_close(objective.prepare(batch).advantages, expected)


def test_a_loss_with_its_own_kl_gradient_gets_it() -> None:
    """The axis has the same name; it once ended there, and the loss kept its default."""
    for name in ("grpo", "kl_policy_gradient"):
        assert recipes.build(name, beta=0.1, kl_gradient="ratio_k3").terms[0].hyper["kl_gradient"] == "ratio_k3"
    assert recipes.build("kl_policy_gradient", beta=0.1, kl_value="k1").terms[0].hyper["kl_value"] == "k1"


def test_a_loss_that_needs_three_answers_can_be_built() -> None:
    hyper = recipes.build("agro_on_policy", beta=0.1, lr_coef=1.0, lr_baseline="unbiased").terms[0].hyper
    assert hyper["lr_baseline"] == "unbiased"
