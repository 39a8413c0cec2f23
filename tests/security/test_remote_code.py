"""Code beside a model's weights: it runs for the models that the settings name, and for no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlft import Trainer
from rlft.config import Config, ConfigError, load_config
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(8)]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]

CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
Path({mark!r}).touch()
class Own(LlamaForCausalLM): pass
class OwnForSequenceClassification(LlamaForSequenceClassification): pass
"""


@pytest.fixture(autouse=True)
def no_cache_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies such code into a folder of its own before it runs it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def model(folder: Path, name: str, *, classifier: bool = False) -> str:
    """A model whose folder holds code; the file ``<name>.ran`` says that it ran."""
    place = folder / name
    made = tiny_llama(head="classifier", num_labels=1) if classifier else tiny_llama()
    made.save_pretrained(place)
    char_tokenizer().save_pretrained(place)
    code = f"own_{name}"
    (place / f"{code}.py").write_text(CODE.format(mark=str(folder / f"{name}.ran")))
    config = json.loads((place / "config.json").read_text())
    config["auto_map"] = {
        "AutoModelForCausalLM": f"{code}.Own",
        "AutoModelForSequenceClassification": f"{code}.OwnForSequenceClassification",
    }
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


def build(folder: Path, trust: Any, *, objective: str = "dpo", rows: Any = PAIRS, **settings: Any) -> Trainer:
    base = {
        "objective": objective, "beta": 0.1, "output_dir": str(folder / "run"), "max_steps": 1, "per_device_train_batch_size": 4,
        "max_prompt_length": 8, "max_completion_length": 4, "disable_tqdm": True, "report_to": [], **settings,
    }  # fmt: skip
    base |= {} if trust is None else {"trust_remote_code": trust}
    path = folder / "run.yaml"
    path.write_text(json.dumps(base))
    return Trainer(args=load_config(path), train_dataset=rows)


def ran(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.ran")}


def all_models(folder: Path) -> dict[str, Any]:
    """An online run whose four models all bring code."""
    named = {
        name: model(folder, name, classifier=name == "reward") for name in ("policy", "reference", "critic", "reward")
    }
    return {
        "objective": "ppo", "rows": PROMPTS, "num_generations": 2, "model": named["policy"], "ref_model": named["reference"],
        "critic": named["critic"], "rewards": [named["reward"]],
    }  # fmt: skip


def test_each_model_is_trusted_by_its_own_name(tmp_path: Path) -> None:
    """The names are added one by one, in the order in which the models are loaded; what is not named is refused."""
    settings = all_models(tmp_path)
    order = ["policy", "reward", "reference", "critic"]
    refusals: set[str] = set()
    for _ in order:
        with pytest.raises(ConfigError, match="names Python code of its own") as raised:
            build(tmp_path, sorted(refusals) or None, **settings)
        name = next(name for name in order if f"set trust_remote_code: [{name}]" in str(raised.value))
        assert name not in refusals
        assert f"/{name}/config.json" in str(raised.value)
        assert ran(tmp_path) <= refusals
        refusals.add(name)
    t = build(tmp_path, sorted(refusals), **settings)
    assert ran(tmp_path) == set(order)
    assert type(t.policy.hf_model).__name__ == "Own"


def test_true_is_the_policy_alone(tmp_path: Path) -> None:
    settings = {"model": model(tmp_path, "policy"), "ref_model": model(tmp_path, "reference")}
    with pytest.raises(ConfigError, match=r"set trust_remote_code: \[reference\]"):
        build(tmp_path, True, **settings)
    assert ran(tmp_path) <= {"policy"}
    build(tmp_path, True, model=settings["model"])
    assert ran(tmp_path) == {"policy"}


@pytest.mark.parametrize("trust", [None, False, []])
def test_nothing_runs_by_default(tmp_path: Path, trust: Any) -> None:
    with pytest.raises(ConfigError, match=r"auto_map.*set trust_remote_code: \[policy\]"):
        build(tmp_path, trust, model=model(tmp_path, "policy"))
    assert ran(tmp_path) == set()


@pytest.mark.parametrize(
    ("trust", "settings", "words"),
    [
        (["reference"], {}, "does nothing for the reference"),
        (["policy", "critic"], {}, "does nothing for the critic"),
        (["reward"], {}, "does nothing for the reward"),
        (["refrence"], {}, "trust_remote_code has no 'refrence'; did you mean 'reference'"),
        ("policy", {}, "trust_remote_code must be true or false or list"),
    ],
)
def test_trust_that_does_nothing_is_refused(tmp_path: Path, trust: Any, settings: dict[str, Any], words: str) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    char_tokenizer().save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=words):
        build(tmp_path, trust, model=str(tmp_path / "plain"), **settings)


@pytest.mark.parametrize("trust", [True, ["policy"]])
def test_trust_in_a_model_that_no_folder_holds_is_refused(tmp_path: Path, trust: Any) -> None:
    with pytest.raises(ConfigError, match="does nothing for the policy"):
        Trainer(
            tiny_llama(), {"objective": "sft", "trust_remote_code": trust, "output_dir": str(tmp_path)},
            train_dataset=[{"prompt": "1=", "completion": "1"}], processing_class=char_tokenizer(),
        )  # fmt: skip


def test_who_is_trusted() -> None:
    names = ("policy", "reference", "critic", "reward")
    for trust, expected in ((False, ()), (True, ("policy",)), (["critic", "reward"], ("critic", "reward")), ([], ())):
        config = Config(trust_remote_code=trust)  # type: ignore[arg-type]
        assert tuple(name for name in names if config.trusts(name)) == expected
