"""Settings: strict keys, types, values that cannot work, and settings that would do nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlft.config import Config, ConfigError, load_config, parse_overrides


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "objective: grpo\nbeta: 0.04\nobjective_args: {eps: 0.001}\nlearning_rate: 1.0e-6\n")
    config = load_config(path, ["beta=0.1", "objective_args.ddof=0", "rewards=[math, length]", "max_steps=7"])
    assert (config.objective, config.beta, config.learning_rate, config.max_steps) == ("grpo", 0.1, 1e-6, 7)
    assert config.objective_args == {"eps": 0.001, "ddof": 0}
    assert config.rewards == ["math", "length"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["bta=0.1"], r"unknown setting 'bta'; did you mean 'beta'\?"),
        (["learning_rate=1e-5"], r"learning_rate must be a number, got '1e-5'.*1\.0e-5"),
        (["learning_rate=0"], "learning_rate must be > 0"),
        (["learning_rate=.nan"], "learning_rate must be > 0, got nan"),
        (["beta=-0.1"], "beta must be >= 0, got -0.1"),
        (["beta=.nan"], "beta must be >= 0, got nan"),
        (["gradient_accumulation_steps=0"], "gradient_accumulation_steps=0 must be at least 1"),
        (["max_steps=5", "warmup_steps=6"], r"warmup_steps=6 is more than max_steps=5; lower warmup_steps"),
        (["temperature=0"], "temperature must be > 0"),
        (["epsilon=0"], "epsilon must be > 0"),
        (["epsilon=0.3", "epsilon_high=0.2"], r"epsilon=0.3 is above epsilon_high=0.2; swap"),
        (["use_peft=true", "lora_r=0"], "lora_r=0 must be at least 1"),
        (["use_peft=true", "lora_alpha=.nan"], "lora_alpha must be > 0, got nan"),
        (["lora_r=4"], "lora_r=4 does nothing while use_peft is off; set use_peft: true or drop lora_r"),
        (["sampler=vlm"], r"sampler must be 'auto' or .*; did you mean 'vllm'\?"),
        (["use_peft=1"], "use_peft must be true or false, got 1 of type int"),
        (["max_steps=1.5"], "max_steps must be a whole number or null, got 1.5"),
        (["save_steps=true"], "save_steps must be a whole number or null, got True"),
        (["load_in_4bit=true"], "set use_peft: true"),
        (["eval_data=a.jsonl", "eval_fraction=0.1"], "keep one"),
        (["eval_fraction=1.5"], "must lie between 0 and 1"),
        (["pair_rewards=[0.5, 0.5]"], "chosen above rejected"),
        (["rewards=[math]", "reward_weights=[1, 2]"], "2 entries for 1 rewards"),
        (
            ["steps_per_generation=3", "gradient_accumulation_steps=2"],
            "must be a multiple of gradient_accumulation_steps=2",
        ),
        (["replay_capacity=3"], "does nothing while replay_probability is 0"),
        (["beta"], "is not key=value"),
        (["objective=grpo", "objective.x=1"], "objective is not a mapping"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_a_remedy(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nbeta: 0.2\n", r"key 'beta' appears twice \(line 2\)"),
        ("a: &x 1\nb: *x\n", "aliases are not supported"),
        ("beta: [\n", "is not valid YAML"),
        ("- 1\n", "must hold `key: value` lines"),
        ("model: !!python/object/apply:os.system [true]\n", "is not valid YAML"),
        ("? [a, b]\n: 1\n", "not valid YAML|must be text|unknown setting"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_whole_numbers_pass_as_floats_and_nothing_else_is_converted() -> None:
    config = Config.from_dict({"beta": 1, "temperature": 2})
    assert (config.beta, config.temperature) == (1.0, 2.0)
    assert isinstance(config.beta, float)
    with pytest.raises(ConfigError, match="must be a number"):
        Config.from_dict({"temperature": True})


def test_trl_names_reach_the_loss() -> None:
    config = Config.from_dict({"beta": 0.1, "epsilon": 0.2, "epsilon_high": 0.28, "objective_args": {"dual_clip": 3.0}})
    assert config.objective_hyper() == {"beta": 0.1, "clip_eps": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0}
    with pytest.raises(ConfigError, match="clip_eps given twice"):
        Config.from_dict({"epsilon": 0.2, "objective_args": {"clip_eps": 0.1}}).objective_hyper()


def test_what_may_change_when_resuming_leaves_the_digest() -> None:
    base = Config.from_dict({"beta": 0.1})
    assert Config.from_dict({"beta": 0.1, "output_dir": "elsewhere", "save_steps": 3}).digest() == base.digest()
    assert Config.from_dict({"beta": 0.2}).digest() != base.digest()
    assert Config.from_dict({"beta": 0.1, "seed": 1}).digest() != base.digest()


def test_every_field_is_documented_and_grouped() -> None:
    for group, fields in Config.groups().items():
        for field in fields:
            assert field.metadata["doc"].endswith("."), (group, field.name)


def test_overrides_are_yaml_values() -> None:
    assert parse_overrides(["a=1.5", "b=[x, y]", "c=null", "--d=true"]) == {
        "a": 1.5,
        "b": ["x", "y"],
        "c": None,
        "d": True,
    }


@pytest.mark.parametrize("text", ["a: " + "[" * 65, "[" * 5000 + "]" * 5000, "{a: " * 100 + "1" + "}" * 100])
def test_brackets_that_nest_without_end_are_refused_at_once(text: str, tmp_path: Path) -> None:
    """PyYAML takes quadratic time over them; a few levels are read."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="brackets nest deeper than 64"):
        load_config(path)
    deep = parse_overrides(["a=" + "[" * 60 + "1" + "]" * 60])["a"]
    for _ in range(60):
        (deep,) = deep
    assert deep == 1
