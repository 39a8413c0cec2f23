"""The policy's outputs against each row scored alone: families, padding, temperature, positions, dropout."""

from __future__ import annotations

import pytest
import torch

from rlft.models import Policy
from rlft.models.layout import build_rows
from rlft.models.shared import build_shared
from tests.models.oracle import alone, batch, close, entropy, exact_kl, pick
from tests.tiny import FAMILIES, VOCAB, tiny_gpt2, tiny_llama

ALL = frozenset({"logps", "entropy", "token_kl", "ref_logps"})
LOGPS = frozenset({"logps"})


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_rows_alone(family, temperature) -> None:
    model, data = FAMILIES[family](dtype=torch.float64), batch(groups=3, per_group=2)
    other = FAMILIES[family](dtype=torch.float64, seed=1).requires_grad_(False)
    policy = Policy(model, reference=other)
    out = policy(data, want=ALL, temperature=temperature)
    logp, ref = alone(model, data, temperature=temperature), alone(other, data, temperature=temperature)
    assert policy._scorer.path == "matrix"
    close(out["logps"], pick(logp, data))
    close(out["ref_logps"], pick(ref, data))
    close(out["entropy"], entropy(logp, data))
    close(out["token_kl"], exact_kl(logp, ref).where(data.completion_mask, 0.0))
    for value in out.values():
        assert value.shape == data.completion_ids.shape
        assert value.dtype == torch.float64
        assert not value[~data.completion_mask].any()
    close(policy.reference_logps(data, temperature=temperature), pick(ref, data))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("name", ["logps", "entropy", "token_kl"])
def test_gradients_equal_rows_alone(family, name) -> None:
    """Every parameter's gradient, against plain autograd through each row by itself."""
    model, data = FAMILIES[family](dtype=torch.float64), batch(groups=2, per_group=2)
    other = FAMILIES[family](dtype=torch.float64, seed=1).requires_grad_(False)
    upstream = torch.randn(data.completion_ids.shape, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    want = frozenset({name}) | ({"entropy_grad"} if name == "entropy" else set())
    mine = torch.autograd.grad(
        (Policy(model, reference=other)(data, want=want, temperature=0.8)[name] * upstream).sum(),
        list(parameters.values()),
    )
    logp, ref = alone(model, data, temperature=0.8), alone(other, data, temperature=0.8).detach()
    value = {"logps": pick(logp, data), "entropy": entropy(logp, data), "token_kl": exact_kl(logp, ref)}[name]
    theirs = torch.autograd.grad((value.where(data.completion_mask, 0.0) * upstream).sum(), list(parameters.values()))
    for key, a, b in zip(parameters, mine, theirs, strict=True):
        assert b.any(), key
        close(a, b, 1e-6 if family == "gemma2" else 1e-9)  # Gemma's norms are float32 inside


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_batch_mates_and_garbage_change_nothing(family) -> None:
    model = FAMILIES[family](dtype=torch.float64)
    policy = Policy(model, reference="none")
    data = batch(groups=3, per_group=2)
    whole = policy(data, want=LOGPS)["logps"]
    for i in range(data.num_rows):  # each row in a batch of its own, without padding
        one = data.select(torch.tensor([i]))
        width = one.completion_ids.shape[1]
        close(policy(one, want=LOGPS)["logps"][0], whole[i, :width], 1e-12)
    junk = torch.randint(4, VOCAB, (1,)).item()
    garbage = data.replace(
        prompt_ids=data.prompt_ids.where(data.prompt_mask, junk),
        completion_ids=data.completion_ids.where(data.completion_mask, junk),
    )
    assert torch.equal(policy(garbage, want=LOGPS)["logps"], whole)
    wide = data.replace(
        prompt_ids=torch.nn.functional.pad(data.prompt_ids, (7, 0)),
        prompt_mask=torch.nn.functional.pad(data.prompt_mask, (7, 0)),
    )
    assert torch.equal(policy(wide, want=LOGPS)["logps"], whole)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_left_padded_rows_have_the_same_hidden_states(family) -> None:
    """The other layout of the rows, through the same model: absolute positions would be off without position ids."""
    policy = Policy(FAMILIES[family](dtype=torch.float64), reference="none")
    data = batch(groups=3, per_group=2, prompt_lengths=(1, 20))
    right, left = build_rows(data), build_rows(data, padding_side="left")
    assert not torch.equal(right.attention_mask, left.attention_mask)
    with torch.no_grad():
        close(policy._scorer.states(left), policy._scorer.states(right), 1e-10)


def test_temperature_divides_the_logits() -> None:
    model, data = tiny_llama(dtype=torch.float64), batch()
    policy = Policy(model, reference="none")
    hot, cold = (policy(data, want=LOGPS, temperature=t)["logps"] for t in (2.0, 0.5))
    assert (hot - cold).abs().max() > 0.5
    close(hot, pick(alone(model, data, temperature=2.0), data))
    for bad in (0.0, -1.0, float("nan"), True):
        with pytest.raises(ValueError, match="temperature must be"):
            policy(data, want=LOGPS, temperature=bad)


def test_a_token_is_scored_by_what_comes_before_it_alone() -> None:
    """Causality and the shift by one: changing token t moves its own log-prob and later ones, never earlier ones."""
    policy = Policy(tiny_llama(dtype=torch.float64), reference="none")
    data = batch(groups=1, per_group=1, lengths=(5, 5))
    before = policy(data, want=LOGPS)["logps"][0]
    for t in range(5):
        ids = data.completion_ids.clone()
        ids[0, t] = 4 + (ids[0, t] - 3) % (VOCAB - 4)
        after = policy(data.replace(completion_ids=ids), want=LOGPS)["logps"][0]
        assert torch.equal(after[:t], before[:t])
        assert (after[t:] != before[t:]).all()


DROPOUTS = {
    "gpt2": lambda: tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, dtype=torch.float64),
    "llama": lambda: tiny_llama(attention_dropout=0.1, dtype=torch.float64),
}


@pytest.mark.parametrize("family", sorted(DROPOUTS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_while_gradient_flows(family, checkpointing) -> None:
    model, data = DROPOUTS[family](), batch()
    model.train()
    noisy = pick(alone(model, data), data)
    model.eval()
    quiet = pick(alone(model, data), data)
    assert not torch.equal(noisy, quiet)  # the dropout is real
    policy = Policy(model)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    policy.train()
    with torch.no_grad():
        old = policy(data, want=LOGPS)["logps"]
    out = policy(data, want=ALL)
    close(out["logps"].detach(), quiet)
    assert torch.equal((out["logps"] - old).exp(), torch.ones_like(old))  # ratio exactly 1
    assert torch.equal(out["logps"].detach(), out["ref_logps"])
    assert not out["token_kl"].detach().any()
    parameters = list(model.parameters())
    mine = torch.autograd.grad(out["logps"].sum(), parameters)
    theirs = torch.autograd.grad(pick(alone(model.eval(), data), data).sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("family", sorted(DROPOUTS))
def test_dropout_on_when_asked_and_off_without_gradient(family) -> None:
    policy, data = Policy(DROPOUTS[family](), reference="none", dropout=True), batch()
    with torch.no_grad():
        quiet = policy(data, want=LOGPS)["logps"]
        assert torch.equal(policy(data, want=LOGPS)["logps"], quiet)
    assert not torch.equal(policy(data, want=LOGPS)["logps"].detach(), quiet)
    policy.eval()
    assert torch.equal(policy(data, want=LOGPS)["logps"].detach(), quiet)


def test_entropy_without_entropy_grad_refuses_a_gradient() -> None:
    policy, data = Policy(tiny_llama(), reference="none"), batch()
    out = policy(data, want=frozenset({"logps", "entropy"}))
    with pytest.raises(ValueError, match="'entropy_grad'"):
        (out["logps"].sum() - out["entropy"].sum()).backward()
    out = policy(data, want=frozenset({"entropy", "entropy_grad"}))
    assert set(out) == {"entropy"}
    out["entropy"].sum().backward()


def test_rows_without_completion_and_batches_without_any() -> None:
    model = tiny_llama()
    policy, data = Policy(model, critic="shared"), batch()
    nothing = torch.zeros_like(data.completion_mask)
    some = data.completion_mask & (torch.arange(data.num_rows) > 0)[:, None]
    want = ALL | {"values"}
    full = policy(data, want=want)
    for exists in (some, nothing):
        out = policy(data.replace(completion_mask=exists, mask=exists), want=want)
        for name, value in out.items():
            torch.testing.assert_close(value, full[name].where(exists, 0.0), rtol=1e-5, atol=1e-5)
        torch.autograd.grad(sum(out[n].sum() for n in ("logps", "token_kl", "values")), list(policy.model.parameters()))


def test_float32_model_gives_float32_even_from_bfloat16() -> None:
    model, data = tiny_llama(dtype=torch.bfloat16), batch()
    out = Policy(model)(data, want=ALL)
    assert {value.dtype for value in out.values()} == {torch.float32}
    assert (out["logps"] <= 0).all()
    assert not out["token_kl"].detach().any()


def test_under_autocast_the_head_stays_float32() -> None:
    """The trunk rounds under autocast; the head sums the hidden states it gets in float32."""
    model, data = tiny_llama(), batch()
    policy = Policy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = policy(data, want=ALL)
        states = policy._scorer.states(build_rows(data), build_shared(data))
    logits = states.double() @ model.lm_head.weight.double().T
    exact = torch.log_softmax(logits, -1).gather(-1, build_rows(data).targets[:, None]).squeeze(-1)
    assert out["logps"].dtype == torch.float32
    torch.testing.assert_close(build_rows(data).scatter(exact), out["logps"].double(), rtol=0.0, atol=1e-5)


def test_rows_longer_than_learned_positions_are_refused() -> None:
    policy = Policy(tiny_gpt2(n_positions=8), reference="none")
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit the model's 8 positions"):
        policy(batch(), want=LOGPS)


BAD = [
    ({"logp"}, {}, "want holds 'logp'.*did you mean 'logps'"),
    ({"ref_logps"}, {"reference": "none"}, "need a reference"),
    ({"token_kl"}, {"reference": "none"}, "need a reference"),
    ({"values"}, {}, "need a critic"),
    ({"entropy_grad"}, {}, "'entropy_grad' without 'entropy'"),
]


@pytest.mark.parametrize(("want", "settings", "message"), BAD, ids=[m for _, _, m in BAD])
def test_wishes_that_cannot_be_met_are_refused(want, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(tiny_llama(), **settings)(batch(), want=frozenset(want))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="reference must be 'auto', 'copy', 'none' or a model"):
        Policy(tiny_llama(), reference="some/model")
    with pytest.raises(ValueError, match="critic must be 'none', 'shared' or a model"):
        Policy(tiny_llama(), critic="head")


def test_batch_on_another_device_is_refused() -> None:
    data = batch()
    policy = Policy(tiny_llama().to("meta"), reference="none")
    with pytest.raises(ValueError, match=r"the batch is on cpu and the model on meta; call batch\.to\('meta'\)"):
        policy(data, want=LOGPS)


def test_wrapped_forward_is_used_for_the_reference_too() -> None:
    """Autocast and sharding hang on the module's call; a reference scored past them would differ from the policy."""
    policy, data = Policy(tiny_llama()), batch()
    calls = []
    policy.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.reference_logps(data)
    assert calls == [1]
