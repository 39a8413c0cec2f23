"""What every module that the trainer wraps can do: give and take its trainable tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rlft.models import adapters
from rlft.models.reference import full_copy, load_tensors
from rlft.models.sharded import settle, whole_state

__all__ = ["TrainableModule", "plain_state", "under"]


class TrainableModule(nn.Module):
    """A module whose checkpoint is its trainable tensors: the rest is rebuilt from where it came."""

    model: Any

    @property
    def _no_split_modules(self) -> list[str] | None:
        """The model's layer classes: what wrappers that shard a module look for, to gather one layer at a time."""
        return getattr(self.model, "_no_split_modules", None)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies of all trainable tensors by name, full (unsharded) and on the CPU."""
        settle(self)
        return {name: full_copy(p) for name, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`trainable_state` in place.

        Raises:
            ValueError: when names or shapes differ; nothing is changed then.
        """
        settle(self)
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        load_tensors(own, state, what="trainable state")

    def unsaved_state(self) -> dict[str, Tensor]:
        """The tensors that no checkpoint holds, by name and not copied: they come from where the model comes from."""
        named = self.state_dict(keep_vars=True)
        return {name: t for name, t in named.items() if isinstance(t, Tensor) and not t.requires_grad}

    def whole_state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """What ``save_pretrained`` writes, whole and on the CPU, of a module that is spread over processes. Collective.

        Args:
            keep: False takes part in gathering, and returns nothing.

        Returns:
            Entries of the ``state_dict``: adapters and what trains where there are adapters, else all but the reference.
        """
        names = {name for name in self.state_dict() if not name.startswith("reference_model.")}
        if adapters.is_peft(self.model):
            adapter = adapters.active_adapter(self.model)
            trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
            names = {n for n in names if n in trained or adapter in n.split(".") or not n.startswith("model.")}
        return whole_state(self, names, keep=keep)

    def reference_state(self) -> dict[str, Tensor]:
        """The tensors of a reference that belongs to the module; empty where there is none."""
        return {}

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`reference_state`.

        Raises:
            ValueError: when names or shapes differ; nothing is changed then.
        """
        load_tensors({}, state, what="reference")


def under(prefix: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The entries of one part of a module, by their names in that part; None of None."""
    if state is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters as contiguous CPU copies, ready for safetensors."""
    return {name: full_copy(p) for name, p in module.named_parameters()}
