"""The main job on real data: three seeds of every shipped small configuration, written to docs/results.md."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from tests.results import page, runs

pytestmark = [pytest.mark.data, runs.needs_data]


def test_polite_pairs(tmp_path: Path) -> None:
    """The reward model and each preference method order most held-out pairs; raw likelihood did not, before."""
    records = runs.each_seed(runs.polite_pairs, tmp_path, "polite_pairs")
    page.write()
    for record in records:
        assert record["sft"]["raw"] < 0.65, record
        for name in ("reward_model", "dpo", "ipo", "agro"):
            assert record[name]["implicit"] > 0.75, (name, record)
            if name != "reward_model":
                assert record[name]["rejected"] < record[name]["chosen"], (name, record)


def test_word_problems(tmp_path: Path) -> None:
    """On every seed the reward of sampled answers rises; on average over seeds held-out accuracy does."""
    records = runs.each_seed(runs.word_problems, tmp_path, "word_problems")
    page.write()
    for name in runs.ONLINE:
        for record in records:
            assert record[name]["sampled_last"] > record[name]["sampled_first"] + 0.1, (name, record)
        assert fmean(record[name]["all"] - record["sft"]["all"] for record in records) > 0.03, (name, records)


def test_real_formats(tmp_path: Path) -> None:
    """Files in, trained models out."""
    records = runs.each_seed(runs.formats, tmp_path, "formats", seeds=(0,))
    page.write()
    for record in records:
        assert record["kto"]["eval_rewards/chosen"] > record["kto"]["eval_rewards/rejected"], record
        assert record["sft"]["eval_loss"] < 5.0, record
        assert 0.0 <= record["agro"]["reward"] <= 1.0, record
