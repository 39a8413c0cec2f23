"""Sampling answers: rlft's built-in sampler against transformers' ``generate`` and continuous batching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.harness import Case, Variant
from benchmarks.worker import Tick

__all__ = ["cases"]

HERE = "benchmarks.generation"


def _setup(folder: str, shape: dict[str, Any]) -> tuple[Any, Any, list[list[int]], list[int]]:
    """Model, tokenizer, prompt ids and the ids that end an answer: so many that a share 1 / mean_length of tokens do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab = model.config.vocab_size
    rows = workload.prompts(shape["prompts"], length=shape["prompt"], vocab=vocab)
    ids = [tokenizer(row["prompt"]).input_ids for row in rows]
    ends = round(vocab / shape["mean_answer"]) if shape.get("mean_answer") else 1
    return model, tokenizer, ids, list(range(1, 1 + ends))


def rlft_sampler(tick: Tick, folder: str, *, kind: str = "FastSampler", **shape: Any) -> None:
    from rlft import rollout

    model, tokenizer, prompts, ends = _setup(folder, shape)
    sampler = getattr(rollout, kind)(model, tokenizer)
    params = rollout.SamplingParams(shape["answer"], stop_token_ids=tuple(ends))
    tick()
    seed = 0
    while True:
        drawn = sampler.sample(prompts, shape["group"], params, seed=seed)
        seed += 1
        tick(tokens=sum(len(ids) for ids in drawn.completion_ids))


def generate(tick: Tick, folder: str, *, cache: str | None = None, **shape: Any) -> None:
    import torch
    from transformers import GenerationConfig

    model, tokenizer, prompts, ends = _setup(folder, shape)
    ids = torch.tensor([p for p in prompts for _ in range(shape["group"])])
    stop = torch.tensor(ends)
    config = GenerationConfig(
        max_new_tokens=shape["answer"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation=cache,
    )
    tick()
    seed = 0
    while True:
        torch.manual_seed(seed)
        seed += 1
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers = out[:, ids.shape[1] :]
        ended = torch.isin(answers, stop).int().cumsum(-1)
        tick(tokens=int(((ended == 0) | ((ended == 1) & torch.isin(answers, stop))).sum()))


def continuous_batching(tick: Tick, folder: str, **shape: Any) -> None:
    """transformers' own continuous batching, with what was found to be its best settings on a CPU.

    Its cache is sized for the work: by default it takes nine tenths of the machine's memory, and filling that with zeros
    would be most of the time. The answers to a prompt are one request, so that each prompt is prefilled once. Pages of 16,
    32, 64 and 256 tokens, prefill in one or several parts, both schedulers, and eager attention were tried; these settings
    are among the fastest, and all are within a tenth but eager attention without sharing and the largest pages. The manager
    lives for one call: a persistent one would keep the prompts of the call before, which is wrong once weights change.
    """
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer, prompts, ends = _setup(folder, shape)
    page = 16
    config = GenerationConfig(
        max_new_tokens=shape["answer"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        num_return_sequences=shape["group"],
    )
    pages = shape["prompts"] * shape["group"] * -(-(shape["prompt"] + shape["answer"]) // page)
    tick()
    seed = 0
    while True:
        batching = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=pages + page,
            max_batch_tokens=shape["prompts"] * shape["prompt"],
            seed=seed,
        )
        seed += 1
        with torch.no_grad():
            out = model.generate_batch(
                prompts, generation_config=config, continuous_batching_config=batching, warmup=False
            )
        if len(out) != shape["prompts"] * shape["group"]:
            raise RuntimeError(f"continuous batching gave {len(out)} of {shape['prompts'] * shape['group']} answers")
        tick(tokens=sum(len(answer.generated_tokens) for answer in out.values()))


def cases(folder: Path, *, quick: bool = False) -> list[Case]:
    """Ragged answers (most rows end early, as in practice) and answers of full length."""
    model = {"hidden": 64, "layers": 2, "vocab": 2000} if quick else {"hidden": 256, "layers": 4, "vocab": 8000}
    path = folder / ("generation-" + "-".join(f"{k}{v}" for k, v in model.items()))
    workload.make_model(path, **model)
    full = {"model": model, "prompts": 4, "group": 4, "prompt": 32, "answer": 16}
    if not quick:
        full |= {"group": 8, "prompt": 128, "answer": 128}
    ragged = {**full, "mean_answer": full["answer"] // 2}

    def variants(shape: dict[str, Any]) -> list[Variant]:
        where = {**shape, "folder": str(path)}
        return [
            Variant("rlft FastSampler", f"{HERE}:rlft_sampler", where),
            Variant("rlft TransformersSampler", f"{HERE}:rlft_sampler", {**where, "kind": "TransformersSampler"}),
            Variant("transformers generate", f"{HERE}:generate", where),
            Variant("transformers continuous batching", f"{HERE}:continuous_batching", where),
        ]

    rounds = 1 if quick else 5
    ragged_case = Case(
        "generation, ragged answers",
        "sampling; answers end at random",
        ragged,
        variants(ragged),
        rounds=rounds,
        same=("tokens",),
        tolerance=0.6,
        note="Token counts of different samplers differ by chance; the ratio is per token.",
        per="tokens",
    )
    full_case = Case(
        "generation, full length",
        "sampling; every answer has the full length",
        full,
        variants(full),
        rounds=rounds,
        same=("tokens",),
        tolerance=0.2,
        per="tokens",
    )
    return [ragged_case] if quick else [ragged_case, full_case]
