"""Loops on comparisons, end to end: what is paired and with what weight, opponents, judges, filters, resume, refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlft import Trainer, losses
from rlft.config import ConfigError
from rlft.errors import Interrupted, TrainingError
from rlft.rewards import RewardError
from rlft.types import Batch
from tests.test_trainer import PAIRS, PROMPTS, digest, digits_reward, settings, weights
from tests.tiny import char_tokenizer, tiny_llama
from tests.trainer.common import facts

F64 = torch.float64
STOPS = list(range(40, 90, 5))  # answers of many lengths
HELD = [{"prompt": f"{i}-{i}=", "answer": "0"} for i in range(4)]


def longer(completions: list[str], opponents: list[str], **columns: Any) -> list[float]:
    """A judge: the longer answer wins, with a probability that depends on both, and its own mirror image."""
    return [1 / (1 + math.exp(len(b) - len(a))) for a, b in zip(completions, opponents, strict=True)]


def coarse(completions: list[str], **columns: Any) -> list[float]:
    """Rewards with many ties."""
    return [float(len(text) // 3) for text in completions]


class Spy(Trainer):
    """Keeps every batch that a generation became."""

    seen: list[Batch]

    def rollout(self, indices: Any, step: int) -> Batch:
        batch = super().rollout(indices, step)
        self.seen = [*getattr(self, "seen", []), batch]
        return batch


def by_prompt(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The same ties, and a number that gives the prompt away."""
    return [100 * float(p.split("+")[0]) + len(text) // 3 for p, text in zip(prompts, completions, strict=True)]


def run(folder: Path, objective: str, **extra: Any) -> Spy:
    judge, reward = extra.pop("judge", None), extra.pop("reward", digits_reward)
    rows, held, model = extra.pop("rows", PROMPTS), extra.pop("held", None), extra.pop("model", None)
    optimizer = extra.pop("optimizer", None)
    return Spy(
        model if model is not None else tiny_llama(),
        settings(folder, objective, online=True, **{"stop_token_ids": STOPS, **extra}),
        train_dataset=rows,
        eval_dataset=held,
        processing_class=char_tokenizer(),
        reward_funcs=None if judge is not None else reward,
        judge=judge,
        optimizers=(optimizer, None),
    )


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def texts(t: Trainer, batch: Batch) -> list[str]:
    ends = {t.tokenizer.eos_token_id, *STOPS}
    rows = [
        [int(i) for i in ids[exists] if int(i) not in ends]
        for ids, exists in zip(batch.completion_ids, batch.completion_mask, strict=True)
    ]
    return t.tokenizer.batch_decode(rows)


# -- pairs ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("selection", ["best_worst", "all"])
@pytest.mark.parametrize("by", ["rewards", "judge"])
def test_pairs_are_what_the_answers_earn(tmp_path: Path, by: str, selection: str) -> None:
    extra = {"judge": longer} if by == "judge" else {"reward": by_prompt}
    t = run(tmp_path, "dpo", beta=0.1, max_steps=1, pair_selection=selection, **extra)
    values = t.train()
    (batch,) = t.seen
    pairs = 2 * (1 if selection == "best_worst" else 6)  # two prompts of four answers
    assert batch.num_rows == 2 * pairs
    assert batch.num_groups == pairs
    length = [len(text) for text in texts(t, batch)]
    alive = 0
    for k in range(pairs):
        better, worse = length[2 * k], length[2 * k + 1]
        gap = better - worse if by == "judge" else better // 3 - worse // 3
        assert gap >= 0
        both = batch.mask[2 * k : 2 * k + 2].any(-1)
        assert both.tolist() == [gap > 0] * 2, "ties are masked, both answers of them"
        alive += gap > 0
        if gap > 0:
            won = 1 / (1 + math.exp(-gap))
            assert batch.extras["win_rates"][2 * k : 2 * k + 2].tolist() == pytest.approx([won, 1 - won], abs=1e-6)
            if by == "rewards":
                assert batch.extras["margin"][2 * k] == gap
                assert batch.rewards is not None
                (prompt,) = t.tokenizer.batch_decode([batch.prompt_ids[k][batch.prompt_mask[k]]])
                assert int(batch.rewards[2 * k]) // 100 == int(prompt.split("+")[0]), (
                    "the pair stands by its own prompt"
                )
            elif selection == "all":
                assert float(batch.extras["margin"][2 * k]) == pytest.approx(2 * won - 1, abs=1e-6)
    assert 0 < alive < pairs or selection == "best_worst"
    assert values["pairs/tied_fraction"] == pytest.approx(1 - alive / pairs)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= values.keys()
    assert ("reward" in values) == (by == "rewards")
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-6), "step 1: the policy is its reference"


@pytest.mark.parametrize("objective", ["dpo", "ipo", "ipo_md"])
def test_a_step_is_that_of_the_loss_on_all_pairs_however_it_is_cut(tmp_path: Path, objective: str) -> None:
    """SGD in float64: with one micro-batch, with four, and by hand from the batch that was sampled."""
    results: list[dict[str, Tensor]] = []
    for accumulation in (1, 4):
        model = tiny_llama(dtype=F64)
        t = run(
            tmp_path / str(accumulation), objective, beta=0.3, max_steps=1, pair_selection="all", model=model, reward=coarse,
            per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation, max_grad_norm=None,
            dtype="float64", optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )  # fmt: skip
        t.train()
        results.append(weights(t))
    (batch,) = t.seen
    expected = by_hand(tmp_path, objective, batch)
    for found in results:
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_two_processes_of_which_one_has_ties_alone_take_the_step_of_the_other(tmp_path: Path) -> None:
    """Different numbers of micro-batches, one denominator, no hang; by hand from what process 0 sampled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests._pairs_of_two", str(tmp_path)],
            cwd=root,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    batches = [Batch.from_tensors(load_file(tmp_path / f"batch{rank}.safetensors")) for rank in range(2)]
    assert not bool(batches[1].mask.any())
    expected = by_hand(tmp_path, "dpo", batches[0])
    for rank in range(2):
        for name, value in load_file(tmp_path / f"weights{rank}.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def by_hand(folder: Path, objective: str, batch: Batch) -> dict[str, Tensor]:
    """Weights after a step of SGD at rate 0.1 on the mean over the pairs that are alive, beta 0.3."""
    fresh = run(folder / "hand", objective, beta=0.3, model=tiny_llama(dtype=F64), reward=coarse, dtype="float64")
    outputs = fresh.policy(batch, want=frozenset({"logps", "ref_logps"}))
    logps, ref = (outputs[name].where(batch.mask, 0.0).sum(-1) for name in ("logps", "ref_logps"))
    live = batch.mask.any(-1)[0::2]
    assert 0 < int(live.sum()) < len(live)
    four = [x[live] for x in (logps[0::2], logps[1::2], ref[0::2], ref[1::2])]
    soft = [batch.extras["win_rates"][0::2][live]] if objective == "ipo_md" else []
    getattr(losses, objective)(*four, *soft, beta=0.3).mean().backward()
    return {n: p.detach() if p.grad is None else p.detach() - 0.1 * p.grad for n, p in fresh.policy.named_parameters()}


def test_ties_alone_move_nothing(tmp_path: Path) -> None:
    t = run(tmp_path, "dpo", beta=0.1, max_steps=2, reward=lambda completions, **k: [1.0] * len(completions))
    before = weights(t)
    values = t.train()
    assert values["pairs/tied_fraction"] == 1.0
    assert values["grad_norm"] == 0.0
    assert all(torch.equal(before[name], p) for name, p in weights(t).items())


def test_a_gap_that_is_asked_for_thins_out_pairs(tmp_path: Path) -> None:
    t = run(tmp_path, "dpo", beta=0.1, max_steps=1, pair_selection="all", pair_min_gap=1.0, reward=coarse)
    t.train()
    (batch,) = t.seen
    live = batch.mask.any(-1)
    gaps = batch.extras["margin"][live]
    assert gaps.numel()
    assert bool((gaps > 1.0).all())


def test_dynamic_sampling_draws_prompts_whose_answers_differ(tmp_path: Path) -> None:
    def odd(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [
            len(text) + i / 100 if int(prompt.split("+")[0]) % 2 else 1.0
            for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]

    shares = {}
    for dynamic in (False, True):
        used: list[bool] = []

        class Watch(Spy):
            def prepare(self, batch: Batch, used: list[bool] = used) -> Batch:
                used += batch.mask.any(-1).tolist()
                return super().prepare(batch)

        extra = {"dynamic_sampling": True, "max_refills": 8} if dynamic else {}
        args = settings(
            tmp_path / str(dynamic), "dpo", online=True, beta=0.1, max_steps=2, pair_selection="all", **extra
        )
        Watch(tiny_llama(), args, train_dataset=PROMPTS, processing_class=char_tokenizer(), reward_funcs=odd).train()
        shares[dynamic] = sum(used) / len(used)
    assert shares[False] < 0.9
    assert shares[True] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "extra"),
    [("dpo", {"beta": 0.1}), ("ipo_md", {"mixture_coef": 0.1}), ("nash_md_pg", {"mixture_coef": 0.1})],
)
def test_loops_climb_a_reward(tmp_path: Path, objective: str, extra: dict[str, Any]) -> None:
    def steep(completions: list[str], **columns: Any) -> list[float]:
        return [20 * value for value in digits_reward(completions)]  # a fifth more digits wins with probability 0.98

    extra = {"beta": 0.05, "max_steps": 40, "num_generations": 8, "per_device_train_batch_size": 32, **extra}
    run(tmp_path, objective, learning_rate=1e-2, stop_token_ids=[], reward=steep, **extra).train()
    rewards = [row["reward"] / 20 for row in log(tmp_path)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards


# -- opponents --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["rewards", "judge"])
def test_every_answer_meets_one_of_the_opponent(tmp_path: Path, by: str) -> None:
    met: list[tuple[str, str]] = []

    def judge(completions: list[str], opponents: list[str], **columns: Any) -> list[float | None]:
        met.extend(zip(completions, opponents, strict=True))
        return [None if i == 1 else p for i, p in enumerate(longer(completions, opponents))]

    scored: list[list[float]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        scored.append(coarse(completions))
        return scored[-1]

    extra = {"judge": judge} if by == "judge" else {"reward": reward}
    t = run(tmp_path, "nash_md_pg", beta=0.1, mixture_coef=0.5, max_steps=1, **extra)
    values = t.train()
    (batch,) = t.seen
    won = batch.extras["win_rates"]
    assert batch.num_rows == 8
    if by == "rewards":
        ours, theirs = (torch.tensor(values) for values in scored)
        torch.testing.assert_close(won, torch.sigmoid(ours - theirs))
        assert bool((ours != theirs).any())
    else:
        ours = texts(t, batch)
        swapped = 0
        for row, (first, second) in enumerate(met):
            if row == 1:  # the judge had no answer: the row takes no part
                assert not bool(batch.mask[row].any())
                continue
            mine, other = (first, second) if first == ours[row] else (second, first)
            assert mine == ours[row]
            swapped += first != mine
            assert float(won[row]) == pytest.approx(longer([mine], [other])[0], abs=1e-6)
        assert 0 < swapped < 8, "which one the judge sees first is drawn"
        assert values["judge/unanswered"] == pytest.approx(1 / 8)
    live = batch.mask.any(-1)
    assert values["judge/win_rate"] == pytest.approx(float(won[live].mean()), abs=1e-6)


def test_a_step_of_nash_md_is_that_of_its_loss(tmp_path: Path) -> None:
    model = tiny_llama(dtype=F64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    t = run(tmp_path / "a", "nash_md_pg", beta=0.2, mixture_coef=0.3, max_steps=1, model=model, dtype="float64", optimizer=sgd,
            max_grad_norm=None)  # fmt: skip
    t.train()
    (batch,) = t.seen
    fresh = run(tmp_path / "b", "nash_md_pg", beta=0.2, mixture_coef=0.3, model=tiny_llama(dtype=F64), dtype="float64")
    out = fresh.policy(batch, want=frozenset({"logps", "ref_logps"}))
    won = batch.extras["win_rates"].double()
    losses.nash_md_pg(out["logps"], out["ref_logps"], won, batch.mask, beta=0.2).mean().backward()
    for name, p in fresh.policy.named_parameters():
        moved = p.detach() - 0.1 * p.grad if p.grad is not None else p.detach()
        torch.testing.assert_close(weights(t)[name], moved, rtol=1e-9, atol=1e-12)


def test_the_average_moves_by_its_decay_and_plays(tmp_path: Path) -> None:
    t = run(tmp_path, "nash_md_pg", beta=0.1, opponent_ema_decay=0.5, max_steps=3)
    expected = {name: p.detach().clone() for name, p in t.policy.model.named_parameters()}
    trail: list[dict[str, Tensor]] = []
    t.callbacks.append(lambda event, trainer, values: trail.append(weights(trainer)) if event == "step" else None)
    t.train()
    for step in trail:
        for name in expected:
            expected[name] = 0.5 * expected[name] + 0.5 * step[f"model.{name}"]
    average = t.parts.players.average
    assert average is not None
    state = average.state()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(value, trail[-1][f"model.{name}"]) for name, value in state.items())


def test_greedy_answers_are_judged_against_the_reference(tmp_path: Path) -> None:
    t = run(tmp_path, "ipo", beta=0.1, judge=longer, held=HELD, eval_on_start=True, max_steps=1)
    t.train()
    first = next(row for row in log(tmp_path) if "eval_judge/win_rate" in row)
    assert first["eval_judge/win_rate"] == 0.5, "before the first step both answers are the same"


# -- filters ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", ["best", "threshold", "rejection"])
def test_supervised_training_on_the_answers_that_are_kept(tmp_path: Path, keep: str) -> None:
    extra = {"threshold": {"keep_threshold": 1.0}, "rejection": {"keep_beta": 0.5}}.get(keep, {})
    t = run(tmp_path, "sft", keep=keep, reward=coarse, max_steps=1, **extra)
    values = t.train()
    (batch,) = t.seen
    assert batch.rewards is not None
    rewards, kept = batch.rewards.reshape(2, 4), batch.mask.any(-1).reshape(2, 4)
    if keep == "threshold":
        assert torch.equal(kept, rewards >= 1.0)
    else:
        assert bool(kept[torch.arange(2), rewards.argmax(-1)].all())
        assert keep == "rejection" or kept.sum(-1).tolist() == [1, 1]
    assert values["keep/fraction"] == pytest.approx(kept.double().mean().item())
    logps = run(tmp_path / "x", "sft", keep="best").policy(batch, want=frozenset({"logps"}))["logps"].detach()
    assert values["loss"] == pytest.approx(-float(logps[batch.mask].mean()), rel=1e-5), (
        "a mean over the kept tokens alone"
    )


def test_rejection_thins_out_pairs(tmp_path: Path) -> None:
    counts = {}
    for keep in ("all", "rejection"):
        extra = {"keep": keep, "keep_beta": 0.05} if keep == "rejection" else {}
        t = run(tmp_path / keep, "dpo", beta=0.1, max_steps=1, pair_selection="all", reward=coarse, **extra)
        t.train()
        counts[keep] = int(t.seen[0].mask.any(-1).sum())
    assert counts["rejection"] < counts["all"]


# -- resume -----------------------------------------------------------------------------------------------------------------
RUNS = {
    "dpo, all pairs, reused": ("dpo", {"pair_selection": "all", "steps_per_generation": 2, "num_iterations": 2}),
    "ipo_md from a mixture": ("ipo_md", {"mixture_coef": 0.3, "judge": longer}),
    "nash-ema": ("nash_md_pg", {"opponent_ema_decay": 0.7, "judge": longer}),
    "dpo, reference swapped (BPO)": (
        "dpo",
        {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_bit_identical(tmp_path: Path, name: str) -> None:
    objective, extra = RUNS[name]
    extra = {"beta": 0.1, "max_steps": 5, "use_peft": True, "lora_r": 4, **extra}
    whole = run(tmp_path / "whole", objective, **extra)
    whole.train()
    cut = run(tmp_path / "cut", objective, **extra)
    cut.callbacks.append(
        lambda event, t, values: os.kill(os.getpid(), signal.SIGTERM) if event == "step" and t.step == 3 else None
    )
    with pytest.raises(Interrupted):
        cut.train()
    resumed = run(tmp_path / "cut", objective, **extra)
    resumed.train()
    assert digest(resumed, tmp_path / "cut")[0] == digest(whole, tmp_path / "whole")[0]
    theirs, ours = ([{k: v for k, v in r.items() if not k.startswith("meter/")} for r in digest(t, tmp_path / f)[1]]
                    for t, f in ((resumed, "cut"), (whole, "whole")))  # fmt: skip
    assert theirs == ours
    averages = [t.parts.players.average for t in (whole, resumed)]
    assert (None not in averages) is ("opponent_ema_decay" in extra)
    if averages[0] is not None:
        one, other = (average.state() for average in averages)
        assert all(torch.equal(value, other[n]) for n, value in one.items())


# -- refusals ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("objective", "extra", "message"),
    [
        ("nash_md_pg", {}, "needs an opponent; set mixture_coef"),
        ("nash_md_pg", {"mixture_coef": 0.5, "opponent_ema_decay": 0.9}, "are two opponents; keep one"),
        ("nash_md_pg", {"mixture_coef": 0.5, "beta": 0.0}, "mixes in the reference, and objective 'nash_md_pg' has none"),
        ("nash_md_pg", {"mixture_coef": 0.5, "num_iterations": 2}, "num_iterations=2 gives such samples"),
        ("nash_md_pg", {"mixture_coef": 0.5, "dynamic_sampling": True}, "compares each answer with an opponent's; drop it"),
        ("nash_md_pg", {"mixture_coef": 1.5}, "mixture_coef must be >= 0 and <= 1"),
        ("nash_md_pg", {"opponent_ema_decay": 1.0}, "at 1 it never moves"),
        ("nash_md_pg", {"mixture_coef": 0.5, "pair_selection": "all"}, "pair_selection='all' does nothing"),
        ("rloo", {"mixture_coef": 0.5}, "mixture_coef=0.5 does nothing"),
        ("rloo", {"pair_min_gap": 0.5}, "pair_min_gap=0.5 does nothing"),
        ("rloo", {"keep": "best"}, "biases its baseline; use it with sft"),
        ("rloo", {"judge": longer}, "judge does nothing: objective 'rloo' learns from no comparison"),
        ("dpo", {"opponent_ema_decay": 0.5}, "opponent_ema_decay=0.5 does nothing"),
        ("dpo", {"num_generations": 1}, "set num_generations >= 2, got 1"),
        ("dpo", {"keep": "best"}, "leaves one answer per prompt, and a pair needs two"),
        ("dpo", {"judge": longer, "replay_probability": 0.5}, "does not go with a judge"),
        ("dpo", {"judge": longer, "keep": "threshold", "keep_threshold": 0.5}, "does nothing without rewards"),
        ("dpo", {"keep": "rejection"}, "keep: rejection needs keep_beta"),
        ("dpo", {"keep_threshold": 0.5}, "does nothing unless keep is 'threshold'"),
        ("simpo", {"mixture_coef": 0.5, "objective_args": {"gamma": 0.5}}, "objective 'simpo' has none"),
        ("sft", {"beta": None}, "uses no rewards"),
        ("bradley_terry", {"beta": None}, "uses no rewards"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(tmp_path: Path, objective: str, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, objective, **{"beta": 0.1, **extra})


def test_judge_and_rewards_together_and_judging_without_a_reference_are_refused(tmp_path: Path) -> None:
    args = settings(tmp_path, "dpo", online=True, beta=0.1)
    with pytest.raises(ConfigError, match="keep one of them"):
        Trainer(
            tiny_llama(),
            args,
            train_dataset=PROMPTS,
            processing_class=char_tokenizer(),
            reward_funcs=coarse,
            judge=longer,
        )
    with pytest.raises(ConfigError, match="objective 'simpo' has none; drop the evaluation data"):
        run(tmp_path, "simpo", beta=2.0, objective_args={"gamma": 0.5}, judge=longer, held=HELD)


def test_offline_the_settings_of_comparisons_do_nothing(tmp_path: Path) -> None:
    for extra in ({"pair_selection": "all"}, {"mixture_coef": 0.5}, {"keep": "best"}):
        with pytest.raises(ConfigError, match="does nothing"):
            Trainer(
                tiny_llama(),
                settings(tmp_path, "dpo", beta=0.1, **extra),
                train_dataset=PAIRS,
                processing_class=char_tokenizer(),
            )


@pytest.mark.parametrize(
    ("returned", "message"),
    [(1.5, "returned 1.5 for row 0 at step 1; it must return the probability"), ("a", "returned 'a' of type str")],
)
def test_a_judge_that_returns_no_probability_is_named(tmp_path: Path, returned: Any, message: str) -> None:
    def judge(completions: list[str], opponents: list[str], **columns: Any) -> list[Any]:
        return [returned] * len(completions)

    with pytest.raises(RewardError, match=message):
        run(tmp_path, "dpo", beta=0.1, judge=judge).train()


def test_a_judge_that_never_answers_stops_the_run(tmp_path: Path) -> None:
    def silent(completions: list[str], opponents: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    for objective, extra in (("dpo", {}), ("nash_md_pg", {"mixture_coef": 0.5})):
        t = run(tmp_path / objective, objective, beta=0.1, judge=silent, max_steps=5, max_unscored_steps=2, **extra)
        with pytest.raises(TrainingError, match="no answer for 2 steps in a row"):
            t.train()
        assert t.step == 1


def test_the_table_of_the_run_says_what_is_compared(tmp_path: Path) -> None:
    rows = facts(run(tmp_path, "dpo", beta=0.1, pair_selection="all", pair_min_gap=0.5))
    assert rows["pairs"] == "all pairs, more than 0.5 apart; by rewards"
    assert rows["rewards"] == "digits_reward"
    rows = facts(run(tmp_path, "ipo_md", beta=0.1, mixture_coef=0.25, judge=longer))
    assert (
        rows["pairs"] == "best against worst, ties left out; by judge longer; answers from policy^0.75 x reference^0.25"
    )
    assert "rewards" not in rows
    rows = facts(run(tmp_path, "nash_md_pg", beta=0.1, opponent_ema_decay=0.9))
    assert rows["opponent"] == "moving average of the policy, decay 0.9; by Bradley-Terry on the rewards"
    assert facts(run(tmp_path, "sft", keep="best"))["kept"] == "the best of 4"


def test_a_function_that_cannot_compare_is_no_judge(tmp_path: Path) -> None:
    def blind(completions: list[str]) -> list[float]:
        return [0.5] * len(completions)

    with pytest.raises(ConfigError, match="takes no `opponents`, so it cannot compare"):
        run(tmp_path, "dpo", beta=0.1, judge=blind)
    with pytest.raises(ConfigError, match="judge='math' must read module:function"):
        run(tmp_path, "dpo", beta=0.1, judge="math")


def test_a_column_cannot_take_the_place_of_the_opponents(tmp_path: Path) -> None:
    rows = [{**row, "opponents": "x"} for row in PROMPTS]
    with pytest.raises(ValueError, match="the column name 'opponents' is an argument of every judge"):
        run(tmp_path, "dpo", beta=0.1, judge=longer, rows=rows).train()


def test_a_judge_by_name_from_a_file(tmp_path: Path) -> None:
    """From YAML: `judge: file.py:function`, which gets prompts and columns by keyword."""
    (tmp_path / "my_judge.py").write_text(
        "def even(prompts, completions, opponents, answer, trainer_state):\n"
        "    assert len(prompts) == len(opponents) == len(answer) and trainer_state.global_step >= 0\n"
        "    return [float(len(a) > len(b)) if len(a) != len(b) else None for a, b in zip(completions, opponents)]\n"
    )
    args = settings(
        tmp_path / "run", "ipo", online=True, beta=0.1, judge=f"{tmp_path}/my_judge.py:even", stop_token_ids=STOPS
    )
    t = Trainer(tiny_llama(), args, train_dataset=PROMPTS, processing_class=char_tokenizer())
    assert t.online
    assert math.isfinite(t.train()["loss"])
