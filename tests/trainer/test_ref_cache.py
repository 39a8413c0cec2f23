"""Reference log-probs on disk: the numbers of a live run, no pass in the second one, and nothing stale or broken is read."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import Trainer
from rlft.config import ConfigError
from rlft.metrics import comparable, read_metrics
from rlft.models.reference import Reference
from rlft.run.keep import ref_logps
from tests.test_trainer import ANSWERS, PAIRS, PROMPTS, RANKED, THUMBS, digits_reward, settings, trainer, weights
from tests.tiny import char_tokenizer, tiny_llama

CHECKED = {"self_checks": {"reference": False}}
HELD_OUT = [{"prompt": f"{i}-{i}=", "chosen": "00", "rejected": str(i)} for i in range(5)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that the reference is switched on."""
    found: list[int] = []
    active = Reference.active

    def counted(reference: Reference) -> Any:
        found.append(1)
        return active(reference)

    monkeypatch.setattr(Reference, "active", counted)
    return found


def run(
    folder: Path,
    *,
    cached: bool = True,
    objective: str = "dpo",
    rows: Any = PAIRS,
    held_out: Any = HELD_OUT,
    model: Any = None,
    **extra: Any,
) -> Trainer:
    cache = {"precompute_ref_log_probs": True} if cached else {}
    base = {"beta": 0.1, "max_steps": 5, "per_device_train_batch_size": 5}
    args = settings(folder, objective, **{**base, **CHECKED, **cache, **extra})
    t = Trainer(
        model if model is not None else tiny_llama(), args, train_dataset=rows, eval_dataset=held_out,
        processing_class=char_tokenizer(),
    )  # fmt: skip
    t.train()
    return t


def same(one: Trainer, other: Trainer, tolerance: float = 1e-6) -> None:
    for (name, a), b in zip(weights(one).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_a_second_run_has_no_reference_pass(tmp_path: Path, passes: list[int], lora: bool) -> None:
    extra = {"use_peft": True, "lora_r": 4} if lora else {}
    live = run(tmp_path / "live", cached=False, **extra)
    assert len(passes) > 5
    passes.clear()
    first = run(tmp_path / "first", **extra)
    assert len(passes) == 4  # 12 pairs and 5 held-out ones, five at a time
    passes.clear()
    second = run(tmp_path / "second", **extra)
    assert not passes
    # Adam divides by the gradient's size: a rounding of the log-probs shows in weights whose gradient is one
    same(first, live, 1e-3)
    same(first, second, 0)
    logs = [comparable(read_metrics(tmp_path / name)) for name in ("live", "first", "second")]
    assert logs[1] == logs[2]
    for a, b in zip(logs[0], logs[1], strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], abs=2e-4, rel=1e-3) for k in a if k != "prompt_sharing")


@pytest.mark.parametrize(
    ("objective", "rows", "hyper"),
    [("dpo", PAIRS, {}), ("ipo", PAIRS, {}), ("kto", THUMBS, {}), ("rloo", RANKED, {}), ("grpo", RANKED, {}), ("agro_off_policy", RANKED, {})],
)  # fmt: skip
def test_the_gradient_is_that_of_a_live_reference(
    tmp_path: Path, objective: str, rows: list[Any], hyper: dict[str, Any]
) -> None:
    """One SGD step in float64, where the policy has left its reference."""
    ends = []
    for cached in (True, False):
        model, reference = (
            tiny_llama(dtype=torch.float64),
            tiny_llama(dtype=torch.float64, seed=1).requires_grad_(False),
        )
        args = settings(
            tmp_path / f"{cached}/run", objective, max_steps=1, per_device_train_batch_size=12, max_grad_norm=None,
            dtype="float64", beta=0.1, self_checks=False, precompute_ref_log_probs=cached, **hyper,
        )  # fmt: skip
        t = Trainer(
            model, args, train_dataset=rows, processing_class=char_tokenizer(), ref_model=reference,
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
        )  # fmt: skip
        t.train()
        ends.append(weights(t))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-9, atol=1e-10)


def entries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "ref-log-probs").glob("*.json")}


def test_what_decides_the_numbers_is_in_the_key(tmp_path: Path, passes: list[int]) -> None:
    base: dict[str, Any] = {"held_out": None, "max_steps": 1}
    run(tmp_path / "0", **base)
    known = entries(tmp_path)
    assert len(known) == 1
    moved = tiny_llama()
    with torch.no_grad():
        moved.lm_head.weight[7, 3] += 1e-3
    scaled = tiny_llama(rms_norm_eps=1e-5)
    changed: dict[str, dict[str, Any]] = {
        "one weight": {"model": moved},
        "the config": {"model": scaled},
        "the data": {"rows": [*PAIRS[:-1], {"prompt": "9=", "chosen": "1", "rejected": "2"}]},
        "the order": {"rows": PAIRS[::-1]},
        "the length": {"max_prompt_length": 3},
        "the precision": {"model": tiny_llama(dtype=torch.float64), "dtype": "float64"},
    }
    for number, (what, extra) in enumerate(changed.items(), 1):
        passes.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(tmp_path / str(number), **{**base, **extra})
        assert passes, what
        assert len(entries(tmp_path)) == number + 1, what
    passes.clear()
    run(tmp_path / "again", **{**base, "beta": 0.3, "learning_rate": 1e-3, "seed": 5})
    assert not passes, "what does not touch the reference reads the same entry"


def test_versions_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    run(tmp_path / "0", held_out=None, max_steps=1)
    monkeypatch.setattr(ref_logps, "FORMAT", 2)
    passes.clear()
    run(tmp_path / "1", held_out=None, max_steps=1)
    assert passes
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "not json", "no hash", "elsewhere"])
def test_a_damaged_entry_is_computed_again_with_a_warning(tmp_path: Path, passes: list[int], damage: str) -> None:
    first = run(tmp_path / "first", held_out=None, max_steps=1)
    place = tmp_path / "ref-log-probs"
    (record,), (values,) = place.glob("*.json"), place.glob("*.safetensors")
    data = values.read_bytes()
    if damage == "flip":
        values.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif damage == "cut":
        values.write_bytes(data[:-4])
    elif damage == "gone":
        values.unlink()
    elif damage == "not json":
        record.write_text("{")
    elif damage == "no hash":
        record.write_text(json.dumps({"file": values.name}))
    else:
        record.write_text(json.dumps({"file": "../../etc/passwd", "sha256": "0"}))
    passes.clear()
    with pytest.warns(UserWarning, match="cannot be used .* computed again"):
        again = run(tmp_path / "again", held_out=None, max_steps=1)
    assert passes
    same(first, again, 0)
    passes.clear()
    run(tmp_path / "healed", held_out=None, max_steps=1)
    assert not passes
    assert not list(place.glob(".tmp*"))


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match=r"could not be kept in .*ref_cache_dir"):
        run(tmp_path / "run", held_out=None, max_steps=1, ref_cache_dir=str(blocked / "inner"))


def test_a_resumed_run_reads_the_same_numbers(tmp_path: Path, passes: list[int]) -> None:
    whole = run(tmp_path / "a/whole", max_steps=6, save_steps=3, save_total_limit=None)
    expected = comparable(read_metrics(tmp_path / "a/whole"))
    passes.clear()
    args = {"max_steps": 6, "save_steps": 3, "save_total_limit": None, "resume": str(tmp_path / "a/whole/checkpoint-3")}
    again = run(tmp_path / "a/whole", **args)
    assert not passes
    same(whole, again, 0)
    assert comparable(read_metrics(tmp_path / "a/whole")) == expected


@pytest.mark.parametrize(
    ("objective", "rows", "extra", "message"),
    [
        ("sft", ANSWERS, {}, "has no reference"),
        ("dpo", PAIRS, {"beta": 0.1, "sync_ref_model": True}, "sync_ref_model moves it"),
        ("kl_policy_gradient_exact", RANKED, {"beta": 0.1}, "whole distribution"),
        ("rloo", PROMPTS, {"beta": 0.1, "reward": digits_reward}, "sampled anew"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(
    tmp_path: Path, objective: str, rows: list[Any], extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, objective, rows, precompute_ref_log_probs=True, **extra)


def test_a_place_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ref_cache_dir does nothing"):
        trainer(tmp_path, "dpo", PAIRS, beta=0.1, ref_cache_dir="x")


def test_what_a_killed_run_was_writing_is_cleared(tmp_path: Path) -> None:
    """After an hour: before, it may be another run's that writes it still. Nothing else in the folder is touched."""
    place = tmp_path / "ref-log-probs"
    place.mkdir()
    old, young = f".tmp-{'a' * 32}", f".tmp-{'b' * 32}"
    record, others = f".tmp-{'c' * 32}.json-{'d' * 32}", ["kept.json", ".tmp-mine", "notes.txt"]
    for name in (old, young, record, *others):
        (place / name).write_text("x")
        if name != young:
            os.utime(place / name, (time.time() - 7200,) * 2)
    run(tmp_path, max_steps=1, ref_cache_dir=str(place))
    left = {path.name for path in place.iterdir()}
    assert left >= {young, *others}
    assert not left & {old, record}


def test_a_folder_that_cannot_be_cleared_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(point: str, path: Path) -> None:
        raise PermissionError(13, "no")

    place = tmp_path / "ref-log-probs"
    place.mkdir()
    left = place / f".tmp-{'a' * 32}"
    left.write_text("x")
    os.utime(left, (0, 0))
    monkeypatch.setattr(ref_logps, "remove_file", refuse)
    assert run(tmp_path, max_steps=1, ref_cache_dir=str(place)).step == 1
    assert left.exists()
