"""A run that is continued with something else than it was begun with: refused with what changed, or said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft import Trainer, recipes
from rlft.checkpoint._tensorfile import tensor_bytes
from rlft.config import Config, ConfigError
from rlft.data import tokenize
from rlft.errors import Interrupted
from rlft.models.tensor_hashes import sampled_hash
from tests.tiny import char_tokenizer, tiny_llama

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(12)]
ANSWERED = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "note": "n"} for i in range(12)]


def close_to(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(c.startswith(a[:1])) + 0.1 * len(c) for c, a in zip(completions, answer, strict=True)]


def of_answer_alone(completions: list[str], answer: list[str]) -> list[float]:
    return close_to(completions, answer)


def run(folder: Path, rows: Any = PAIRS, *, model: Any = None, stop: int | None = None, **extra: Any) -> Trainer:
    def interrupt(event: str, t: Trainer, values: Any) -> None:
        if event == "step" and t.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    names = ("objective_given", "reward_funcs", "ref_model", "peft_config", "tokenizer")
    given = {name: extra.pop(name) for name in names if name in extra}
    online = "reward_funcs" in given or "rewards" in extra
    objective = given.pop("objective_given", None)
    named = {} if objective is not None else {"objective": "grpo"} if online else {"objective": "dpo", "beta": 0.1}
    settings = {
        "output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_prompt_length": 8,
        "max_completion_length": 4, "disable_tqdm": True, "report_to": [], "self_checks": False, **named,
        **({"num_generations": 4} if online else {}), **extra,
    }  # fmt: skip
    return Trainer(
        tiny_llama() if model is None else model, settings, objective=objective, train_dataset=rows,
        processing_class=given.pop("tokenizer", None) or char_tokenizer(), callbacks=[interrupt], **given,
    )  # fmt: skip


def begun(folder: Path, *arguments: Any, **extra: Any) -> None:
    with pytest.raises(Interrupted):
        run(folder, *arguments, stop=1, **extra).train()


def refused(folder: Path, *words: str, rows: Any = PAIRS, **extra: Any) -> str:
    t = run(folder, rows, **extra)
    with pytest.raises(ConfigError) as raised:
        t.train()
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
    assert t.step == 0
    return str(raised.value)


def goes_on(folder: Path, rows: Any = PAIRS, *, says: str | None = None, **extra: Any) -> None:
    t = run(folder, rows, **extra)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.train()
    assert t.step == 3
    said = " ".join(str(w.message) for w in caught)
    if says is not None:
        assert says in said, said


# -- data --------------------------------------------------------------------------------------------------------------
def other_answers(shift: int = 5) -> list[dict[str, Any]]:
    return [{**row, "answer": str(2 * i + shift)} for i, row in enumerate(ANSWERED)]


def test_a_column_that_a_reward_reads_is_part_of_the_data(tmp_path: Path) -> None:
    """Prompts and tokens are equal; the answers that earn the reward are not."""
    begun(tmp_path, ANSWERED, reward_funcs=close_to)
    refused(tmp_path, "training data changed", "column 'answer': other values", "accept_changed: [data]",
            rows=other_answers(), reward_funcs=close_to)  # fmt: skip
    goes_on(tmp_path, ANSWERED, reward_funcs=close_to)


def test_changed_data_goes_on_where_that_is_accepted(tmp_path: Path) -> None:
    begun(tmp_path, ANSWERED, reward_funcs=close_to)
    goes_on(tmp_path, other_answers(), reward_funcs=close_to, accept_changed=["data"], says="column 'answer'")


def test_only_columns_that_are_read_count(tmp_path: Path) -> None:
    """A function that names its columns reads no other; one with ``**columns`` may read all."""
    noted = [{**row, "note": "other"} for row in ANSWERED]
    begun(tmp_path / "named", ANSWERED, reward_funcs=of_answer_alone)
    goes_on(tmp_path / "named", noted, reward_funcs=of_answer_alone)
    begun(tmp_path / "all", ANSWERED, reward_funcs=close_to)
    refused(tmp_path / "all", "column 'note': other values", rows=noted, reward_funcs=close_to)
    begun(tmp_path / "offline", [{**row, "note": 1} for row in PAIRS])
    goes_on(tmp_path / "offline", [{**row, "note": 2} for row in PAIRS])


def test_a_column_that_the_objective_names_counts(tmp_path: Path) -> None:
    from rlft import Objective

    def weighted(logps: torch.Tensor, difficulty: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return -logps * difficulty[:, None]

    def rows(scale: float) -> list[dict[str, Any]]:
        return [{"prompt": f"{i}=", "completion": str(i), "difficulty": i * scale} for i in range(1, 9)]

    objective = Objective(weighted)
    begun(tmp_path, rows(1.0), objective_given=objective)
    refused(tmp_path, "column 'difficulty': other values", rows=rows(2.0), objective_given=objective)
    goes_on(tmp_path, rows(1.0), objective_given=objective)


def test_columns_are_hashed_by_their_content() -> None:
    """Keys in another order and an array for a list are the same data; a swap, a nested change and NaN are seen."""
    import numpy as np

    def digest(*cells: Any) -> str:
        rows = [{"prompt": "1=", "completion": "2", "c": cell} for cell in cells]
        return tokenize(rows, char_tokenizer()).column_fingerprint("c")

    assert digest({"a": 1, "b": [1.5]}, 2) == digest({"b": (1.5,), "a": 1}, 2)
    assert digest(np.array([1, 2]), np.float64(0.5)) == digest([1, 2], 0.5)
    assert digest(object(), b"x") == digest(object(), b"x")  # where it lies in memory is no part of it
    cells = [
        None,
        0,
        0.5,
        "0",
        "",
        [],
        {},
        True,
        float("nan"),
        [0],
        [[0]],
        {"a": 0},
        {"1": 0},
        b"0",
        "é",
        "\ud800",
    ]
    assert len({digest(cell) for cell in cells}) == len(cells)
    assert digest(1, 2) != digest(2, 1)
    assert digest("a", "b") != digest("ab", "")
    rows = [{"prompt": "1=", "completion": "2"}]
    assert tokenize(rows, char_tokenizer()).column_fingerprint("c") == digest(None)


@pytest.mark.filterwarnings("ignore:.*prompts were cut")
def test_the_text_of_a_prompt_that_was_cut_counts_for_rewards(tmp_path: Path) -> None:
    """Its tokens agree after truncation, but a reward function is given the whole text."""

    def of_prompt(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]

    one, two = ([{"prompt": f"{start}11111{i}="} for i in range(8)] for start in ("2", "3"))
    begun(tmp_path, one, reward_funcs=of_prompt, max_prompt_length=4)
    refused(tmp_path, "column 'prompt': other values", rows=two, reward_funcs=of_prompt, max_prompt_length=4)


# -- objective, rewards, adapters --------------------------------------------------------------------------------------
def test_an_objective_given_as_an_object_is_compared(tmp_path: Path) -> None:
    one, other = recipes.build("dpo", beta=0.1), recipes.build("ipo", beta=0.7)
    begun(tmp_path, objective_given=one)
    refused(tmp_path, "objective: dpo -> ipo", "beta=0.1 -> beta=0.7", "accept_changed: [objective]", "another output_dir",
            objective_given=other)  # fmt: skip
    goes_on(tmp_path, objective_given=other, accept_changed=["objective"], says="objective: dpo -> ipo")


def test_reward_functions_are_compared_by_name_and_weight(tmp_path: Path) -> None:
    def shorter(completions: list[str], **columns: Any) -> list[float]:
        return [-float(len(c)) for c in completions]

    begun(tmp_path, ANSWERED, reward_funcs=[close_to])
    said = refused(
        tmp_path,
        "close_to (weight 1) -> shorter (weight 1)",
        "accept_changed: [rewards]",
        rows=ANSWERED,
        reward_funcs=[shorter],
    )
    assert "column" not in said
    goes_on(tmp_path, ANSWERED, reward_funcs=[shorter], accept_changed=["rewards"], says="shorter")


def test_a_reward_function_that_was_mended_goes_on(tmp_path: Path) -> None:
    def mended(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [2.0 * value for value in close_to(completions, answer)]

    mended.__name__ = "close_to"
    begun(tmp_path, ANSWERED, reward_funcs=close_to)
    goes_on(tmp_path, ANSWERED, reward_funcs=mended)


def test_adapters_given_as_an_object_are_compared(tmp_path: Path) -> None:
    from peft import LoraConfig

    def lora(alpha: int, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Any:
        return LoraConfig(r=4, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM")

    begun(tmp_path, peft_config=lora(8))
    refused(tmp_path, "adapters", "lora_alpha: 8 -> 64", "accept_changed: [adapters]", peft_config=lora(64))
    goes_on(tmp_path, peft_config=lora(8, ("v_proj", "q_proj")))  # a set has no order


# -- weights that no checkpoint holds ----------------------------------------------------------------------------------
def saved(folder: Path, change: Callable[[Any], None] | None = None, **sizes: Any) -> str:
    model = tiny_llama(**sizes)
    if change is not None:
        with torch.no_grad():
            change(model)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    return str(folder)


def scaled(model: Any) -> None:
    for p in model.parameters():
        p.mul_(1.5)


def one_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight[3] += 1e-3


@pytest.mark.parametrize("change", [scaled, one_norm])
def test_another_base_under_adapters_is_refused(tmp_path: Path, change: Callable[[Any], None]) -> None:
    model = saved(tmp_path / "model")
    begun(tmp_path / "run", model=model, use_peft=True)
    goes_on_or_not = {"model": saved(tmp_path / "model", change), "use_peft": True}
    refused(
        tmp_path / "run", "frozen weights of the policy", "layers.0.", "accept_changed: [weights]", **goes_on_or_not
    )
    goes_on(tmp_path / "run", **goes_on_or_not, accept_changed=["weights"], says="frozen weights of the policy")


def test_the_same_base_goes_on(tmp_path: Path) -> None:
    begun(tmp_path / "run", model=saved(tmp_path / "model"), use_peft=True)
    goes_on(tmp_path / "run", model=saved(tmp_path / "model"), use_peft=True)


def test_weights_that_the_checkpoint_holds_may_come_from_anywhere(tmp_path: Path) -> None:
    """All weights train, and their reference is a copy: both are in the checkpoint."""
    begun(tmp_path / "run", model=saved(tmp_path / "model"))
    goes_on(tmp_path / "run", model=saved(tmp_path / "model", scaled))


def test_another_config_of_equal_weights_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    begun(tmp_path / "run", model=model)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    refused(
        tmp_path / "run", "config of the policy", "rms_norm_eps: 1e-06 -> 0.1", "accept_changed: [weights]", model=model
    )


def test_another_reference_is_refused(tmp_path: Path) -> None:
    reference = saved(tmp_path / "reference", scaled)
    begun(tmp_path / "run", ref_model=reference)
    refused(tmp_path / "run", "frozen weights of the reference", ref_model=saved(tmp_path / "reference", one_norm))
    goes_on(tmp_path / "run", ref_model=saved(tmp_path / "reference", scaled))


def test_another_reward_model_is_refused(tmp_path: Path) -> None:
    def scorer(factor: float) -> str:
        from transformers import LlamaForSequenceClassification

        config = tiny_llama().config
        config.num_labels = 1
        config.pad_token_id = 0
        torch.manual_seed(3)
        model = LlamaForSequenceClassification(config)
        with torch.no_grad():
            model.score.weight.mul_(factor)
        model.save_pretrained(tmp_path / "scorer")
        char_tokenizer().save_pretrained(tmp_path / "scorer")
        return str(tmp_path / "scorer")

    prompts = [{"prompt": f"{i}+{i}="} for i in range(12)]
    begun(tmp_path / "run", prompts, rewards=[scorer(1.0)])
    refused(
        tmp_path / "run", "frozen weights of the reward scorer", "score.weight", rows=prompts, rewards=[scorer(2.0)]
    )
    goes_on(tmp_path / "run", prompts, rewards=[scorer(1.0)])


def test_the_fingerprint_of_weights_is_cheap_and_sees_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors whole; of large ones 64 blocks, the first and the last byte among them."""
    small = torch.arange(1000, dtype=torch.float32)
    before = sampled_hash(small)
    for place in (0, 499, 999):
        other = small.clone()
        other[place] += 1
        assert sampled_hash(other) != before
    assert sampled_hash(small.view(10, 100)) != before  # the shape counts, and the type
    assert sampled_hash(small.view(torch.int32)) != before
    assert sampled_hash(torch.zeros(0)) == sampled_hash(torch.zeros(0))
    large = torch.zeros(16 << 20, dtype=torch.uint8)
    base = sampled_hash(large)
    for place in (0, len(large) - 1):
        large[place] = 1
        assert sampled_hash(large) != base
        large[place] = 0
    assert sampled_hash(large + 1) != base
    assert sampled_hash(large.view(torch.bfloat16).view(1024, -1).T) != base  # not contiguous
    hashed: list[int] = []
    monkeypatch.setattr(
        "rlft.models.tensor_hashes.tensor_bytes", lambda flat: hashed.append(flat.nbytes) or tensor_bytes(flat)
    )
    sampled_hash(torch.empty(1 << 30, dtype=torch.uint8))
    assert hashed == [1 << 20]  # whatever the size


# -- versions ----------------------------------------------------------------------------------------------------------
def test_versions_revisions_and_the_template_are_in_the_run_folder(tmp_path: Path) -> None:
    import platform

    import accelerate
    import peft
    import transformers

    import rlft

    model = tiny_llama()
    model.config._commit_hash = "c0ffee" * 6
    begun(tmp_path, model=model)
    for record in (
        json.loads((tmp_path / "checkpoint-1" / "trainer.json").read_text())["made_of"],
        json.loads((tmp_path / "summary.json").read_text()),
    ):
        assert record["versions"] | {"device": ""} == {
            "rlft": rlft.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "peft": peft.__version__, "accelerate": accelerate.__version__, "python": platform.python_version(), "device": "",
        }  # fmt: skip
        assert record["sources"]["policy"]["revision"] == "c0ffee" * 6
        assert len(record["chat_template"]) == 16 or record["chat_template"] == "none"


def test_other_versions_are_said_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)
    monkeypatch.setattr("rlft.run.keep.record.versions", lambda device: {"rlft": "9.9", "torch": torch.__version__})
    goes_on(tmp_path, says=" -> 9.9")


def test_the_same_versions_are_not_mentioned(tmp_path: Path) -> None:
    begun(tmp_path)
    t = run(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.train()
    assert [str(w.message) for w in caught if "->" in str(w.message)] == []


def test_another_template_or_revision_is_said(tmp_path: Path) -> None:
    one, two = char_tokenizer(), char_tokenizer()
    two.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}!"
    model = tiny_llama()
    model.config._commit_hash = "a" * 40
    begun(tmp_path, tokenizer=one, model=model)
    moved = tiny_llama()
    moved.config._commit_hash = "b" * 40
    goes_on(tmp_path, tokenizer=two, model=moved, says="chat template")
    begun(tmp_path / "two", model=model)
    goes_on(tmp_path / "two", model=moved, says=f"{'a' * 12} -> {'b' * 12}")


# -- the setting -------------------------------------------------------------------------------------------------------
def test_accept_changed_is_checked() -> None:
    with pytest.raises(ConfigError, match="accept_changed has no 'weight'; did you mean 'weights'"):
        Config(accept_changed=["weight"])
    with pytest.raises(ConfigError, match="accept_changed=\\['data'\\] does nothing with resume: never"):
        Config(accept_changed=["data"], resume="never")


def test_a_checkpoint_that_knows_less_is_continued(tmp_path: Path) -> None:
    """Written before these were recorded."""
    from rlft._files import hash_file
    from rlft._json import loads
    from rlft.checkpoint._manifest import _sealed

    begun(tmp_path)
    folder = tmp_path / "checkpoint-1"
    record = loads((folder / "trainer.json").read_bytes())
    del record["made_of"]
    (folder / "trainer.json").write_text(json.dumps(record))
    body = {key: value for key, value in loads((folder / "manifest.json").read_bytes()).items() if key != "seal"}
    body["files"]["trainer.json"] = hash_file(folder / "trainer.json")._asdict()
    (folder / "manifest.json").write_bytes(_sealed(body))
    goes_on(tmp_path, objective_given=None)
