"""Parts of a step on a model of half a billion weights, from scratch: the update of a group, and sampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.measure import Recorder, Skipped

__all__ = ["build", "generation", "sharing"]


def build(recorder: Recorder) -> Any:
    """A random Qwen2 of the shape of Qwen2.5-0.5B in bfloat16 on the device (quick: two layers of 64, float32)."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    if recorder.quick:
        shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    else:
        shape = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                 "num_attention_heads": 14, "num_key_value_heads": 2}  # fmt: skip
    config = Qwen2Config(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with recorder.device:
        model = AutoModelForCausalLM.from_config(config)
    return model.to(recorder.device, torch.bfloat16 if recorder.device.type == "cuda" else torch.float32).eval()


def _batch(
    vocab: int, *, prompt: int, answer: int, each: int, groups: int, shortest: float, device: torch.device
) -> Any:
    from rlft.types import Batch

    generator = torch.Generator().manual_seed(0)
    rows = groups * each
    lengths = torch.randint(max(1, round(shortest * answer)), answer + 1, (rows,), generator=generator)
    lengths[0] = answer
    exists = torch.arange(answer)[None] < lengths[:, None]
    return Batch(
        prompt_ids=torch.randint(2, vocab, (groups, prompt), generator=generator),
        prompt_mask=torch.ones(groups, prompt, dtype=torch.bool),
        completion_ids=torch.randint(2, vocab, (rows, answer), generator=generator),
        completion_mask=exists,
        mask=exists,
        group_ids=torch.arange(groups).repeat_interleave(each),
    ).to(device)


# -- the update -------------------------------------------------------------------------------------------------------
def sharing(recorder: Recorder) -> None:
    """Forward and backward pass of a group's log-probs: each prompt once, against the prompt repeated."""
    shapes = (
        {"prompt": 1024, "answer": 256, "each": 8, "groups": 2, "shortest": 1.0},
        {"prompt": 256, "answer": 256, "each": 8, "groups": 4, "shortest": 1.0},
        {"prompt": 256, "answer": 512, "each": 8, "groups": 2, "shortest": 0.1},
        {"prompt": 64, "answer": 512, "each": 1, "groups": 24, "shortest": 0.1},
    )
    if recorder.quick:
        shapes = ({"prompt": 24, "answer": 8, "each": 4, "groups": 2, "shortest": 0.5},)
    for lora in (True, False):
        for shape in shapes if lora else shapes[:1]:
            with recorder.section(f"sharing {shape}"):
                _sharing(recorder, shape, lora)


def _sharing(recorder: Recorder, shape: dict[str, Any], lora: bool) -> None:
    from rlft.models import LoraSettings, Policy, add_lora
    from rlft.models.shared import build_shared

    model = build(recorder)
    vocab = model.config.vocab_size
    if lora:
        model = add_lora(model, LoraSettings(r=16))
    batch = _batch(vocab, **shape, device=recorder.device)
    shared = build_shared(batch)
    assert shared is not None
    name = "x".join(str(shape[key]) for key in ("groups", "each", "prompt", "answer"))
    what = "log-probs of answers and their gradient; bound = token ratio of the layouts"
    case = recorder.case(
        f"update {name}{', ragged' if shape['shortest'] < 1 else ''}, {'LoRA' if lora else 'all weights'}",
        what,
        {**shape, "bound": round(shared.ratio, 3)},
    )

    def update(layout: Any) -> Callable[[], dict[str, float]]:
        policy = Policy(model, reference="none", layout=layout)
        read: dict[str, float] = {}

        def unit() -> dict[str, float]:
            logps = policy(batch, want=frozenset({"logps"}))["logps"]
            logps.sum().backward()
            if not read:
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                read["outputs"] = float(logps.detach().double().sum())
                read["grad"] = float(torch.stack([g.double().norm() for g in grads]).norm())
                read["tokens"] = float(policy.layout_used.computed)
            model.zero_grad(set_to_none=True)
            return read

        return unit

    recorder.variant(case, "rlft, layout shared", partial(update, "shared"))
    recorder.variant(case, "rlft, layout padded", partial(update, "padded"), same=("outputs", "grad"), tolerance=5e-2)


# -- sampling ---------------------------------------------------------------------------------------------------------
def generation(recorder: Recorder) -> None:
    """The built-in sampler against transformers' ``generate``, answers that end at random and at full length."""
    shape = {"prompts": 8, "each": 8, "prompt": 256, "answer": 96}
    if recorder.quick:
        shape = {"prompts": 2, "each": 2, "prompt": 8, "answer": 6}
    for mean in (shape["answer"] // 2, 0):
        with recorder.section(f"sampling, mean length {mean or 'full'}"):
            _sampling(recorder, shape, mean)


def _sampling(recorder: Recorder, shape: dict[str, int], mean: int) -> None:
    """``mean`` 0: no answer ends by itself, but for a token in the whole vocabulary."""
    from rlft import rollout

    model = build(recorder)
    vocab = model.config.vocab_size
    ends = list(range(1, 1 + (round(vocab / mean) if mean else 1)))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(len(ends) + 1, vocab, (shape["prompts"], shape["prompt"]), generator=generator)
    case = recorder.case(
        f"sampling, {'ragged' if mean else 'full length'}",
        "sampling; answers end at random" if mean else "sampling; every answer has the full length",
        {**shape, "mean answer": mean or shape["answer"]},
        per="tokens",
        note="Token counts of samplers differ by chance; ratios are per token.",
    )
    given = (model, prompts, shape, ends)
    for kind in (rollout.FastSampler, rollout.TransformersSampler):
        recorder.variant(case, f"rlft {kind.__name__}", partial(_sampler, kind, *given), warmup=1)
    recorder.variant(case, "transformers generate", partial(_generate, *given), warmup=1)


class _Ends:
    """All that a sampler asks of a tokenizer."""

    eos_token_id = 1
    pad_token_id = 0


def _sampler(kind: Any, model: Any, prompts: torch.Tensor, shape: dict[str, int], ends: list[int]) -> Callable[[], Any]:
    from rlft.rollout import SamplingParams

    try:
        sampler = kind(model, _Ends())
    except (TypeError, ValueError) as error:
        raise Skipped(str(error)) from error
    params = SamplingParams(shape["answer"], stop_token_ids=tuple(ends))
    ids = prompts.tolist()

    def unit() -> dict[str, float]:
        drawn = sampler.sample(ids, shape["each"], params, seed=0)
        return {"tokens": float(sum(len(row) for row in drawn.completion_ids))}

    return unit


def _generate(model: Any, prompts: torch.Tensor, shape: dict[str, int], ends: list[int]) -> Callable[[], Any]:
    from transformers import GenerationConfig

    ids = prompts.repeat_interleave(shape["each"], 0).to(model.device)
    stop = torch.tensor(ends, device=model.device)
    config = GenerationConfig(
        max_new_tokens=shape["answer"], do_sample=True, temperature=1.0, top_k=0, eos_token_id=ends, pad_token_id=0
    )

    def unit() -> dict[str, float]:
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers = out[:, ids.shape[1] :]
        ended = torch.isin(answers, stop)
        before = ended.int().cumsum(-1) - ended.int()  # ends before this token
        return {"tokens": float((before == 0).sum())}

    return unit
