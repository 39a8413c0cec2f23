"""The sampler's own decode step: the model's numbers and tokens, the weights of the moment, and models it must leave alone."""

from __future__ import annotations

import random
import re
import warnings

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlft.models import LoraSettings, add_lora
from rlft.ops import gemm
from rlft.rollout import FastSampler, SamplingParams, TransformersSampler
from rlft.rollout.llama_step import LlamaStep, disagreement
from rlft.rollout.llama_structure import unknown
from rlft.rollout.shared_rows import can_share
from tests import tiny
from tests.rollout.test_samplers import MIXED, PROMPTS, STOPS, flat, generate_alone, lora

F64 = torch.float64
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "llama": lambda **kw: tiny.tiny_llama(**kw),
    "llama, tied": lambda **kw: tiny.tiny_llama(tie_word_embeddings=True, **kw),
    "llama, biases": lambda **kw: tiny.tiny_llama(attention_bias=True, mlp_bias=True, **kw),
    "llama, no shared keys": lambda **kw: tiny.tiny_llama(num_key_value_heads=4, **kw),
    "llama, one key for all": lambda **kw: tiny.tiny_llama(num_key_value_heads=1, head_dim=6, **kw),
    "llama, llama3 positions": lambda **kw: tiny.tiny_llama(rope_parameters=LLAMA3, **kw),
    "llama, yarn": lambda **kw: tiny.tiny_llama(rope_parameters=YARN, **kw),
    "llama, gelu": lambda **kw: tiny.tiny_llama(hidden_act="gelu_pytorch_tanh", **kw),
    "mistral": lambda **kw: tiny.tiny_mistral(**{"sliding_window": 64, **kw}),
    "mistral, no window": lambda **kw: tiny.tiny_mistral(sliding_window=None, **kw),
    "qwen2": lambda **kw: tiny.tiny_qwen2(**kw),
    "qwen3": lambda **kw: tiny.tiny_qwen3(**kw),
    "qwen3, biases, tied": lambda **kw: tiny.tiny_qwen3(attention_bias=True, tie_word_embeddings=True, **kw),
}


def build(name="llama", dtype=F64, **config):
    """A model with transformers' own norms: the stand-ins of ``tests.tiny`` for float64 are other classes."""
    return MODELS[name](dtype=torch.float32, **config).to(dtype)


def sampler(model, **options):
    return FastSampler(model, tiny.char_tokenizer(), **options)


def full_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.fixture
def packed(monkeypatch):
    """Weights in oneDNN's order, on every processor and for the smallest shapes."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(gemm, "pays", lambda x, weight: x.dtype == weight.dtype == torch.float32)


# -- tokens and log-probs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_generate_token_for_token(name):
    """Prompts of many lengths, rows that end at many, refilled slots; one answer per prompt and several that share it."""
    model = build(name)
    expected = [generate_alone(model, prompt, max_new_tokens=20) for prompt in PROMPTS]
    for slots, n in ((128, 1), (3, 1), (128, 5), (3, 5), (6, 5)):
        one = sampler(model, max_batch=slots)
        out = one.sample(PROMPTS, n, SamplingParams(20, greedy=True, stop_token_ids=STOPS), seed=0)
        assert one.not_own_step is None
        assert out.completion_ids == [ids for ids in expected for _ in range(n)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_greedy_in_bfloat16_is_generate_as_often_as_the_models_modules_are(name):
    """Rounding decides between tokens of almost one probability, and padding changes it: so exactly generate's tokens are
    promised in float32 and float64 alone. The step adds nothing to it: it rounds where the modules do."""
    differ = {True: 0, False: 0}
    for seed in range(3):
        model = build(name, torch.bfloat16, seed=seed)
        expected = [generate_alone(model, prompt, max_new_tokens=20) for prompt in PROMPTS for _ in range(3)]
        for own_step in differ:
            one = sampler(model, own_step=own_step)
            found = one.sample(PROMPTS, 3, SamplingParams(20, greedy=True, stop_token_ids=STOPS), seed=0).completion_ids
            assert (one.not_own_step is None) == own_step
            differ[own_step] += sum(a != b for a, b in zip(found, expected, strict=True))
    rows = 3 * 3 * len(PROMPTS)
    # one prompt more (of three rows): a processor's products may round fused weights otherwise
    assert differ[True] <= differ[False] + 3, differ
    assert differ[False] <= 0.2 * rows, differ


def test_greedy_rows_in_bfloat16_hold_their_prompts_themselves():
    cpu = torch.device("cpu")
    assert can_share(cpu, torch.bfloat16)
    assert not can_share(cpu, torch.bfloat16, greedy=True)
    assert can_share(cpu, torch.float32, greedy=True)


def test_greedy_with_a_repetition_penalty_is_generate():
    model = build()
    expected = [generate_alone(model, prompt, max_new_tokens=20, repetition_penalty=1.3) for prompt in PROMPTS]
    for n in (2, 4):
        params = SamplingParams(20, greedy=True, repetition_penalty=1.3, stop_token_ids=STOPS)
        out = sampler(model, max_batch=6).sample(PROMPTS, n, params, seed=0)
        assert out.completion_ids == [ids for ids in expected for _ in range(n)]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_models_modules(name, n):
    model = build(name)
    expected = sampler(model, own_step=False).sample(PROMPTS, n, MIXED, seed=5)
    one = sampler(model, max_batch=7)
    found = one.sample(PROMPTS, n, MIXED, seed=5)
    assert one.not_own_step is None
    assert found.completion_ids == expected.completion_ids
    assert found.finished == expected.finished
    assert flat(found.logps) == pytest.approx(flat(expected.logps), rel=0, abs=2e-6)


@pytest.mark.parametrize("trial", range(12))
def test_random_schedules(trial):
    """Random prompts, lengths and slots: rows and prompts come, go, move and are re-laid."""
    rng = random.Random(trial)
    model = build(rng.choice(list(MODELS)), seed=trial)
    prompts = [[rng.randrange(4, 100) for _ in range(rng.choice([1, 2, 5, 30]))] for _ in range(rng.randint(1, 7))]
    stops = tuple(rng.sample(range(4, 100), rng.choice([0, 3, 10])))
    params = SamplingParams(rng.choice([1, 2, 17, 30]), stop_token_ids=stops, temperature=rng.choice([0.7, 1.5]))
    n = rng.randint(1, 9)
    one = sampler(model, max_batch=rng.randint(1, 20), max_prefill_tokens=rng.randint(1, 200))
    expected = TransformersSampler(model, tiny.char_tokenizer()).sample(prompts, n, params, seed=trial)
    assert one.sample(prompts, n, params, seed=trial).completion_ids == expected.completion_ids
    assert one.not_own_step is None


@pytest.mark.parametrize("options", [{}, {"copy_limit_mb": 0}, {"copy_limit_mb": 0.01}], ids=["fused", "live", "some"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", ["llama, biases", "qwen2", "qwen3"])
def test_float32_logps_are_those_of_a_full_forward(name, n, options):
    model = build(name, torch.float32)
    one = sampler(model, max_batch=6, **options)
    out = one.sample(PROMPTS, n, SamplingParams(20, stop_token_ids=STOPS), seed=1)
    assert one.not_own_step is None
    for row, ids in enumerate(out.completion_ids):
        prompt = PROMPTS[row // n]
        logps = full_logits(model, prompt + ids).double().log_softmax(-1)[len(prompt) - 1 : -1]
        # logits of size 10 and more, rounded by other orders of summation in both
        assert out.logps[row] == pytest.approx(logps.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist(), abs=3e-5)


@pytest.mark.parametrize("options", [{}, {"copy_limit_mb": 0.01}], ids=["all", "some"])
@pytest.mark.usefixtures("packed")
def test_packed_weights_give_the_same(options):
    for name in ("llama, biases", "qwen2", "qwen3"):
        model = build(name, torch.float32)
        expected = sampler(model, own_step=False).sample(PROMPTS, 4, SamplingParams(12), seed=1)
        step = LlamaStep(model, rows=8, copy_bytes=1 << 30)
        assert step.head.packed is not None
        found = sampler(model, max_batch=8, **options).sample(PROMPTS, 4, SamplingParams(12), seed=1)
        assert found.completion_ids == expected.completion_ids, name
        assert flat(found.logps) == pytest.approx(flat(expected.logps), rel=0, abs=3e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_bfloat16_is_as_near_to_float32_as_the_models_own(n):
    """Log-probs of the tokens drawn, against the same weights in float32: not further off than the model's modules are."""
    model = build("qwen3", torch.bfloat16)
    truth = build("qwen3", torch.bfloat16).float()
    errors = []
    for own_step in (True, False):
        one = sampler(model, own_step=own_step)
        out = one.sample(PROMPTS, n, SamplingParams(20), seed=1)
        assert (one.not_own_step is None) == own_step
        worst = []
        for row, ids in enumerate(out.completion_ids):
            prompt = PROMPTS[row // n]
            logps = full_logits(truth, prompt + ids).log_softmax(-1)[len(prompt) - 1 : -1]
            exact = logps.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            worst.append((torch.tensor(out.logps[row]) - exact).abs().mean())
        errors.append(float(torch.stack(worst).mean()))
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.2


def test_logits_in_float64():
    """One step on rows of several lengths, against unpadded forward passes, where only the norms are float32."""
    model = build("qwen3, biases, tied")
    step = LlamaStep(model, rows=4, copy_bytes=1 << 30)
    with torch.no_grad():
        rows, logits = step.prefill(PROMPTS[:3])
    for prompt, found in zip(PROMPTS, logits, strict=False):
        torch.testing.assert_close(found, full_logits(model, prompt)[-1], rtol=0, atol=1e-6)
    assert [tuple(layer.keys.shape) for layer in rows.layers] == [(3, 2, 12, 8)] * 2


# -- the weights of the moment ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2"])
def test_weights_are_read_at_every_call(name):
    model = build(name)
    one = sampler(model)
    params = SamplingParams(12)
    before = one.sample(PROMPTS, 4, params, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in list(model.parameters()):
        with torch.no_grad():
            old = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.3)
        changed = one.sample(PROMPTS, 4, params, seed=0)
        expected = sampler(model, own_step=False).sample(PROMPTS, 4, params, seed=0)
        assert changed.completion_ids == expected.completion_ids
        assert changed.logps != before.logps
        with torch.no_grad():
            parameter.copy_(old)
    assert one.sample(PROMPTS, 4, params, seed=0) == before
    model.load_state_dict(build(name, seed=7).state_dict())
    again = one.sample(PROMPTS, 4, params, seed=0)
    assert again.completion_ids == sampler(model, own_step=False).sample(PROMPTS, 4, params, seed=0).completion_ids


def test_merged_adapters_are_what_is_fused():
    model = lora(build())
    params = SamplingParams(12, stop_token_ids=STOPS)
    one, by_modules = sampler(model), sampler(model, own_step=False, merge_limit_mb=0)
    adapted = one.sample(PROMPTS, 4, params, seed=0)
    assert one.not_own_step is None
    assert adapted.completion_ids == by_modules.sample(PROMPTS, 4, params, seed=0).completion_ids
    with model.disable_adapter():
        base = one.sample(PROMPTS, 4, params, seed=0)
        assert one.not_own_step is None
        assert base.completion_ids == by_modules.sample(PROMPTS, 4, params, seed=0).completion_ids
    assert base.completion_ids != adapted.completion_ids
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())


# -- models that keep their own forward -------------------------------------------------------------------------------
class OtherLinear(torch.nn.Linear):
    pass


def other_linear(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj = OtherLinear(32, 48, bias=False)


def other_forward(model):
    attention = model.model.layers[0].self_attn
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)


def other_attention(model):
    model.config._attn_implementation = "mine"


CHANGES = {
    "model.norm is a LlamaRMSNorm": lambda model: setattr(
        model.model.norm, "__class__", type("LlamaRMSNorm", (type(model.model.norm),), {})
    ),
    "model.layers.1.mlp.up_proj is a OtherLinear": other_linear,
    "model.layers.0.mlp has a forward hook": lambda model: model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output * 2
    ),
    "the model has a forward hook": lambda model: model.register_forward_pre_hook(lambda module, inputs: None),
    "the forward of model.layers.0.self_attn has been replaced": other_forward,
    "lm_head.weight is torch.float64 on cpu, and the head is|model.embed_tokens.weight is torch.float32 on cpu": (
        lambda model: model.lm_head.double()
    ),
    "its attention is 'mine'": other_attention,
    "its norms have several epsilons": lambda model: setattr(model.model.norm, "variance_epsilon", 0.1),
    "its layers have heads of several shapes": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 1.0),
    "it has 3 layers and its config says 2": lambda model: model.model.layers.append(model.model.layers[0]),
    "its config sets final_logit_softcapping": lambda model: setattr(model.config, "final_logit_softcapping", 3.0),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_model_keeps_its_own_forward(reason):
    model = build(dtype=torch.float32)
    assert unknown(model, longest=256) is None
    CHANGES[reason](model)
    assert re.search(reason, unknown(model, longest=256) or "")


def test_other_models_keep_their_own_forward():
    for name, family in tiny.FAMILIES.items():
        why = unknown(family(), longest=5)
        assert (why is None) == (name in ("llama", "mistral", "qwen2", "qwen3")), name
    assert unknown(tiny.tiny_gpt2(), longest=5) == (
        "GPT2LMHeadModel is not among LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )

    class Mine(type(tiny.tiny_llama())):
        pass

    assert "Mine is not among" in unknown(Mine(tiny.tiny_llama().config), longest=5)


def test_a_window_shorter_than_the_rows():
    mistral = tiny.tiny_mistral(sliding_window=20)
    assert unknown(mistral, longest=20) is None
    assert unknown(mistral, longest=21) == "rows may reach 21 tokens, and its attention window holds 20"
    settings = tiny.tiny_qwen3().config.to_dict()
    settings |= {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "layer_types": None}
    mixed = Qwen3ForCausalLM(Qwen3Config(**settings))
    assert mixed.config.layer_types == ["full_attention", "sliding_attention"]
    assert unknown(mixed, longest=20) is None
    assert "window holds 20" in unknown(mixed, longest=21)
    params = SamplingParams(20, greedy=True)
    model = build("mistral", sliding_window=20)
    one = sampler(model)
    out = one.sample(PROMPTS, 1, params, seed=0)
    assert one.not_own_step == "rows may reach 32 tokens, and its attention window holds 20"
    assert out.completion_ids == sampler(model, own_step=False).sample(PROMPTS, 1, params, seed=0).completion_ids


def test_adapters_that_are_not_merged():
    model = lora(build())
    one = sampler(model, merge_limit_mb=0)
    one.sample(PROMPTS, 1, SamplingParams(3), seed=0)
    assert one.not_own_step == "model.layers.0.self_attn.q_proj has an adapter that is not merged"
    model.merge_adapter()
    one.sample(PROMPTS, 1, SamplingParams(3), seed=0)
    assert one.not_own_step is None
    head = add_lora(build(), LoraSettings(r=2, modules_to_save=("lm_head",)))
    assert unknown(head.get_base_model(), longest=5) is not None
    wrapped = build()
    wrapped.lm_head = head.get_base_model().lm_head
    assert re.search("lm_head (is a ModulesToSaveWrapper|has an adapter)", unknown(wrapped, longest=5) or "")


def test_autocast_and_a_choice_of_ones_own(caplog):
    model = build(dtype=torch.float32)
    one = sampler(model)
    with caplog.at_level("INFO", "rlft"):
        with torch.autocast("cpu", torch.bfloat16):
            one.sample(PROMPTS, 1, SamplingParams(3), seed=0)
        assert one.not_own_step == "autocast is on"
        one.sample(PROMPTS, 1, SamplingParams(3), seed=0)
        one.sample(PROMPTS, 1, SamplingParams(3), seed=1)
    assert one.not_own_step is None
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "built-in sampler: decodes by the model's modules: autocast is on",
        "built-in sampler: decodes by its own step",
    ]
    off = sampler(model, own_step=False)
    off.sample(PROMPTS, 1, SamplingParams(3), seed=0)
    assert off.not_own_step == "own_step=False"


def test_what_training_leaves_on_a_model_is_no_obstacle():
    """Gradient checkpointing with inputs that require gradients, and a pass that recorded hidden states."""
    model = build(dtype=torch.float32).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(torch.tensor([PROMPTS[0]]), output_hidden_states=True, output_attentions=False)
    assert any(module._forward_hooks for module in model.modules())
    one = sampler(model)
    one.sample(PROMPTS, 1, SamplingParams(3), seed=0)
    assert one.not_own_step is None
    assert all(module.training for module in model.modules())


# -- the comparison on first use --------------------------------------------------------------------------------------
@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_known_models_agree(name, dtype, layers):
    model = build(name, dtype, num_hidden_layers=layers)
    step = LlamaStep(model, rows=4, copy_bytes=1 << 30)
    with torch.no_grad():
        assert disagreement(model, step, PROMPTS, pad_id=0) is None


def wrong_scale(step):
    step.scale *= 1.1


def wrong_norm(step):
    step.norm = step.norm * 1.01


def wrong_order(step):
    step.layers.reverse()


def wrong_eps(step):
    step.eps = 0.1


def stops(step):
    step.embedding = step.embedding[:2]


FAULTS = {
    wrong_scale: "its logits differ by",
    wrong_norm: "its logits differ by",
    wrong_order: "its logits differ by",
    wrong_eps: "its logits differ by",
    stops: "it stopped with IndexError",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_step_that_differs_is_not_used(fault, dtype, monkeypatch):
    """In half precision too, where each of these faults is smaller than the rounding of the whole model."""
    model = build(dtype=dtype)
    made = []

    class Faulty(LlamaStep):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            fault(self)
            made.append(self)

    monkeypatch.setattr("rlft.rollout.llama_step.LlamaStep", Faulty)
    one = sampler(model)
    params = SamplingParams(8)
    with pytest.warns(
        UserWarning, match=rf"is not that of this LlamaForCausalLM: {FAULTS[fault]}.*own forward is used"
    ):
        found = one.sample(PROMPTS, 4, params, seed=0)
    assert found == sampler(model, own_step=False).sample(PROMPTS, 4, params, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.sample(PROMPTS, 4, params, seed=0)
    assert FAULTS[fault] in one.not_own_step
    assert len(made) == 1, "what was found once is not tried again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_in_shared_prompts_is_found(dtype, monkeypatch):
    from rlft.rollout.shared_rows import SharedRows

    right = SharedRows.attend
    monkeypatch.setattr(SharedRows, "attend", lambda self, *args, **kw: right(self, *args, **kw) * 1.01)
    model = build(dtype=dtype)
    step = LlamaStep(model, rows=4, copy_bytes=0)
    with torch.no_grad():
        assert "its logits differ" in disagreement(model, step, PROMPTS, pad_id=0)
