"""The behaviour policy: the policy as it was when it sampled, for objectives that need its whole distribution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlft.models.reference import Reference, full_copy, load_tensors
from rlft.models.scorer import CausalScorer
from rlft.ops import MOMENTS, log_ratio_moments

__all__ = ["Behaviour"]


class Behaviour:
    """A copy of the trained weights, put in the model's place for the length of a ``with`` block.

    Until :meth:`remember` is called the behaviour policy is the policy itself.

    Args:
        model: the policy's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}

    def remember(self) -> None:
        """Keep the weights as they are now.

        Raises:
            ValueError: for a sharded model, whose parameters cannot be exchanged.
        """
        trained = self._trained()
        if any(hasattr(p, "device_mesh") for p in trained.values()):
            raise ValueError(
                "the weights of a sharded model cannot be exchanged for those that sampled; use agro_off_policy_cv, or "
                "one optimizer step per generation"
            )
        self._kept = {name: p.detach().clone() for name, p in trained.items()}

    @property
    def remembers(self) -> bool:
        """Whether weights are kept; while none are, the behaviour policy is the policy as it is."""
        return bool(self._kept)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """No gradient, and the model with the weights that sampled."""
        trained = self._trained()
        pairs = [(trained[name], kept) for name, kept in self._kept.items()]
        # Storage is exchanged, not copied: no version moves, so a graph that was built before stays valid. Autocast
        # keeps casts by parameter and would confuse the two.
        own = [p.data for p, _ in pairs]
        with torch.no_grad():
            torch.clear_autocast_cache()
            try:
                for p, kept in pairs:
                    p.data = kept
                yield
            finally:
                for (p, _), data in zip(pairs, own, strict=True):
                    p.data = data
                torch.clear_autocast_cache()

    def moments(
        self,
        scorer: CausalScorer,
        reference: Reference,
        states: Tensor,
        ref_states: Tensor,
        behaviour_states: Tensor | None,
        *,
        want: frozenset[str],
        temperature: float,
        rows: int,
    ) -> dict[str, Tensor]:
        """:func:`rlft.ops.log_ratio_moments` of scored tokens, a chunk of logits at a time, recomputed in the backward.

        Args:
            scorer: of the policy.
            reference: what it is compared with.
            states: ``[N, D]`` hidden states of the policy, differentiable.
            ref_states: ``[N, Dr]`` of the reference.
            behaviour_states: ``[N, D]`` under the weights that sampled; None where ``want`` does not need them, or where
                the policy itself sampled.
            want: names of :data:`rlft.ops.MOMENTS`.
            temperature: divides all logits.
            rows: tokens of a chunk.

        Returns:
            ``[N]`` each, by name.
        """
        ref = reference.scorer(scorer)
        names = [name for name in MOMENTS if name in want]
        own = behaviour_states is None and bool(want - {"token_log_ratio_sq"})

        def score(piece: Tensor, ref_piece: Tensor, behaviour_piece: Tensor | None) -> tuple[Tensor, ...]:
            with reference.active():
                ref_logits = ref.logits(ref_piece)
            behaviour_logits = None
            if behaviour_piece is not None:
                with self.active():
                    behaviour_logits = scorer.logits(behaviour_piece)
            logits = scorer.logits(piece)
            if own:
                behaviour_logits = logits.detach()
            found = log_ratio_moments(logits, ref_logits, behaviour_logits, temperature=temperature, want=want)
            return tuple(found[name] for name in names)

        pieces: list[tuple[Tensor, ...]] = []
        for i in range(0, max(states.shape[0], 1), rows):
            kept = None if behaviour_states is None else behaviour_states[i : i + rows]
            arguments = (states[i : i + rows], ref_states[i : i + rows], kept)
            again = torch.is_grad_enabled()
            pieces.append(checkpoint(score, *arguments, use_reentrant=False) if again else score(*arguments))  # type: ignore[arg-type]
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*pieces, strict=True), strict=True)}

    def state(self) -> dict[str, Tensor]:
        """The kept weights by name; empty before the first :meth:`remember`."""
        return {name: full_copy(kept) for name, kept in self._kept.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`; refuses other names or shapes."""
        fresh = {name: torch.empty_like(p) for name, p in self._trained().items()} if state else {}
        load_tensors(fresh, state, what="behaviour policy")
        self._kept = fresh

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}
