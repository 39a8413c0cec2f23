"""Passes through the trunks of policy and reference, counted in real runs: one for each set of weights and batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.models import Policy
from rlft.models.scorer import CausalScorer
from rlft.run.step.passes import Passes
from rlft.types import Batch
from tests.tiny import tiny_llama
from tests.trainer.common import run


class Trunks:
    """``(with gradient?, trunk passes)`` of each forward of the policy; sampling is not among them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[tuple[bool, int]] = Counter()
        self.count = 0
        forward, states = Policy.forward, CausalScorer.states

        def counted(policy: Policy, batch: Batch, *, want: frozenset[str], temperature: float = 1.0) -> Any:
            self.count = 0
            out = forward(policy, batch, want=want, temperature=temperature)
            self.seen[torch.is_grad_enabled(), self.count] += 1
            return out

        def trunk(scorer: CausalScorer, *arguments: Any) -> Any:
            self.count += 1
            return states(scorer, *arguments)

        monkeypatch.setattr(Policy, "forward", counted)
        monkeypatch.setattr(CausalScorer, "states", trunk)


QUIET: dict[str, Any] = {"self_checks": False, "sampler_check_steps": 0, "beta": 0.1}
CASES: list[tuple[str, dict[str, Any], dict[tuple[bool, int], int]]] = [
    # one step per generation: the policy sampled, so it stands for the behaviour policy, and the reference is scored once
    ("agro_off_policy_rb", {"max_steps": 2}, {(True, 2): 2}),
    ("agro_off_policy_rb2", {"max_steps": 2}, {(True, 2): 2}),
    ("agro_on_policy_lr_moments", {"max_steps": 2}, {(True, 2): 2}),
    # three passes over a generation: reference and behaviour policy once, then the policy alone
    ("agro_off_policy_rb", {"max_steps": 6, "num_iterations": 3}, {(False, 2): 2, (True, 1): 6}),
    ("agro_off_policy_rb2", {"max_steps": 6, "num_iterations": 3, "use_peft": True}, {(False, 2): 2, (True, 1): 6}),
    # two steps per generation, each on answers of its own: nothing is kept, and nothing runs ahead of time
    ("agro_off_policy_rb", {"max_steps": 4, "steps_per_generation": 2}, {(True, 3): 4}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "extra", "passes"), CASES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CASES)])
def test_no_trunk_runs_twice_on_the_same_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    extra: dict[str, Any],
    passes: dict[tuple[bool, int], int],
) -> None:
    trunks = Trunks(monkeypatch)
    run(tmp_path, name, **QUIET, **extra).train()
    assert dict(trunks.seen) == passes


@pytest.mark.parametrize("name", ["agro_off_policy_rb", "agro_off_policy_rb2"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kept_states_train_like_passes_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lora: bool
) -> None:
    ends = []
    for kept in (True, False):
        with monkeypatch.context() as patch:
            if not kept:
                original = Passes.outputs

                def without(*arguments: Any, _original: Any = original, **options: Any) -> Any:
                    found = _original(*arguments, **options)
                    return {n: t for n, t in found.items() if n not in ("states", "ref_states")}

                patch.setattr(Passes, "outputs", without)
            trunks = Trunks(patch)
            t = run(
                tmp_path / str(kept), name, model=tiny_llama(dtype=torch.float64), dtype="float64", num_iterations=3,
                max_steps=6, use_peft=lora, max_grad_norm=None, **QUIET,
            )  # fmt: skip
            t.train()
            assert trunks.seen[True, 1 if kept else 3] == 6
            ends.append({n: p.detach() for n, p in t.policy.named_parameters()})
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-7, atol=1e-8)  # six steps of Adam


def test_kept_states_are_of_the_weights_that_sampled(tmp_path: Path) -> None:
    """A moved reference takes its own along; the policy's stay."""
    t = run(
        tmp_path, "agro_off_policy_rb", num_iterations=3, max_steps=2, sync_ref_model=True, ref_model_mixup_alpha=0.5,
        ref_model_sync_steps=2, **QUIET,
    )  # fmt: skip
    t.train()
    (left,) = t.source.queue  # type: ignore[attr-defined]
    assert left.behaviour_states is not None
    assert left.ref_states is None
    assert left.ref_logps is None
