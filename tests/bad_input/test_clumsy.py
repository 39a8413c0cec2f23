"""Bad input that is in no table: odd values, wrong kinds, empty texts. Each is refused in words, before any work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft import Trainer, cli
from rlft.config import Config, ConfigError
from rlft.errors import TrainingError
from rlft.objective import Objective
from rlft.rewards import RewardError
from tests.bad_input.common import (
    ANSWERS,
    MODEL,
    PAIRS,
    PROMPTS,
    command,
    once,
    refused,
    refused_by_command,
    stops,
    trainer,
    varied,
)
from tests.tiny import char_tokenizer, tiny_llama

ONLINE = {"objective": "rloo", "beta": 0.0, "rewards": ["length"], "num_generations": 4}
#: (settings, what the message says)
SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"seed": 10**40}, ("seed=1e+40", "at most", "lower seed")),
    ({"adam_beta2": 1.0}, ("adam_beta2=1 must be below 1", "lower adam_beta2")),
    ({**ONLINE, "stop_token_ids": [-1]}, ("stop_token_ids=[-1]", "0 and up")),
    ({"end_token_ids": [10**9]}, ("end_token_ids holds 1000000000", "does nothing", "drop end_token_ids")),
    ({**ONLINE, "max_length": 9}, ("max_length=9 does nothing", "max_completion_length", "drop max_length")),
    ({"output_dir": ""}, ("output_dir='' is empty", "drop output_dir")),
    ({"train_data": " "}, ("train_data=' ' is empty",)),
    ({"train_data": [""]}, ("train_data=[''] is empty",)),
    ({"model": ""}, ("model='' is empty",)),
    ({**ONLINE, "rewards": [""]}, ("rewards=[''] is empty",)),
    ({"eval_data": []}, ("eval_data: a list holds no rows", "at least one row")),
    ({"report_to": ["swanlab"]}, ("report_to=['swanlab'] needs swanlab", "not installed", "drop 'swanlab'")),
    ({"model": {**MODEL, "hidden_size": -4}}, ("no model can be made of the config", "negative dimension -4", "correct its sizes")),
    ({"model": {**MODEL, "num_attention_heads": 3}}, ("no model can be made", "not a multiple", "correct its sizes")),
    ({"model": {**MODEL, "hidden_size": "16"}}, ("no model can be made", "expected int, got str", "correct its sizes")),
    ({"model": {"model_type": "t5"}}, ("no model can be made", "T5Config", "its model_type")),
    ({"attn_implementation": "flash_attention_2"}, ("attn_implementation='flash_attention_2' cannot be used", "drop attn_implementation")),
    ({**ONLINE, "sampler": "vllm"}, ("needs vLLM", "sampler='builtin'")),
    ({"tokenizer": {"kind": "bpe", "vocab_size": 10**9}}, ("vocab_size", "up to 1000000", "got 1000000000")),
    ({"use_peft": True, "lora_r": 64}, ("lora r=64", "any targeted matrix can have (16)", "to 16 or less")),
    ({"resume": "nevr"}, ("resume='nevr' is no folder", "'never'")),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), SETTINGS, ids=lambda x: "-".join(x)[:40] if isinstance(x, dict) else "")
def test_a_setting_that_cannot_work_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused_by_command(capsys, tmp_path, *words, rows=PROMPTS if "rewards" in settings else None, **settings)


def test_numbers_that_are_too_large_or_too_small(tmp_path: Path) -> None:
    """Through the Trainer: JSON writes them in a way that YAML reads as text."""
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, learning_rate=1e300),
        "learning_rate=1e+300", "at most 1e+30", "lower learning_rate", kind=ConfigError,
    )  # fmt: skip
    refused(
        lambda: trainer(tmp_path, "rloo", PROMPTS, reward=varied, beta=0.0, temperature=1e-30),
        "temperature=1e-30", "at least 0.001", "raise temperature", kind=ConfigError,
    )  # fmt: skip


def test_a_number_of_the_data_that_float32_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for score in (1e300, 10**400):
        folder = tmp_path / str(score)[:5]
        folder.mkdir()
        rows = [{"prompt": str(i), "completions": ["a", "b"], "scores": [score, 1.0]} for i in range(8)]
        refused_by_command(capsys, folder, "8 number too large for float32", rows=rows, objective="rloo", beta=0.1)


def test_data_without_two_scored_answers(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completions": ["a", "b"], "scores": [None, 1.0]} for i in range(8)]
    refused(
        lambda: trainer(tmp_path, "rloo", rows, beta=0.1),
        "'rloo'", "no row has 2 that are scored", "give scores", kind=ConfigError,
    )  # fmt: skip
    trainer(tmp_path, "rloo", [*rows, {"prompt": "9", "completions": ["a", "b"], "scores": [0.0, 1.0]}], beta=0.1)


def test_one_example_for_an_objective_that_compares_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}=", "completion": "a", "label": i % 2 == 0} for i in range(8)]
    settings = {"beta": 0.1, "per_device_train_batch_size": 1}
    refused(lambda: trainer(tmp_path, "kto", rows, **settings), "'kto'", "gives a step one example", kind=ConfigError)
    trainer(tmp_path, "kto", rows, **settings, gradient_accumulation_steps=2).train()


def test_rows_longer_than_the_model_was_made_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rlft"):
        trainer(tmp_path, "sft", ANSWERS, model=tiny_llama(max_position_embeddings=4))
    once(caplog.records, "rows may have 7 tokens", "max_position_embeddings=4", "lower max_prompt_length (now 8)")
    caplog.clear()
    trainer(tmp_path, "sft", ANSWERS)
    assert not caplog.records


# -- rewards --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "said"),
    [("def f(:\n", "SyntaxError"), ("import nosuchmodule\n", "No module named 'nosuchmodule'"), ("1/0\n", "ZeroDivisionError")],
)  # fmt: skip
def test_a_reward_file_that_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, said: str
) -> None:
    file = tmp_path / "own.py"
    file.write_text(source)
    settings = {**ONLINE, "rewards": [f"{file}:f"]}
    refused_by_command(capsys, tmp_path, "own.py' cannot be run", said, "try `python", rows=PROMPTS, **settings)


def test_a_folder_without_a_reward_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        lambda: trainer(tmp_path, "rloo", PROMPTS, reward=str(tmp_path / "empty"), beta=0.0),
        "empty gives no tokenizer",
        "save one",
    )


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_reward_that_exits_is_an_error_and_not_the_end_of_the_process(tmp_path: Path, timeout: float | None) -> None:
    def leaves(completions: list[str], **columns: Any) -> list[float]:
        raise SystemExit(3)

    t = trainer(tmp_path, "rloo", PROMPTS, reward=leaves, beta=0.0, reward_timeout=timeout)
    stops(t, "'leaves' raised SystemExit: 3", "return None", kind=RewardError)


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_reward_that_switches_gradients_off(tmp_path: Path, timeout: float | None) -> None:
    def careless(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        torch.set_grad_enabled(False)
        return varied(completions, completion_ids)

    t = trainer(tmp_path, "rloo", PROMPTS, reward=careless, beta=0.0, reward_timeout=timeout)
    t.train()
    assert t.step == 2
    assert torch.is_grad_enabled()


def test_a_table_of_rewards_says_its_shape(tmp_path: Path) -> None:
    t = trainer(tmp_path, "rloo", PROMPTS, reward=lambda completions, **k: torch.zeros(len(completions), 1), beta=0.0)
    stops(t, "must return a list", "got Tensor of shape [8, 1]", kind=RewardError)


# -- arguments of the Trainer -------------------------------------------------------------------------------------------
ARGUMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"args": ["sft"]}, ("args must be a rlft.Config or a mapping", "got list")),
    ({"model": 5}, ("model must be a hub id, a folder", "got int")),
    ({"model": torch.nn.Linear(2, 2)}, ("model must be a model of transformers", "got Linear")),
    ({"objective": 5}, ("objective must be an Objective or a loss function", "got int")),
    ({"processing_class": len}, ("processing_class must be a tokenizer", "got builtin_function_or_method")),
    ({"reward_funcs": 5}, ("reward_funcs must be functions", "got int")),
    ({"reward_funcs": [torch.nn.Linear(2, 2)]}, ("reward_funcs must be functions", "rlft.models.ModelReward")),
    ({"judge": 5}, ("judge must be a function", "got int")),
    ({"peft_config": True}, ("peft_config must be a peft.LoraConfig", "got bool")),
    ({"peft_config": {"rr": 2}}, ("peft_config has no 'rr'; did you mean 'r'?",)),
    ({"sampler": 5}, ("sampler must be a Sampler", "got int")),
    ({"optimizers": 5}, ("optimizers must be a pair (optimizer or None, None)", "got int")),
    ({"optimizers": (None, 5)}, ("optimizers must be a pair", "the learning rate is yours too")),
    ({"callbacks": print}, ("callbacks must be a list of functions",)),
    ({"callbacks": [5]}, ("callbacks must be a list of functions",)),
]


@pytest.mark.parametrize(("given", "words"), ARGUMENTS, ids=lambda x: "-".join(x)[:30] if isinstance(x, dict) else "")
def test_an_argument_of_the_wrong_kind_is_refused(
    tmp_path: Path, given: dict[str, Any], words: tuple[str, ...]
) -> None:
    args = {"objective": "sft", "output_dir": str(tmp_path / "run"), "report_to": [], "max_steps": 2}
    rest = {"args": args, "model": None, "train_dataset": ANSWERS, "processing_class": char_tokenizer(), **given}
    rest["model"] = tiny_llama() if rest["model"] is None else rest["model"]
    refused(lambda: Trainer(rest.pop("model"), rest.pop("args"), **rest), *words, kind=ConfigError)


def test_arguments_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    reference = tiny_llama(seed=1).requires_grad_(False)
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, ref_model=reference),
        "ref_model does nothing",
        "'sft'",
        "leave it out",
    )
    sampler = trainer(tmp_path, "rloo", PROMPTS, reward=varied, beta=0.0).sampler
    refused(lambda: trainer(tmp_path, "sft", ANSWERS, sampler=sampler), "sampler does nothing", "reward_funcs")
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, peft_config={"r": 2}, use_peft=True),
        "peft_config and use_peft",
        "keep one",
    )


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    for model in (tiny_llama(head="classifier", num_labels=1), tiny_llama().model):
        refused(
            lambda m=model: trainer(tmp_path, "sft", ANSWERS, model=m), "no head over the vocabulary", "load_causal_lm"
        )
    refused(
        lambda: trainer(tmp_path, "sft", ANSWERS, model=tiny_llama().to("meta")), "no weights yet", "load them first"
    )


def test_evaluation_rows_that_could_not_be_trained_on(tmp_path: Path) -> None:
    for rows, words in ((PROMPTS, "the rows hold prompts only"), (PAIRS, "would imitate the rejected answers")):
        refused(
            lambda r=rows: trainer(tmp_path, "sft", ANSWERS, eval_dataset=r), "eval_data: ", words, kind=ConfigError
        )
    refused(
        lambda: trainer(tmp_path, "dpo", PAIRS, beta=0.1, eval_dataset=ANSWERS),
        "eval_data: ",
        "preference",
        kind=ConfigError,
    )


def test_columns_whose_names_are_no_text(tmp_path: Path) -> None:
    refused(
        lambda: trainer(tmp_path, "sft", [{1: "a", 2: "b"}] * 8),
        "no data format fits the columns [1, 2]",
        "prompt + completion",
    )


def test_a_loss_without_gradient(tmp_path: Path) -> None:
    def detached(logps: Tensor, mask: Tensor) -> Tensor:
        return -logps.detach()

    t = trainer(tmp_path, "", ANSWERS, objective_given=Objective(detached))
    stops(t, "step 1", "'detached' has no gradient", ".detach()", kind=TrainingError)


# -- folders and commands -------------------------------------------------------------------------------------------------
def test_folders_that_are_no_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    code, said = command(capsys, tmp_path)
    assert code == 1
    assert f"{tmp_path}/run cannot be written: it is there, and no folder (a file, or a link to nothing)" in said
    (tmp_path / "run").unlink()
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    code, said = command(capsys, tmp_path)
    assert code == 1
    assert f"{tmp_path}/run/.lock: Is a directory" in said
    (tmp_path / "run" / ".lock").rmdir()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    code, said = command(capsys, tmp_path)
    assert code == 1
    assert "metrics.jsonl cannot be opened: Is a directory; move it away" in said
    assert "Traceback" not in said


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new setting at its default is the run as it was; at another value it is another run."""

    def older(self: Any) -> dict[str, Any]:
        return {name: value for name, value in identity(self).items() if name != "drop_zero_advantages"}

    def as_dict(self: Any) -> dict[str, Any]:
        return {name: value for name, value in to_dict(self).items() if name != "drop_zero_advantages"}

    identity, to_dict = Config.identity, Config.to_dict
    rows = [{"prompt": f"{i}=", "completions": ["a", "bc"], "scores": [1.0, 0.5]} for i in range(8)]
    with monkeypatch.context() as patch:
        patch.setattr(Config, "identity", older)
        patch.setattr(Config, "to_dict", as_dict)
        first = trainer(tmp_path, "reinforce", rows, save_steps=1)
        first.train()
        before = first.config.digest()
    again = trainer(tmp_path, "reinforce", rows, save_steps=1)
    assert again.config.digest() != before
    again.train()
    assert again.step == 2
    other = trainer(tmp_path, "reinforce", rows, save_steps=1, drop_zero_advantages=False)
    refused(other.train, "other settings", "drop_zero_advantages: True -> False", kind=ConfigError)


def test_counts_of_the_demo_are_at_least_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("seeds", "steps", "workers"):
        assert cli.main(["demo", f"--{name}", "0", "--output", str(tmp_path / "demo")]) == 2
        assert f"--{name} 0 must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_long_list_of_known_words_is_cut() -> None:
    from rlft import _check

    said = _check.suggestion("zzz", [f"name{i}" for i in range(500)])
    assert said.endswith(", ... (500 in all)")
    assert len(said) < 2000
    assert "name7" in _check.suggestion("zzz", [f"name{i}" for i in range(9)])
