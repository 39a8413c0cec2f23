"""The head op: log-probs, and log-probs with exact KL, beside the bare matrix products and what others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Case, Recorder, need

__all__ = ["run"]

#: The vocabulary width that TRL's fused head passes to its function.
TRL_CHUNK = 32768
Forward = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Hidden states whose logits have a standard deviation of about 2, as a trained model's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return (std * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    h = normal(tokens, hidden, std=1.0)
    return {
        "hidden": h,
        "ref_hidden": h + normal(tokens, hidden, std=0.05),
        "weight": normal(vocab, hidden, std=2.0 / hidden**0.5),
        "targets": torch.randint(0, vocab, (tokens,), generator=generator, device=device),
        "upstream": torch.randn(tokens, generator=generator, device=device),
    }


def stepping(given: dict[str, Tensor], forward: Forward, *, trains: bool = False) -> Callable[[], dict[str, float]]:
    """One forward and one backward pass; facts are read outside the clock's way, once."""
    hidden = given["hidden"].detach().clone().requires_grad_()
    weight = given["weight"].detach().requires_grad_(trains)
    read: dict[str, float] = {}

    def unit() -> dict[str, float]:
        outputs = forward({**given, "hidden": hidden, "weight": weight})
        sum((given["upstream"] * x.float()).sum() for x in outputs).backward()
        assert hidden.grad is not None
        if not read:
            read["outputs"] = float(sum(x.detach().double().sum() for x in outputs))
            read["grad"] = float(hidden.grad.double().norm())
        hidden.grad = weight.grad = None
        return read

    return unit


# -- ways to log-probs ------------------------------------------------------------------------------------------------
def ours(plan: str = "auto", chunk: tuple[int, int] | None = None) -> Forward:
    from rlft.ops import linear_logps

    def forward(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (linear_logps(x["hidden"], x["weight"], x["targets"], plan=plan, chunk=chunk).logps,)

    return forward


def materialised(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logps = (x["hidden"] @ x["weight"].t()).float().log_softmax(-1)
    return (logps.gather(-1, x["targets"][:, None]).squeeze(-1),)


def trl() -> Forward:
    function = need("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def forward(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (function.apply(x["hidden"], x["weight"], None, x["targets"], 1.0, TRL_CHUNK, None, 1.0, ())[0],)

    return forward


def liger() -> Forward:
    function = need("liger_kernel.chunked_loss.fused_linear_ppo")._ChunkedSelectiveLogProbFunction

    def forward(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (function.apply(x["hidden"], x["weight"], x["targets"], None, 1.0, 4096),)

    return forward


# -- ways to log-probs, reference log-probs, entropy and exact KL -------------------------------------------------------
def ours_joint(plan: str = "auto", chunk: tuple[int, int] | None = None) -> Forward:
    from rlft.ops import linear_logps

    def forward(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = linear_logps(
            x["hidden"],
            x["weight"],
            x["targets"],
            ref_hidden=x["ref_hidden"],
            want=frozenset({"logps", "ref_logps", "entropy", "kl"}),
            grad=frozenset({"logps", "kl"}),
            plan=plan,
            chunk=chunk,
        )
        return out.logps, out.kl

    return forward


def materialised_joint(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logps = (x["hidden"] @ x["weight"].t()).float().log_softmax(-1)
    with torch.no_grad():
        ref = (x["ref_hidden"] @ x["weight"].t()).float().log_softmax(-1)
        ref.gather(-1, x["targets"][:, None])
    p = logps.exp()
    with torch.no_grad():
        -(p * logps).sum(-1)
    return logps.gather(-1, x["targets"][:, None]).squeeze(-1), (p * (logps - ref)).sum(-1)


def trl_joint() -> Forward:
    logprob = need("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    divergence = need("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def forward(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        h, w, t = x["hidden"], x["weight"], x["targets"]
        logps = logprob.apply(h, w, None, t, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))[0]
        with torch.no_grad():
            logprob.apply(x["ref_hidden"], w, None, t, 1.0, TRL_CHUNK, None, 1.0, ())
        return logps, divergence.apply(h, w, None, x["ref_hidden"], w, None, 1.0)[0]

    return forward


def trl_sampled() -> Forward:
    """Log-probs of policy and reference: what a sampled estimate of the KL (k3) needs."""
    logprob = need("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def forward(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        h, w, t = x["hidden"], x["weight"], x["targets"]
        logps = logprob.apply(h, w, None, t, 1.0, TRL_CHUNK, None, 1.0, ())[0]
        with torch.no_grad():
            logprob.apply(x["ref_hidden"], w, None, t, 1.0, TRL_CHUNK, None, 1.0, ())
        return (logps,)

    return forward


# -- the floor --------------------------------------------------------------------------------------------------------
def products(given: dict[str, Tensor], count: tuple[int, int]) -> Callable[[], None]:
    """The bare matrix products of the op, by column tiles: ``count`` of logits, and of tiles times the head."""
    h, w = given["hidden"], given["weight"]
    half = h.dtype == torch.bfloat16 and h.device.type == "cuda"
    width = 16384
    tile = torch.randn(h.shape[0], min(width, w.shape[0]), device=h.device).to(h.dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32) if half else a @ b

    def unit() -> None:
        for start in range(0, w.shape[0], width):
            rows = w[start : start + width]
            for _ in range(count[0]):
                product(h, rows.t())
            for _ in range(count[1]):
                product(tile[:, : rows.shape[0]], rows)

    return unit


# -- cases ------------------------------------------------------------------------------------------------------------
def run(recorder: Recorder) -> None:
    """Joint op and log-probs at three widths, log-probs of a head that trains, and tile sizes."""
    device = recorder.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, vocab, widths = (8192, 151_936, (2048, 4096, 1024)) if not recorder.quick else (64, 500, (16,))
    for width in widths:
        shape = {"tokens": tokens, "hidden": width, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
        with recorder.section(f"head, {width} wide"):
            given = inputs(tokens, width, vocab, dtype, device)
            _joint(recorder, given, shape)
            _logps(recorder, given, shape)
            if width == widths[0]:
                _trained(recorder, given, shape)
                _tiles(recorder, given, shape)


def _plans(case: Case, recorder: Recorder, given: dict[str, Tensor], way: Any, *, trains: bool = False) -> None:
    """Ours as it comes, and with torch's operators where that is another way."""
    recorder.variant(case, "rlft", lambda: stepping(given, way(), trains=trains))
    if given["hidden"].device.type == "cuda":
        plain = "recompute" if trains else "tile"
        recorder.variant(case, f"rlft, torch's operators ({plain})", lambda: stepping(given, way(plain), trains=trains))


def _others(
    case: Case, recorder: Recorder, given: dict[str, Tensor], ways: dict[str, Callable[[], Forward]], **more: bool
) -> None:
    """What must compute the same; sums of bfloat16 outputs and norms of gradients agree within two percent."""
    for name, way in ways.items():

        def make(way: Callable[[], Forward] = way) -> Callable[[], dict[str, float]]:
            return stepping(given, way(), **more)

        recorder.variant(case, name, make, same=("outputs", "grad"), tolerance=2e-2)


def _joint(recorder: Recorder, given: dict[str, Tensor], shape: dict[str, Any]) -> None:
    what = "log-prob, reference log-prob, entropy and exact KL; gradients of log-prob and KL; head frozen"
    case = recorder.case(f"joint, {shape['hidden']} wide", what, shape)
    _plans(case, recorder, given, ours_joint)
    recorder.variant(case, "bare matrix products of the op (4)", lambda: products(given, (2, 2)))
    _others(
        case,
        recorder,
        given,
        {"torch, two log_softmax": lambda: materialised_joint, "TRL LogProb x 2 + Divergence": trl_joint},
    )
    recorder.variant(case, "TRL LogProb x 2 (sampled KL alone)", lambda: stepping(given, trl_sampled()))


def _logps(recorder: Recorder, given: dict[str, Tensor], shape: dict[str, Any]) -> None:
    case = recorder.case(f"log-probs, {shape['hidden']} wide", "log-prob and its gradient; head frozen", shape)
    _plans(case, recorder, given, ours)
    recorder.variant(case, "bare matrix products of the op (2)", lambda: products(given, (1, 1)))
    ways = {
        "torch log_softmax + gather": lambda: materialised,
        "TRL ChunkedLogProbFunction": trl,
        "Liger chunked selective log-prob": liger,
    }
    _others(case, recorder, given, ways)


def _trained(recorder: Recorder, given: dict[str, Tensor], shape: dict[str, Any]) -> None:
    case = recorder.case("log-probs, head trained", "log-prob; gradients to hidden states and head", shape)
    _plans(case, recorder, given, ours, trains=True)
    ways = {"torch log_softmax + gather": lambda: materialised, "TRL ChunkedLogProbFunction": trl}
    _others(case, recorder, given, ways, trains=True)


def _tiles(recorder: Recorder, given: dict[str, Tensor], shape: dict[str, Any]) -> None:
    case = recorder.case("tile sizes", "the joint op with other tiles (rows x vocabulary entries)", shape)
    sizes = [(4096, 16384), (1024, 16384), (8192, 8192), (8192, 32768), (2048, 32768), (512, 4096)]
    ways = {f"rlft, {rows} x {columns}": (rows, columns) for rows, columns in sizes[: 2 if recorder.quick else None]}
    _others(case, recorder, given, {name: lambda chunk=chunk: ours_joint(chunk=chunk) for name, chunk in ways.items()})
