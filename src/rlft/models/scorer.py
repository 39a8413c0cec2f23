"""A causal language model seen as trunk and head: hidden states here, logits only where nothing else is right."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlft import _check
from rlft.models.attention import DEVICES, NoKernelError
from rlft.models.float32_view import difference
from rlft.models.layout import LayoutUsed, Rows, build_rows
from rlft.models.shared import SharedRows, build_shared, why_not
from rlft.ops.dense import transform
from rlft.types import Batch

__all__ = ["CausalScorer", "Head", "Layout", "unwrap"]

Layout = Literal["auto", "padded", "shared"]


class Head(NamedTuple):
    """A head that is one matrix, and what the model does to its output."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def unwrap(model: Any) -> Any:
    """The transformers model inside a PeftModel (its LoRA layers stay in place), else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class CausalScorer:
    """Runs one causal language model over :class:`~rlft.models.layout.Rows`.

    On first use a tiny row is scored by the fast path and by ``model(...).logits``; where they differ the next, more
    general path is taken, with one warning:

    1. ``matrix``: trunk, then the head's weight goes to :func:`rlft.ops.linear_logps`;
    2. ``module``: trunk, then the head module is called on the scored tokens (LoRA on the head, ``modules_to_save``,
       quantised heads);
    3. ``logits``: the whole model is called, and logits exist for every token.

    In the same way it finds out whether the model may see each prompt once (:mod:`rlft.models.shared`).

    Attributes:
        layout: ``padded`` never shares, ``shared`` always does or refuses, ``auto`` does where the model allows it.
        not_shared: why prompts are not shared, found on first use; None where they are.
        used: token counts of the last pass through the model.
    """

    def __init__(self, model: nn.Module, *, layout: Layout = "padded") -> None:
        self.model = model
        self.layout = layout
        config = getattr(model, "peft_config", None)
        if isinstance(config, dict) and any(getattr(c, "is_prompt_learning", False) for c in config.values()):
            raise ValueError(
                "prompt-learning adapters (prefix or prompt tuning) put virtual tokens into the sequence and cannot be "
                "scored; use LoRA (rlft.models.add_lora)"
            )
        base = unwrap(model)
        self.base = base
        text = base.config.get_text_config() if hasattr(base, "config") else None
        self.logit_scale, self.softcap = _transform(text)
        self.max_positions = _position_limit(base, text)
        self.path: str | None = None
        self.not_shared: str | None = None
        self.shared_limit: int | None = None
        self.used = LayoutUsed()
        self._share_checked = False

    # -- parts ----------------------------------------------------------------------------------------------------
    @property
    def trunk(self) -> nn.Module | None:
        trunk = getattr(self.base, "base_model", None)
        return trunk if isinstance(trunk, nn.Module) and trunk is not self.base else None

    @property
    def head_module(self) -> nn.Module | None:
        get = getattr(self.base, "get_output_embeddings", None)
        return get() if get is not None else None

    def matrix_head(self) -> Head | None:
        """The head's current weight, when the head is a plain linear layer."""
        head = self.head_module
        if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
            return None  # an adapter's layer, or modules_to_save
        if head.weight.ndim != 2 or not head.weight.is_floating_point():
            return None  # a quantised head
        return Head(head.weight, head.bias, self.logit_scale, self.softcap)

    # -- forward --------------------------------------------------------------------------------------------------
    def states(self, rows: Rows, shared: SharedRows | None = None) -> Tensor:
        """``[N, D]`` final hidden states that predict the scored tokens (path ``logits``: ``[N, V]`` logits).

        Args:
            rows: the batch in the padded layout.
            shared: the same batch in the shared layout, where that pays; used if the model allows it.
        """
        self.check_rows(rows)
        self.ensure_path(rows)
        chosen, states = self._run(self._full_logits if self.path == "logits" else self._hidden, rows, shared)
        return chosen.gather(states)

    def hidden_states(self, rows: Rows, shared: SharedRows | None = None) -> Tensor:
        """``[N, D]`` final hidden states that predict the scored tokens, whatever head the model has."""
        self._check_layout(rows)
        chosen, states = self._run(self._hidden, rows, shared)
        return chosen.gather(states)

    def last_states(self, rows: Rows, shared: SharedRows | None = None) -> Tensor:
        """``[B, D]`` final hidden states at each row's last token; ``shared`` must have been built with ``keep_last``."""
        self._check_layout(rows)
        chosen, states = self._run(self._hidden, rows, shared)
        if isinstance(chosen, Rows):
            return chosen.gather_last(states)
        assert chosen.last is not None
        return states[0].index_select(0, chosen.last)

    def _check_layout(self, rows: Rows) -> None:
        """Find out on first use whether both layouts give the same."""
        self.check_rows(rows)
        if not self._share_checked and self.layout != "padded":
            with torch.no_grad(), _evaluating(self.model):
                self._ensure_shared(_probe_ids(self.base, rows))

    def _run(
        self, forward: Callable[[Rows | SharedRows], Tensor], rows: Rows, shared: SharedRows | None
    ) -> tuple[Rows | SharedRows, Tensor]:
        """The layout used, and the model's output on it: the shared one where the model allows it."""
        if shared is not None and self._may_share(shared):
            try:
                return shared, forward(shared)
            except NoKernelError as error:  # known only here: autocast and wrappers decide the dtype of attention
                self._cannot_share(str(error))
                self._may_share(shared)  # which refuses, where the layout was asked for
        return rows, forward(rows)

    def _may_share(self, shared: SharedRows) -> bool:
        why = self.not_shared
        if why is None and self.shared_limit is not None and shared.longest > self.shared_limit:
            why = f"a row of {shared.longest} tokens is longer than its attention window of {self.shared_limit}"
        if why is not None and self.layout == "shared":
            raise ValueError(
                f"layout='shared' is not possible for {type(self.base).__name__}: {why}; use layout='auto'"
            )
        return why is None and self.layout != "padded"

    def logits(self, states: Tensor) -> Tensor:
        """Final logits of some rows of :meth:`states`."""
        if self.path == "logits":
            return states
        head = self.head_module
        assert head is not None
        return transform(head(states), logit_scale=self.logit_scale, softcap=self.softcap)

    def _hidden(self, rows: Rows | SharedRows) -> Tensor:
        trunk = self.trunk
        assert trunk is not None
        return trunk(**self._inputs(rows)).last_hidden_state

    def _full_logits(self, rows: Rows | SharedRows) -> Tensor:
        return self.model(**self._inputs(rows)).logits

    def _inputs(self, rows: Rows | SharedRows) -> dict[str, Any]:
        self.used = rows.used
        return {
            "input_ids": rows.input_ids,
            "attention_mask": rows.attention_mask,
            "position_ids": rows.position_ids,
            "use_cache": False,
            "return_dict": True,
        }

    def check_rows(self, rows: Rows) -> None:
        """Refuse rows on another device, or longer than the model's learned positions."""
        device = self.base.get_input_embeddings().weight.device
        if rows.input_ids.device.type != device.type:
            raise ValueError(
                f"the batch is on {rows.input_ids.device} and the model on {device}; call batch.to({str(device)!r}) first"
            )
        width = rows.input_ids.shape[1]
        if self.max_positions is not None and width > self.max_positions:
            raise ValueError(
                f"a row of {width} tokens does not fit the model's {self.max_positions} positions; lower "
                f"max_prompt_length or max_completion_length so that their sum is at most {self.max_positions}"
            )

    # -- self-check -----------------------------------------------------------------------------------------------
    def ensure_path(self, rows: Rows) -> None:
        """Choose the fastest path that agrees with the model itself on a short row. Runs once, without gradient."""
        if self.path is not None:
            return
        ids = _probe_ids(self.base, rows)
        ones, steps = torch.ones_like(ids), torch.arange(4, device=ids.device)
        none = steps[:0]
        probe = Rows(ids, ones, steps[None], none, none, none, steps[-1:], ones.bool())
        with torch.no_grad(), _evaluating(self.model):
            _finite(self._full_logits(probe), self.base)
            self.path = self._agreeing_path(probe)
            if self.layout != "padded":
                self._ensure_shared(ids)

    def _ensure_shared(self, ids: Tensor) -> None:
        """Compare both layouts on a group of two; with every process in step, whatever the layout of its batch."""
        self._share_checked = True
        self.not_shared, self.shared_limit = why_not(self.base)
        if self.shared_limit is not None and self.shared_limit < 5:
            self.not_shared = f"its attention window holds {self.shared_limit} tokens"
        if ids.device.type not in DEVICES:
            self.not_shared = self.not_shared or f"there is no kernel for {ids.device.type}"
        if self.not_shared is not None:
            return
        exists = torch.ones(2, 3, dtype=torch.bool, device=ids.device)
        prompt, tokens = ids[:, :2], torch.cat([ids[:, 1:], ids[:, :3].flip(1)])
        batch = Batch(prompt, exists[:1, :2], tokens, exists, exists, torch.zeros_like(tokens[:, 0]))
        rows, shared = build_rows(batch), build_shared(batch)
        assert shared is not None
        run = self._full_logits if self.path == "logits" else self._hidden
        try:
            worst = difference(
                self.model,
                lambda: (rows.gather(run(rows)), shared.gather(run(shared))),
                device=ids.device,
                layers=getattr(self.base.config.get_text_config(), "num_hidden_layers", 1),
            )
        except NoKernelError as error:
            self._cannot_share(str(error))
        except Exception as error:  # whatever the model does with its mask: it is found here, not while training
            self._cannot_share(f"it stopped with {type(error).__name__}: {error}")
        else:
            if worst is not None:
                self._cannot_share(f"its hidden states differ by {worst:.1e} of their size")

    def _cannot_share(self, why: str) -> None:
        self.not_shared = why
        warnings.warn(
            f"{type(self.base).__name__} cannot compute the prompt of a group once ({why}), so it is "
            f"repeated for every completion (slower); pass layout='padded' to skip this check",
            stacklevel=2,
        )

    def _agreeing_path(self, probe: Rows) -> str:
        name = type(self.base).__name__
        if self.trunk is None or self.head_module is None:
            warnings.warn(f"{name} has no separate trunk and head; its full logits are used (slower)", stacklevel=2)
            return "logits"
        if self.matrix_head() is not None and self._agrees(probe, self._by_matrix):
            return "matrix"
        if self._agrees(probe, self.logits):
            return "module"
        warnings.warn(
            f"{name}: hidden states times head differ from the model's own logits, so its full logits are used "
            f"(slower). The config probably holds a logit transform that rlft does not know",
            stacklevel=2,
        )
        return "logits"

    def _agrees(self, probe: Rows, head: Callable[[Tensor], Tensor]) -> bool:
        def compute() -> tuple[Tensor, Tensor]:
            return self._full_logits(probe), head(self._hidden(probe))

        device = probe.input_ids.device
        return difference(self.model, compute, device=device, layers=1, entrywise=True) is None

    def _by_matrix(self, states: Tensor) -> Tensor:
        head = self.matrix_head()
        assert head is not None
        raw = torch.nn.functional.linear(states.to(head.weight.dtype), head.weight, head.bias)
        return transform(raw, logit_scale=head.logit_scale, softcap=head.softcap)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probe_ids(base: Any, rows: Rows) -> Tensor:
    """``[1, 4]`` ids of the vocabulary, the first one from the data."""
    vocabulary = getattr(base.config.get_text_config(), "vocab_size", 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, 4), generator=generator).to(rows.input_ids.device)
    if rows.input_ids.numel():
        ids[0, 0] = rows.input_ids[0, 0]
    return ids


def _finite(logits: Tensor, model: nn.Module) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"{type(model).__name__} returns NaN or infinite logits for a plain row of 4 tokens; "
            f"check its weights and dtype (float16 overflows in some families: use bfloat16 or float32)"
        )


def _transform(config: Any) -> tuple[float, float | None]:
    """``(factor, soft cap)`` of the logits, from the names the known families use."""
    scale, cap = 1.0, None
    if config is not None:
        if isinstance(getattr(config, "logit_scale", None), (int, float)):  # Cohere
            scale *= float(config.logit_scale)
        if isinstance(getattr(config, "logits_scaling", None), (int, float)):  # Granite
            scale /= float(config.logits_scaling)
        if isinstance(getattr(config, "final_logit_softcapping", None), (int, float)):  # Gemma 2
            cap = float(config.final_logit_softcapping)
            _check.number("final_logit_softcapping", cap, low=0.0, open_low=True)
    return scale, cap


def _position_limit(base: nn.Module, config: Any) -> int | None:
    """The number of learned absolute positions (GPT-2), None for models without them (rotary positions extrapolate)."""
    trunk = getattr(base, "base_model", base)
    for name in ("wpe", "position_embeddings", "embed_positions"):
        table = getattr(trunk, name, None)
        if isinstance(table, nn.Embedding):
            return int(getattr(config, "max_position_embeddings", table.num_embeddings))
    return None
