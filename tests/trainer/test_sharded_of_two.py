"""Weights and moments spread over two processes (torch's ``fully_shard``, gloo): saved, continued and exported whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlft import checkpoint
from rlft.config import ConfigError
from rlft.models.sharded import settle, whole_state
from rlft.run.processes.launch import refuse_launcher, refuse_online_launcher
from tests.launch import launch
from tests.reliability.runs import digest
from tests.tiny import tiny_llama
from tests.trainer import _sharded_of_two as job

Two = tuple[Path, list[dict[str, Any]]]
slow = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """One launch for all."""
    folder = tmp_path_factory.mktemp("sharded")
    launch("tests.trainer._sharded_of_two", folder, 2, timeout=240)
    return folder, [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2)]


def last(folder: Path, kind: str) -> checkpoint.Checkpoint:
    return checkpoint.load(folder / kind / f"checkpoint-{job.STEPS}")


@pytest.mark.parametrize("kind", job.KINDS, ids=str)
class TestTwo:
    pytestmark = slow

    def test_the_runs_were_sharded(self, two: Two, kind: str) -> None:
        """Else nothing here is proved. Each layer gathers alone, a reference's too; the rest with the root."""
        _, said = two
        layers = 4 if kind == "dpo" else 2
        for own in said:
            for name in ("whole", "cut", "resumed"):
                facts = own[f"{name} {kind}"]
                assert (facts["spread"], facts["moments_spread"], facts["alone"]) == (True, True, layers + 1)
            assert not own[f"ddp {kind}"]["spread"]

    def test_a_stopped_run_goes_on_bit_for_bit(self, two: Two, kind: str) -> None:
        folder, said = two
        for own in said:
            assert own[f"cut {kind}"]["step"] == job.STOP
            assert own[f"resumed {kind}"] == own[f"whole {kind}"]
            assert own[f"whole {kind}"]["weights"] == said[0][f"whole {kind}"]["weights"]
        assert digest(folder / "cut" / kind) == digest(folder / "whole" / kind)

    def test_checkpoints_are_those_of_whole_models(self, two: Two, kind: str) -> None:
        """Gradients are summed in another order (reduce-scatter), in float64: 1e-12 on weights and moments of size 1."""
        folder, _ = two
        spread, whole = last(folder / "whole", kind).tensors, last(folder / "ddp", kind).tensors
        assert spread.keys() == whole.keys() >= {"trainable", "optimizer"}
        for stem in ("trainable", "optimizer", "reference"):
            assert spread.get(stem, {}).keys() == whole.get(stem, {}).keys()
            for name, value in whole.get(stem, {}).items():
                torch.testing.assert_close(spread[stem][name], value, rtol=1e-9, atol=1e-12, msg=name)
        moments = [name for name in spread["optimizer"] if name.endswith("exp_avg")]
        assert len(moments) == len(spread["trainable"])
        assert all(bool(spread["optimizer"][name].abs().max() > 0) for name in moments)

    def test_the_exported_model_is_the_trained_one(self, two: Two, kind: str) -> None:
        folder, _ = two
        trained = last(folder / "whole", kind).tensors["trainable"]
        name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
        exported = load_file(folder / "whole" / kind / "model" / name)
        assert exported.keys() == load_file(folder / "ddp" / kind / "model" / name).keys()
        assert len(exported) == len(trained)
        found = {n.removeprefix("model.").replace(".default.", "."): value for n, value in trained.items()}
        assert all(torch.equal(exported[n], value) for n, value in found.items())
        kept = folder / "whole" / kind / f"checkpoint-{job.STEPS}" / "model" / name
        assert kept.read_bytes() == (folder / "whole" / kind / "model" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["to_ddp", "from_ddp"])
def test_a_checkpoint_goes_on_spread_or_whole(two: Two, way: str) -> None:
    folder, _ = two
    ended, expected = last(folder / way, "dpo").tensors, last(folder / "ddp", "dpo").tensors
    for stem in ("trainable", "optimizer"):
        for name, value in expected[stem].items():
            torch.testing.assert_close(ended[stem][name], value, rtol=1e-9, atol=1e-12, msg=name)


# -- parts, on one process ------------------------------------------------------------------------------------------------
def test_whole_copies_of_a_module_that_is_not_sharded() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    settle(model)
    state = whole_state(model, set(model.state_dict()), keep=True)
    assert checkpoint.fingerprint(state) == checkpoint.fingerprint(dict(model.state_dict()))
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"], "tied ones stay tied, and are written once"
    assert state["lm_head.weight"].data_ptr() != model.lm_head.weight.data_ptr()
    assert whole_state(model, {"lm_head.weight"}, keep=True).keys() == {"lm_head.weight"}
    assert whole_state(model, set(model.state_dict()), keep=False) == {}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"asks for DeepSpeed, whose optimizer .*configs/accelerate/fsdp\.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for version 1 of FSDP.* set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "1"}, "asks for version 1 of FSDP"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}, "FSDP on CPUs"),
    ],
)
def test_launchers_that_cannot_be_saved_under_are_refused_first(
    env: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlft import Trainer

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    settings = {"objective": "dpo", "beta": 0.1, "model": "no/such-model", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=said):
        Trainer(args=settings, train_dataset=job.PAIRS)
    assert not (tmp_path / "run").exists()


def test_sampling_from_spread_weights_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlft import Trainer

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    settings = {"objective": "rloo", "beta": 0.1, "model": "no/such-model", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"asks for FSDP, and sampling needs whole weights .*ddp\.yaml"):
        refuse_online_launcher(online=True)
    refuse_online_launcher(online=False)
    with pytest.raises(ConfigError, match="asks for FSDP, and sampling needs whole weights"):
        Trainer(args=settings, train_dataset=[{"prompt": "a"}], reward_funcs=lambda completions, **_: [0.0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"ACCELERATE_USE_CPU": "true"},
        {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_USE_DEEPSPEED": "false"},
    ],
)
def test_other_launchers_are_not(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    refuse_launcher()
