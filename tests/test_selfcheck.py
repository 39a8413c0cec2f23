"""Each self-check passes on a sound run, fails on the fault it is made for, and can be switched off."""

from __future__ import annotations

import functools
import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlft import checkpoint
from rlft.config import SELF_CHECKS, Config, ConfigError, load_config
from rlft.errors import Interrupted, TrainingError
from rlft.models.tensor_hashes import fingerprint
from rlft.run.checks import before
from rlft.run.checks.first_step import FirstStep, modules_of
from tests.bad_input.common import ANSWERS, PAIRS, PROMPTS, refused, same, state, trainer, varied
from tests.tiny import BOS_ID, char_tokenizer, tiny_llama

OFF = dict.fromkeys(SELF_CHECKS, False)


def only(*names: str) -> dict[str, bool]:
    return {**OFF, **dict.fromkeys(names, True)}


def run(folder: Path, *names: str, kind: str = "sft", **extra: Any) -> Any:
    """A small run with these checks alone."""
    rows, reward = {"sft": (ANSWERS, None), "dpo": (PAIRS, None), "rloo": (PROMPTS, varied)}[kind]
    extra = {"beta": 0.1, **extra} if kind != "sft" else extra
    settings = {"max_steps": 1, "self_checks": only(*names), **extra}
    return trainer(folder, kind, rows, reward=reward, **settings)


def watched(t: Any) -> bool:
    """Whether a first step is still waited for."""
    return any(isinstance(watcher, FirstStep) for watcher in t.watchers)


def stops(t: Any, name: str, *words: str, applied: bool = False) -> None:
    """The run stops with the check's name and switch; before the update unless ``applied``."""
    before = state(t)
    refused(t.train, f"self-check {name}:", f"self_checks: {{{name}: false}}", *words, kind=TrainingError)
    assert t.step == 0
    assert applied or same(before, state(t))
    assert all(p.grad is None for p in t.policy.parameters())
    assert not list(t.run_dir.glob("checkpoint-*"))


# -- a sound run ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "extra"), [("sft", {}), ("dpo", {"use_peft": True}), ("rloo", {"num_iterations": 1})])
def test_a_sound_run_passes_all_and_says_what_they_cost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, extra: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO, logger="rlft")
    t = run(tmp_path / "on", kind=kind, **{**extra, "self_checks": True})
    t.train()
    lines = [r.message for r in caplog.records if "self-checks" in r.message]
    assert [line.split(" in ")[0] for line in lines] == ["self-checks passed", "self-checks of the first step passed"]
    assert all(f"{name} " in lines[0] for name in t.self_checks.checks)
    assert {*t.self_checks.checks, "first_step", "gradients", "on_policy"} == set(SELF_CHECKS)
    off = run(tmp_path / "off", kind=kind, **{**extra, "self_checks": False})
    off.train()
    assert same(state(t), state(off))  # looking changes nothing: weights, moments, random numbers


def test_they_draw_no_random_number_and_take_little_time(tmp_path: Path) -> None:
    run(tmp_path / "warm", kind="rloo", self_checks=True).self_checks.run()  # what is imported on first use
    t = run(tmp_path, kind="rloo", self_checks=True)
    drawn, started = checkpoint.rng_state(), time.process_time()
    t.self_checks.run()
    assert time.process_time() - started < 5
    after = checkpoint.rng_state()
    assert drawn[1] == after[1]
    assert drawn[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in drawn[0].items())


def test_a_resumed_run_does_not_begin_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, self_checks=True, max_steps=2, save_steps=1).train()
    newest = tmp_path / "run" / "checkpoint-2"
    (newest / "manifest.json").unlink()
    caplog.set_level(logging.INFO, logger="rlft")
    again = run(tmp_path, self_checks=True, max_steps=2, save_steps=1)
    with pytest.warns(checkpoint.CheckpointWarning):
        again.train()
    assert again.step == 2
    assert not [r for r in caplog.records if "self-checks" in r.message]


def test_settings(tmp_path: Path) -> None:
    assert all(Config().checks_itself(name) for name in SELF_CHECKS)
    assert not any(Config(self_checks=False).checks_itself(name) for name in SELF_CHECKS)
    file = tmp_path / "c.yaml"
    file.write_text("self_checks: {padding: false}\n")
    read = load_config(file, ["self_checks.memory=false"])
    assert [name for name in SELF_CHECKS if not read.checks_itself(name)] == ["padding", "memory"]
    with pytest.raises(ConfigError, match="self_checks has no 'paddding'; did you mean 'padding'"):
        Config(self_checks={"paddding": False})
    with pytest.raises(
        ConfigError, match=r"self_checks must be true or false or dict\[str, bool\], got \{'padding': 'no'\}"
    ):
        Config(self_checks={"padding": "no"})  # type: ignore[dict-item]


def test_nothing_runs_when_all_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = run(tmp_path)
    for name in t.self_checks.checks:
        monkeypatch.setitem(t.self_checks.checks, name, lambda: pytest.fail("was called"))
    monkeypatch.setattr(FirstStep, "__init__", lambda self, parts: pytest.fail("was made"))
    t.train()
    assert not watched(t)


# -- reference ----------------------------------------------------------------------------------------------------------------
def test_reference_that_is_not_the_policy(tmp_path: Path) -> None:
    t = run(tmp_path, "reference", kind="dpo")
    with torch.no_grad():
        t.policy.hf_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    stops(t, "reference", "differ by up to", "bound 0.0001", "Build the Trainer from the model in its final state")
    t = run(tmp_path / "2", kind="dpo")
    with torch.no_grad():
        t.policy.hf_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    t.train()


def test_reference_under_an_adapter_that_is_no_longer_fresh(tmp_path: Path) -> None:
    t = run(tmp_path, "reference", kind="dpo", use_peft=True)
    with torch.no_grad():
        next(p for n, p in t.policy.named_parameters() if "lora_B" in n).fill_(0.5)
    stops(t, "reference", "a trained adapter under a bare reference")


# -- padding ------------------------------------------------------------------------------------------------------------------
class Mixing(nn.Module):
    """A layer that lets the rows of a batch see each other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = self.inner(*args, **kwargs)
        return states + 0.1 * states.mean((0, 1), keepdim=True) if states.shape[0] > 1 else states


@pytest.mark.filterwarnings("ignore:.*cannot compute the prompt of a group once")
@pytest.mark.parametrize("kind", ["sft", "rloo"])
def test_rows_that_see_each_other(tmp_path: Path, kind: str) -> None:
    t = run(tmp_path, "padding", kind=kind)
    layer = t.policy.hf_model.model.layers[1]
    layer.mlp = Mixing(layer.mlp)
    stops(t, "padding", "the same log-probs alone and beside a longer row", "mix rows", "attn_implementation")


def test_model_that_ignores_the_attention_mask(tmp_path: Path) -> None:
    """Right padding is invisible to a causal model; a sampler pads at the left."""
    t = run(tmp_path, "padding", kind="rloo")
    model = t.policy.hf_model
    forward = model.forward

    @functools.wraps(forward)
    def ignores(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    model.forward = ignores
    stops(t, "padding", "three tokens of padding at its left", "ignores attention_mask")
    t = run(tmp_path / "off", kind="rloo", sampler_check_steps=0)
    forward = t.policy.hf_model.forward
    t.policy.hf_model.forward = ignores
    t.train()


def test_padding_of_a_reward_model(tmp_path: Path) -> None:
    model = tiny_llama(head="classifier", num_labels=1)
    t = trainer(tmp_path, "bradley_terry", PAIRS, model=model, self_checks=only("padding"))
    assert t.self_checks.padding() is None
    layer = model.model.layers[1]
    layer.mlp = Mixing(layer.mlp)
    assert "beside a longer row" in str(t.self_checks.padding())


def test_spoilt_weights_are_not_called_a_matter_of_padding(tmp_path: Path) -> None:
    t = run(tmp_path, "padding")
    assert t.self_checks.padding() is None
    with torch.no_grad():
        t.policy.hf_model.lm_head.weight.fill_(float("nan"))
    assert "must be finite" in str(t.self_checks.padding())


# -- sample -------------------------------------------------------------------------------------------------------------------
def test_answers_without_a_trained_end(tmp_path: Path) -> None:
    t = run(tmp_path, "sample")
    examples = t.train_data.examples
    masked = [replace(e, completions=[replace(c, mask=[*c.mask[:-1], False]) for c in e.completions]) for e in examples]
    object.__setattr__(t.train_data, "examples", masked)
    stops(t, "sample", "should end with a trained end token (one of [2])", "never learn to stop", "end_token_ids")
    object.__setattr__(t.train_data, "examples", [masked[0], *examples[1:]])
    assert t.self_checks.sample() is None  # one row is the data's own matter


def test_two_bos(tmp_path: Path) -> None:
    t = trainer(tmp_path, "sft", ANSWERS, processing_class=char_tokenizer(add_bos=True), self_checks=only("sample"))
    assert all(e.prompt_ids.count(BOS_ID) == 1 for e in t.train_data.examples)
    assert t.self_checks.sample() is None
    doubled = [replace(e, prompt_ids=[BOS_ID, *e.prompt_ids]) for e in t.train_data.examples]
    object.__setattr__(t.train_data, "examples", doubled)
    stops(t, "sample", "should hold one BOS token ('<bos>'), got 2 in row", "the chat template")


def test_the_sample_is_shown_once_with_and_without_colour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(name: str, **extra: Any) -> str:
        capsys.readouterr()
        run(tmp_path / name, "sample", **{"disable_tqdm": False, **extra}).train()
        return capsys.readouterr().out

    plain = shown("plain")
    assert plain.count("one row as it is trained on (trained tokens in [| |])") == 1
    assert "0+0=" in plain
    assert "[|0<eos>|]" in plain
    assert "\x1b[" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = shown("colour")
    assert "trained tokens highlighted" in coloured
    assert "\x1b[30;42m0<eos>" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[|0<eos>|]" in shown("no colour")
    assert "as it is trained on" not in shown("quiet", disable_tqdm=True)
    assert "as it is trained on" not in shown("off", self_checks=False)


# -- trainable ----------------------------------------------------------------------------------------------------------------
def test_nothing_trains(tmp_path: Path) -> None:
    t = run(tmp_path, "trainable")
    t.policy.requires_grad_(False)
    stops(t, "trainable", "no parameter is trainable")


def test_optimizer_for_other_tensors(tmp_path: Path) -> None:
    model = tiny_llama()
    head = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    stops(
        run(tmp_path, "trainable", model=model, optimizers=(head, None)),
        "trainable",
        "21 trainable tensors",
        "20 are missing",
    )
    model = tiny_llama()
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    t = run(tmp_path / "2", "trainable", model=model, optimizers=(everything, None))
    model.lm_head.requires_grad_(False)
    stops(t, "trainable", "0 are missing", "1 are not trained")


def test_a_lora_target_that_matches_nothing(tmp_path: Path) -> None:
    """peft takes a list of which one name matches; the others would silently not train."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "vproj"], task_type="CAUSAL_LM"))
    stops(run(tmp_path, "trainable", model=model), "trainable", "got 'vproj' in target_modules")


# -- memory -------------------------------------------------------------------------------------------------------------------
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    t = run(tmp_path, "memory")
    real = before._free_memory(torch.device("cpu"))
    assert real is None or real > 1 << 20
    monkeypatch.setattr(before, "_free_memory", lambda device: 1 << 10)
    stops(t, "memory", "1 KiB are free", "Lower per_device_train_batch_size (now 4)", "gradient_checkpointing: true")
    assert "use_peft: true" in str(t.self_checks.memory())
    monkeypatch.setattr(before, "_free_memory", lambda device: None)
    assert t.self_checks.memory() is None
    needed = sum(v for k, v in before.peak_memory(t.parts).items() if k not in ("weights", "reference"))
    monkeypatch.setattr(before, "_free_memory", lambda device: int(needed * 0.6))
    assert t.self_checks.memory() is None  # within the error of the estimate: told, not refused
    assert "a rough estimate" in caplog.text


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 500\nfile 400\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert before._cgroup(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert before._cgroup(tmp_path) is None
    assert before._cgroup(tmp_path / "missing") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert before._meminfo(tmp_path / "meminfo") == 7 * 1024


# -- dry checkpoint -----------------------------------------------------------------------------------------------------------
def test_the_rehearsal_leaves_nothing(tmp_path: Path) -> None:
    t = run(tmp_path)
    (tmp_path / "run").mkdir()
    t.callbacks.append(lambda event, run, values: pytest.fail("a rehearsal is no save") if event == "save" else None)
    assert t.self_checks.dry_checkpoint() is None
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLFT_FAILPOINT", "dry.checkpoint.manifest.write.before:1:oserror:ENOSPC")
    t = run(tmp_path, "dry_checkpoint")
    stops(t, "dry_checkpoint", "could not be written and read back", "No space left", "another output_dir")
    assert not list(t.run_dir.glob(".tmp*"))
    monkeypatch.setenv("RLFT_FAILPOINT", "dry.checkpoint.manifest.write.before:1:oserror:ENOSPC")
    run(tmp_path / "off").train()


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLFT_FAILPOINT", "dry.checkpoint.mkdir.before:1:oserror:EACCES")
    stops(run(tmp_path, "dry_checkpoint"), "dry_checkpoint", "make the folder writable or choose another")


def test_a_disk_that_changes_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = run(tmp_path, "dry_checkpoint")
    load = checkpoint.load

    def other(path: Any, **kwargs: Any) -> Any:
        found = load(path, **kwargs)
        found.tensors["trainable"]["model.lm_head.weight"][0, 0] += 1
        return found

    monkeypatch.setattr(checkpoint, "load", other)
    stops(t, "dry_checkpoint", "model.lm_head.weight came back from a checkpoint with other values")


def test_rehearsals_are_not_counted_with_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``RLFT_FAILPOINT`` names the n-th passage of the real protocol."""
    monkeypatch.setenv("RLFT_FAILPOINT", "checkpoint.manifest.write.before:1:oserror:ENOSPC")
    t = run(tmp_path)
    (tmp_path / "run").mkdir()
    assert t.checkpoints.rehearse() is None


# -- the first step -----------------------------------------------------------------------------------------------------------
def test_an_adapter_that_is_not_active(tmp_path: Path) -> None:
    t = run(tmp_path, "gradients", use_peft=True)
    module = next(m for m in t.policy.modules() if hasattr(m, "lora_A"))
    module.enable_adapters(False)
    module.requires_grad_(False)
    for name, p in module.named_parameters():
        p.requires_grad_("lora" in name)
    stops(t, "gradients", "2 of 28 have none", "self_attn.q_proj (2 tensors)", "an adapter that is not active")


def test_a_detached_layer(tmp_path: Path) -> None:
    t = run(tmp_path, "gradients")
    mlp = t.policy.hf_model.model.layers[0].mlp
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    stops(t, "gradients", "1 of 21 have none (model.model.layers.0.mlp.up_proj.weight)")


class Tower(nn.Module):
    """Layers of a model that reading text never comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


def with_tower() -> Any:
    model = tiny_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.model.vision_tower = Tower()
    return model


def test_weights_that_text_does_not_use_are_named_by_their_module(tmp_path: Path) -> None:
    t = run(tmp_path, "gradients", model=with_tower())
    stops(
        t, "gradients", "4 of 25 have none (model.model.vision_tower (4 tensors))", "requires_grad_(False)", "use_peft: true",
    )  # fmt: skip


def test_a_run_goes_on_without_their_gradients_where_that_is_said(tmp_path: Path) -> None:
    """The other checks stay on; the unused weights stay what they are, through a stop and a resume."""
    quiet: dict[str, Any] = {"self_checks": {"gradients": False}, "max_steps": 3}
    whole = run(tmp_path / "whole", model=with_tower(), **quiet)
    whole.train()

    def stop(event: str, t: Any, values: Any) -> None:
        if event == "step" and t.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path / "cut", model=with_tower(), callbacks=[stop], **quiet).train()
    resumed = run(tmp_path / "cut", model=with_tower(), **quiet)
    resumed.train()
    assert same(state(resumed), state(whole))
    before = {name: p.clone() for name, p in with_tower().named_parameters()}
    for name, p in whole.policy.hf_model.named_parameters():
        assert torch.equal(p, before[name]) == ("vision_tower" in name), name
    frozen = with_tower()
    frozen.model.vision_tower.requires_grad_(False)
    other = run(tmp_path / "frozen", model=frozen, **{**quiet, "self_checks": True})
    other.train()
    assert all(torch.equal(p, q) for p, q in zip(whole.policy.parameters(), other.policy.parameters(), strict=True))


def test_modules_are_named_by_their_longest_common_part() -> None:
    trained = ["a.b.w", "a.b.v", "a.c.w", "d", "e.w", "e.v"]
    assert modules_of(["a.b.w", "a.b.v", "d"], trained) == ["a.b (2 tensors)", "d"]
    assert modules_of(["a.b.w", "a.b.v", "a.c.w", "e.v"], trained) == ["a (3 tensors)", "e.v"]
    assert modules_of(["ab"], ["ab", "abc"]) == ["ab"]


def test_a_frozen_tensor_that_moves(tmp_path: Path) -> None:
    t = run(tmp_path, "first_step", use_peft=True)
    frozen = dict(t.policy.named_parameters())["model.base_model.model.model.embed_tokens.weight"]
    assert not frozen.requires_grad
    step = t.optimizer.step

    def writes(*args: Any) -> Any:
        with torch.no_grad():
            frozen[50, 3] += 1e-4
        return step(*args)

    t.optimizer.step = writes
    stops(t, "first_step", "1 of 21 did", "embed_tokens", applied=True)


def test_a_reference_that_moves_with_the_policy(tmp_path: Path) -> None:
    t = run(tmp_path, "first_step", kind="dpo")
    theirs = t.policy.reference_model.lm_head.weight

    def moves(parameter: torch.Tensor) -> None:
        theirs.data.add_(1e-3)

    t.policy.hf_model.lm_head.weight.register_post_accumulate_grad_hook(moves)
    stops(t, "first_step", "frozen tensors should not change", "reference_model.lm_head.weight", applied=True)


def test_an_optimizer_that_does_nothing(tmp_path: Path) -> None:
    t = run(tmp_path, "first_step")
    t.optimizer.step = lambda *args: None
    stops(t, "first_step", "none of 21 did", "learning_rate", applied=True)
    stops(run(tmp_path / "2", "first_step", learning_rate=1e-30), "first_step", "now 1e-30", applied=True)


def test_a_wrong_count(tmp_path: Path) -> None:
    t = run(tmp_path, "first_step")
    count = t.count
    t.count = lambda batches: count(batches) + 1
    stops(t, "first_step", "term 'sft' was divided by", "the masks of its batches count", "Trainer.count")
    t = run(tmp_path / "later", "first_step")
    compute = t.compute_loss
    t.compute_loss = lambda b, d: compute(b.replace(mask=b.mask & (torch.arange(b.mask.shape[1]) > 0)), d)
    stops(t, "first_step", "but its losses saw", "changes Batch.mask after the count")
    t = run(tmp_path / "off")
    count_off = t.count
    t.count = lambda batches: count_off(batches) + 1
    t.train()


@pytest.mark.parametrize(
    ("objective", "rows", "reward"),
    [
        ("dr_grpo", PROMPTS, varied),
        ("grpo", PROMPTS, varied),
        ("simpo", PAIRS, None),
        ("agro_off_policy", PROMPTS, varied),
    ],
)
def test_counts_of_every_averaging(tmp_path: Path, objective: str, rows: Any, reward: Any) -> None:
    hyper = {"simpo": {"objective_args": {"gamma": 0.5}, "beta": 2.0}, "agro_off_policy": {"beta": 0.1}}.get(
        objective, {}
    )
    hyper |= {"objective_args": {"length": 6}} if objective == "dr_grpo" else {}
    extra = {"gradient_accumulation_steps": 2} if reward is None else {}
    t = trainer(tmp_path, objective, rows, reward=reward, max_steps=1, self_checks=only("first_step"), **hyper, **extra)
    t.train()
    assert not watched(t)


def test_a_step_without_gradient_proves_nothing(tmp_path: Path) -> None:
    """Equal rewards give no gradient: the watch waits for a step that has one."""

    def flat_then_varied(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        if t.step < 1:
            return [1.0] * len(completions)
        return varied(completions, completion_ids)

    t = trainer(
        tmp_path, "rloo", PROMPTS, reward=flat_then_varied, beta=0.0, self_checks=only("first_step"), max_steps=2
    )  # fmt: skip
    waiting: list[bool] = []
    t.callbacks.append(lambda event, run, values: waiting.append(watched(t)) if event == "step" else None)
    t.train()
    assert waiting == [True, False]


# -- on-policy ratios ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reuse", [1, 2])
def test_ratios_of_fresh_samples(tmp_path: Path, reuse: int) -> None:
    """A layer that scores otherwise under gradient, as dropout does."""
    t = trainer(
        tmp_path, "grpo", PROMPTS, reward=varied, num_iterations=reuse, self_checks=only("on_policy"), max_steps=1,
        objective_args={"advantage": "group_mean"},
    )  # fmt: skip
    t.policy.hf_model.model.layers[1].mlp.register_forward_hook(
        lambda module, inputs, output: output * 1.01 if torch.is_grad_enabled() else output
    )
    stops(t, "on_policy", "importance ratio 1", "bound 0.0001", "disable_dropout: true")


def test_dropout_while_training(tmp_path: Path) -> None:
    def lively(folder: Path, **extra: Any) -> Any:
        settings = {
            "num_iterations": 2,
            "disable_dropout": False,
            "use_peft": True,
            "lora_dropout": 0.5,
            "max_steps": 1,
        }
        t = trainer(folder, "grpo", PROMPTS, reward=varied, **settings, **extra)
        with torch.no_grad():
            for name, p in t.policy.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
        return t

    stops(lively(tmp_path, self_checks=only("on_policy")), "on_policy", "dropout in training (disable_dropout: false)")
    lively(tmp_path / "off", self_checks=OFF).train()


# -- the hash -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int16])
@pytest.mark.parametrize("size", [1, 7, 8, 1025, 20_000])
def test_a_fingerprint_sees_any_bit(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tensor = (torch.randn(size, generator=generator) > 0).to(dtype)
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.clone()))
    assert torch.equal(before, fingerprint(torch.stack([tensor, tensor], 1)[:, 1]))  # whatever the strides
    raw = tensor.view(torch.uint8)
    for place in {0, raw.numel() // 2, raw.numel() - 1}:
        raw[place] ^= 1
        assert not torch.equal(before, fingerprint(tensor))
        raw[place] ^= 1
    odd = torch.zeros(size + 1, dtype=dtype)[1:]
    odd.copy_(tensor)
    assert torch.equal(before, fingerprint(odd))


def test_a_fingerprint_sees_exchanged_rows() -> None:
    rows = torch.randn(8, 4096)
    assert not torch.equal(fingerprint(rows), fingerprint(rows.flip(0)))
