"""What vLLM's worker processes run for :class:`rlft.rollout.VLLMSampler`; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["WeightLoader"]


class WeightLoader:
    """A vLLM worker extension (``worker_extension_cls``): its methods can be called by ``collective_rpc``."""

    model_runner: Any

    def rlft_load_weights(self, path: str) -> int:
        """Load every tensor of a safetensors file into the worker's model; returns how many there were.

        The weights travel through a file, not through a pickled message: nothing that arrives here can run code.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())

            def tensors() -> Iterator[tuple[str, Any]]:
                for name in names:
                    yield name, file.get_tensor(name)

            self.model_runner.model.load_weights(tensors())
        return len(names)
