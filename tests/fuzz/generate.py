"""Random inputs of a loss, as plain Python lists: ragged groups, gaps, ties, poison wherever a slot does not count."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from rlft import losses

NAN, INF = float("nan"), float("inf")
POISON = (-INF, INF, NAN, 7.0, -3e4)
PER_TOKEN = frozenset(
    {"token_kl", "teacher_kl", "token_log_ratio_sq", "behaviour_log_ratio", "behaviour_log_ratio_sq", "step_labels"}
    | {"old_values", "returns"}
)
#: Names that carry gradient in every loss that takes them, and those that do in the losses of the table.
ALWAYS_LEARNED = frozenset({"logps", "chosen_logps", "rejected_logps", "scores", "values"})
ALSO_LEARNED = {
    "token_kl": None,
    "teacher_kl": None,
    "token_log_ratio_sq": None,
    "behaviour_log_ratio": None,
    "behaviour_log_ratio_sq": None,
    "chosen_rewards": None,
    "rejected_rewards": None,
}


@dataclass
class Case:
    """One call: tensors by parameter name as lists, hyper-parameters, and what is needed to work out the answer."""

    name: str
    tensors: dict[str, Any]
    hyper: dict[str, Any]
    limit: float  # largest exponent that is not refused
    narrow: bool = False  # float32
    learned: frozenset[str] = field(default_factory=frozenset)

    @property
    def rows(self) -> int:
        return len(self.tensors["mask"])


@cache
def parameters(name: str) -> tuple[str, ...]:
    """The tensors a loss takes, in order."""
    found = inspect.signature(getattr(losses, name)).parameters.values()
    return tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)


def _positive(low: float, high: float) -> Callable[[Random], float]:
    return lambda rng: low * (high / low) ** rng.random()


def _maybe_zero(low: float, high: float) -> Callable[[Random], float]:
    return lambda rng: 0.0 if rng.random() < 0.15 else low * (high / low) ** rng.random()


def _one_of(*words: Any) -> Callable[[Random], Any]:
    return lambda rng: rng.choice(words)


def _between(low: float, high: float) -> Callable[[Random], float]:
    return lambda rng: rng.uniform(low, high)


BETA, BETA0, SMOOTH = _positive(0.01, 5), _maybe_zero(0.01, 5), _one_of(0.0, 0.0, 0.1, 0.3)
COEF, WEIGHT = _one_of(0.0, 0.5, 1.0), _one_of(0.0, 0.5, 1.0, 2.0)
CLIP = {"clip_eps": _one_of(0.1, 0.2, 0.9, 1.0), "clip_eps_high": _one_of(None, 0.28, 4.0)}
LR = {"beta": BETA, "lr_coef": COEF}

#: loss -> hyper-parameter -> how to draw it. A loss that is missing takes none.
HYPER: dict[str, dict[str, Callable[[Random], Any]]] = {
    "distillation": {"soft_weight": _one_of(0.0, 0.3, 1.0)},
    "dpo": {"beta": BETA, "label_smoothing": SMOOTH},
    "robust_dpo": {"beta": BETA, "label_smoothing": SMOOTH},
    "dpo_reference_free": {"beta": BETA, "label_smoothing": SMOOTH},
    "slic": {"beta": BETA, "delta": _positive(0.1, 9)},
    "slic_hf": {"delta": _positive(0.1, 9), "nll_weight": WEIGHT},
    "generalised_po": {"beta": BETA, "f": _one_of("logistic", "square", "hinge", "exp")},
    "f_dpo": {
        "beta": BETA,
        "divergence": _one_of("reverse_kl", "forward_kl", "js", "alpha"),
        "alpha": _one_of(0.1, 0.5, 1.0),
    },
    "discopop": {"beta": BETA, "temperature": _one_of(0.05, 0.3, 1.0)},
    "reward_aware_rpo": {
        "beta": BETA,
        "eta": BETA,
        "distance": _one_of("square", "backward_kl", "forward_kl"),
    },
    "anchored_dpo": {"beta": BETA, "delta": _between(-2, 2)},
    "bco_pair": {"beta": BETA, "delta": _between(-2, 2)},
    "exo_pair": {"beta": BETA, "label_smoothing": _one_of(1e-3, 0.1, 0.4)},
    "aot": {"beta": BETA, "label_smoothing": SMOOTH},
    "aot_unpaired": {"beta": BETA, "label_smoothing": SMOOTH},
    "rpo": {"beta": BETA, "alpha": WEIGHT},
    "simpo": {"beta": BETA, "gamma": _maybe_zero(0.1, 2), "label_smoothing": SMOOTH},
    "orpo": {"beta": BETA, "eps": _one_of(0.0, 1e-7, 0.01, 0.5)},
    "cpo": {"beta": BETA, "nll_weight": WEIGHT, "label_smoothing": SMOOTH},
    "wpo": {"beta": BETA, "label_smoothing": SMOOTH},
    "ld_dpo": {"beta": BETA, "ld_alpha": _one_of(0.0, 0.4, 1.0), "label_smoothing": SMOOTH},
    "bradley_terry": {"margin": _maybe_zero(0.1, 2), "centering": _maybe_zero(0.01, 1)},
    "bradley_terry_margin": {"centering": _maybe_zero(0.01, 1)},
    "kto": {"beta": BETA, "desirable_weight": WEIGHT, "undesirable_weight": WEIGHT},
    "rrhf": {"nll_weight": WEIGHT},
    "unlikelihood": {"weight": WEIGHT, "eps": _one_of(1e-4, 0.01, 0.5)},
    "kl_policy_gradient": {
        "beta": BETA0,
        "kl_value": _one_of("k1", "k2", "k3"),
        "kl_gradient": _one_of("none", "k1", "k2", "k3", "ratio_k3"),
    },
    "ppo_clip": {**CLIP, "dual_clip": _one_of(None, 1.5, 3.0)},
    "grpo": {**CLIP, "beta": BETA0, "kl_gradient": _one_of("none", "k1", "k2", "k3", "ratio_k3")},
    "gspo": CLIP,
    "gspo_token": CLIP,
    "p3o": {**CLIP, "beta": BETA0, "clipping": _one_of("separate", "joint")},
    "cispo": {"clip_eps_high": _one_of(0.28, 4.0), "clip_eps": _one_of(0.2, 1.0)},
    "sapo": {"temperature_positive": _positive(0.1, 5), "temperature_negative": _positive(0.1, 5)},
    "ppo_penalty": {"beta": BETA0},
    "value_loss": {"clip_eps": _one_of(None, 0.2, 1.0)},
    "agro_on_policy": {**LR, "lr_baseline": _one_of("none", "leave_one_out", "unbiased")},
    "agro_on_policy_causal": {"beta": BETA0, "baseline": _one_of("none", "sequence", "position")},
    "agro_on_policy_exact_kl": {"beta": BETA0, "baseline": _one_of("none", "sequence", "position")},
    "agro_on_policy_lr_causal": LR,
    "agro_on_policy_lr_token": {
        **LR,
        "square": _one_of("h1", "h2"),
        "linear": _one_of("g1", "g2"),
        "lr_baseline": _one_of("none", "unbiased"),
    },
    "agro_on_policy_lr_kl": {
        **LR,
        "square": _one_of("h1", "h2", "h3"),
        "linear": _one_of("g1", "g2", "g3", "g3n"),
        "lr_baseline": _one_of("none", "unbiased"),
    },
    "agro_on_policy_lr_moments": {**LR, "lr_baseline": _one_of("none", "unbiased")},
    **{key: {"beta": BETA} for key in ("ipo", "ipo_mean", "ipo_md", "apo_zero", "apo_down", "nca_pair", "sppo_hard")},
    **{key: {"beta": BETA} for key in ("dro", "agro_off_policy_weighted", "agro_off_policy_per_token")},
    **{key: {"beta": BETA0} for key in ("rloo", "kl_policy_gradient_exact", "nash_md_pg", "agro_off_policy")},
    **{key: {"beta": BETA0} for key in ("agro_off_policy_rb", "agro_off_policy_rb2", "agro_off_policy_cv")},
}


def case(name: str, seed: int) -> Case:
    """Case number ``seed`` of a loss, always the same."""
    rng = Random(f"{name}/{seed}")
    narrow = seed % 8 == 7
    hyper = {key: draw(rng) for key, draw in HYPER.get(name, {}).items()}
    if name == "agro_on_policy_lr_kl" and hyper["square"] != "h3" and not hyper["linear"].startswith("g3"):
        hyper["linear"] = "g3"
    names = parameters(name)
    learned = frozenset(n for n in names if n in ALWAYS_LEARNED or n in ALSO_LEARNED)
    if name == "value_loss":
        learned = frozenset({"values"})
    made = _tokens(rng, name, names, narrow) if "mask" in names else _pairs(rng, names, narrow)
    if narrow:
        made = {key: _single(value) for key, value in made.items()}
    limit = 44.36141955583649 if narrow else 354.891356446692
    return Case(name, made, hyper, limit, narrow, learned)


def _single(value: Any) -> Any:
    """The nearest float32 of every float: both sides see the same numbers."""
    import struct

    if isinstance(value, list):
        return [_single(v) for v in value]
    return struct.unpack("f", struct.pack("f", value))[0] if isinstance(value, float) else value


def _log_prob(rng: Random, style: str) -> float:
    if style == "close":
        return -rng.random() * 3
    if style == "grid":
        return -rng.randrange(12) / 2
    return -50 * rng.random() if style == "wide" else -(10 ** rng.uniform(-9, 1.6))


def _pairs(rng: Random, names: tuple[str, ...], narrow: bool) -> dict[str, Any]:
    size = rng.randint(1, 5)
    style = rng.choice(("close", "close", "grid", "wide", "tiny"))
    made: dict[str, Any] = {}
    for name in names:
        if name.endswith("lengths"):
            made[name] = [rng.randint(1, 7) for _ in range(size)]
        elif name == "chosen_win_rates":
            made[name] = [rng.choice((0.0, 0.5, 1.0, rng.random())) for _ in range(size)]
        elif name.endswith("logps"):
            made[name] = [_log_prob(rng, style) for _ in range(size)]
            if not narrow and rng.random() < 0.02:
                made[name][rng.randrange(size)] = -900.0
        else:  # rewards of a reward model, margins
            made[name] = [rng.choice((rng.uniform(-3, 3), float(rng.randint(-2, 2)), 40.0)) for _ in range(size)]
    return made


def _mask_row(rng: Random, width: int) -> list[bool]:
    kind = rng.choice(("full", "prefix", "prefix", "gaps", "gaps", "zero", "suffix"))
    if kind == "gaps":
        return [rng.random() < 0.6 for _ in range(width)]
    cut = {"full": width, "zero": 0}.get(kind, rng.randint(1, width))
    row = [t < cut for t in range(width)]
    return row[::-1] if kind == "suffix" else row


def _group_ids(rng: Random, name: str) -> list[int]:
    if name == "ld_dpo":
        ids = [i for i in range(rng.randint(1, 3)) for _ in range(2)]
        rng.shuffle(ids)
        return [3 * i - 2 for i in ids]
    smallest = 1 if rng.random() < 0.03 else 2
    ids = [9 - 2 * g for g in range(rng.randint(1, 3)) for _ in range(rng.randint(smallest, 5))]
    if rng.random() < 0.7:
        rng.shuffle(ids)
    return ids


def _rewards(rng: Random, mask: list[list[bool]], narrow: bool) -> list[float]:
    kind = rng.choice(("bits", "bits", "real", "real", "real", "equal", "huge"))
    if kind == "bits":
        found = [float(rng.random() < 0.5) for _ in mask]
    elif kind == "equal":
        found = [0.7] * len(mask)
    else:
        unit = (1e6 if narrow else 1e30) if kind == "huge" else 1.0
        found = [unit * rng.gauss(0, 1) for _ in mask]
    for i, row in enumerate(mask):
        if not any(row) and rng.random() < 0.5:
            found[i] = rng.choice(POISON)
        elif rng.random() < 0.1:
            found[i] = NAN
    return found


def _tokens(rng: Random, name: str, names: tuple[str, ...], narrow: bool) -> dict[str, Any]:
    ids = _group_ids(rng, name) if "group_ids" in names else []
    rows, width = len(ids) or rng.randint(1, 5), rng.randint(1, 7)
    mask = [_mask_row(rng, width) for _ in range(rows)]
    style = rng.choice(("close", "close", "grid", "wide", "tiny"))

    def tokens(draw: Callable[[], float]) -> list[list[float]]:
        return [[draw() if on else rng.choice(POISON) for on in row] for row in mask]

    def per_row(draw: Callable[[], float]) -> list[float]:
        return [draw() if any(row) else rng.choice(POISON) for row in mask]

    def real() -> float:
        return 0.0 if rng.random() < 0.1 else rng.gauss(0, 2)

    made: dict[str, Any] = {}
    for key in names:
        if key == "mask":
            made[key] = mask
        elif key == "group_ids":
            made[key] = ids
        elif key == "rewards":
            made[key] = _rewards(rng, mask, narrow)
        elif key == "labels":
            made[key] = [rng.random() < 0.5 for _ in mask]
        elif key == "kl_baseline":
            baseline = abs(real())
            made[key] = [baseline if any(row) else rng.choice(POISON) for row in mask]
        elif key == "win_rates":
            made[key] = per_row(lambda: rng.choice((0.0, 0.5, 1.0, rng.random(), NAN)))
        elif key == "weights":
            made[key] = per_row(lambda: rng.choice((0.0, 1.0, rng.random(), 3.0)))
        elif key == "scores" or (key == "values" and name == "dro"):
            made[key] = per_row(real)
        elif key == "advantages":
            made[key] = per_row(real) if name == "gspo" or rng.random() < 0.5 else tokens(real)
        elif key.endswith("logps"):
            made[key] = tokens(lambda: _log_prob(rng, style))
            if not narrow and rng.random() < 0.02:
                made[key] = [[-400.0 if on and rng.random() < 0.2 else x for x, on in zip(xs, ms, strict=True)]
                             for xs, ms in zip(made[key], mask, strict=True)]  # fmt: skip
        elif key in ("token_kl", "teacher_kl", "token_log_ratio_sq", "behaviour_log_ratio_sq"):
            made[key] = tokens(lambda: abs(real()))
        elif key == "step_labels":
            made[key] = tokens(lambda: rng.choice((0.0, 1.0, rng.random())))
        elif key in ("values", "old_values", "returns", "behaviour_log_ratio"):
            made[key] = tokens(real)
        else:
            raise KeyError(f"no strategy for {key!r} of {name}")
    return made
