"""The built-in sampler: its own decoding loop over a transformers model."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlft import _check
from rlft.rollout.decode_loop import DecodeLoop
from rlft.rollout.llama_structure import unknown
from rlft.rollout.sampling_mode import check_context, end_token_ids, generating_model, sampling_mode, vocab_size
from rlft.rollout.stop_strings import StopStrings
from rlft.rollout.types import Rollout, Sampler, SamplingParams, check_request, each_params
from rlft.rollout.weights import merged_adapters

if TYPE_CHECKING:
    from rlft.rollout.llama_step import LlamaStep
    from rlft.rollout.step_graphs import Capture

__all__ = ["FastSampler", "unsupported"]

logger = logging.getLogger("rlft")

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def unsupported(model: Any) -> str | None:
    """Why :class:`FastSampler` cannot run a model, None where it can."""
    try:
        inner = generating_model(model)
    except ValueError as error:
        return str(error)
    config = inner.config.get_text_config(decoder=True)
    if inner.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(inner, "_is_stateful", False):
        return "its state is no key-value cache"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= _LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(kinds - _LAYER_TYPES))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if rope_types & _BATCH_DEPENDENT_ROPE:
        return f"its {', '.join(sorted(rope_types & _BATCH_DEPENDENT_ROPE))} rotary positions depend on the batch"
    if "past_key_values" not in inspect.signature(inner.forward).parameters:
        return "its forward takes no past_key_values"
    return None


class FastSampler(Sampler):
    """A :class:`Sampler` that prefills each prompt once, drops finished rows and refills their slots.

    The prompt of a group runs through the model once, however many completions it gets. Rows that end free their
    slot at once; waiting rows take it (continuous batching), so a step never computes a finished row. Greedy rows equal
    those of ``generate`` and sampled rows those of :class:`TransformersSampler` with the same seed, up to float
    rounding: every random number belongs to (seed, prompt, sample, position), not to a slot.

    Args:
        model: a causal language model or a LoRA PeftModel over one; read at every call, so always the live weights.
        tokenizer: its EOS ends a row, its padding token fills prompts on the left.
        max_batch: slots, the rows decoded at once.
        max_prefill_tokens: prompt tokens (padding included) that go through the model at once.
        merge_limit_mb: LoRA adapters are merged while sampling, which saves two matrix products per layer and token, if
            the weights they adapt, then held twice, are float32 or float64 and take at most so much memory; 0 = never.
            The weights are bit for bit the same afterwards.
        own_step: Llama, Mistral, Qwen2 and Qwen3 models decode by :class:`rlft.rollout.llama_step.LlamaStep`, whose
            logits are compared with the model's own on first use; False: every model by its modules.
        cuda_graphs: such steps are recorded as CUDA graphs and replayed (:mod:`rlft.rollout.step_graphs`): no time between
            kernels, which is most of a small model's step. ``"auto"``: on CUDA. The first replays are compared with the
            step itself; after a failure there is one warning, and no graph any more.
        copy_limit_mb: weights of that step are held twice, fused and in the order in which the processor reads them
            fastest, if they take at most so much memory; those beyond are used where they are.

    Attributes:
        not_own_step: why the last call decoded by the model's modules; None where it did not.
        not_graphed: why the last call replayed no CUDA graphs; None where it could.

    Raises:
        ValueError: for a model whose cache is not made of rows of keys and values (state-space layers,
            encoder-decoders, ...), with the reason; use ``TransformersSampler`` for those. For ``cuda_graphs=True`` where it would do nothing.
    """

    reads_live_weights = True  # its log-probs are the model's own, up to rounding

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch: int = 128,
        max_prefill_tokens: int = 8192,
        merge_limit_mb: float = 1024,
        own_step: bool = True,
        cuda_graphs: Literal["auto"] | bool = "auto",
        copy_limit_mb: float = 2048,
    ) -> None:
        _check.number("max_batch", max_batch, low=1)
        _check.number("max_prefill_tokens", max_prefill_tokens, low=1)
        _check.number("merge_limit_mb", merge_limit_mb, low=0)
        _check.number("copy_limit_mb", copy_limit_mb, low=0)
        reason = unsupported(model)
        if reason:
            raise ValueError(f"the built-in sampler cannot run this model: {reason}; use the 'transformers' sampler")
        if cuda_graphs != "auto" and not isinstance(cuda_graphs, bool):
            raise ValueError(f"cuda_graphs must be 'auto', True or False, got {cuda_graphs!r}")
        device = generating_model(model).device
        if cuda_graphs is True and (device.type != "cuda" or not own_step):
            why = f"the model is on {device}" if own_step else "own_step=False"
            raise ValueError(
                f"cuda_graphs=True would do nothing: {why}, and graphs are made of the sampler's own step on CUDA; "
                f"leave it at 'auto'"
            )
        self.cuda_graphs: Literal["auto"] | bool = cuda_graphs
        self.not_graphed: str | None = None
        self._graphs_failed: str | None = None
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_prefill_tokens = int(max_batch), int(max_prefill_tokens)
        self.merge_limit_mb, self.copy_limit_mb = merge_limit_mb, copy_limit_mb
        self.own_step = own_step
        self.not_own_step: str | None = None
        self._compared = False
        self._found: str | None = None  # by comparison with the model's forward
        self.end_ids = end_token_ids(model, tokenizer)
        self.strings = StopStrings(tokenizer, vocab_size(model))
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = pad if pad is not None else (self.end_ids[0] if self.end_ids else 0)

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        seed: int,
        weight_version: int = 0,
        poll: Callable[[], None] | None = None,
    ) -> Rollout:
        prompts = check_request(prompt_ids, n, seed)
        requests = each_params(params, len(prompts))
        model = generating_model(self.model)
        check_context(model, prompts, [request.max_new_tokens for request in requests])
        longest = max(len(ids) + request.max_new_tokens for ids, request in zip(prompts, requests, strict=True))
        with sampling_mode(self.model), merged_adapters(model, max_bytes=int(self.merge_limit_mb * 2**20)):
            decode = self._decode_step(model, prompts, rows=len(prompts) * n, longest=longest)
            loop = DecodeLoop(
                model,
                prompts,
                n,
                requests,
                seed=seed,
                slots=self.max_batch,
                max_prefill_tokens=self.max_prefill_tokens,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                strings=self.strings,
                decode=decode,
                capture=self._capture(model.device, decode),
            )
            rollout = loop.run(weight_version, poll)
        if loop.graphs is not None and loop.graphs.failed is not None:
            self.not_graphed = self._graphs_failed = loop.graphs.failed
        return rollout

    def _capture(self, device: torch.device, decode: LlamaStep | None) -> Capture | None:
        """What records the steps of this call; None where they are launched one kernel after the other."""
        from rlft.rollout.step_graphs import CudaCapture

        if not self.cuda_graphs:
            self.not_graphed = "cuda_graphs=False"
        elif device.type != "cuda":
            self.not_graphed = f"the model is on {device}"
        elif decode is None:
            self.not_graphed = f"decodes by the model's modules: {self.not_own_step}"
        else:
            self.not_graphed = self._graphs_failed
        return CudaCapture(device) if self.not_graphed is None else None

    def _decode_step(self, model: Any, prompts: list[list[int]], *, rows: int, longest: int) -> LlamaStep | None:
        """The step that this call decodes with, over the weights of this moment; None for the model's own forward."""
        from rlft.rollout.llama_step import LlamaStep, disagreement

        why = self._found or unknown(model, longest=longest)
        step = None
        if not self.own_step:
            why = "own_step=False"
        elif why is None:
            step = LlamaStep(model, rows=min(self.max_batch, rows), copy_bytes=int(self.copy_limit_mb * 2**20))
            if not self._compared:
                self._compared = True
                why = self._found = disagreement(model, step, prompts, pad_id=self.pad_id)
                if why is not None:
                    warnings.warn(
                        f"the built-in sampler's decode step is not that of this {type(model).__name__}: {why}; the "
                        f"model's own forward is used (slower). Pass own_step=False to skip this check",
                        stacklevel=3,
                    )
        if why != self.not_own_step:
            logger.info(
                "built-in sampler: %s", f"decodes by the model's modules: {why}" if why else "decodes by its own step"
            )
        self.not_own_step = why
        return step if why is None else None
