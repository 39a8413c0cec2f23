"""Does the sampler draw from the policy? A few of its tokens are scored again by the policy, every so many generations.

A sampler says of every token how likely it was when it was drawn. Under the weights, adapters, temperature and filters
that the trainer believes in, the policy says the same, up to rounding. Where it does not, the run trains on samples of
another model, and nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlft.rollout import Rollout, SamplingParams
from rlft.rollout.draw import filter_logits
from rlft.run.checks import before as selfcheck
from rlft.run.step import micro_batches as micro
from rlft.run.step import update as guard

if TYPE_CHECKING:
    from rlft.trainer import Trainer

__all__ = ["bound", "policy_logps", "verdict", "watch"]

#: Rows that are scored again, and tokens of each.
ROWS, TOKENS = 4, 256
#: Mean |difference| per token, nats: samplers that run the policy itself in float32 or better, and all others.
EXACT, ROUGH = 1e-3, 0.1


def watch(trainer: Trainer, examples: Sequence[Any], sampled: Rollout, params: SamplingParams) -> None:
    """Score some rows of a rollout again; what is wrong is kept for :func:`verdict`. No process waits here.

    Due at the first two generations (the second is the first after an update) and at every
    ``sampler_check_steps``-th.

    Args:
        trainer: the run; ``sampling/sampling_logp_difference/mean`` and ``/max`` go to its metrics.
        examples: the prompts, one for each group of rows.
        sampled: what the sampler gave back, prompt-major.
        params: what it was asked for.
    """
    every = trainer.config.sampler_check_steps
    generation = trainer.rollouts - 1
    if not every or not (generation < 2 or generation % every == 0) or not len(sampled):
        return
    n = len(sampled) // len(examples)
    count = min(ROWS, len(sampled))
    rows = [(2 * i + 1) * len(sampled) // (2 * count) for i in range(count)]  # spread over the prompts
    prompts = [list(examples[row // n].prompt_ids) for row in rows]
    answers = [sampled.completion_ids[row][:TOKENS] for row in rows]
    theirs = torch.tensor([x for row in rows for x in sampled.logps[row][:TOKENS]], dtype=torch.float64)
    mine = policy_logps(trainer, prompts, answers, params)
    gap = (theirs - mine).abs()
    if trainer.config.sampler_correction is None:  # which measures it on every token
        trainer.metrics.add("sampling/sampling_logp_difference/mean", gap, None)
        trainer.metrics.add_max("sampling/sampling_logp_difference/max", gap)
    if not float(gap.mean()) <= bound(trainer):
        trainer.sampler_fault = _message(trainer, gap, theirs, prompts, answers, params)


def verdict(trainer: Trainer) -> None:
    """Stop every process where :func:`watch` found something on any. Collective, in online runs.

    Raises:
        TrainingError: naming the drift, its likely causes and what to do; nothing was trained on those samples.
    """
    if trainer.online and trainer.config.sampler_check_steps:
        guard.agree(trainer, trainer.sampler_fault)


def bound(trainer: Trainer) -> float:
    """The mean drift at which a run stops, nats per token."""
    if trainer.config.sampler_check_bound is not None:
        return trainer.config.sampler_check_bound
    itself = getattr(trainer.sampler, "reads_live_weights", False) and trainer.config.sampler_correction is None
    return EXACT if itself and selfcheck.exact(trainer) else ROUGH


@torch.no_grad()
def policy_logps(
    trainer: Trainer, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], params: SamplingParams
) -> Tensor:
    """Log-probs of sampled tokens under the policy, after the filters that they were drawn through.

    Without filters that is the forward pass that trains; with filters, the bare model's logits, a row at a time.

    Args:
        trainer: the run; its unwrapped policy is used, so that no other process has to take part.
        prompts: token ids of each row's prompt.
        answers: the sampled ids.
        params: how they were drawn.

    Returns:
        float64 ``[N]`` on the CPU, row by row.
    """
    policy = trainer.policy
    if params.top_p == 1.0 and not params.top_k and not params.min_p and params.repetition_penalty == 1.0:
        batch = selfcheck.batch_of(trainer, list(zip(prompts, answers, strict=True)))
        found = torch.zeros(batch.mask.shape, dtype=torch.float64)
        for rows in micro.without_gradient(trainer, batch, alone=True):
            part = batch.select(rows)
            logps = policy(part, want=frozenset({"logps"}), temperature=params.temperature)["logps"]
            found[rows, : logps.shape[1]] = logps.double().cpu()
        return found[batch.mask.cpu()]
    found = []
    with policy.generating() as model:
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=trainer.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            scores = filter_logits(logits, params, _seen(ids[0], len(prompt), logits.shape[-1]))
            found.append(scores.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found).double().cpu()


def _seen(ids: Tensor, prompt: int, vocab: int) -> Tensor:
    """``[T, V]`` which tokens stood before each completion token."""
    present = torch.zeros(len(ids), vocab, dtype=torch.bool, device=ids.device)
    present[torch.arange(len(ids)), ids] = True
    return present.cumsum(0).bool()[prompt - 1 : -1]


def _message(
    trainer: Trainer,
    gap: Tensor,
    theirs: Tensor,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    params: SamplingParams,
) -> str:
    """What came, and which known fault would give just that."""
    limit = bound(trainer)
    proved = _diagnosis(trainer, theirs, limit, prompts, answers, params)
    causes = proved or (
        "likely causes: weights of an earlier step in the sampler, an adapter that never reached it, another temperature or "
        "filter than the run's, or dropout while sampling"
    )
    return (
        f"step {trainer.step + 1}: the sampler {type(trainer.sampler).__name__} gave log-probs that differ from the policy's by "
        f"{float(gap.mean()):.3g} nats per token on average and {float(gap.max()):.3g} at most over {gap.numel()} tokens "
        f"(sampler_check_bound {limit:g}), so its samples are not the policy's; {causes}. Nothing was trained on them. Compare "
        f"with sampler: transformers, which reads the live weights; where the difference is known and wanted, raise "
        f"sampler_check_bound"
    )


def _diagnosis(
    trainer: Trainer,
    theirs: Tensor,
    limit: float,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    params: SamplingParams,
) -> str | None:
    """The one fault that explains the numbers, where one does."""
    from dataclasses import replace

    def explains() -> bool:
        return float((policy_logps(trainer, prompts, answers, params) - theirs).abs().mean()) <= limit

    if params.temperature != 1.0:
        asked, params = params, replace(params, temperature=1.0)
        if explains():
            return (
                f"they are those of temperature 1, and the run's is {asked.temperature:g}: it never reached the sampler"
            )
        params = asked
    model = trainer.policy.hf_model
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            if explains():
                return "they are those of the model without its adapter: the adapter never reached the sampler"
    return None
