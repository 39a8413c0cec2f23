"""Heads that are no plain matrix, and configs that rlft does not know: slower, never wrong."""

from __future__ import annotations

import warnings

import pytest
import torch

from rlft.models import Policy
from tests.models.oracle import alone, batch, close, entropy, exact_kl, perturb, pick, trained_lora
from tests.tiny import FAMILIES, tiny_llama

ALL = frozenset({"logps", "entropy", "entropy_grad", "token_kl", "ref_logps"})


class Shifted(torch.nn.Module):
    """A head that no op knows: a linear layer and a kink."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).abs()


def own_head() -> torch.nn.Module:
    model = tiny_llama(dtype=torch.float64)
    model.lm_head = Shifted(model.lm_head)
    return model


def own_transform() -> torch.nn.Module:
    """A model that does something to its logits that no config field tells."""
    model = tiny_llama(dtype=torch.float64)
    original = model.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 1.5 - 0.1 * out.logits.square()
        return out

    model.forward = forward
    return model


CASES = {
    "lora on the head": (lambda: trained_lora(target_modules=["q_proj", "lm_head"]), "module"),
    "head saved in full": (lambda: trained_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), "module"),
    "capped, lora on the head": (
        lambda: trained_lora(
            FAMILIES["gemma2"](dtype=torch.float64, tie_word_embeddings=False), target_modules=["q_proj", "lm_head"]
        ),
        "module",
    ),
    "own head": (own_head, "module"),
    "own transform": (own_transform, "logits"),
}


@pytest.mark.parametrize("chunk", [(512, 4096), (3, 7)], ids=str)
@pytest.mark.parametrize("case", sorted(CASES))
def test_slow_paths_equal_rows_alone(case, chunk) -> None:
    build, path = CASES[case]
    model, data = build(), batch()
    before = alone(model, data).detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = Policy(
            model, reference="auto" if case != "own transform" else own_transform_reference(), chunk_size=chunk
        )
        policy(data, want=ALL)
        out = policy(data, want=ALL, temperature=0.7)
    assert policy._scorer.path == path
    assert sum("full logits" in str(w.message) for w in caught) == (path == "logits") * (1 + (case == "own transform"))
    assert torch.equal(out["logps"].detach(), out["ref_logps"])
    assert not out["token_kl"].detach().any()
    perturb(model, seed=7, size=0.1)
    out = policy(data, want=ALL, temperature=0.7)
    logp, ref = alone(model, data, temperature=0.7), rescaled(before, model, data, policy)
    close(out["logps"], pick(logp, data))
    close(out["entropy"], entropy(logp, data))
    close(out["ref_logps"], pick(ref, data))
    close(out["token_kl"], exact_kl(logp, ref).where(data.completion_mask, 0.0))
    close(policy.reference_logps(data, temperature=0.7), pick(ref, data))
    parameters = [p for p in model.parameters() if p.requires_grad]
    value = {"logps": pick(logp, data), "entropy": entropy(logp, data)}
    value["token_kl"] = exact_kl(logp, ref).where(data.completion_mask, 0.0)
    for name, truth in value.items():
        mine = torch.autograd.grad(out[name].sum(), parameters, retain_graph=True)
        theirs = torch.autograd.grad(truth.sum(), parameters, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            assert b.any()
            close(a, b, 1e-6 if "capped" in case else 1e-9)


def own_transform_reference() -> torch.nn.Module:
    return own_transform().requires_grad_(False)


def rescaled(before: torch.Tensor, model: torch.nn.Module, data, policy: Policy) -> torch.Tensor:
    """The reference's log-softmax at temperature 0.7: log-probs at 1 are logits up to a constant."""
    return torch.log_softmax(before / 0.7, -1).where(data.completion_mask[..., None], 0.0)


def test_undeclared_entropy_gradient_is_an_error_on_the_slow_path() -> None:
    policy = Policy(trained_lora(target_modules=["q_proj", "lm_head"]))
    out = policy(batch(), want=frozenset({"logps", "entropy"}))
    with pytest.raises(ValueError, match="a gradient reached 'entropy'"):
        out["entropy"].sum().backward()


def test_shared_critic_needs_hidden_states() -> None:
    policy = Policy(own_transform(), reference="none", critic="shared")
    with pytest.warns(UserWarning, match="full logits"), pytest.raises(ValueError, match="critic='shared' needs"):
        policy(batch(), want=frozenset({"values"}))


def test_model_that_returns_nan_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="returns NaN or infinite logits"):
        Policy(model, reference="none")(batch(), want=frozenset({"logps"}))


def test_self_check_leaves_modes_and_random_state_alone() -> None:
    model = tiny_llama()
    policy = Policy(model, reference="none", dropout=True)
    state = torch.random.get_rng_state()
    policy(batch(), want=frozenset({"logps"}))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in model.modules())
