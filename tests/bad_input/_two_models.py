"""Bad input 21-33 and 57-63 on two processes: tokenizers, references, reward models, precision and adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rlft.run.processes import launch
from tests.bad_input._two_case import CHAT, NAN, ONE, Hold, add, case, chatty
from tests.bad_input.common import ANSWERS, PAIRS, PROMPTS, trainer
from tests.bad_input.test_rows_of_models import _reversed_tokenizer, adapter, classifier
from tests.tiny import CHARS, SPECIALS, char_tokenizer, tiny_llama, tiny_qwen2

LONG = {"max_prompt_length": None}


def tokenizer(row: int, what: str, end: str, make: Callable[[], Any], **rest: Any) -> None:
    """A tokenizer that is bad where it is met; the other process has a good one."""
    bad = {"processing_class": make}
    case(row, what, end, "sft", whose=ONE, bad=bad, **{"processing_class": chatty(), **rest})


def model(row: int, what: str, objective: str, bad: dict[str, Any], *words: str, **common: Any) -> None:
    case(row, what, "refused", objective, whose=ONE, bad=bad, words=words, **common)


def _pad_is_eos() -> Any:
    made = chatty()()
    made.pad_token = made.eos_token
    return made


tokenizer(21, "no pad token", "trains", lambda: char_tokenizer(pad=False), at=2,
          warns=("no pad token; '<pad>' (id 0) is used", "end-of-sequence token is never"))  # fmt: skip
tokenizer(22, "pad is eos", "trains", _pad_is_eos, at=2,
          warns=("pad and end-of-sequence token are the same ('<eos>')", "masked by their length"))  # fmt: skip
tokenizer(23, "no eos token", "refused", lambda: char_tokenizer(eos=False),
          words=("no end-of-sequence token", "set tokenizer.eos_token"))  # fmt: skip
tokenizer(24, "no chat template", "refused", char_tokenizer, good=CHAT, rows=CHAT, **LONG,
          words=("row 0", "no chat template", "set tokenizer.chat_template"))  # fmt: skip
TWICE = "<bos><bos>{% for m in messages %}{{ m['content'] }}{% endfor %}"
tokenizer(25, "second BOS", "refused", chatty(add_bos=True, chat_template=TWICE), good=CHAT, rows=CHAT, **LONG,
          words=("row 0", "two BOS tokens ('<bos>')", "take it out of the chat template"))  # fmt: skip
THINKS = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
tokenizer(26, "prompt is no prefix", "refused", chatty(chat_template=THINKS), good=CHAT, rows=CHAT, **LONG,
          words=("row 0", "does not continue its own prompt", "'0<think>'", "chat_template_kwargs"))  # fmt: skip
model(27, "embedding too small", "sft", {"model": lambda: tiny_llama(vocab_size=90)},
      "the tokenizer knows 100 tokens", "the model embeds 90", "resize_token_embeddings")  # fmt: skip
model(28, "reference of another vocabulary", "dpo", {"ref_model": lambda: tiny_llama(vocab_size=120).requires_grad_(False)},
      "vocabulary of 120", "the policy one of 100", "models of one tokenizer", beta=0.1)  # fmt: skip
model(30, "reference trains", "dpo", {"ref_model": lambda: tiny_llama(seed=1)},
      "trainable parameters", "reference.requires_grad_(False)", beta=0.1)  # fmt: skip


def _same_object(folder: Path, met: bool, hold: Hold) -> None:
    policy = tiny_llama()
    hold.trainer = trainer(folder, "dpo", PAIRS, beta=0.1, model=policy, **({"ref_model": policy} if met else {}))
    hold.trainer.train()


add(29, "reference is the policy", "refused", _same_object, whose=ONE,
    words=("the reference is the policy itself", "use reference='auto'"))  # fmt: skip


# -- reward models ----------------------------------------------------------------------------------------------------
def reward_model(row: int, what: str, end: str, make: Callable[[Path], Any], **rest: Any) -> None:
    """A folder of a reward model that is bad where it is met."""

    def run(folder: Path, met: bool, hold: Hold) -> None:
        place = folder / f"reward-{met}-{os.environ['RANK']}"
        (make if met else classifier)(place)
        hold.trainer = trainer(folder, "rloo", PROMPTS, reward=str(place), beta=0.0)
        hold.trainer.train()

    add(row, what, end, run, whose=ONE, **rest)


def _without_head(folder: Path) -> None:
    tiny_llama().save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)


reward_model(
    31, "reward tokenizer differs", "trains", at=2, warns=("has another tokenizer than the policy", "encoded again"),
    make=lambda folder: classifier(folder, tokenizer=_reversed_tokenizer(list(SPECIALS), CHARS)),
)  # fmt: skip
reward_model(32, "reward head newly made", "refused", _without_head,
             words=("no trained score head (score.weight is random)", "train it first"))  # fmt: skip
reward_model(33, "reward of two outputs", "refused", lambda folder: classifier(folder, num_labels=2),
             words=("num_labels=2", "one output"))  # fmt: skip


# -- precision ----------------------------------------------------------------------------------------------------------
case(57, "fp16 on a CPU", "refused", "sft", mixed_precision="fp16",
     words=("mixed_precision='fp16'", "needs a CUDA device", "use 'no' or 'bf16'"))  # fmt: skip


def _old_card(folder: Path, met: bool, hold: Hold) -> None:
    """A card of one machine that lacks bf16. Only what is asked of it is pretended."""
    kept = torch.cuda.is_available, torch.cuda.is_bf16_supported, torch.cuda.get_device_name
    if met:
        torch.cuda.is_available, torch.cuda.is_bf16_supported = (lambda: True), (lambda *a, **k: False)
        torch.cuda.get_device_name = lambda *a, **k: "an old card"
    waited, launch.SECONDS = launch.SECONDS, 3
    try:
        hold.trainer = trainer(folder, "sft", ANSWERS, mixed_precision="bf16")
    finally:
        torch.cuda.is_available, torch.cuda.is_bf16_supported, torch.cuda.get_device_name = kept
        launch.SECONDS = waited


add(57, "bf16 on an old card", "refused", _old_card, whose=ONE, told=False,
    words=("mixed_precision='bf16'", "an old card", "use 'no'"))  # fmt: skip
model(58, "weights in half precision", "sft", {"model": lambda: tiny_llama(dtype=torch.bfloat16)},
      "trainable parameter", "is torch.bfloat16", "dtype='float32'")  # fmt: skip


# -- adapters -----------------------------------------------------------------------------------------------------------
def lora(*modules: str, **options: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(
        **{"r": 2, "target_modules": list(modules or ("q_proj",)), "task_type": "CAUSAL_LM", **options}
    )


model(
    59,
    "LoRA on nothing",
    "sft",
    {"peft_config": lora("c_attn")},
    "'c_attn' matches no module",
    "q_proj",
    peft_config=lora(),
)
model(60, "nothing trains", "sft", {"model": lambda: tiny_llama().requires_grad_(False)},
      "no parameter is trainable", "model.requires_grad_(True)")  # fmt: skip


def _adapter(spoil: Callable[[Path, Path], None]) -> Callable[[Path, bool, Hold], None]:
    """An adapter on disk, spoilt where it is met; the folders of the two processes are their own."""

    def run(folder: Path, met: bool, hold: Hold) -> None:
        own = folder / f"models{os.environ['RANK']}"
        tiny_llama().save_pretrained(own / "base")
        place = adapter(own / "adapter", own / "base")
        if met:
            spoil(place, own)
        hold.trainer = trainer(folder, "sft", ANSWERS, model=str(place))
        hold.trainer.train()

    return run


def _other_base(place: Path, own: Path) -> None:
    tiny_qwen2(hidden_size=16).save_pretrained(own / "other")
    path = place / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(own / "other")}))


def _renamed(place: Path, own: Path) -> None:
    path = place / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("layers.1", "layers.7"): value for name, value in tensors.items()}, path)


add(61, "adapter of another base", "refused", _adapter(_other_base), whose=ONE,
    words=("adapter", "does not fit Qwen2ForCausalLM", "other"))  # fmt: skip
add(62, "adapter keys unmatched", "refused", _adapter(_renamed), whose=ONE,
    words=("2 tensors missing", "layers.1", "2 without a place", "layers.7", "load it onto the base it was trained on"))  # fmt: skip
case(63, "rank 0", "refused", "sft", use_peft=True, lora_r=0, words=("lora_r=0", "at least 1"))
case(63, "alpha NaN", "refused", "sft", use_peft=True, lora_alpha=NAN, words=("lora_alpha", "nan"))
model(63, "alpha NaN given", "sft", {"peft_config": lora(lora_alpha=NAN)}, "lora alpha must be a finite number > 0", "got nan",
      peft_config=lora())  # fmt: skip


# -- not in the table -----------------------------------------------------------------------------------------------------
def _model_missing(folder: Path, met: bool, hold: Hold) -> None:
    place = folder / f"model{os.environ['RANK']}"
    if not met:
        tiny_llama().save_pretrained(place)
    hold.trainer = trainer(folder, "sft", ANSWERS, model=str(place))
    hold.trainer.train()


add(0, "model folder missing", "refused", _model_missing, whose=ONE, words=("model",))
case(0, "model of another shape", "refused", "sft", bad={"model": lambda: tiny_llama(hidden_size=16, head_dim=4)},
     whose=("first", "second"), words=("must agree", "process 1 has another model than process 0", "weights"))  # fmt: skip
