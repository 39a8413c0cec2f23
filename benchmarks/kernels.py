"""The head: final hidden states to log-probs (and reference log-probs, entropy, exact KL), forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Variant
from benchmarks.worker import Tick

__all__ = ["cases"]

HERE = "benchmarks.kernels"


def _inputs(tokens: int, hidden: int, vocab: int, dtype: str, trainable: bool) -> dict[str, Tensor]:
    """Hidden states whose logits have a standard deviation of about 2, as a trained model's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(getattr(torch, dtype))

    h = normal(tokens, hidden, std=1.0)
    return {
        "hidden": h.requires_grad_(),
        "ref_hidden": h.detach() + normal(tokens, hidden, std=0.05),
        "weight": normal(vocab, hidden, std=2.0 / hidden**0.5).requires_grad_(trainable),
        "targets": torch.randint(0, vocab, (tokens,), generator=generator),
        "upstream": torch.randn(tokens, generator=generator),
    }


def _repeat(tick: Tick, inputs: dict[str, Tensor], forward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Units of one forward and one backward pass; outputs are log-probs and, where asked for, KL."""
    upstream = inputs["upstream"]
    tick()
    while True:
        outputs = forward(**inputs)
        sum((upstream * x.float()).sum() for x in outputs).backward()
        grad = inputs["hidden"].grad
        assert grad is not None
        facts = {"outputs": float(sum(x.detach().float().sum() for x in outputs)), "grad": float(grad.float().norm())}
        inputs["hidden"].grad = inputs["weight"].grad = None
        del outputs, grad
        tick(**facts)


def rlft_logps(tick: Tick, **shape: Any) -> None:
    from rlft.ops import linear_logps

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        return (linear_logps(hidden, weight, targets).logps,)

    _repeat(tick, _inputs(**shape), forward)


def naive_logps(tick: Tick, **shape: Any) -> None:
    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        logps = (hidden @ weight.t()).float().log_softmax(-1)
        return (logps.gather(-1, targets[:, None]).squeeze(-1),)

    _repeat(tick, _inputs(**shape), forward)


def trl_selective(tick: Tick, **shape: Any) -> None:
    from trl.trainer.utils import selective_log_softmax

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        return (selective_log_softmax(hidden @ weight.t(), targets),)

    _repeat(tick, _inputs(**shape), forward)


# The vocabulary width that TRL's fused head passes to its function.
TRL_CHUNK = 32768


def trl_chunked(tick: Tick, **shape: Any) -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        return (ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0],)

    _repeat(tick, _inputs(**shape), forward)


def liger_chunked(tick: Tick, **shape: Any) -> None:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        return (_ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, 4096),)

    _repeat(tick, _inputs(**shape), forward)


def rlft_joint(tick: Tick, **shape: Any) -> None:
    from rlft.ops import linear_logps

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        out = linear_logps(
            hidden,
            weight,
            targets,
            ref_hidden=ref_hidden,
            want=frozenset({"logps", "ref_logps", "entropy", "kl"}),
            grad=frozenset({"logps", "kl"}),
        )
        return out.logps, out.kl

    _repeat(tick, _inputs(**shape), forward)


def naive_joint(tick: Tick, **shape: Any) -> None:
    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        logps = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            ref = (ref_hidden @ weight.t()).float().log_softmax(-1)
            ref.gather(-1, targets[:, None])
        p = logps.exp()
        with torch.no_grad():
            -(p * logps).sum(-1)
        return logps.gather(-1, targets[:, None]).squeeze(-1), (p * (logps - ref)).sum(-1)

    _repeat(tick, _inputs(**shape), forward)


def trl_joint(tick: Tick, **shape: Any) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
        logps = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))[0]
        with torch.no_grad():
            ChunkedLogProbFunction.apply(ref_hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())
        kl = ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, weight, None, 1.0)[0]
        return logps, kl

    _repeat(tick, _inputs(**shape), forward)


def _logps_case(name: str, what: str, shape: dict[str, Any], *, rounds: int, tolerance: float = 1e-4) -> Case:
    variants = [
        Variant("rlft linear_logps", f"{HERE}:rlft_logps", shape),
        Variant("torch log_softmax + gather", f"{HERE}:naive_logps", shape),
        Variant("TRL selective_log_softmax", f"{HERE}:trl_selective", shape, ("trl",)),
        Variant("TRL ChunkedLogProbFunction", f"{HERE}:trl_chunked", shape, ("trl",)),
        Variant("Liger chunked selective log-prob", f"{HERE}:liger_chunked", shape, ("liger_kernel",)),
    ]
    return Case(name, what, shape, variants, rounds=rounds, same=("outputs", "grad"), tolerance=tolerance)


def _joint_case(name: str, shape: dict[str, Any], *, rounds: int) -> Case:
    variants = [
        Variant("rlft linear_logps", f"{HERE}:rlft_joint", shape),
        Variant("torch, two log_softmax", f"{HERE}:naive_joint", shape),
        Variant("TRL LogProb x 2 + Divergence", f"{HERE}:trl_joint", shape, ("trl",)),
    ]
    what = "log-prob, reference log-prob, entropy and exact KL; gradients of log-prob and KL; head frozen"
    return Case(name, what, shape, variants, rounds=rounds, same=("outputs", "grad"), tolerance=1e-3)


def cases(*, quick: bool = False) -> list[Case]:
    """The head's cases; shapes a CPU can repeat."""
    if quick:
        small = {"tokens": 256, "hidden": 64, "vocab": 8000, "dtype": "float32", "trainable": False}
        return [
            _logps_case("head: log-probs", "log-prob, head frozen", small, rounds=1),
            _joint_case("head: log-probs and exact KL", small, rounds=1),
        ]
    base = {"tokens": 2048, "hidden": 512, "vocab": 32000, "dtype": "float32", "trainable": False}
    wide = {**base, "vocab": 151936}
    half = {**base, "tokens": 1024, "dtype": "bfloat16"}
    return [
        _logps_case("head: log-probs", "log-prob, head frozen", base, rounds=5),
        _logps_case("head: log-probs, large vocabulary", "log-prob, head frozen", wide, rounds=2),
        _logps_case(
            "head: log-probs, trained head", "log-prob, gradient to the head too", {**base, "trainable": True}, rounds=3
        ),
        _logps_case("head: log-probs, bfloat16", "log-prob, head frozen", half, rounds=3, tolerance=5e-2),
        _joint_case("head: log-probs and exact KL", base, rounds=5),
        _joint_case("head: log-probs and exact KL, large vocabulary", wide, rounds=2),
    ]
