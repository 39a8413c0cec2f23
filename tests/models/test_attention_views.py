"""Attention over a packed row in views: who attends to whom, long sequences cut in two, grouped heads, no copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlft.models import attention
from rlft.models.attention import attend, plan_segments
from rlft.models.attention_kernels import CpuFlash
from rlft.models.attention_views import ByViews
from rlft.models.segments import Block, Segments, View
from rlft.models.shared import build_shared
from rlft.types import Batch
from tests.models import test_shared_layout as shared
from tests.models.oracle import close
from tests.models.test_segment_kernels import ROWS, by_mask

CPU = torch.device("cpu")


def row(*lengths: int, prompts: int = 0, each: int = 0):
    """Segments end to end; the first ``prompts`` have ``each`` completions, in order."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [(end - length, length) for end, length in zip(ends, lengths, strict=True)]
    groups = []
    for i in range(prompts):
        members = segments[prompts + i * each : prompts + (i + 1) * each]
        groups.append(((members[0][0], sum(length for _, length in members)), segments[i]))
    return segments, groups


# Around the lengths at which sequences are cut (192, in multiples of 64), alone and in runs.
LONG = {
    "just short of a cut": row(191, 191, 64),
    "cut once, unequal": row(192, 200, 255),
    "a run, cut in halves": row(256, 256, 256),
    "a run, cut unequally": row(255, 255),
    "cut again and again": row(800),
    "halves, then unequal": row(640, 640, 3),
    "prompts and answers": row(300, 300, *[200] * 4, 30, prompts=2, each=2),
    "ragged": row(257, 5, *[3, 70, 200, 1], *[9, 9, 9, 400], 33, 2, prompts=2, each=4),
}
EVERY = {**ROWS, **LONG}


def tokens_of(block: View | Block) -> list[list[int]]:
    if isinstance(block, View):
        return [[block.start + i * block.step + t for t in range(block.width)] for i in range(block.count)]
    assert block.target is not None
    assert block.padding is not None
    real = torch.ones(block.count * block.width, dtype=torch.bool).index_fill_(0, block.padding, False)
    return [t[m].tolist() for t, m in zip(block.target.chunk(block.count), real.chunk(block.count), strict=True)]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_pair_of_tokens_is_computed_once(name: str) -> None:
    plan = plan_segments(*EVERY[name], device=CPU)
    own, across = plan.views
    seen = torch.zeros(plan.tokens, plan.tokens, dtype=torch.long)
    for block in own:
        for t in map(torch.tensor, tokens_of(block)):
            seen[t[:, None], t] += torch.ones(len(t), len(t), dtype=torch.long).tril()
    for queries, keys in across:
        for a, b in zip(tokens_of(queries), tokens_of(keys), strict=True):
            seen[torch.tensor(a)[:, None], torch.tensor(b)] += 1
    assert torch.equal(seen, by_mask(*EVERY[name]).long())


def differentiated(make, inputs: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    out = make(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("name", sorted(EVERY))
def test_equal_to_a_dense_mask(name: str, heads: tuple[int, int]) -> None:
    plan, allowed = plan_segments(*EVERY[name], device=CPU), by_mask(*EVERY[name])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, plan.tokens, 8, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
        for h in (heads[0], *heads[1:] * 2)
    )
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    assert isinstance(attention.choose(q, k), ByViews)
    mine = differentiated(lambda *x: attend(*x, plan, scale=0.6), (q, k, v), weight)
    truth = differentiated(lambda *x: shared.dense(*x, allowed, 0.6), (q, k, v), weight)
    for a, b in zip(mine, truth, strict=True):
        close(a, b, 1e-11)


def test_layouts_of_memory_do_not_matter() -> None:
    plan = plan_segments(*LONG["ragged"], device=CPU)
    n = plan.tokens
    q, k, v = (torch.randn(1, n, h, 8).transpose(1, 2) for h in (4, 2, 2))  # as projections leave them
    expected = attend(q, k, v, plan)
    wide = torch.randn(1, n, 3, 4, 8)  # one matrix for queries, keys and values
    wide[:, :, 0], wide[:, :, 1, :2], wide[:, :, 2, :2] = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    for views in (
        tuple(x.contiguous() for x in (q, k, v)),
        (wide[:, :, 0].transpose(1, 2), wide[:, :, 1, :2].transpose(1, 2), wide[:, :, 2, :2].transpose(1, 2)),
    ):
        assert torch.equal(attend(*views, plan), expected)


def test_parts_of_bfloat16_are_summed_in_float32() -> None:
    """Each part is rounded once, by the kernel (a fifth more error than in one call); sums in bfloat16 add two fifths."""
    segments, groups = row(1024)
    plan = plan_segments(segments, groups, device=CPU)
    assert len(plan.views[1]) == 3
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(1, 2, 1024, 16, generator=generator).bfloat16().requires_grad_() for _ in range(4))
    exact = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    allowed = by_mask(segments, groups)
    truth = differentiated(lambda *x: shared.dense(*x, allowed, 0.25), exact, weight.detach().double())
    mine = differentiated(lambda *x: attend(*x, plan, scale=0.25), (q, k, v), weight.detach())
    whole = differentiated(
        lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, scale=0.25),
        (q, k, v),
        weight.detach(),
    )
    for a, b, c in zip(mine, whole, truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - c).norm()) < 1.3 * float((b.double() - c).norm())


def test_runs_and_cuts_by_hand() -> None:
    own, across = Segments([(0, 30), (30, 30), (60, 40), (100, 3), (103, 3)], [((30, 70), (0, 30))], CPU).views
    padded = own.pop()
    assert own == [View(2, 30, 0, 30), View(1, 40, 60, 40)]
    assert padded == View(2, 3, 100, 3)  # short, but of one length: nothing to pad
    assert across == [(View(1, 70, 30, 70), View(1, 30, 0, 30))]
    own, across = Segments([(0, 256), (256, 256)], [], CPU).views
    assert own == [View(4, 128, 0, 128)]
    assert across == [(View(2, 128, 128, 256), View(2, 128, 0, 256))]
    own, across = Segments([(0, 5), (5, 4), (9, 2)], [], CPU).views
    assert isinstance(own[0], Block)
    assert (own[0].count, own[0].width, len(own), across) == (3, 5, 1, [])


def test_answers_of_one_length_become_neighbours() -> None:
    """Lengths 40, 31, 40, 31: two runs of two, whatever the order of the rows."""
    lengths = torch.tensor([41, 32, 41, 32])  # the last token is not laid out
    exists = torch.arange(41)[None] < lengths[:, None]
    ids = torch.arange(4 * 41).view(4, 41)
    prompt = torch.ones(1, 30, dtype=torch.long)
    data = Batch(prompt, prompt.bool(), ids, exists, exists, torch.zeros(4, dtype=torch.long))
    packed = build_shared(data)
    assert packed is not None
    assert packed.attention_mask.segments.views[0] == [View(1, 30, 0, 30), View(2, 40, 30, 40), View(2, 31, 110, 31)]
    assert packed.input_ids[0, [30, 70, 110, 141]].tolist() == [0, 82, 41, 123]
    predicted = packed.index.split(lengths.tolist())
    assert [p[:2].tolist() for p in predicted] == [[29, 30], [29, 110], [29, 70], [29, 141]]


def test_nothing_is_copied_for_grouped_heads() -> None:
    """Each call's keys are views of the row, with stride 0 along the heads that share them."""
    seen: list[tuple[int, ...]] = []

    class Watched(CpuFlash):
        def forward(self, q, k, v, causal, scale):
            seen.append(k.stride())
            assert k.untyped_storage().data_ptr() == storage
            return super().forward(q, k, v, causal, scale)

    plan = plan_segments(*LONG["prompts and answers"], device=CPU)
    q, k = torch.randn(plan.tokens, 4, 8), torch.randn(plan.tokens, 2, 8)
    storage = k.untyped_storage().data_ptr()
    ByViews(Watched()).forward(q, k, k, plan, 0.3)
    assert seen
    assert all(stride[1] == 0 for stride in seen)
