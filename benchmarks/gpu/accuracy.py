"""Digits of log-probs and KL on the device, against float64 of the same bfloat16 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.head import Forward, inputs, materialised, materialised_joint, ours, ours_joint, trl, trl_joint
from benchmarks.gpu.measure import Recorder, Row, Skipped

__all__ = ["run"]


def run(recorder: Recorder) -> None:
    """Largest error of a log-prob, and median relative error of the KL at two sizes of it."""
    device = recorder.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, width, vocab = (64, 16, 500) if recorder.quick else (512, 1024, 151_936)
    shape = {"tokens": tokens, "hidden": width, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
    with recorder.section("accuracy"):
        given = inputs(tokens, width, vocab, dtype, device)
        case = recorder.case("accuracy", "errors against float64; no times", shape)
        near = {**given, "ref_hidden": given["hidden"] + 0.02 * (given["ref_hidden"] - given["hidden"])}
        ways: dict[str, tuple[object, object]] = {
            "rlft": (ours, ours_joint),
            "torch log_softmax": (lambda: materialised, lambda: materialised_joint),
            "TRL": (trl, trl_joint),
        }
        truths = [_truth(x) for x in (given, near)]
        for name, (one, both) in ways.items():
            row = Row(name)
            case.rows.append(row)
            try:
                row.facts["log-prob, largest error"] = _worst(one(), given, truths[0][0])  # type: ignore[operator]
                for x, (_, kl) in zip((given, near), truths, strict=True):
                    error, negative = _relative(both(), x, kl)  # type: ignore[operator]
                    size = f"{float(kl.median()):.0e}"
                    row.facts[f"KL {size}, median relative error"] = error
                    row.facts[f"KL {size}, share below 0"] = negative
            except Skipped as error:
                row.skipped = str(error)
            except Exception as error:  # one way's failure is a line of the table
                row.skipped = (
                    f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                )
            recorder.write()
            print(f"  accuracy | {name}: {row.skipped or row.facts}", flush=True)


@torch.no_grad()
def _truth(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-prob and KL of each token, in float64, some tokens at a time."""
    logps, kls = [], []
    weight = x["weight"].double()
    for rows in torch.arange(x["hidden"].shape[0], device=weight.device).split(64):
        p = (x["hidden"][rows].double() @ weight.t()).log_softmax(-1)
        q = (x["ref_hidden"][rows].double() @ weight.t()).log_softmax(-1)
        logps.append(p.gather(-1, x["targets"][rows, None])[:, 0])
        u = q - p  # every term >= 0: a small KL keeps its digits
        kls.append((p.exp() * (torch.expm1(u) - u)).sum(-1))
    return torch.cat(logps), torch.cat(kls)


@torch.no_grad()
def _worst(way: Forward, x: dict[str, Tensor], truth: Tensor) -> float:
    return float((way(x)[0].double() - truth).abs().max())


@torch.no_grad()
def _relative(way: Forward, x: dict[str, Tensor], truth: Tensor) -> tuple[float, float]:
    kl = way(x)[1].double()
    return float(((kl - truth) / truth).abs().median()), float((kl < 0).double().mean())
