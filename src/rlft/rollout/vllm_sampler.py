"""Sampling with vLLM: the fastest back end on a GPU, with its own copy of the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlft.rollout.randomness import fold_seed
from rlft.rollout.sampling_mode import check_context, end_token_ids, generating_model, vocab_size
from rlft.rollout.stop_strings import StopStrings
from rlft.rollout.types import Rollout, Sampler, SamplingParams, check_request, each_params
from rlft.rollout.weights import merged_weights

__all__ = ["VLLMSampler"]

_MINIMUM = (0, 14)  # older versions ran code from a model's folder although told not to (CVE-2026-22807)
_OURS = {
    "model": "the engine is built from the model that was passed",
    "tokenizer": "the engine sees token ids only",
    "skip_tokenizer_init": "the engine sees token ids only",
    "load_format": "weights are loaded from the live model",
    "logprobs_mode": "log-probs must be those of the distribution sampled from",
    "worker_extension_cls": "it loads the weights",
    "generation_config": "what SamplingParams says is all there is",
}


class VLLMSampler(Sampler):
    """A :class:`Sampler` over an in-process vLLM engine (extra ``rlft[vllm]``).

    The engine is built from the model's config with placeholder weights. Before sampling, if ``weight_version`` is not
    the one it holds, the live weights are merged with their LoRA adapters, written to a temporary safetensors file and
    loaded by every worker; then the prefix cache, computed with the old weights, is dropped.

    The same seed gives the same rows on the same machine and version, but not the rows of the other back ends.
    The engine sees token ids only, so a row with stop strings is sampled to its end or to ``max_new_tokens``, and cut
    afterwards: the rows are the same, their rest is wasted. ``poll`` is called before and after a batch: vLLM does not return in between.

    Args:
        model: a causal language model or a LoRA PeftModel over one.
        tokenizer: its EOS ends a row.
        gpu_memory_utilization: the share of GPU memory the engine may take; the trainer needs the rest.
        tensor_parallel_size: GPUs the engine spreads over.
        max_model_len: the longest prompt and completion; default the model's own.
        weights_dir: where the temporary weights file goes; a memory-backed folder makes it fast. Default: the system's.
        **engine_options: passed to ``vllm.LLM``.

    Raises:
        ImportError: when vLLM is not installed.
        ValueError: for a version older than 0.14, or an engine option that this class sets itself.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        gpu_memory_utilization: float = 0.3,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        weights_dir: str | Path | None = None,
        **engine_options: Any,
    ) -> None:
        for option, why in _OURS.items():
            if option in engine_options:
                raise ValueError(f"{option} is set by VLLMSampler ({why}); leave it out")
        self._vllm = _import_vllm()
        self.model, self.tokenizer, self.weights_dir = model, tokenizer, weights_dir
        self.end_ids = end_token_ids(model, tokenizer)
        self.strings = StopStrings(tokenizer, vocab_size(model))
        inner = generating_model(model)
        with tempfile.TemporaryDirectory(prefix="rlft-vllm-", dir=weights_dir) as folder:
            inner.config.save_pretrained(folder)
            self.engine = self._vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                worker_extension_cls="rlft.rollout.vllm_worker.WeightLoader",
                dtype=str(inner.dtype).removeprefix("torch."),
                gpu_memory_utilization=gpu_memory_utilization,
                tensor_parallel_size=tensor_parallel_size,
                **({} if max_model_len is None else {"max_model_len": max_model_len}),
                **engine_options,
            )
        self._version: int | None = None

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
        check_context(generating_model(self.model), prompts, [request.max_new_tokens for request in requests])
        if poll is not None:
            poll()
        if weight_version != self._version:
            self.sync()
            self._version = weight_version
        stops = [sorted({*self.end_ids, *request.stop_token_ids}) for request in requests]
        # vLLM draws one row of a greedy request: all n are the same.
        asked = [1 if request.greedy else n for request in requests]
        theirs = [
            self._params(request, asked[p], stops[p], fold_seed(seed, step=p, stream="vllm"))
            for p, request in enumerate(requests)
        ]
        outputs = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], theirs, use_tqdm=False)
        if poll is not None:
            poll()
        if len(outputs) != len(prompts):
            raise RuntimeError(f"vLLM returned {len(outputs)} outputs for {len(prompts)} prompts")
        rows = [
            self._row(row, stops[p], requests[p].stop_strings)
            for p, output in enumerate(outputs)
            for row in self._rows(output, asked[p]) * (n // asked[p])
        ]
        ids, logps, finished = (list(column) for column in zip(*rows, strict=True))
        return Rollout(ids, logps, finished, weight_version)

    def sync(self) -> None:
        """Load the model's weights, adapters merged, into the engine."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(prefix="rlft-vllm-", dir=self.weights_dir) as folder:
            path = Path(folder) / "weights.safetensors"
            tensors = {name: tensor.contiguous() for name, tensor in merged_weights(self.model)}
            save_file(tensors, path)
            loaded = self.engine.collective_rpc("rlft_load_weights", args=(str(path),))
        if any(count != len(tensors) for count in loaded):
            raise RuntimeError(
                f"vLLM's workers loaded {loaded} tensors of {len(tensors)}; the engine's weights are stale"
            )
        self.engine.reset_prefix_cache()

    def _params(self, params: SamplingParams, n: int, stops: list[int], seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=n,
            temperature=0.0 if params.greedy else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            max_tokens=params.max_new_tokens,
            stop_token_ids=stops,
            seed=seed % 2**31,
            logprobs=0,  # the sampled token's alone
            detokenize=False,
        )

    def _rows(self, output: Any, asked: int) -> list[Any]:
        if len(output.outputs) != asked:
            raise RuntimeError(f"vLLM returned {len(output.outputs)} completions of a prompt, asked for {asked}")
        return sorted(output.outputs, key=lambda row: row.index)

    def _row(self, row: Any, stops: list[int], strings: tuple[str, ...]) -> tuple[list[int], list[float], bool]:
        ids = [int(token) for token in row.token_ids]
        if row.finish_reason not in ("stop", "length") or not ids:
            raise RuntimeError(f"vLLM ended a row by {row.finish_reason!r} after {len(ids)} tokens; see its log")
        if row.finish_reason == "stop" and ids[-1] not in stops:
            raise RuntimeError(f"vLLM ended a row by 'stop' at token {ids[-1]}, which is none of {stops}")
        logps = [float(step[token].logprob) for step, token in zip(row.logprobs, ids, strict=True)]
        end = self.strings.cut(ids, strings)
        return ids[:end], logps[:end], end is not None or ids[-1] in stops


def _import_vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ImportError(
            "the 'vllm' sampler needs vLLM, which is not installed: pip install 'rlft[vllm]' (Linux with a GPU), "
            "or use sampler='builtin'"
        ) from error
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if version < _MINIMUM:
        raise ValueError(
            f"vLLM {vllm.__version__} is too old: at least {_MINIMUM[0]}.{_MINIMUM[1]} is needed; upgrade it"
        )
    return vllm
