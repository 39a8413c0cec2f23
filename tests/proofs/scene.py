"""Random float64 batches in which everything ragged happens at once, and what a forward pass returns for them.

A scene is what an :class:`rlft.objective.Objective` sees in a step: a batch of constants, and outputs that carry gradient.
Every slot that does not count holds NaN, so whatever is proved on a scene is proved with poison in its padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlft.types import Batch
from tests.losses.enumeration import small

F64 = torch.float64

#: Groups of 5, 4 and 2 answers, interleaved: row 3 is blank, row 8 unscored; rows 2, 6 and 9 have a gap (a tool spoke).
GROUP_IDS = [0, 1, 0, 1, 1, 0, 1, 0, 0, 2, 2]
GROUP_MASK = ["1111", "1100", "1010", "0000", "1000", "1110", "0111", "1100", "1110", "1101", "1111"]
BLANK, UNSCORED = 3, 8
#: Seven pairs, chosen first: one without a chosen answer, one without a rejected one.
PAIR_MASK = "1111 1100 1010 1110 0000 1100 1000 0111 1101 0000 1110 1111 1100 1000".split()
#: The same without the two blank rows, for losses that count rows and not pairs.
WHOLE_MASK = [m for i, m in enumerate(PAIR_MASK) if i // 2 not in (2, 4)]

#: Outputs of a forward pass per token, with the range they are drawn from.
PER_TOKEN = {
    "logps": (-2.5, -0.1),
    "token_kl": (0.01, 0.5),
    "teacher_kl": (0.01, 0.5),
    "token_log_ratio_sq": (0.01, 0.5),
    "behaviour_log_ratio": (-0.5, 0.5),
    "behaviour_log_ratio_sq": (0.01, 0.5),
    "values": (-2.0, 2.0),
    "entropy": (0.1, 2.0),
}


@dataclass(frozen=True)
class Scene:
    """One step's data.

    Attributes:
        batch: the constants.
        outputs: what the forward pass returned, by name; differentiable in ``leaves``.
        leaves: what gradients are taken of. Changes of a scene keep them.
    """

    batch: Batch
    outputs: Mapping[str, Tensor]
    leaves: Mapping[str, Tensor]

    @property
    def logps(self) -> Tensor:
        return self.outputs["logps"]

    @property
    def mask(self) -> Tensor:
        return self.batch.mask

    @property
    def ref(self) -> Tensor:
        assert self.batch.ref_logps is not None
        return self.batch.ref_logps

    @property
    def rewards(self) -> Tensor:
        assert self.batch.rewards is not None
        return self.batch.rewards

    def summed(self, tokens: Tensor) -> Tensor:
        """``[B]`` sums over the tokens that count."""
        return tokens.where(self.mask, 0.0).sum(-1)

    def lengths(self) -> Tensor:
        """``[B]`` tokens that count, 1 for a blank row."""
        return self.mask.sum(-1).clamp(min=1).to(F64)

    def but(self, **changes: Tensor) -> Scene:
        """Other outputs, constants or extras, by name; constants lose their gradient."""
        outputs, fields, extras = dict(self.outputs), {}, dict(self.batch.extras)
        for name, value in changes.items():
            if name in outputs and name != "values":
                outputs[name] = value
            elif name in Batch.__dataclass_fields__:
                fields[name] = value.detach()
            else:
                extras[name] = value.detach()
        return replace(self, batch=self.batch.replace(**fields, extras=extras), outputs=outputs)

    def with_outputs(self, **changes: Tensor) -> Scene:
        """Other outputs: for ``values``, which is also the name of a constant."""
        return replace(self, outputs={**self.outputs, **changes})

    def take(self, rows: list[int] | Tensor) -> Scene:
        """Some of the rows, in that order."""
        rows = torch.as_tensor(rows)
        b = self.batch
        per_row = {n: t[rows] for n, t in b.tensors().items() if not n.startswith(("prompt", "extras."))}
        batch = replace(b, **per_row, extras={n: t[rows] for n, t in b.extras.items()})
        return replace(self, batch=batch, outputs={n: t[rows] for n, t in self.outputs.items()})

    def regrouped(self, group_ids: Tensor) -> Scene:
        """The rows as answers to other prompts."""
        prompts = torch.zeros(int(group_ids.max()) + 1, 2, dtype=torch.long)
        batch = self.batch.replace(group_ids=group_ids, prompt_ids=prompts, prompt_mask=torch.ones_like(prompts).bool())
        return replace(self, batch=batch)


def _mask(lines: Sequence[str]) -> Tensor:
    return torch.tensor([[c == "1" for c in line] for line in lines])


def _scene(mask: Tensor, group_ids: Tensor, seed: int) -> Scene:
    g = torch.Generator().manual_seed(seed)
    rows, width = mask.shape
    blank = ~mask.any(-1)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = low + (high - low) * torch.rand(*(shape or (rows, width)), generator=g, dtype=F64)
        return values.where(mask if values.ndim == 2 else ~blank, torch.nan)

    outputs = {name: uniform(*bounds) for name, bounds in PER_TOKEN.items()}
    outputs["scores"] = uniform(-2, 2, rows)
    outputs = {name: tensor.requires_grad_() for name, tensor in outputs.items()}
    last = (mask * torch.arange(1, width + 1)).amax(-1).clamp(min=2)
    groups = int(group_ids.max()) + 1
    batch = Batch(
        prompt_ids=torch.zeros(groups, 2, dtype=torch.long),
        prompt_mask=torch.ones(groups, 2, dtype=torch.bool),
        completion_ids=torch.zeros(rows, width, dtype=torch.long),
        completion_mask=torch.arange(width) < last[:, None],
        mask=mask,
        group_ids=group_ids,
        rewards=uniform(-1, 1, rows),
        old_logps=uniform(-2.5, -0.1),
        ref_logps=uniform(-2.5, -0.1),
        advantages=uniform(-2, 2),
        values=uniform(-2, 2),
        returns=uniform(-2, 2),
        labels=torch.rand(rows, generator=g) > 0.5,
        extras={
            "kl_baseline": torch.full((rows,), 0.3, dtype=F64).where(~blank, torch.nan),
            "margin": uniform(0, 1, rows),
            "win_rates": uniform(0, 1, rows),
            "weights": uniform(0, 1, rows),
            "step_labels": uniform(0, 1),
        },
    )
    return Scene(batch, outputs, outputs)


def groups(seed: int = 0) -> Scene:
    """Ragged groups of scored answers."""
    scene = _scene(_mask(GROUP_MASK), torch.tensor(GROUP_IDS), seed)
    return scene.but(rewards=scene.rewards.index_fill(0, torch.tensor([UNSCORED]), torch.nan))


def pairs(seed: int = 0) -> Scene:
    """Preference pairs, two of them with a blank row. Chosen answers are desirable."""
    mask = _mask(PAIR_MASK)
    scene = _scene(mask, torch.arange(len(mask) // 2).repeat_interleave(2), seed)
    return scene.but(labels=torch.arange(len(mask)) % 2 == 0)


def whole_pairs(seed: int = 0) -> Scene:
    """Preference pairs without a blank row: counting rows is counting pairs twice. Chosen answers are desirable."""
    mask = _mask(WHOLE_MASK)
    scene = _scene(mask, torch.arange(len(mask) // 2).repeat_interleave(2), seed)
    return scene.but(labels=torch.arange(len(mask)) % 2 == 0)


def short(seed: int = 0) -> Scene:
    """Groups of answers of one token."""
    mask = _mask(["1"] * 9)
    return _scene(mask, torch.tensor([0, 1, 0, 1, 1, 0, 2, 2, 0]), seed)


def large(seed: int = 0) -> Scene:
    """:func:`groups` without the group of two: three scored answers or more to each prompt."""
    scene = groups(seed)
    kept = [i for i, g in enumerate(GROUP_IDS) if g < 2]
    taken = scene.take(kept)
    return taken.regrouped(taken.batch.group_ids)


def even(seed: int = 0) -> Scene:
    """Groups of answers of one length, four tokens."""
    mask = _mask(["1111"] * 9)
    return _scene(mask, torch.tensor([0, 1, 0, 1, 1, 0, 2, 2, 0]), seed)


def fresh(seed: int = 0) -> Scene:
    """:func:`groups`, sampled by the policy itself."""
    scene = groups(seed)
    return scene.but(old_logps=scene.logps)


def per_row(seed: int = 0) -> Scene:
    """:func:`groups` with one advantage for each answer."""
    scene = groups(seed)
    g = torch.Generator().manual_seed(seed + 100)
    return scene.but(advantages=4 * torch.rand(len(GROUP_IDS), generator=g, dtype=F64) - 2)


def started(seed: int = 0) -> Scene:
    """:func:`groups` with a critic that values every prompt, also where the first token of the answer does not count."""
    scene = groups(seed)
    g = torch.Generator().manual_seed(seed + 100)
    drawn = (4 * torch.rand(scene.mask.shape, generator=g, dtype=F64) - 2).where(
        scene.mask.any(-1, keepdim=True), torch.nan
    )
    drawn[:, 1:] = drawn[:, 1:].where(scene.mask[:, 1:], torch.nan)
    return Scene(scene.batch, *({**scene.outputs, "values": drawn.requires_grad_()},) * 2)


def tree(seed: int = 0) -> Scene:
    """Answers of an enumerable policy in groups of three, two and two; everything is a function of its table of logits."""
    s = small(seed)
    answers = torch.tensor([0, 2, 3, 1, 3, 2, 2])
    behaviour = s.logits.detach()
    log_ratio = s.world.log_ratio_table(s.logits, s.ref)
    outputs = {
        "logps": s.logps,
        "token_kl": s.world.token_kl(s.logits, s.ref),
        "token_log_ratio_sq": s.world.token_expectation(log_ratio.square(), s.logits),
        "behaviour_log_ratio": s.world.token_expectation(log_ratio, behaviour),
        "behaviour_log_ratio_sq": s.world.token_expectation(log_ratio.square(), behaviour),
    }
    mask = s.world.mask[answers]
    scene = _scene(mask, torch.tensor([0, 0, 1, 0, 1, 2, 2]), seed)
    scene = Scene(scene.batch, {n: t[answers] for n, t in outputs.items()}, {"logits": s.logits})
    return scene.but(ref_logps=s.ref_logps[answers], old_logps=scene.logps, rewards=s.rewards[answers])
