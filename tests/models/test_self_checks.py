"""The comparisons on first use find small faults in half precision too, and refuse no right model there."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import rlft.models.attention as attention
from rlft.models import LoraSettings, Policy, add_lora
from rlft.models import float32_view as view
from rlft.models.float32_view import can_widen, difference, in_float32
from tests.models.test_shared_layout import SHARING, group
from tests.tiny import FAMILIES, tiny_gpt2, tiny_llama, tiny_mistral

CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]
LOGPS = frozenset({"logps"})
ALL = FAMILIES | SHARING


def made(family: str, dtype: torch.dtype, *, layers: int = 2, seed: int = 0):
    if family == "gemma":  # its builder takes no settings
        return ALL[family]().to(dtype)
    settings = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    return ALL[family](seed=seed, **settings).to(dtype)


def widened() -> bool:
    """Whether this is computed in the view."""
    return torch.zeros(1, dtype=torch.bfloat16).dtype == torch.float32


def warned(policy: Policy) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy(group(4), want=LOGPS)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


# -- the view ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", sorted(ALL))
def test_the_view_is_the_model_in_float32_to_the_last_bit(family: str, dtype: torch.dtype) -> None:
    model = made(family, dtype)
    before = copy.deepcopy(model.state_dict())
    ids = torch.tensor([[5, 6, 7, 8, 9, 20]])
    with torch.no_grad():
        with in_float32(CPU):
            seen = model(ids, use_cache=False).logits
        truth = copy.deepcopy(model).float()(ids, use_cache=False).logits
    assert seen.dtype == torch.float32
    if (
        family == "gemma" or family == "gemma2"
    ):  # the factor of their embeddings is a buffer, rounded or not as it was made
        torch.testing.assert_close(seen, truth, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(seen, truth)
    assert all(x.dtype == before[name].dtype and torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_the_view_holds_one_piece_of_a_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product in pieces is the product, and the largest tensor widened is a piece."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).bfloat16() for s in ((3, 8), (50, 8), (50,)))
    monkeypatch.setattr(view, "_PIECE", 7 * 8 * 4)
    sizes = []
    widen = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: sizes.append(self.numel()) or widen(self))
    with in_float32(CPU):
        found = torch.nn.functional.linear(x, weight, bias)
        rows = torch.nn.functional.embedding(torch.tensor([3, 1]), weight)
    assert max(sizes) == 7 * 8
    torch.testing.assert_close(found, torch.nn.functional.linear(x.double().float(), widen(weight), widen(bias)))
    assert torch.equal(rows, widen(weight)[[3, 1]])


def test_the_view_leaves_everything_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    half = torch.ones(3, dtype=torch.bfloat16)

    def inside() -> None:
        with torch.autocast("cpu", torch.bfloat16), in_float32(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_autocast_enabled("cpu")
            assert half.dtype == torch.float32 == torch.zeros(2, dtype=torch.bfloat16).dtype
            assert (half.half() + half.to(torch.bfloat16)).dtype == torch.float32
            half.add_(1)
            half[0] = 5
            raise KeyError

    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError):
            inside()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert half.dtype == torch.bfloat16
    assert half.tolist() == [5, 2, 2]
    assert (half + half).dtype == torch.bfloat16


def test_sharded_and_quantised_weights_are_not_widened() -> None:
    model = tiny_llama()
    assert can_widen(model)
    model.lm_head.weight.ds_id = 3  # what ZeRO-3 writes on a weight that it has taken apart
    assert not can_widen(model)

    class Packed(torch.nn.Parameter):
        pass

    other = tiny_llama()
    other.lm_head.weight = Packed(other.lm_head.weight.data)
    assert not can_widen(other)


# -- faults -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("strength", [0.02, 0.1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_that_mixes_tokens_is_found(family: str, strength: float, dtype: torch.dtype) -> None:
    def make():
        model = made(family, dtype)
        layer = model.model.layers[0] if family == "llama" else model.transformer.h[0]
        first = torch.tensor(0)
        layer.mlp.register_forward_hook(lambda m, a, out: out + strength * out.roll(1, 1).index_fill(1, first, 0.0))
        return model

    policy = Policy(make(), reference="none")
    (message,) = warned(policy)
    assert "cannot compute the prompt of a group once (its hidden states differ by" in message
    padded = Policy(make(), reference="none", layout="padded")
    assert torch.equal(policy(group(4), want=LOGPS)["logps"], padded(group(4), want=LOGPS)["logps"])


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_that_ignores_its_mask_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal over the whole row, so answers see each other; with weights of a fresh model, which hardly attend at all."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def ignores(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return sdpa(query, key, value, is_causal=True, scale=scale, enable_gqa=key.shape[1] != query.shape[1])

    monkeypatch.setattr(attention, "_answer", ignores)
    torch.manual_seed(0)
    (message,) = warned(Policy(tiny_llama(initializer_range=0.02, num_hidden_layers=4).to(dtype), reference="none"))
    assert "its hidden states differ by" in message


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("factor", [0.99, 1.2])
def test_an_unknown_factor_of_the_logits_is_found(factor: float, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * factor
        return out

    model.forward = scaled
    policy = Policy(model, reference="none", layout="padded")
    (message,) = warned(policy)
    assert "hidden states times head differ from the model's own logits" in message
    assert policy._scorer.path == "logits"


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_an_unknown_bias_of_one_token_is_found(dtype: torch.dtype) -> None:
    """Much smaller than the logits are long; seen because every entry is held to the model's own."""
    model = tiny_llama().to(dtype)
    forward = model.forward

    def shifted(*args, **kwargs):
        out = forward(*args, **kwargs)
        bias = torch.zeros(out.logits.shape[-1])
        bias[7] = 1e-3
        out.logits = out.logits.float() + bias
        return out

    model.forward = shifted
    policy = Policy(model, reference="none", layout="padded")
    (message,) = warned(policy)
    assert "hidden states times head differ from the model's own logits" in message


@pytest.mark.parametrize("autocast", [False, True])
def test_a_fault_of_half_precision_alone_is_found(autocast: bool) -> None:
    """What the view cannot see: the layout is compared as it is used, too."""
    model = tiny_llama().to(torch.float32 if autocast else torch.bfloat16)

    def coarse(module, args, out):
        used = out.dtype == torch.bfloat16 and not widened()
        return out * 1.3 if used and out.shape[0] == 1 and out.shape[1] != 4 else out  # the packed row

    model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: (coarse(m, a, out[0]), *out[1:]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (message,) = warned(Policy(model, reference="none"))
    assert "its hidden states differ by" in message


# -- right models -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("layers", "lora"), [(2, False), (2, True), (12, False)])
@pytest.mark.parametrize("family", sorted(ALL))
def test_no_right_model_is_refused(family: str, layers: int, lora: bool) -> None:
    for seed, dtype in ((1, torch.bfloat16), (2, torch.bfloat16), (3, torch.float16)):
        model = made(family, dtype, layers=layers, seed=seed)
        policy = Policy(add_lora(model, LoraSettings(r=2)) if lora else model, reference="none")
        assert warned(policy) == []
        assert policy._scorer.path == "matrix"
        if family in SHARING:
            assert policy._scorer.not_shared is None


def test_autocast_shares_and_remembers_no_weight_without_gradient() -> None:
    """A weight that autocast has converted without gradient must not serve a pass that needs one."""
    data = group(4)
    policy = Policy(tiny_llama(), reference="none")
    with torch.autocast("cpu", torch.bfloat16):
        policy(data, want=LOGPS)["logps"].sum().backward()
    assert policy._scorer.not_shared is None
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())


# -- where float32 cannot be had --------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "phi", "granite", "gpt2"])
def test_without_the_view_faults_must_be_larger(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "can_widen", lambda model: False)
    for layers in (2, 12):
        for dtype in HALF:
            policy = Policy(made(family, dtype, layers=layers), reference="none")
            assert warned(policy) == []
            assert policy._scorer.not_shared is None
    model = made(family, torch.bfloat16)
    trunk = model.base_model
    (trunk.h if family == "gpt2" else trunk.layers)[0].mlp.register_forward_hook(
        lambda m, a, out: out + 0.5 * out.roll(1, 1)
    )
    (message,) = warned(Policy(model, reference="none"))
    assert "its hidden states differ by" in message
    model = made(family, torch.bfloat16)
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.9
        return out

    model.forward = scaled
    policy = Policy(model, reference="none", layout="padded")
    assert len(warned(policy)) == 1
    assert policy._scorer.path == "logits"


def test_what_stops_in_float32_alone_is_compared_as_it_is_used() -> None:
    model = tiny_mistral(sliding_window=None).to(torch.bfloat16)

    def picky(module, args, out):
        if widened():
            raise RuntimeError("expected bfloat16")

    model.model.layers[0].register_forward_hook(picky)
    policy = Policy(model, reference="none")
    assert warned(policy) == []
    assert policy._scorer.not_shared is None


def test_shapes_that_differ_are_a_difference() -> None:
    model = tiny_gpt2()
    assert difference(model, lambda: (torch.ones(2, 3), torch.ones(2, 4)), device=CPU, layers=1) == float("inf")
    assert difference(model, lambda: (torch.ones(2, 3), torch.ones(2, 3) + 1e-6), device=CPU, layers=1) is None
    assert difference(model, lambda: (torch.ones(2, 3), torch.ones(2, 3) * torch.nan), device=CPU, layers=1) is not None
