"""In a sum with a preference loss, what imitates answers imitates the chosen ones: identities, counts, refusals, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Trainer, losses, recipes
from rlft.config import ConfigError
from rlft.objective import Objective
from rlft.types import Batch, LossOutput
from tests.test_objective import gradient, make_batch
from tests.tiny import char_tokenizer, tiny_llama

TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
PER_TOKEN: dict[str, Any] = {"averaging": "sequence_mean"}


def pairs() -> tuple[Batch, dict[str, Tensor]]:
    batch, outputs = make_batch(size=2)
    return batch.replace(labels=None), outputs


def summed(weight: float, **axes: Any) -> Objective:
    return Objective(losses.dpo, beta=0.3) + weight * Objective(losses.sft, **axes)


@pytest.mark.parametrize("order", ["dpo first", "sft first"])
def test_dpo_plus_sft_is_rpo(order: str) -> None:
    """Rafailov's loss plus the chosen answer's negative log-likelihood per token (Pang et al. 2024, equation 1)."""
    batch, outputs = pairs()
    sft = 0.7 * Objective(losses.sft, averaging="sequence_mean")
    dpo = Objective(losses.dpo, beta=0.3)
    both = dpo + sft if order == "dpo first" else sft + dpo
    rpo = Objective(losses.rpo, beta=0.3, alpha=0.7)
    for pieces in ([torch.arange(8)], [torch.arange(2), torch.arange(2, 8)]):
        found = gradient(both, batch, outputs, pieces)["logps"]
        torch.testing.assert_close(found, gradient(rpo, batch, outputs, pieces)["logps"], **TIGHT)
    mine, _ = both.compute(outputs, batch, both.denominators(batch))
    theirs, _ = rpo.compute(outputs, batch, rpo.denominators(batch))
    torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("averaging", ["token_mean", "sequence_mean", "sequence_sum", "fixed_length"])
def test_the_likelihood_term_is_sft_on_the_chosen_rows(averaging: str) -> None:
    """Loss, gradient, metrics and denominators are those of a batch of the chosen answers alone."""
    batch, outputs = pairs()
    axes = {"averaging": averaging, **({"length": 9} if averaging == "fixed_length" else {})}
    both, alone = summed(0.7, **axes), Objective(losses.sft, **axes)
    rows = torch.arange(0, 8, 2)
    logps = outputs["logps"].detach()[rows].requires_grad_()
    chosen = batch.select(rows)
    expected, _ = alone.compute({"logps": logps[:, : chosen.mask.shape[1]]}, chosen, alone.denominators(chosen))
    (slope,) = torch.autograd.grad(expected, logps)

    counts = both.denominators(batch)
    assert counts.tolist() == [4.0, float(alone.denominators(chosen))]
    _, results = both.compute(outputs, batch, counts)
    whole, _ = both.compute(outputs, batch, counts)
    (grad,) = torch.autograd.grad(whole, outputs["logps"])
    dpo = Objective(losses.dpo, beta=0.3)
    without, _ = dpo.compute(outputs, batch, dpo.denominators(batch))
    (base,) = torch.autograd.grad(without, outputs["logps"])
    torch.testing.assert_close((grad - base)[rows], 0.7 * slope, **TIGHT)
    assert float((grad - base)[1::2].abs().max()) == 0.0
    assert not results[1].counted[1::2].any()
    assert torch.equal(results[1].counted[0::2], batch.mask[0::2])


def test_labels_say_which_rows_are_imitated() -> None:
    batch, outputs = make_batch(size=1)
    assert batch.labels is not None
    both = Objective(losses.kto, beta=0.3) + Objective(losses.sft)
    assert both.denominators(batch).tolist() == [4.0, float(batch.mask[batch.labels].sum())]
    _, results = both.compute(outputs, batch, both.denominators(batch))
    assert torch.equal(results[1].counted, batch.mask & batch.labels[:, None])


def test_sft_alone_and_beside_losses_without_preferences_is_on_all_rows() -> None:
    batch, outputs = pairs()
    for objective in (
        Objective(losses.sft),
        Objective(losses.sft) + 0.1 * Objective(recipes.entropy_bonus),
        Objective(losses.reinforce, advantage="reward") + Objective(losses.sft),
    ):
        assert [term.rows for term in objective.terms] == [None] * len(objective.terms)
        assert float(objective.denominators(batch)[-1]) == float(batch.mask.sum())
        _, results = objective.compute(outputs, objective.prepare(batch), objective.denominators(batch))
        assert torch.equal(results[-1].counted, batch.mask)


def test_other_terms_of_a_preference_sum_keep_all_rows() -> None:
    def mine(logps: Tensor, mask: Tensor) -> LossOutput:
        return LossOutput(-logps.where(mask, 0.0), {}, "token_mean", mask)

    batch, _ = pairs()
    tokens, chosen = float(batch.mask.sum()), float(batch.mask[0::2].sum())
    dpo = Objective(losses.dpo, beta=0.3)
    assert (dpo + Objective(recipes.entropy_bonus)).denominators(batch).tolist() == [4.0, tokens]
    assert (dpo + Objective(mine)).denominators(batch).tolist() == [4.0, tokens]
    assert (dpo + Objective(mine, rows="chosen")).denominators(batch).tolist() == [4.0, chosen]
    by_groups = Objective(losses.ld_dpo, beta=0.3, ld_alpha=0.5) + Objective(losses.sft)
    assert by_groups.denominators(batch)[1] == chosen


def test_all_rows_are_imitated_where_that_is_said() -> None:
    batch, _ = pairs()
    both = summed(0.2, rows="all")
    assert both.denominators(batch).tolist() == [4.0, float(batch.mask.sum())]
    assert both.describe()["loss"] == "dpo + 0.2 sft (all rows)"
    assert summed(0.2).describe()["loss"] == "dpo + 0.2 sft (chosen rows)"
    assert summed(1.0).needs_groups
    assert Objective(losses.sft, rows="chosen").needs_groups


def test_choices_of_rows_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows 'choosen' is unknown; did you mean 'chosen'\?"):
        Objective(losses.sft, rows="choosen")
    cases: tuple[tuple[Any, dict[str, Any]], ...] = (
        (losses.dpo, {"beta": 0.1}),
        (losses.kto, {"beta": 0.1}),
        (losses.ld_dpo, {"beta": 0.1, "ld_alpha": 0.5}),
        (losses.rloo, {"beta": 0.1}),
    )
    for loss, hyper in cases:
        with pytest.raises(ValueError, match="compares answers, and needs all of them; drop rows"):
            Objective(loss, rows="chosen", **hyper)
    with pytest.raises(ValueError, match="acts on all rows as it is; drop rows"):
        Objective(recipes.entropy_bonus, rows="all")
    batch, _ = make_batch(size=4)
    lone = Objective(losses.sft, rows="chosen")
    odd = batch.replace(labels=None).select(torch.arange(3))
    with pytest.raises(
        ValueError, match="rows='chosen' needs pairs, rows in twos, chosen first, or labels; got 3 rows"
    ):
        lone.denominators(odd)


PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1) * 2} for i in range(12)]
THUMBS = [{"prompt": f"{i}=", "completion": str(i), "label": i % 3 == 0} for i in range(12)]
ANSWERS = [{"prompt": f"{i}=", "completion": str(i)} for i in range(12)]


def run(folder: Path, objective: Any, rows: Any, **extra: Any) -> Trainer:
    settings = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "max_completion_length": 6, "disable_tqdm": True, "report_to": [], "dtype": "float64", **extra,
    }  # fmt: skip
    by_name = isinstance(objective, str)
    return Trainer(
        tiny_llama(dtype=torch.float64), {**settings, "objective": objective} if by_name else settings, train_dataset=rows,
        objective=None if by_name else objective, processing_class=char_tokenizer(),
    )  # fmt: skip


def test_runs_of_the_sum_and_of_rpo_end_in_the_same_weights(tmp_path: Path) -> None:
    """Every self-check of the first step is on: the count of the masks is taken apart from the objective's own."""
    mine = run(tmp_path / "sum", summed(0.7, **PER_TOKEN), PAIRS)
    theirs = run(tmp_path / "rpo", Objective(losses.rpo, beta=0.3, alpha=0.7), PAIRS)
    values, expected = mine.train(), theirs.train()
    assert values["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    for (name, one), other in zip(mine.policy.named_parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


def test_metrics_per_answer_are_over_the_rows_of_their_term(tmp_path: Path) -> None:
    def short(logps: Tensor, mask: Tensor) -> LossOutput:
        return LossOutput(-logps.where(mask, 0.0), {"length": mask.sum(-1).float()}, "token_mean", mask)

    rows = [{"prompt": f"{i}=", "chosen": "a", "rejected": "bbb"} for i in range(8)]
    objective = Objective(losses.dpo, beta=0.3) + Objective(short, rows="chosen")
    settings = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "report_to": []}
    t = Trainer(
        tiny_llama(), settings, objective=objective, train_dataset=rows, eval_dataset=[{**rows[0], "prompt": "x"}],
        processing_class=char_tokenizer(),
    )  # fmt: skip
    values = t.train()
    assert values["length"] == values["eval_length"] == 2.0, "one letter and the end of the text"


def test_sft_alone_on_the_chosen_rows_of_pairs(tmp_path: Path) -> None:
    by_rows = run(tmp_path / "rows", "sft", PAIRS, objective_args={"rows": "chosen"})
    renamed = run(tmp_path / "columns", "sft", PAIRS, data_format="prompt_completion", columns={"completion": "chosen"})
    by_rows.train()
    renamed.train()
    for one, other in zip(by_rows.policy.parameters(), renamed.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_sum_trains_on_sampled_pairs_and_on_labels(tmp_path: Path) -> None:
    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    t = Trainer(
        tiny_llama(), {"output_dir": str(tmp_path / "online"), "max_steps": 2, "num_generations": 4, "report_to": [],
                       "per_device_train_batch_size": 8, "max_completion_length": 4, "disable_tqdm": True},
        objective=summed(0.2), train_dataset=[{"prompt": f"{i}="} for i in range(8)], processing_class=char_tokenizer(),
        reward_funcs=reward,
    )  # fmt: skip
    assert t.train()["nll_loss"] > 0
    labelled = Objective(losses.kto, beta=0.1) + 0.2 * Objective(losses.sft)
    assert run(tmp_path / "labels", labelled, THUMBS).train()["nll_loss"] > 0


REFUSED: list[tuple[Any, Any, dict[str, Any], str]] = [
    ("sft", ANSWERS, {"objective_args": {"rows": "chosen"}}, "'prompt_completion' rows have none"),
    ("distillation", THUMBS, {"objective_args": {"soft_weight": 0.5}}, "would imitate the undesired answers too"),
    (
        Objective(losses.reinforce, advantage="reward") + Objective(losses.sft), PAIRS, {"pair_rewards": [0.5, -0.5]},
        "would imitate the rejected answers too.*rows='chosen'.*rows='all'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "rows", "extra", "message"), REFUSED, ids=range(len(REFUSED)))
def test_data_without_chosen_rows_or_with_others_is_refused(
    tmp_path: Path, objective: Any, rows: Any, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, objective, rows, **extra)


def test_rows_all_may_imitate_both_answers(tmp_path: Path) -> None:
    assert run(tmp_path, "sft", PAIRS, objective_args={"rows": "all"}).train()["nll_loss"] > 0
