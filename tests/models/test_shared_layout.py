"""Each prompt once, in a packed row: the same numbers and gradients as repeating it, for every family that may share."""

from __future__ import annotations

import warnings

import pytest
import torch

from rlft.models import LoraSettings, Policy, add_lora
from rlft.models.attention import attend, plan_segments
from rlft.models.layout import build_rows
from rlft.models.shared import build_shared, place
from rlft.types import Batch
from tests.models.oracle import alone, close, perturb, pick, trained_lora
from tests.tiny import FAMILIES, random_batch, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2

ALL = frozenset({"logps", "entropy", "entropy_grad", "token_kl", "ref_logps", "values"})
GRADED = ("logps", "entropy", "token_kl", "values")
LOGPS = frozenset({"logps"})


def wide_mistral(**settings):
    return tiny_mistral(sliding_window=None, **settings)


def tiny_gemma(*, dtype=torch.float32):
    """The first Gemma: scaled embeddings, norms of 1 + weight, no window and no soft cap."""
    from tests.tiny import _build, _rope

    return _build(_rope("GemmaConfig", {"tie_word_embeddings": True}), seed=0, dtype=dtype)


SHARING = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "phi", "granite", "cohere", "gpt2")}
SHARING |= {"mistral": wide_mistral, "gemma": tiny_gemma}
# Their norms compute in float32 inside, whatever the model.
ROUNDED = {"cohere", "gemma"}


def ragged(seed: int = 0) -> Batch:
    """Rows of six groups in any order: groups of 4, 3, 2, 1, 1 and 0, prompts of 1 to 9, completions of 0 to 30."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(4, 100, size, generator=generator)

    group_ids = torch.tensor([2, 0, 1, 4, 0, 1, 2, 0, 3, 0, 1])
    lengths = torch.tensor([3, 30, 1, 4, 7, 0, 9, 0, 1, 2, 8])
    prompt_lengths = torch.tensor([9, 1, 5, 2, 5, 6])
    exists = torch.arange(30)[None] < lengths[:, None]
    prompt_exists = torch.arange(9)[None] < prompt_lengths[:, None]
    prompt_exists[2] = prompt_exists[2].flip(0)  # padded on the left
    return Batch(draw(6, 9), prompt_exists, draw(11, 30), exists, exists, group_ids)


def upstream(out: dict[str, torch.Tensor]) -> torch.Tensor:
    """A scalar in which every token of every output has a weight of its own."""
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for name in GRADED:
        weight = torch.randn(out[name].shape, generator=generator, dtype=torch.float64)
        total = total + (out[name] * weight).sum()
    return total


def both(make, data: Batch, *, checkpointing: bool = False) -> list[tuple[dict, list[torch.Tensor]]]:
    results = []
    for layout in ("padded", "shared"):
        policy = Policy(make(), critic="shared", layout=layout)
        perturb(policy)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        out = policy(data, want=ALL)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        results.append((out, list(torch.autograd.grad(upstream(out), parameters, allow_unused=True))))
    return results


def agree(results, tolerance: float) -> None:
    (padded, padded_grads), (shared, shared_grads) = results
    for name in padded:
        assert padded[name].any()
        close(shared[name], padded[name], tolerance)
    assert any(g is not None and g.any() for g in padded_grads)
    for a, b in zip(shared_grads, padded_grads, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            scale = max(1.0, float(b.abs().max()))
            close(a / scale, b / scale, tolerance)


# -- the same as repeating the prompt ---------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", sorted(SHARING))
def test_equal_to_the_padded_layout_in_float64(family: str, lora: bool) -> None:
    def make():
        model = SHARING[family](dtype=torch.float64)
        return add_lora(model, LoraSettings(r=2)) if lora else model

    agree(both(make, ragged()), 1e-6 if family in ROUNDED else 1e-10)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi", "gpt2"])
def test_equal_to_the_padded_layout_in_float32(family: str) -> None:
    agree(both(SHARING[family], ragged(1)), 2e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_recomputed_layer_sees_the_same_layout(family: str, lora: bool) -> None:
    def make():
        model = SHARING[family](dtype=torch.float64)
        return add_lora(model, LoraSettings(r=2)) if lora else model

    agree(both(make, ragged(), checkpointing=True), 1e-10)
    plain, again = both(make, ragged())[1], both(make, ragged(), checkpointing=True)[1]
    agree([plain, again], 1e-12)


def test_checkpointing_that_the_model_switched_on_itself_is_no_matter() -> None:
    def make(switch: bool):
        model = tiny_llama(dtype=torch.float64)
        if switch:
            model.gradient_checkpointing_enable()
        return model

    agree([both(lambda: make(False), ragged())[0], both(lambda: make(True), ragged())[1]], 1e-10)


def test_rows_alone_are_the_truth() -> None:
    model, data = tiny_llama(dtype=torch.float64), ragged()
    policy = Policy(model, reference="none", layout="shared")
    kept = data.completion_mask.any(-1)
    data = data.select(kept.nonzero()[:, 0])
    mine, theirs = policy(data, want=LOGPS)["logps"], pick(alone(model, data), data)
    close(mine, theirs)
    for a, b in zip(*(torch.autograd.grad(x.sum(), list(model.parameters())) for x in (mine, theirs)), strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", ["adapter_off", "adapter_copy", "snapshot", "model"])
def test_every_kind_of_reference(kind: str) -> None:
    results = []
    for layout in ("padded", "shared"):
        model = tiny_llama(dtype=torch.float64)
        reference: object = "auto"
        if kind == "adapter_off":
            model = add_lora(model, LoraSettings(r=2))
        elif kind == "adapter_copy":
            model = trained_lora(model)
        elif kind == "model":
            reference = tiny_gpt2(dtype=torch.float64, seed=4).requires_grad_(False).eval()
        policy = Policy(model, reference=reference, layout=layout)
        assert policy.reference_kind == kind
        perturb(model, seed=8)
        out = policy(ragged(), want=frozenset({"logps", "token_kl", "ref_logps"}))
        close(policy.reference_logps(ragged()), out["ref_logps"], 1e-12)
        results.append(out)
    for name in results[0]:
        close(results[1][name], results[0][name])


def test_bfloat16_and_autocast() -> None:
    data = random_batch(groups=3, per_group=4, prompt_lengths=(4, 8), lengths=(1, 8))
    exact = Policy(tiny_qwen2(dtype=torch.bfloat16).float(), reference="none", layout="padded")(data, want=LOGPS)
    errors = {}
    for layout in ("padded", "shared"):
        half = Policy(tiny_qwen2(dtype=torch.bfloat16), reference="none", layout=layout)(data, want=LOGPS)["logps"]
        cast = Policy(tiny_qwen2(dtype=torch.bfloat16).float(), reference="none", layout=layout)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            auto = cast(data, want=LOGPS)["logps"]
        auto.sum().backward()
        assert half.dtype == auto.dtype == torch.float32
        errors[layout] = [float((x - exact["logps"]).detach().abs().mean()) for x in (half, auto)]
    for padded, shared in zip(*errors.values(), strict=True):
        assert 0.0 < shared < 1.5 * padded  # the same rounding, elsewhere


# -- who sees whom ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_siblings_token_changes_nothing_to_the_last_bit(family: str) -> None:
    policy = Policy(SHARING[family](), reference="none", layout="shared")
    data = ragged()
    before = policy(data, want=LOGPS)["logps"]
    for row in range(data.num_rows):
        for t in (0, int(data.completion_mask[row].sum()) // 2):
            if not data.completion_mask[row, t]:
                continue
            ids = data.completion_ids.clone()
            ids[row, t] = 4 + (ids[row, t] + 1) % 90
            after = policy(data.replace(completion_ids=ids), want=LOGPS)["logps"]
            others = torch.arange(data.num_rows) != row
            assert torch.equal(after[others], before[others])
            assert torch.equal(after[row, :t], before[row, :t])
            assert not torch.equal(after[row, t:], before[row, t:])


def test_a_prompts_token_changes_its_own_group_alone() -> None:
    policy, data = Policy(tiny_llama(), reference="none", layout="shared"), ragged()
    before = policy(data, want=LOGPS)["logps"]
    ids = data.prompt_ids.clone()
    ids[0, 0] = 4 + (ids[0, 0] + 1) % 90
    after = policy(data.replace(prompt_ids=ids), want=LOGPS)["logps"]
    mine = (data.group_ids == 0) & data.completion_mask.any(-1)
    assert torch.equal(after[~mine], before[~mine])
    assert not (after == before)[data.completion_mask & mine[:, None]].any()


def test_garbage_in_masked_slots_changes_nothing() -> None:
    policy, data = Policy(tiny_llama(), reference="none", layout="shared"), ragged()
    dirty = data.replace(
        prompt_ids=data.prompt_ids.where(data.prompt_mask, 77),
        completion_ids=data.completion_ids.where(data.completion_mask, 55),
    )
    assert torch.equal(policy(data, want=LOGPS)["logps"], policy(dirty, want=LOGPS)["logps"])


# -- the row ----------------------------------------------------------------------------------------------------------
def test_the_packed_row_by_hand() -> None:
    """Prompt 0: 10 11 12, prompt 1: 20; completions 30 31 | (none) | 50 51 52 | 60 61; rows 0 answers prompt 1."""
    exists = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    data = Batch(
        prompt_ids=torch.tensor([[10, 11, 12], [20, 99, 99]]),
        prompt_mask=torch.tensor([[True, True, True], [True, False, False]]),
        completion_ids=torch.tensor([[30, 31, 99], [99, 99, 99], [50, 51, 52], [60, 61, 99]]),
        completion_mask=exists,
        mask=exists,
        group_ids=torch.tensor([1, 0, 0, 0]),
    )
    row = build_shared(data)
    assert row.input_ids.tolist() == [[10, 11, 12, 50, 51, 60, 20, 30]]  # nothing depends on 52, 61 and 31
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert row.index.tolist() == [6, 7, 2, 3, 4, 2, 5]
    assert build_rows(data).targets.tolist() == [30, 31, 50, 51, 52, 60, 61]
    assert row.longest == 6
    assert row.ratio == 4 * 6 / 8
    assert build_shared(data, at_least=3.1) is None
    assert build_shared(data.select(torch.tensor([1]))) is None


def test_the_places_of_a_row_by_hand() -> None:
    """Prompts of 3, 5 and 2 tokens; 0 has completions of 2, 4 and 0 tokens, 1 one of 3, and 2 two of 3 and 1."""
    lengths = [2, 3, 4, 0, 3, 1]
    children = {0: [0, 2], 1: [1], 2: [4, 5]}
    places = place(children, [3, 5, 2], lengths, drop=1)
    # the shared prompt, its completions with the longest first, then the rest: 5 + 2, and 2 + 2 tokens
    assert places.prompts == {1: 7, 0: 0, 2: 14}
    assert list(places.prompts) == [1, 0, 2]
    assert places.completions == [6, 12, 3, 0, 16, 0]
    assert places.segments == [(0, 3), (3, 3), (6, 1), (7, 7), (14, 4)]
    assert places.groups == [((3, 4), (0, 3))]
    kept = place({**children, 0: [0, 2, 3]}, [3, 5, 2], lengths, drop=0)
    assert kept.prompts == {1: 15, 0: 0, 2: 3}
    assert kept.completions == [9, 20, 5, 0, 11, 14]
    assert kept.segments == [(0, 3), (3, 2), (5, 4), (9, 2), (11, 3), (14, 1), (15, 8)]
    assert kept.groups == [((5, 6), (0, 3)), ((11, 4), (3, 2))]


def dense(q, k, v, allowed, scale) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize("seed", range(4))
def test_attention_equals_a_dense_mask(seed: int) -> None:
    """Segments of 1 to 90 tokens, so that buckets with, without and of mixed padding all come up."""
    generator = torch.Generator().manual_seed(seed)
    segments, groups, place = [], [], 0
    allowed = torch.zeros(2000, 2000, dtype=torch.bool)
    for group in range(4):
        top = (6, 40, 90, 90)[group if seed % 2 else 3 - group]
        sizes = torch.randint(1, top + 1, (1 + group,), generator=generator).tolist()
        prompt = (place, 17 if group % 2 else int(torch.randint(1, 30, (), generator=generator)))
        for i, size in enumerate([prompt[1], *sizes]):
            span = slice(place, place + size)
            allowed[span, span] = torch.ones(size, size).tril().bool()
            if i:
                allowed[span, prompt[0] : prompt[0] + prompt[1]] = True
            segments.append((place, size))
            place += size
        groups.append(((prompt[0] + prompt[1], sum(sizes)), prompt))
    allowed = allowed[:place, :place]
    plan = plan_segments(segments, groups, device=torch.device("cpu"))
    shapes = ((1, 4, place, 8), (1, 2, place, 8), (1, 2, place, 8))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).mul(3).requires_grad_() for s in shapes)
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    mine, theirs = attend(q, k, v, plan, scale=0.7), dense(q, k, v, allowed, 0.7)
    close(mine, theirs, 1e-12)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (mine, theirs)]
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-11)


# -- when it is not possible, or does not pay -------------------------------------------------------------------------
class Calls:
    """The shapes of token ids that a trunk was called with."""

    def __init__(self, policy: Policy, data: Batch) -> None:
        policy(data, want=LOGPS)  # the self-check of first use
        self.widths: list[tuple[int, ...]] = []
        policy._scorer.trunk.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs) -> None:
        self.widths.append(tuple(kwargs["input_ids"].shape))


def group(n: int, *, prompt: int = 6, length: int = 4) -> Batch:
    return random_batch(groups=2, per_group=n, prompt_lengths=(prompt, prompt), lengths=(length, length))


def test_auto_shares_where_it_pays() -> None:
    for data, shape in (
        (group(4), (1, 2 * (6 + 4 * 3))),
        (group(2, prompt=1, length=20), (4, 21)),  # ratio 1.07
        (group(1, prompt=10, length=10), (2, 20)),  # nothing to share, nothing padded
        (random_batch(groups=6, per_group=1, lengths=(1, 30), seed=3), None),  # single rows with much padding
    ):
        policy = Policy(tiny_llama(), reference="none")
        calls = Calls(policy, data)
        policy(data, want=LOGPS)
        (seen,) = calls.widths
        assert seen == shape if shape else seen[0] == 1


FALLBACKS = {
    "window shorter than the row": (lambda: tiny_mistral(sliding_window=6), "longer than its attention window of 6"),
    "soft-capped scores": (tiny_gemma2, "attention implementation is 'eager'|soft-capped"),
    "eager": (lambda: tiny_llama(attn_implementation="eager"), "attention implementation is 'eager'"),
}


@pytest.mark.parametrize("case", sorted(FALLBACKS))
def test_known_limits_fall_back_silently_and_refuse_when_forced(case: str) -> None:
    make, message = FALLBACKS[case]
    data = group(4, prompt=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = Policy(make(), reference="none")(data, want=LOGPS)["logps"]
    assert torch.equal(out, Policy(make(), reference="none", layout="padded")(data, want=LOGPS)["logps"])
    with pytest.raises(ValueError, match=f"layout='shared' is not possible for .*{message}.*use layout='auto'"):
        Policy(make(), reference="none", layout="shared")(data, want=LOGPS)


def test_a_window_as_long_as_the_row_does_not_bite() -> None:
    data = group(4, prompt=8)
    for window, shares in ((12, True), (11, False)):
        policy = Policy(tiny_mistral(sliding_window=window), reference="none")
        calls = Calls(policy, data)
        out = policy(data, want=LOGPS)["logps"]
        assert (calls.widths[0][0] == 1) == shares
        model = tiny_mistral(sliding_window=window)
        padded = Policy(model, reference="none", layout="padded")(data, want=LOGPS)["logps"]
        torch.testing.assert_close(out, padded, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("how", ["mixes tokens", "edits its mask"])
def test_a_model_of_its_own_kind_is_found_out_on_first_use(how: str) -> None:
    model = tiny_llama(dtype=torch.float64)
    layer = model.model.layers[0]
    if how == "mixes tokens":  # a convolution over neighbours, as state-space layers have
        layer.mlp.register_forward_hook(
            lambda m, a, out: out + 0.1 * out.roll(1, 1).index_fill(1, torch.tensor(0), 0.0)
        )
    else:

        def edit(module, args, kwargs):
            mask = kwargs["attention_mask"]
            return args, {**kwargs, "attention_mask": mask if mask is None else mask & mask}

        layer.register_forward_pre_hook(edit, with_kwargs=True)
    data = group(4)
    policy = Policy(model, reference="none")
    with pytest.warns(UserWarning, match="cannot compute the prompt of a group once") as caught:
        out = policy(data, want=LOGPS)["logps"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = policy(data, want=LOGPS)["logps"]
        padded = Policy(model, reference="none", layout="padded")(data, want=LOGPS)["logps"]
    assert torch.equal(out, again)
    assert torch.equal(out, padded)
    forced = Policy(model, reference="none", layout="shared")
    with pytest.warns(UserWarning, match="cannot compute"), pytest.raises(ValueError, match="'shared' is not possible"):
        forced(data, want=LOGPS)


def test_dropout_shares_nothing() -> None:
    data = group(4)
    policy = Policy(tiny_llama(attention_dropout=0.1), reference="none", dropout=True)
    calls = Calls(policy, data)
    policy(data, want=LOGPS)
    with torch.no_grad():
        policy(data, want=LOGPS)
    assert [shape[0] for shape in calls.widths] == [8, 1]  # no dropout without gradient; equal rows are not packed
    with pytest.raises(ValueError, match="layout='shared' has no dropout"):
        Policy(tiny_llama(), reference="none", dropout=True, layout="shared")(data, want=LOGPS)


def test_a_mask_without_storage_refuses_everything_else() -> None:
    mask = build_shared(group(2)).attention_mask
    assert mask.shape == (1, 1, 24, 24)
    assert mask.dtype == torch.bool
    for use in (lambda: mask[..., :3], lambda: mask.float(), lambda: mask.any(), lambda: torch.where(mask, 0.0, 1.0)):
        with pytest.raises(TypeError, match="mask of a shared prompt"):
            use()
    for use in (lambda: mask & mask, lambda: torch.ones(24) + mask):
        with pytest.raises(TypeError):
            use()
    q = torch.randn(1, 2, 24, 8)
    with pytest.raises(ValueError, match=r"shared prompt has no attention dropout, got 0\.1"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.1)
    with pytest.raises(ValueError, match="expected one packed row of 24 tokens"):
        torch.nn.functional.scaled_dot_product_attention(q[:, :, :5], q, q, attn_mask=mask)


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'packed'"):
        Policy(tiny_llama(), layout="packed")


def test_the_critics_own_trunk_and_nothing_to_score() -> None:
    data = ragged()
    outs = []
    for layout in ("padded", "shared"):
        policy = Policy(tiny_llama(), reference="none", critic=tiny_qwen2(seed=1), layout=layout)
        with torch.no_grad():
            policy.critic.head.weight.fill_(0.1)
        outs.append(policy(data, want=frozenset({"logps", "values"})))
        nothing = data.replace(completion_mask=data.completion_mask & False, mask=data.mask & False)
        assert not policy(nothing, want=LOGPS)["logps"].any()
    close(outs[1]["values"], outs[0]["values"], 1e-6)
    close(outs[1]["logps"], outs[0]["logps"], 2e-5)
