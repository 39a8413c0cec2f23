"""Samplers by name, for configs."""

from __future__ import annotations

from typing import Any

from rlft import _check
from rlft.rollout.types import Sampler

__all__ = ["SAMPLERS", "make_sampler"]

SAMPLERS = ("auto", "builtin", "transformers", "vllm")


def make_sampler(name: str, model: Any, tokenizer: Any, **options: Any) -> Sampler:
    """A sampler by name.

    Args:
        name: ``"builtin"`` (:class:`~rlft.rollout.FastSampler`), ``"transformers"``
            (:class:`~rlft.rollout.TransformersSampler`), ``"vllm"`` (:class:`~rlft.rollout.VLLMSampler`), or ``"auto"``:
            the built-in one where it can run the model, else transformers.
        model: a causal language model or LoRA PeftModel.
        tokenizer: the model's.
        **options: of the sampler's class (``max_batch``, ...).

    Raises:
        ValueError: for an unknown name or option, or a model that the named sampler cannot run.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown{_check.suggestion(str(name), SAMPLERS)}")
    if name in ("auto", "builtin"):
        from rlft.rollout.fast_sampler import FastSampler, unsupported

        if name == "builtin" or unsupported(model) is None:
            return _build(FastSampler, model, tokenizer, options)
    if name == "vllm":
        from rlft.rollout.vllm_sampler import VLLMSampler

        return _build(VLLMSampler, model, tokenizer, options)
    from rlft.rollout.transformers_sampler import TransformersSampler

    return _build(TransformersSampler, model, tokenizer, options)


def _build(kind: type, model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    import inspect

    known = [key for key, p in inspect.signature(kind).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(kind).parameters.values())
    for option in options:
        if option not in known and not open_ended:
            raise ValueError(f"{kind.__name__} has no option {option!r}{_check.suggestion(option, known)}")
    return kind(model, tokenizer, **options)
