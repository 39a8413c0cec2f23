"""Every kernel of a packed row against a dense mask, and the CUDA kernels' callers on stand-ins for torch's operators."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from rlft.models import Policy, attention
from rlft.models import attention_kernels as kernels
from rlft.models.attention import NoKernelError, attend, flaw, plan_segments
from rlft.models.attention_kernels import ByBlocks, ByOffsets, CpuFlash, CudaEfficient, CudaFlash, Dense
from tests.models import test_shared_layout as shared
from tests.models.cuda_standins import standins
from tests.models.oracle import close
from tests.tiny import tiny_gpt2, tiny_llama, tiny_qwen2

CPU = torch.device("cpu")
LOGPS = frozenset({"logps"})


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """CPU tensors take the kernels that CUDA tensors would; gives the count of their calls."""
    with standins() as calls:
        monkeypatch.setattr(attention, "candidates", lambda device, dtype: attention._CUDA[dtype])
        attention.flaw.cache_clear()
        yield calls
        attention.flaw.cache_clear()


def only(monkeypatch: pytest.MonkeyPatch, *chosen: kernels.SegmentKernel) -> None:
    monkeypatch.setattr(attention, "candidates", lambda device, dtype: chosen)


# -- who attends to whom ----------------------------------------------------------------------------------------------
def by_mask(segments, groups) -> torch.Tensor:
    """``[N, N]`` which token sees which: the definition, token by token."""
    total = sum(length for _, length in segments)
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for start, length in segments:
        allowed[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
    for (first, many), (start, length) in groups:
        allowed[first : first + many, start : start + length] = True
    return allowed


ROWS = {
    # prompts first, then the completions of each, then rows of their own: as build_shared lays a batch out
    "in order": ([(0, 4), (4, 2), (6, 3), (9, 1), (10, 5), (15, 6)], [((6, 4), (0, 4)), ((10, 5), (4, 2))]),
    "prompts between": ([(0, 3), (3, 2), (5, 2), (7, 3), (10, 1), (11, 40)], [((3, 4), (0, 3)), ((10, 41), (7, 3))]),
    "one group": ([(0, 17), (17, 1), (18, 1)], [((17, 2), (0, 17))]),
    "no group": ([(0, 1), (1, 9), (10, 2)], []),
    "one segment": ([(0, 5)], []),
}


@pytest.mark.parametrize("kernel", [ByBlocks(CpuFlash()), ByOffsets(Dense())], ids=lambda k: k.name)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("row", sorted(ROWS))
def test_a_row_equals_a_dense_mask(monkeypatch: pytest.MonkeyPatch, row: str, heads: tuple[int, int], kernel) -> None:
    only(monkeypatch, kernel)
    segments, groups = ROWS[row]
    plan, allowed = plan_segments(segments, groups, device=CPU), by_mask(segments, groups)
    q, k, v = (
        torch.randn(1, h, plan.tokens, 8, dtype=torch.float64).mul(2).requires_grad_()
        for h in (heads[0], *heads[1:] * 2)
    )
    weight = torch.randn_like(q)
    mine, theirs = attend(q, k, v, plan, scale=0.6), shared.dense(q, k, v, allowed, 0.6)
    close(mine, theirs, 1e-12)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (mine, theirs)), strict=True):
        close(a, b, 1e-11)


def test_the_offsets_of_a_row_by_hand() -> None:
    plan = plan_segments(*ROWS["in order"], device=CPU)
    assert (plan.own.start, plan.own.bounds, plan.own.longest) == (0, (0, 4, 6, 9, 10, 15, 21), 6)
    assert plan.own.offsets.dtype == torch.int32
    assert plan.across is not None
    queries, keys = plan.across
    assert (queries.start, queries.bounds, queries.longest) == (6, (0, 4, 9), 5)
    assert (keys.start, keys.bounds, keys.longest) == (0, (0, 4, 6), 4)
    assert queries.take(torch.arange(21)).tolist() == list(range(6, 15))  # a view: nothing is copied
    between = plan_segments(*ROWS["prompts between"], device=CPU)
    assert between.across is not None
    queries, keys = between.across
    assert (queries.start, keys.start) == (None, None)
    assert keys.take(torch.arange(51)).tolist() == [0, 1, 2, 7, 8, 9]
    assert plan_segments(*ROWS["no group"], device=CPU).across is None


# -- the CUDA kernels' callers, on stand-ins ---------------------------------------------------------------------------
@pytest.mark.parametrize("row", sorted(ROWS))
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        (ByOffsets(CudaFlash()), torch.bfloat16, 4e-2),
        (ByOffsets(CudaFlash()), torch.float16, 5e-3),
        (ByBlocks(CudaEfficient()), torch.float32, 2e-6),
        (ByBlocks(CudaEfficient()), torch.bfloat16, 4e-2),
    ],
    ids=["flash bf16", "flash fp16", "efficient fp32", "efficient bf16"],
)
def test_the_callers_of_cuda_kernels(monkeypatch, row: str, kernel, dtype: torch.dtype, tolerance: float) -> None:
    """Tolerances are a few units in the last place of the dtype: outputs and gradients are rounded at each call."""
    only(monkeypatch, kernel)
    segments, groups = ROWS[row]
    plan, allowed = plan_segments(segments, groups, device=CPU), by_mask(segments, groups)
    q, k, v = (torch.randn(1, h, plan.tokens, 16).to(dtype).requires_grad_() for h in (4, 2, 2))
    weight = torch.randn_like(q)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = shared.dense(*exact, allowed, 0.3)
    with standins() as calls:
        mine = attend(q, k, v, plan, scale=0.3)
        grads = torch.autograd.grad((mine * weight).sum(), (q, k, v))
    assert mine.dtype == dtype
    assert sum(calls.values()) > 0
    for a, b in zip((mine, *grads), (truth, *torch.autograd.grad((truth * weight).sum(), exact)), strict=True):
        scale = float(b.detach().abs().max())
        close(a.double() / scale, b / scale, tolerance)


def test_layouts_of_queries_do_not_matter(cuda_kernels) -> None:
    """Rotary embeddings leave queries in one order of memory, plain projections in another, some in none."""
    plan = plan_segments(*ROWS["in order"], device=CPU)
    x = torch.randn(1, 4, plan.tokens, 16, dtype=torch.bfloat16)
    expected = attend(x, x, x, plan)
    for y in (x.transpose(1, 2).contiguous().transpose(1, 2), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert y.stride() != x.stride()
        assert torch.equal(attend(y, y, y, plan), expected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2], ids=["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_models_in_float64_through_the_offsets(monkeypatch, make, checkpointing: bool) -> None:
    only(monkeypatch, ByOffsets(Dense()))
    results = shared.both(lambda: make(dtype=torch.float64), shared.ragged(), checkpointing=checkpointing)
    shared.agree(results, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_through_the_callers_of_cuda_kernels(cuda_kernels, dtype: torch.dtype) -> None:
    """float32 models agree with the padded layout; bfloat16 ones are as near to float32 as the padded layout is."""
    data = shared.ragged(2)
    if dtype == torch.float32:
        shared.agree(shared.both(tiny_llama, data), 2e-5)
        assert cuda_kernels["efficient backward"] > 0
        assert not cuda_kernels["flash forward"]
        return
    exact = Policy(tiny_llama(dtype=dtype).float(), reference="none", layout="padded")(data, want=LOGPS)["logps"]
    errors = {}
    for layout in ("padded", "shared"):
        model = tiny_llama(dtype=dtype)
        out = Policy(model, reference="none", layout=layout)(data, want=LOGPS)["logps"]
        out.sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        errors[layout] = float((out - exact).detach().abs().mean())
    assert 0.0 < errors["shared"] < 1.5 * errors["padded"]
    assert cuda_kernels["flash backward"] > 0


def test_autocast_takes_the_half_precision_kernel(cuda_kernels) -> None:
    model, data = tiny_llama(), shared.ragged(3)
    policy = Policy(model, reference="none", layout="shared")
    policy(data, want=LOGPS)  # the check of first use is in float32
    before = dict(cuda_kernels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        policy(data, want=LOGPS)["logps"].sum().backward()
    assert cuda_kernels["flash backward"] > before.get("flash backward", 0)
    assert cuda_kernels["efficient backward"] == before["efficient backward"]


# -- a kernel is proved before its first use --------------------------------------------------------------------------
class NotCausal(Dense):
    name = "not causal"

    def _scores(self, q, k, causal, scale):
        return super()._scores(q, k, False, scale)


class OneScale(Dense):
    name = "backward forgets the scale"

    def backward(self, *args):
        return super().backward(*args[:-1], 1.0)


class OneHead(Dense):
    name = "one of the grouped heads"

    def _summed(self, x, heads, dtype):
        return x.unflatten(0, (heads, -1))[:, 0].transpose(0, 1).to(dtype)


class OwnNorm(Dense):
    name = "backward with each part's own log-sum-exp"

    def backward(self, grad, q, k, v, out, lse, queries, keys, causal, scale):
        mine, norm = self.forward(q, k, v, queries, keys, causal, scale)
        return super().backward(grad, q, k, v, mine, norm, queries, keys, causal, scale)


class OwnOutput(Dense):
    name = "backward with each part's own output"

    def backward(self, grad, q, k, v, out, lse, queries, keys, causal, scale):
        mine, _ = self.forward(q, k, v, queries, keys, causal, scale)
        return super().backward(grad, q, k, v, mine, lse, queries, keys, causal, scale)


class Shifted(Dense):
    name = "offsets are one off"

    def forward(self, q, k, v, queries, keys, causal, scale):
        return super().forward(q.roll(1, 0), k, v, queries, keys, causal, scale)


class NoPrompt(ByOffsets):
    def forward(self, q, k, v, segments, scale):
        return self.kernel.forward(q, k, v, segments.own, segments.own, True, scale)


class LostGradient(ByOffsets):
    def backward(self, grad, q, k, v, out, lse, segments, scale):
        return self.kernel.backward(grad, q, k, v, out, lse, segments.own, segments.own, True, scale)


class NoMerge(ByOffsets):
    """The log-sum-exp of the own part is handed on."""

    def forward(self, q, k, v, segments, scale):
        out, _ = super().forward(q, k, v, segments, scale)
        return out, self.kernel.forward(q, k, v, segments.own, segments.own, True, scale)[1]


class Missing(Dense):
    name = "missing"

    def forward(self, *args):
        raise NotImplementedError("Could not run 'aten::_flash_attention_forward'\nwith a long list")


FAULTY = [ByOffsets(fault()) for fault in (NotCausal, OneScale, OneHead, OwnNorm, OwnOutput, Shifted)]
FAULTY += [fault(Dense()) for fault in (NoPrompt, LostGradient, NoMerge)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", FAULTY, ids=lambda k: k.name if type(k) is ByOffsets else type(k).__name__)
def test_the_proof_finds_every_fault(kernel, dtype: torch.dtype) -> None:
    for heads in ((4, 2), (2, 1)):
        assert "is off by" in (flaw(kernel, CPU, dtype, heads, 8) or "")
        assert flaw(ByOffsets(Dense()), CPU, dtype, heads, 8) is None


def test_the_first_kernel_without_a_flaw_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, ByOffsets(Missing()), ByOffsets(NotCausal()), good := ByOffsets(Dense()))
    q = torch.randn(1, 4, 9, 8)
    assert attention.choose(q, q) is good
    only(monkeypatch, ByOffsets(Missing()), ByOffsets(NotCausal()))
    with pytest.raises(
        NoKernelError,
        match=r"missing: NotImplementedError: Could not run 'aten::_flash_attention_forward'; not causal: its",
    ):
        attention.choose(q, q)


def test_the_kernels_of_a_device() -> None:
    cuda = torch.device("cuda")
    names = {dtype: [k.name for k in attention.candidates(cuda, dtype)] for dtype in attention._CUDA}
    assert names[torch.bfloat16] == names[torch.float16] == ["flash attention", "memory-efficient attention"]
    assert names[torch.float32] == ["memory-efficient attention"]
    assert names[torch.float64] == ["attention by its definition"]
    assert attention.candidates(torch.device("meta"), torch.float32) == ()
    q = torch.empty(1, 2, 3, 8, device="meta")
    with pytest.raises(NoKernelError, match=r"shared on cpu and cuda only, got meta; use layout='padded'"):
        attend(q, q, q, plan_segments([(0, 3)], [], device=CPU))


def test_out_of_memory_is_no_flaw() -> None:
    class Full(Dense):
        name = "full"

        def forward(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            flaw(ByOffsets(Full()), CPU, torch.float32, (2, 2), 8)


def test_a_model_without_a_kernel_repeats_its_prompts_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is missing for bfloat16 alone: the check of first use, in float32, does not see it."""
    monkeypatch.setattr(
        attention,
        "candidates",
        lambda device, dtype: attention._CPU if dtype == torch.float32 else (ByOffsets(Missing()),),
    )
    data = shared.ragged()
    policy = Policy(tiny_llama(), reference="none")
    policy(data, want=LOGPS)
    assert policy._scorer.not_shared is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(
            UserWarning, match=r"cannot compute the prompt of a group once \(missing: NotImplementedError"
        ):
            out = policy(data, want=LOGPS)["logps"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = policy(data, want=LOGPS)["logps"]
            padded = Policy(tiny_llama(), reference="none", layout="padded")(data, want=LOGPS)["logps"]
    assert torch.equal(out, again)
    assert torch.equal(out, padded)
    forced = Policy(tiny_llama(), reference="none", layout="shared")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="cannot compute"):
        with pytest.raises(ValueError, match=r"layout='shared' is not possible for LlamaForCausalLM: missing"):
            forced(data, want=LOGPS)
