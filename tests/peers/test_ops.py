"""The head op against TRL's fused kernels: the same numbers, and more digits where KL is small."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from benchmarks import accuracy
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax

from rlft.ops import linear_logps

pytestmark = pytest.mark.peers


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator).requires_grad_()
    ref_hidden = hidden.detach() + 0.3 * torch.randn(37, 16, generator=generator)
    weight = torch.randn(101, 16, generator=generator)
    targets = torch.randint(0, 101, (37,), generator=generator)
    return hidden, ref_hidden, weight, targets, torch.randn(37, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.5])
@pytest.mark.parametrize("trained_head", [False, True])
def test_log_probs_and_entropy(
    trained_head: bool, logit_scale: float, softcap: float | None, temperature: float
) -> None:
    hidden, _, weight, targets, upstream = _inputs()
    weight.requires_grad_(trained_head)
    leaves = (hidden, weight) if trained_head else (hidden,)
    ours = linear_logps(
        hidden,
        weight,
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        want=frozenset({"logps", "entropy"}),
        grad=frozenset({"logps", "entropy"}),
        chunk=(16, 40),
    )
    assert ours.logps is not None
    assert ours.entropy is not None
    logps, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, temperature, 64, softcap, logit_scale, ("entropy",)
    )
    torch.testing.assert_close(ours.logps, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, entropy, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad((upstream * (ours.logps + ours.entropy)).sum(), leaves)
    peers = torch.autograd.grad((upstream * (logps + entropy)).sum(), leaves)
    for a, b in zip(mine, peers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_exact_kl() -> None:
    hidden, ref_hidden, weight, targets, upstream = _inputs()
    ours = linear_logps(
        hidden, weight, targets, ref_hidden=ref_hidden, want=frozenset({"kl"}), grad=frozenset({"kl"}), chunk=(16, 40)
    ).kl
    assert ours is not None
    theirs, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, weight, None, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad((upstream * ours).sum(), hidden)
    (peers,) = torch.autograd.grad((upstream * theirs).sum(), hidden)
    torch.testing.assert_close(mine, peers, rtol=1e-5, atol=1e-5)


def test_double_precision_log_probs() -> None:
    hidden, _, weight, targets, upstream = (x.double() if x.is_floating_point() else x for x in _inputs())
    hidden = hidden.detach().requires_grad_()
    ours = linear_logps(hidden, weight, targets).logps
    theirs = selective_log_softmax(hidden @ weight.t(), targets)
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    (mine,) = torch.autograd.grad((upstream * ours).sum(), hidden)
    (peers,) = torch.autograd.grad((upstream * theirs).sum(), hidden)
    torch.testing.assert_close(mine, peers, rtol=1e-10, atol=1e-12)


def test_small_kl_has_digits() -> None:
    result = accuracy.compare(1e-3, tokens=128, hidden=128, vocab=4000)
    ours, theirs = result["ways"]["rlft linear_logps"], result["ways"]["TRL LogProb and Divergence"]
    assert result["kl"] < 1e-5
    assert ours["negative"] == 0
    assert ours["kl_error"] < 1e-3
    assert theirs["kl_error"] > 30 * ours["kl_error"]
