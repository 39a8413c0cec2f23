"""The policy: everything that carries a gradient happens in its forward, so that wrappers see one ordinary module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlft import _check
from rlft._failpoint import instant
from rlft.models import adapters, modes
from rlft.models.behaviour import Behaviour
from rlft.models.critic import CriticModel, ValueHead
from rlft.models.heads import logit_rows, reference_logps, score_states
from rlft.models.layout import LayoutUsed, Rows, build_rows
from rlft.models.reference import ReferenceKind, load_tensors, make_reference
from rlft.models.scorer import CausalScorer, Layout, unwrap
from rlft.models.sharded import settle
from rlft.models.shared import PAYS, SharedRows, build_shared
from rlft.models.trainable import TrainableModule, plain_state, under
from rlft.ops import MOMENTS
from rlft.types import Batch

__all__ = ["WANTS", "Policy"]

# Wishes, not outputs: "entropy" is differentiable; only tokens under ``mask`` are scored.
_WISHES = ("entropy_grad", "mask_only")
# What a forward can be asked for.
_OUTPUTS = ("logps", "entropy", "token_kl", "ref_logps", "states", "ref_states", "values", *MOMENTS)
WANTS: tuple[str, ...] = (*_OUTPUTS, *_WISHES)
# Output of the policy -> quantity of the head.
_QUANTITY = {"logps": "logps", "entropy": "entropy", "token_kl": "kl", "ref_logps": "ref_logps"}


class Policy(TrainableModule):
    """A causal language model that scores completions, with its reference and its critic.

    Dropout is off in every forward, with or without gradient: log-probs that an importance ratio or a reference is
    compared with must be a function of the weights. ``dropout=True`` leaves it on while training and grad is enabled.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        reference: ``"auto"`` is the policy as passed: adapter switched off when it is fresh, a frozen copy of it when
            it is trained, a frozen copy of the model when the model itself trains. ``"copy"``: the same, but always
            a copy, which :meth:`update_reference` can move. ``"none"``: no reference. Or a frozen model over the same vocabulary.
        critic: ``"none"``; ``"shared"``, a value head on the policy's last hidden state (its loss trains the trunk as
            well); or a model that becomes a critic of its own.
        dropout: keep the model's dropout while training.
        chunk_size: rows and vocabulary entries per tile of the head op; None: what suits the device (see
            :func:`rlft.ops.linear_logps`).
        layout: ``auto`` computes the prompt of a group once, in a packed row, where the model allows it and it pays;
            ``padded`` repeats it for every completion; ``shared`` always shares, or refuses. Results are the same.

    Raises:
        ValueError: when the reference does not fit (see :func:`rlft.models.reference.make_reference`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: str | nn.Module = "auto",
        critic: str | nn.Module = "none",
        dropout: bool = False,
        chunk_size: tuple[int, int] | None = None,
        layout: Layout = "auto",
    ) -> None:
        super().__init__()
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {list(get_args(Layout))}, got {layout!r}")
        self.model: Any = model
        self.dropout = dropout
        self.chunk_size = chunk_size
        self.layout: Layout = layout
        self._scorer = CausalScorer(model, layout=layout)
        self._switch = adapters.Switch(model) if adapters.is_peft(model) else None
        self._reference = make_reference(model, reference)
        self._behaviour = Behaviour(model)
        # A reference of another family may have to repeat the prompt where the policy shares it.
        if self._reference.model is not None:
            self._reference.scorer(self._scorer).layout = "auto" if layout == "shared" else layout
        self.reference_model = self._reference.model  # registered, so that it moves and shards with the policy
        self.value_head: ValueHead | None = None
        self.critic: CriticModel | None = None
        if isinstance(critic, nn.Module):
            self.critic = CriticModel(critic, layout="auto" if layout == "shared" else layout)
        elif critic == "shared":
            first = next(model.parameters())
            dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
            size = unwrap(model).config.get_text_config().hidden_size
            self.value_head = ValueHead(size, dtype=dtype, device=first.device)
        elif critic != "none":
            raise ValueError(f"critic must be 'none', 'shared' or a model, got {critic!r}; load the model first")
        if not dropout and (rate := modes.lora_dropout(model)):
            warnings.warn(
                f"the adapter asks for dropout {rate:g}, but a Policy scores without dropout; set dropout 0 in the "
                f"LoRA settings, or pass Policy(..., dropout=True)",
                stacklevel=2,
            )
        self.train()

    # -- forward --------------------------------------------------------------------------------------------------
    def forward(
        self, batch: Batch, *, want: frozenset[str], temperature: float = 1.0
    ) -> dict[str, Float[Tensor, "B T"]]:
        """Score the completion tokens of a batch.

        Args:
            batch: prompts and completions; every token under ``completion_mask`` is scored (with ``mask_only`` those
                under ``mask``).
            want: any of ``logps`` (log-prob of each token), ``entropy`` (of the distribution it was drawn from),
                ``token_kl`` (exact ``KL(policy || reference)`` at that position, differentiable), ``ref_logps``
                (constant), ``values`` (the critic's value of the state before the token), ``ref_states`` (the
                reference's hidden states ``[B, T, D]``; with them in the batch its trunk does not run again; left out for
                models whose hidden states cannot be found), ``states`` (the policy's own, detached; in the batch as
                ``behaviour_states`` they spare the pass of the policy that sampled), moments of the position's log-ratio to
                the reference (differentiable; ``behaviour_log_ratio`` and ``behaviour_log_ratio_sq`` under the policy of
                :meth:`remember_behaviour`, ``token_log_ratio_sq`` under the policy itself), ``entropy_grad`` (makes
                ``entropy`` differentiable; without it a gradient that reaches the entropy is an error), and ``mask_only``
                (tokens outside ``mask`` do not pass the head: their outputs are zero).
            temperature: divides the logits of policy and reference, > 0.

        Returns:
            ``[B, T]`` each, float32 (float64 for float64 models), zero outside the tokens that are scored. Position t
            scores completion token t.
        """
        want = self._check_want(want)
        scored = batch.mask if "mask_only" in want else batch.completion_mask
        rows = build_rows(batch, scored=scored)
        shared = self._shared(batch, scored)
        self._settle()
        if self._switch is not None and torch.is_grad_enabled():
            self._switch.refuse_merged()
        result: dict[str, Tensor] = {}
        settings: dict[str, Any] = {"temperature": temperature, "chunk": self.chunk_size}
        quantities = frozenset(_QUANTITY[name] for name in want if name in _QUANTITY)
        moments, behaviour_states = want & set(MOMENTS), None
        if moments - {"token_log_ratio_sq"} and self._behaviour.remembers:
            behaviour_states = self._behaviour_states(rows, shared, batch)
        needs_policy = quantities - {"ref_logps"} or moments or "states" in want
        needs_policy = needs_policy or ("values" in want and self.value_head is not None)
        states = self._scorer.states(rows, shared) if needs_policy else None
        ref_states = None
        if want & {"token_kl", "ref_logps", "ref_states", *MOMENTS}:
            with self._reference.active():
                ref_states = self._reference_states(rows, shared, batch)
                if quantities == {"ref_logps"}:
                    ref = self._reference.scorer(self._scorer)
                    result["ref_logps"] = rows.scatter(reference_logps(ref, ref_states, rows.targets, **settings))
        if quantities - {"ref_logps"}:
            assert states is not None
            grad = {"logps", "kl"} | ({"entropy"} if "entropy_grad" in want else set())
            asked = {"want": quantities, "grad": frozenset(grad & quantities), **settings}
            outputs = score_states(self._scorer, self._reference, states, ref_states, rows.targets, **asked)
            for name in want & _QUANTITY.keys():
                result[name] = rows.scatter(getattr(outputs, _QUANTITY[name]))
        if moments:
            assert states is not None
            assert ref_states is not None
            options = {"want": moments, "temperature": temperature, "rows": logit_rows(self.chunk_size)}
            found = self._behaviour.moments(
                self._scorer, self._reference, states, ref_states, behaviour_states, **options
            )
            result |= {name: rows.scatter(values) for name, values in found.items()}
        if "values" in want:
            result["values"] = rows.scatter(self._values(rows, shared, states))
        # those of the path "logits" would be a vocabulary wide
        if "ref_states" in want and ref_states is not None and self._reference.scorer(self._scorer).path != "logits":
            result["ref_states"] = rows.scatter(ref_states)
        if "states" in want and states is not None and self._scorer.path != "logits":
            result["states"] = rows.scatter(states.detach())
        return result

    @torch.no_grad()
    def reference_logps(self, batch: Batch, *, temperature: float = 1.0) -> Float[Tensor, "B T"]:
        """The reference's log-prob of each completion token, without gradient.

        Args:
            batch: prompts and completions.
            temperature: divides the logits, > 0.

        Returns:
            ``[B, T]``, zero outside ``completion_mask``.
        """
        # Through the call, not through forward: wrappers (autocast, sharding) hang on it.
        return self(batch, want=frozenset({"ref_logps"}), temperature=temperature)["ref_logps"]

    def _check_want(self, want: frozenset[str]) -> frozenset[str]:
        want = frozenset(want)
        for name in sorted(want - set(WANTS)):
            raise ValueError(f"want holds {name!r}, which a Policy does not compute{_check.suggestion(name, WANTS)}")
        if "entropy_grad" in want and "entropy" not in want:
            raise ValueError("want holds 'entropy_grad' without 'entropy'; ask for both")
        of_reference = want & {"token_kl", "ref_logps", "ref_states", *MOMENTS}
        if of_reference and self.reference_kind == "none":
            raise ValueError(
                f"{sorted(of_reference)} need a reference, and this Policy was built with "
                f"reference='none'; use reference='auto'"
            )
        if "values" in want and self.value_head is None and self.critic is None:
            raise ValueError(
                "'values' need a critic, and this Policy was built with critic='none'; use critic='shared'"
            )
        return want

    def _shared(self, batch: Batch, scored: Tensor | None = None) -> SharedRows | None:
        """The batch in one packed row where that may be used and pays; ``scored`` as of :func:`build_shared`."""
        scorers = (self._scorer, self._reference.scorer(self._scorer))
        if self.layout == "padded" or (self.layout == "auto" and all(s.not_shared is not None for s in scorers)):
            return None
        if self.dropout and self.training and torch.is_grad_enabled():
            if self.layout == "shared":
                raise ValueError("layout='shared' has no dropout: a prompt would share its noise; use layout='auto'")
            return build_shared(batch, at_least=PAYS, scored=scored, repeat_prompts=True)
        return build_shared(batch, at_least=PAYS if self.layout == "auto" else 0.0, scored=scored)

    def _reference_states(self, rows: Rows, shared: SharedRows | None, batch: Batch) -> Tensor:
        """``[N, D]`` of the reference, from the batch where it has them; inside ``Reference.active``."""
        ref = self._reference.scorer(self._scorer)
        if batch.ref_states is None:
            return ref.states(rows, shared)
        ref.ensure_path(rows)
        return batch.ref_states[rows.scored]

    def _behaviour_states(self, rows: Rows, shared: SharedRows | None, batch: Batch) -> Tensor:
        """``[N, D]`` of the policy that sampled, from the batch where it has them."""
        if batch.behaviour_states is not None:
            return batch.behaviour_states[rows.scored]
        with self._behaviour.active():
            return self._scorer.states(rows, shared)

    def _values(self, rows: Rows, shared: SharedRows | None, states: Tensor | None) -> Tensor:
        if self.critic is not None:
            return self.critic(rows, shared)
        assert self.value_head is not None
        assert states is not None
        if self._scorer.path == "logits":
            raise ValueError(
                f"critic='shared' needs the hidden states of {type(self._scorer.base).__name__}, which rlft cannot "
                f"find; pass a critic model instead"
            )
        return self.value_head(states)

    # -- modes ----------------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Policy:
        """Set the mode. The models inside stay without dropout unless the Policy was built with ``dropout=True``."""
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        """Put every model into the mode that scoring needs, whatever generation or a caller left behind."""
        tracking = torch.is_grad_enabled()
        modes.scoring(self.model, dropout=self.dropout and self.training and tracking, tracking=tracking)
        if self.critic is not None:
            modes.scoring(self.critic.model, dropout=self.dropout and self.training and tracking, tracking=tracking)
        if self.reference_model is not None:
            self.reference_model.eval()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layer activations in the backward: less memory for about a third more time.

        Works for frozen base models under adapters (their inputs are made to require grad). Call it before wrapping.
        """
        for model in (self.model, None if self.critic is None else self.critic.model):
            if model is not None:
                modes.enable_checkpointing(model)

    @contextlib.contextmanager
    def generating(self) -> Iterator[Any]:
        """The underlying model in plain eval mode, for ``generate``: no dropout, no checkpointing, cache allowed."""
        self.model.eval()
        try:
            yield self.model
        finally:
            self._settle()

    @property
    def layout_used(self) -> LayoutUsed:
        """Token counts of the last pass through the policy's model."""
        return self._scorer.used

    # -- reference ------------------------------------------------------------------------------------------------
    @property
    def reference_kind(self) -> ReferenceKind:
        """``none``, ``adapter_off``, ``adapter_copy``, ``snapshot`` or ``model``."""
        return self._reference.kind

    @contextlib.contextmanager
    def reference_active(self) -> Iterator[None]:
        """Inside, without gradient, :attr:`hf_model` is the reference where both share a model (its adapter is off, or the
        frozen copy); a reference of its own is :attr:`reference_model`, and nothing is switched.
        """
        with self._reference.active():
            yield

    def reference_identity(self) -> tuple[list[Any], dict[str, Tensor]]:
        """What decides the reference's log-probs: configs as plain values, and every tensor by name."""
        return self._reference.identity(self.model)

    def around_reference(self, watch: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Enter ``watch()`` around every pass of the reference: for a clock."""
        self._reference.around = watch

    def update_reference(self, mix: float) -> None:
        """Move the reference towards the policy: ``(1 - mix) * reference + mix * policy``; 1 replaces it.

        For ``snapshot`` and ``adapter_copy``. A copied adapter is mixed factor by factor (its A and its B), which is
        the mean of the two products only at 0 and 1.

        Raises:
            ValueError: for other kinds, which have no tensors of their own to move.
        """
        self._reference.update(mix)

    def unsaved_state(self) -> dict[str, Tensor]:
        """As of :class:`~rlft.models.trainable.TrainableModule`, without the reference's own tensors, which are saved."""
        saved = {id(t) for t in self._reference.own().values()}
        return {name: t for name, t in super().unsaved_state().items() if id(t) not in saved}

    def reference_state(self) -> dict[str, Tensor]:
        """The reference's own tensors, for a checkpoint; empty for ``none``, ``adapter_off`` and ``model``."""
        settle(self)
        return self._reference.state()

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`reference_state`.

        Raises:
            ValueError: when names or shapes differ; nothing is changed then.
        """
        settle(self)
        self._reference.load_state(state)

    # -- behaviour policy -----------------------------------------------------------------------------------------
    def remember_behaviour(self) -> None:
        """Keep a copy of the trained weights: the policy that samples now, for the moments that :meth:`forward` gives.

        Before the first call the policy itself takes that place.
        """
        self._behaviour.remember()

    def behaviour_state(self) -> dict[str, Tensor]:
        """The weights kept by :meth:`remember_behaviour`, for a checkpoint; empty before the first call."""
        return self._behaviour.state()

    def load_behaviour_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`behaviour_state`.

        Raises:
            ValueError: when names or shapes differ; nothing is changed then.
        """
        self._behaviour.load_state(state)

    # -- saving ---------------------------------------------------------------------------------------------------
    @property
    def hf_model(self) -> Any:
        """The transformers model or PeftModel, for generating and saving."""
        return self.model

    def save_pretrained(self, directory: str | Path, *, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter (peft layout) or the full model, and the critic beside it; safetensors and JSON only.

        The critic goes to ``value_head.safetensors`` (shared) or to the folder ``critic`` (a model of its own).

        Args:
            directory: made where it is missing.
            whole: of :meth:`whole_state`, where the parameters are spread over processes; one process writes then.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        with instant("weights.write"):
            directory.mkdir(parents=True, exist_ok=True)
            options: dict[str, Any] = {} if whole is None else {"state_dict": under("model.", whole)}
            if adapters.is_peft(self.model):
                name = adapters.active_adapter(self.model)
                options |= {"selected_adapters": [name], "save_embedding_layers": False}
            self.model.save_pretrained(str(directory), **options)
            if self.value_head is not None:
                head = under("value_head.", whole) or plain_state(self.value_head)
                save_file(head, str(directory / "value_head.safetensors"))
            if self.critic is not None:
                folder = directory / "critic"
                options = {} if whole is None else {"state_dict": under("critic.model.", whole)}
                self.critic.model.save_pretrained(str(folder), **options)
                head = under("critic.head.", whole) or plain_state(self.critic.head)
                save_file(head, str(folder / "value_head.safetensors"))

    def load_value_head(self, directory: str | Path) -> None:
        """Load ``value_head.safetensors`` of :meth:`save_pretrained`'s folder into the critic's head.

        Raises:
            ValueError: without a critic, or when the file does not fit.
        """
        from safetensors.torch import load_file

        head = self.value_head if self.critic is None else self.critic.head
        if head is None:
            raise ValueError("this Policy has no critic to load a value head into; build it with critic='shared'")
        path = Path(directory) / ("value_head.safetensors" if self.critic is None else "critic/value_head.safetensors")
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a folder that Policy.save_pretrained wrote")
        try:
            state = load_file(str(path))
        except Exception as error:  # of the library that reads safetensors, which has a class of its own
            raise ValueError(f"{path} cannot be read ({error}); save the model again, or copy the file anew") from error
        load_tensors(dict(head.named_parameters()), state, what="value head")
