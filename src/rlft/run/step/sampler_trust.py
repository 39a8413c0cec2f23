"""Does the sampler draw from the policy? A few of its tokens are scored again by the policy, every so many generations.

A sampler says of every token how likely it was when it was drawn. Under the weights, adapters, temperature and filters
that the trainer believes in, the policy says the same, up to rounding. Where it does not, the run trains on samples of
another model, and nothing else would show it. Where the two are equal, the sampler's numbers are the old log-probs of a
step, and no pass has to make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft.rollout import Rollout, SamplingParams
from rlft.rollout.draw import filter_logits
from rlft.run.step import probes
from rlft.run.step.micro_batches import MicroBatches
from rlft.run.step.parts import Parts
from rlft.run.step.watchers import Watcher
from rlft.types import Batch

__all__ = ["SamplerTrust"]

#: Rows that are scored again, and tokens of each.
ROWS, TOKENS = 4, 256
#: Mean |difference| per token, nats: samplers that run the policy itself in float32 or better, and all others.
EXACT, ROUGH = 1e-3, 0.1


class SamplerTrust(Watcher):
    """Owns what is known of the sampler: a fault that stops the run, and whether its log-probs are the policy's.

    Attributes:
        fault: what is wrong with the last generation; None where nothing is.
        agrees: the sampler's log-probs with the policy's; None: not yet compared.
        noted: whether the sampler's log-probs are of the policy that trains, as far as settings tell: read from its live
            weights, in float32, without a filter after the temperature. Not for replayed answers, nor where the two are to
            be told apart (``sampler_correction``).
        bound: the mean drift at which a run stops, nats per token.
    """

    def __init__(self, parts: Parts, micro_batches: MicroBatches) -> None:
        self.config, self.sampler, self.policy = config, sampler, policy = parts.config, parts.sampler, parts.policy
        self.pad_id, self.micro_batches = parts.tokenizer.pad_token_id, micro_batches
        self.processes, self.journal = parts.processes, parts.journal
        draws_others = (
            parts.replay is not None or parts.players.opponent is not None
        )  # whose answers may be of a mixture
        self.fault: str | None = None
        self.agrees: bool | None = None
        live = bool(getattr(sampler, "reads_live_weights", False)) and config.sampler_correction is None
        unfiltered = config.top_p == 1.0 and not config.top_k and not config.min_p and config.repetition_penalty == 1.0
        # the sampler notes float32: enough for float32 policies alone
        single = {p.dtype for p in policy.hf_model.parameters()} == {torch.float32}
        self.noted = live and unfiltered and not draws_others and config.mixed_precision == "no" and single
        drift = EXACT if live and probes.exact(policy, config.mixed_precision) else ROUGH
        self.bound: float = drift if config.sampler_check_bound is None else config.sampler_check_bound

    # -- old log-probs without a pass -------------------------------------------------------------------------------------
    @property
    def usable(self) -> bool:
        """Whether the sampler's log-probs may be old log-probs: not yet compared, or found equal."""
        return self.noted and self.agrees is not False

    @property
    def trusted(self) -> bool:
        """Whether they are taken without another look: once they were found equal, or where that check is switched off."""
        return self.usable and bool(self.agrees or not self.config.checks_itself("on_policy"))

    def compare(self, batch: Batch, scored: Tensor, noted: Tensor) -> bool:
        """Compare the sampler's log-probs of a generation with the policy's own, once in a run. Collective.

        Args:
            batch: the generation.
            scored: ``[B, T]`` by the forward pass that trains.
            noted: ``[B, T]`` by the sampler.

        Returns:
            Whether they agree on every process.
        """
        gap = (scored - noted).abs()[batch.completion_mask]
        worst = gap.max().double() if gap.numel() else torch.zeros((), dtype=torch.float64)
        apart = (~(worst <= probes.EXACT)).double().reshape(1)  # NaN does not agree either
        self.agrees = float(self.processes.sum(apart)) == 0
        if not self.agrees:
            self.journal.warn_once(
                "sampler logps",
                f"step {self.processes.progress.step + 1}: log-probs noted while sampling and those of the policy differ by up to "
                f"{float(worst):.2g} nats (bound {probes.EXACT:g}), so old log-probs are scored again for every generation "
                f"(slower)",
            )
        return self.agrees

    # -- stale weights, a lost adapter, another temperature -----------------------------------------------------------------
    def look(self, examples: Sequence[Any], sampled: Rollout, params: SamplingParams) -> None:
        """Score some rows of a generation again; what is wrong stops the run when its step begins. No process waits here.

        Due at the first two generations (the second is the first after an update) and at every
        ``sampler_check_steps``-th.

        Args:
            examples: the prompts, one for each group of rows.
            sampled: what the sampler gave back, prompt-major.
            params: what it was asked for.
        """
        every = self.config.sampler_check_steps
        generation = self.processes.progress.generations - 1
        if not every or not (generation < 2 or generation % every == 0) or not len(sampled):
            return
        n = len(sampled) // len(examples)
        count = min(ROWS, len(sampled))
        rows = [(2 * i + 1) * len(sampled) // (2 * count) for i in range(count)]  # spread over the prompts
        prompts = [list(examples[row // n].prompt_ids) for row in rows]
        answers = [sampled.completion_ids[row][:TOKENS] for row in rows]
        theirs = torch.tensor([x for row in rows for x in sampled.logps[row][:TOKENS]], dtype=torch.float64)
        mine = self.policy_logps(prompts, answers, params)
        gap = (theirs - mine).abs()
        if self.config.sampler_correction is None:  # which measures it on every token
            self.journal.metrics.add("sampling/sampling_logp_difference/mean", gap, None)
            self.journal.metrics.add_max("sampling/sampling_logp_difference/max", gap)
        if not float(gap.mean()) <= self.bound:
            self.fault = self._message(gap, theirs, prompts, answers, params)

    def begins(self, micro_batches: Sequence[Batch], denominators: Tensor) -> None:
        """Stop every process where :meth:`look` found something on any. Collective.

        Raises:
            TrainingError: naming the drift, its likely causes and what to do; nothing was trained on those samples.
        """
        self.processes.agree(self.fault)

    @torch.no_grad()
    def policy_logps(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], params: SamplingParams
    ) -> Tensor:
        """Log-probs of sampled tokens under the policy, after the filters that they were drawn through.

        Without filters that is the forward pass that trains; with filters, the bare model's logits, a row at a time.

        Args:
            prompts: token ids of each row's prompt.
            answers: the sampled ids.
            params: how they were drawn.

        Returns:
            float64 ``[N]`` on the CPU, row by row.
        """
        device = self.processes.device
        if params.top_p == 1.0 and not params.top_k and not params.min_p and params.repetition_penalty == 1.0:
            batch = probes.batch_of(list(zip(prompts, answers, strict=True)), self.pad_id).to(device)
            found = torch.zeros(batch.mask.shape, dtype=torch.float64)
            for rows in self.micro_batches.without_gradient(batch, alone=True):
                part = batch.select(rows)
                logps = self.policy(part, want=frozenset({"logps"}), temperature=params.temperature)["logps"]
                found[rows, : logps.shape[1]] = logps.double().cpu()
            return found[batch.mask.cpu()]
        found = []
        with self.policy.generating() as model:
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = torch.tensor([[*prompt, *answer]], device=device)
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                scores = filter_logits(logits, params, _seen(ids[0], len(prompt), logits.shape[-1]))
                found.append(scores.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
        return torch.cat(found).double().cpu()

    def _message(
        self,
        gap: Tensor,
        theirs: Tensor,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> str:
        """What came, and which known fault would give just that."""
        causes = self._diagnosis(theirs, prompts, answers, params) or (
            "likely causes: weights of an earlier step in the sampler, an adapter that never reached it, another temperature or "
            "filter than the run's, or dropout while sampling"
        )
        return (
            f"step {self.processes.progress.step + 1}: the sampler {type(self.sampler).__name__} gave log-probs that differ from "
            f"the policy's by {float(gap.mean()):.3g} nats per token on average and {float(gap.max()):.3g} at most over "
            f"{gap.numel()} tokens (sampler_check_bound {self.bound:g}), so its samples are not the policy's; {causes}. Nothing was "
            f"trained on them. Compare with sampler: transformers, which reads the live weights; where the difference is known "
            f"and wanted, raise sampler_check_bound"
        )

    def _diagnosis(
        self, theirs: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], params: SamplingParams
    ) -> str | None:
        """The one fault that explains the numbers, where one does."""

        def explains(params: SamplingParams) -> bool:
            return float((self.policy_logps(prompts, answers, params) - theirs).abs().mean()) <= self.bound

        if params.temperature != 1.0 and explains(replace(params, temperature=1.0)):
            return f"they are those of temperature 1, and the run's is {params.temperature:g}: it never reached the sampler"
        model = self.policy.hf_model
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                if explains(params):
                    return "they are those of the model without its adapter: the adapter never reached the sampler"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Whether log-probs were found equal."""
        return {"sampler_agrees": self.agrees}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back."""
        self.agrees = values.get("sampler_agrees", self.agrees)


def _seen(ids: Tensor, prompt: int, vocab: int) -> Tensor:
    """``[T, V]`` which tokens stood before each completion token."""
    present = torch.zeros(len(ids), vocab, dtype=torch.bool, device=ids.device)
    present[torch.arange(len(ids)), ids] = True
    return present.cumsum(0).bool()[prompt - 1 : -1]
