"""What every module that the trainer wraps can do: give and take its trainable tensors by name."""

from __future__ import annotations

from torch import Tensor, nn

from rlft.models.reference import full_copy, load_tensors

__all__ = ["TrainableModule", "plain_state"]


class TrainableModule(nn.Module):
    """A module whose checkpoint is its trainable tensors: the rest is rebuilt from where it came."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies of all trainable tensors by name, full (unsharded) and on the CPU."""
        return {name: full_copy(p) for name, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`trainable_state` in place.

        Raises:
            ValueError: when names or shapes differ; nothing is changed then.
        """
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        load_tensors(own, state, what="trainable state")

    def unsaved_state(self) -> dict[str, Tensor]:
        """The tensors that no checkpoint holds, by name and not copied: they come from where the model comes from."""
        named = self.state_dict(keep_vars=True)
        return {name: t for name, t in named.items() if isinstance(t, Tensor) and not t.requires_grad}

    def reference_state(self) -> dict[str, Tensor]:
        """The tensors of a reference that belongs to the module; empty where there is none."""
        return {}

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`reference_state`.

        Raises:
            ValueError: when names or shapes differ; nothing is changed then.
        """
        load_tensors({}, state, what="reference")


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters as contiguous CPU copies, ready for safetensors."""
    return {name: full_copy(p) for name, p in module.named_parameters()}
