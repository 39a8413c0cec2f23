"""Which plots a report has, and which metrics each of them shows."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["PANELS", "Panel", "labels_of", "leftover_panels", "per_key", "present"]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot.

    Attributes:
        title: shown above.
        keys: metrics drawn in it; ``*`` matches.
        unit: label of the y axis.
        section: heading it belongs under.
        band: two metrics between which the area is filled, around the first key.
        better: ``"high"``, ``"low"`` or "" where neither is better as such.
        log: logarithmic y axis.
        plain: a curve without noise, drawn as it is.
        zero: the y axis begins at 0: a quantity whose small changes mean nothing.
    """

    title: str
    keys: tuple[str, ...]
    unit: str = ""
    section: str = "Learning"
    band: tuple[str, str] | None = None
    better: str = ""
    log: bool = False
    plain: bool = False
    zero: bool = False


_P = Panel
PANELS: tuple[Panel, ...] = (
    _P("Held-out reward", ("eval_reward",), "reward", better="high"),
    _P("Reward", ("reward", "objective/scores", "objective/rlhf_reward"), "reward", better="high"),
    _P("Reward by function", ("rewards/*/mean",), "reward", better="high"),
    _P("Pairs ranked right", ("rewards/accuracies", "eval_rewards/accuracies"), "fraction", better="high"),
    _P("Reward margin", ("rewards/margins", "eval_rewards/margins"), "β · log ratio", better="high"),
    _P("Rewards of the pair", ("rewards/chosen", "rewards/rejected"), "β · log ratio"),
    _P(
        "Accuracy",
        ("accuracy", "eval_accuracy", "mean_token_accuracy", "eval_mean_token_accuracy"),
        "fraction",
        better="high",
    ),
    _P("Score margin", ("margin", "eval_margin"), "score", better="high"),
    _P("Loss", ("loss", "eval_loss"), "loss"),
    _P("KL to the reference", ("kl", "eval_kl", "objective/kl"), "nats", section="Policy"),
    _P("Weight of the KL", ("kl/beta",), "beta", section="Policy", plain=True, log=True),
    _P("KL of a step", ("policy/approxkl", "policy/approxkl_avg"), "nats per token", section="Policy"),
    _P("Entropy", ("entropy",), "nats per token", section="Policy"),
    _P(
        "Answer length",
        ("completions/mean_length", "completions/mean_terminated_length"),
        "tokens",
        section="Policy",
        band=("completions/min_length", "completions/max_length"),
    ),
    _P("Answers cut at the limit", ("completions/clipped_ratio",), "fraction", section="Policy"),
    _P(
        "Tokens clipped",
        ("clip_ratio/low*", "clip_ratio/high*", "clip_ratio/region*", "policy/clipfrac_avg"),
        "fraction",
        "Policy",
    ),
    _P("Groups with equal rewards", ("frac_reward_zero_std",), "fraction", section="Policy"),
    _P("Spread of rewards in a group", ("reward_std", "rewards/*/std"), "reward", section="Policy"),
    _P("Log-probs of the pair", ("logps/chosen", "logps/rejected"), "nats", section="Policy"),
    _P("Sampler against trainer", ("sampling/sampling_logp_difference/*",), "nats", section="Policy"),
    _P("Gradient norm", ("grad_norm",), "norm", section="Optimisation", log=True),
    _P("Learning rate", ("learning_rate",), "", section="Optimisation", plain=True),
    _P("Value loss", ("loss/value_avg", "value_loss"), "loss", section="Optimisation", better="low"),
    _P("Unscored answers", ("rewards/unscored_fraction",), "fraction", section="Optimisation"),
    _P("Time per step", ("step_time", "update_time"), "seconds", section="Optimisation"),
    _P("Tokens seen", ("num_tokens",), "tokens", section="Optimisation", plain=True),
    _P(
        "Tokens per second",
        ("meter/trained_tokens_per_second", "meter/sampled_tokens_per_second"),
        "tokens / s",
        section="Speed",
        better="high",
    ),
    _P("Padding efficiency", ("padding_efficiency",), "fraction", section="Speed", better="high"),
    _P("Tokens saved by shared prompts", ("prompt_sharing",), "repeated / computed", section="Speed", better="high"),
    _P("Answers dropped, without gradient", ("frac_rows_dropped",), "fraction", section="Speed"),
    _P("Peak memory", ("meter/peak_memory_gib",), "GiB", section="Speed", better="low", plain=True, zero=True),
    _P(
        "Share of the device's limit",
        ("meter/mfu", "meter/fraction_of_floor"),
        "fraction",
        section="Speed",
        better="high",
    ),
)


def labels_of(keys: Sequence[str]) -> list[str]:
    """Short labels that tell the metrics of one panel apart."""
    bases = [key.removeprefix("eval_") for key in keys]
    if len(keys) > 1 and len(set(bases)) == 1:
        return ["held out" if key.startswith("eval_") else "training" for key in keys]
    parts = [base.split("/") for base in bases]
    while len(keys) > 1 and all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while len(keys) > 1 and all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    plain = ["/".join(part).replace("_", " ") for part in parts]
    held_out = ["eval_" if key.startswith("eval_") else "" for key in keys]
    return [name + (", held out" if mark else "") for name, mark in zip(plain, held_out, strict=True)]


def present(panels: Sequence[Panel], keys: Sequence[str]) -> list[Panel]:
    """The panels that have something to show, each with the metrics that exist."""
    taken: set[str] = set()
    result = []
    for panel in panels:
        found = [key for wish in panel.keys for key in keys if fnmatch.fnmatchcase(key, wish) and key not in taken]
        found = list(dict.fromkeys(found))
        if found:
            taken.update(found)
            band = panel.band if panel.band and all(key in keys for key in panel.band) else None
            taken.update(band or ())
            result.append(replace(panel, keys=tuple(found), band=band))
    return result


def leftover_panels(panels: Sequence[Panel], keys: Sequence[str]) -> list[Panel]:
    """One panel for each metric that no panel shows; a held-out one has the unit of the same metric in training."""
    shown = {key for panel in panels for key in (*panel.keys, *(panel.band or ()))}
    units = {f"eval_{key}": panel.unit for panel in panels for key in (*panel.keys, *(panel.band or ()))}
    left = [key for key in sorted(keys) if key not in shown and key != "step"]
    return [Panel(key, (key,), units.get(key, ""), "Everything else") for key in left]


def per_key(panels: Sequence[Panel]) -> list[Panel]:
    """Panels cut into one per metric, for comparing runs."""
    result = []
    for panel in panels:
        siblings = len(panel.keys) > 1 and len({key.split("/")[0] for key in panel.keys}) == 1 and "/" in panel.keys[0]
        for index, (key, label) in enumerate(zip(panel.keys, labels_of(panel.keys), strict=True)):
            title = panel.title if index == 0 and not siblings else f"{panel.title}: {label}"
            result.append(replace(panel, keys=(key,), band=None, title=title))
    return result
