"""The reference: the policy as it was when it was passed, never reloaded from a path behind the caller's back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlft import _check
from rlft.models import adapters
from rlft.models.scorer import CausalScorer, unwrap

__all__ = ["Reference", "ReferenceKind", "make_reference"]

#: Entries of a config that say where it came from.
_NO_PART = {"_name_or_path", "transformers_version"}

ReferenceKind = Literal["none", "adapter_off", "adapter_copy", "snapshot", "model"]


class Reference:
    """What a policy is compared with.

    Attributes:
        kind: ``none``; ``adapter_off`` (the base model under a fresh adapter); ``adapter_copy`` (a frozen copy of a
            trained adapter); ``snapshot`` (a frozen copy of the whole model); ``model`` (one that the caller passed).
        model: the separate model of ``snapshot`` and ``model``, else None.
        around: entered around every pass.
    """

    def __init__(
        self,
        kind: ReferenceKind,
        *,
        model: nn.Module | None = None,
        policy: nn.Module | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        self.kind: ReferenceKind = kind
        self.model = model
        self.around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._policy = policy
        # Name in the policy -> name in the reference (for a copied adapter: in the same model). Names, since sharding
        # replaces the parameters themselves.
        self._names = names or {}
        self._switch = (
            adapters.Switch(policy) if kind in ("adapter_off", "adapter_copy") and policy is not None else None
        )
        self._scorer = None if model is None else CausalScorer(model)

    def scorer(self, policy: CausalScorer) -> CausalScorer:
        """Runs the reference: its own model, or the policy's inside :meth:`active`."""
        return policy if self._scorer is None else self._scorer

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """No gradient, and the policy's adapter off or replaced by its frozen copy where the two share a model."""
        with torch.no_grad(), self.around(), contextlib.ExitStack() as stack:
            if self._switch is not None:
                name = None if self.kind == "adapter_off" else adapters.REFERENCE
                stack.enter_context(self._switch.using(name))
            yield

    def update(self, mix: float) -> None:
        """``reference <- (1 - mix) * reference + mix * policy``; see :meth:`rlft.models.Policy.update_reference`."""
        _check.number("mix", mix, low=0.0, high=1.0)
        if self.kind not in ("snapshot", "adapter_copy"):
            why = {
                "none": "there is no reference; construct the Policy with reference='auto'",
                "adapter_off": "it is the base model without adapter, which has no tensors of its own to move; "
                "construct the Policy with reference='copy'",
                "model": "it is a model of yours; update it yourself, or use reference='auto' for a copy that moves",
            }
            raise ValueError(f"the reference ({self.kind}) cannot be updated: {why[self.kind]}")
        assert self._policy is not None
        policy = dict(self._policy.named_parameters(remove_duplicate=False))
        adapters.mix([(policy[name], reference) for name, reference in self.own().items()], mix)

    def state(self) -> dict[str, Tensor]:
        """The reference's own tensors by name; empty for kinds that are rebuilt from the model itself."""
        return {name: full_copy(reference) for name, reference in self.own().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`; refuses other names or shapes."""
        load_tensors(self.own(), state, what=f"reference ({self.kind})")

    def identity(self, policy: nn.Module) -> tuple[list[Any], dict[str, Tensor]]:
        """What decides its log-probs: configs as plain values, and every tensor by name.

        Args:
            policy: the policy's model, which the reference may share.
        """
        model: Any = policy if self.model is None else self.model
        tensors: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        configs = [{k: v for k, v in unwrap(model).config.to_dict().items() if k not in _NO_PART}]
        if self.model is None and adapters.is_peft(policy):
            trained = adapters.active_adapter(policy)
            tensors = {n: t for n, t in tensors.items() if trained not in n.split(".")}
        if self.kind == "adapter_copy":
            configs.append(model.peft_config[adapters.REFERENCE].to_dict())
        return configs, tensors

    def own(self) -> dict[str, Tensor]:
        """The reference's tensors, by the name of the policy's tensor each one mirrors."""
        holder = self._policy if self.model is None else self.model
        theirs = dict(holder.named_parameters(remove_duplicate=False)) if holder is not None else {}
        return {name: theirs[mirrored] for name, mirrored in self._names.items()}


def full_copy(tensor: Any) -> Tensor:
    """A contiguous CPU copy of a parameter, whole even if it is sharded."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.to("cpu", copy=True).contiguous()


def load_tensors(own: dict[str, Any], state: dict[str, Tensor], *, what: str) -> None:
    """Copy ``state`` into ``own`` in place, after checking that names and shapes agree.

    Raises:
        ValueError: naming what is missing, unknown or of another shape; nothing is changed then.
    """
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"the saved {what} does not fit: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}; build it from the same model, adapter settings and critic as the run that saved it"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} of the saved {what} has shape {list(tensor.shape)}, the model's {list(own[name].shape)}; "
                f"build it with the settings of the run that saved it (for example the same LoRA rank)"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            target = own[name]
            if hasattr(target, "device_mesh"):  # a sharded parameter takes its part of the full tensor
                from torch.distributed.tensor import distribute_tensor

                tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
            target.copy_(tensor)


def make_reference(model: nn.Module, reference: str | nn.Module) -> Reference:
    """Choose the cheapest reference that equals the policy as it was passed, or check the one that was passed.

    Args:
        model: the policy's model.
        reference: ``"auto"``, ``"copy"`` (as ``auto``, but always with tensors of its own, so that it can be moved),
            ``"none"`` or a model.

    Raises:
        ValueError: when the passed model is the policy itself, shares modules with it, is not frozen or scores another
            vocabulary.
    """
    if isinstance(reference, nn.Module):
        _check_model(model, reference)
        return Reference("model", model=reference)
    if reference == "none":
        return Reference("none")
    if reference not in ("auto", "copy"):
        raise ValueError(
            f"reference must be 'auto', 'copy', 'none' or a model, got {reference!r}; load the model first"
        )
    if adapters.is_peft(model):
        name = adapters.active_adapter(model)
        own = {id(p) for p in adapters.adapter_parameters(model, name).values()}
        if not any(p.requires_grad and id(p) not in own for p in model.parameters()):
            if reference == "auto" and adapters.adapter_is_identity(model, name):
                return Reference("adapter_off", policy=model)
            return Reference("adapter_copy", policy=model, names=adapters.copy_adapter(model, name))
        # Something of the base model trains as well: switching the adapter off would not give it back.
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    names = {name: name for name, _ in model.named_parameters()}
    return Reference("snapshot", model=frozen, policy=model, names=names)


def _check_model(model: nn.Module, reference: nn.Module) -> None:
    mine = {id(m) for m in model.modules()}
    if reference is model or unwrap(reference) is unwrap(model) or any(id(m) in mine for m in reference.modules()):
        raise ValueError(
            "the reference is the policy itself, or shares layers with it, so it would change with every step; "
            "use reference='auto' (the policy as it is now), or pass copy.deepcopy(model)"
        )
    trainable = [name for name, p in reference.named_parameters() if p.requires_grad]
    if trainable:
        raise ValueError(
            f"the reference has {len(trainable)} trainable parameters ({trainable[0]}, ...); a reference is frozen: "
            f"call reference.requires_grad_(False) first"
        )
    sizes = [_vocabulary(m) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the reference scores a vocabulary of {sizes[1]} and the policy one of {sizes[0]}; "
            f"per-token log-probs can only be compared between models of one tokenizer"
        )


def _vocabulary(model: nn.Module) -> int:
    base = unwrap(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if isinstance(head, nn.Linear) and weight is not None and weight.is_floating_point():
        return int(weight.shape[0])
    return int(base.config.get_text_config().vocab_size)
