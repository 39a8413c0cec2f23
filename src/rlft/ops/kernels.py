"""The two Triton kernels of the head op: what lies between its matrix products, in one read of each tile.

Importing this module imports triton; nothing else of rlft does. The arithmetic is that of :mod:`rlft.ops.tiles`
(:func:`fold`) and of :mod:`rlft.ops.plans` (:func:`d_logits`); one program has ``ROWS`` rows, one on a GPU. Under
``TRITON_INTERPRET=1`` the kernels run on a CPU, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["STATE", "d_logits", "fold"]

#: Rows of the state tensor ``[len(STATE), N]``. The first eleven live on from tile to tile; the last three are what
#: this tile does to the accumulators of :class:`rlft.ops.fused.FusedRows`.
STATE = (
    "top", "s", "q", "ref_top", "ref_s", "centre", "a", "b", "target_z", "target_ref", "target_factor",
    "rescale", "shift", "moved",
)  # fmt: skip


@triton.jit
def _phi(u):
    """``expm1(u) - u``, to full relative precision: a series near zero, where the difference would lose its digits."""
    series = tl.full(u.shape, 1.0, u.dtype)
    if u.dtype == tl.float64:  # terms that float32 cannot see
        for i in tl.static_range(18, 10, -1):  # pyright: ignore[reportGeneralTypeIssues]
            series = 1.0 + u * (series * (1.0 / i))
    for i in tl.static_range(10, 2, -1):  # pyright: ignore[reportGeneralTypeIssues]
        series = 1.0 + u * (series * (1.0 / i))
    return tl.where(tl.abs(u) < 0.5, 0.5 * u * u * series, tl.exp(u) - 1.0 - u)


@triton.jit
def _tanh(x):
    e = -2.0 * tl.abs(x)
    e = e + _phi(e)  # expm1(-2 |x|)
    return tl.where(x < 0, e / (2.0 + e), -e / (2.0 + e))


@triton.jit
def _tile(
    z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, start, v,
    HAS_REF: tl.constexpr, BY_DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits, slope of the soft cap, reference logits and their difference, for ``BLOCK`` columns of some rows.

    ``ref_ptr`` holds ``h_ref W'``, or ``(h - h_ref) W'`` where both go through one head (``BY_DIFFERENCE``).
    ``scales_ptr`` holds ``pre``, ``post`` and the slope in the dtype of the sums: as numbers they would be float32.
    """
    pre = tl.load(scales_ptr)
    post = tl.load(scales_ptr + 1)
    cols = start + tl.arange(0, BLOCK)[None, :]
    column = cols < v
    inside = alive[:, None] & column
    at = rows[:, None] * v + cols
    x = tl.load(z_ptr + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=column, other=0.0).to(x.dtype)
    z = x * pre
    factor = tl.full(z.shape, 1.0, z.dtype)
    ref = tl.zeros_like(z)
    delta = tl.zeros_like(z)
    if HAS_REF:
        y = tl.load(ref_ptr + at, mask=inside, other=0.0)
        if BY_DIFFERENCE:
            delta = y * pre
            ref = z - delta
        else:
            if ref_bias_ptr is not None:
                y += tl.load(ref_bias_ptr + cols, mask=column, other=0.0).to(y.dtype)
            delta = (x - y) * pre
            ref = y * pre
    if SOFTCAP:
        t = _tanh(z)
        factor = 1.0 - t * t
        if HAS_REF:
            if BY_DIFFERENCE:  # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
                delta = _tanh(delta) * (1.0 - t * _tanh(ref)) * post
            else:
                ref = _tanh(ref)
                delta = (t - ref) * post
                ref = ref * post
        z = t * post
    if HAS_REF and BY_DIFFERENCE:
        ref = z - delta
    return at, cols, inside, column, z, factor, ref, delta


# A fold sweeps over its tile two or three times: for the maxima, for the first centre, for the sums. Each sweep is compiled
# into its kernel, as if it were written there.
@triton.jit
def _maxima(
    z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, v, target,
    top, ref_top, target_z, target_ref, target_factor,
    HAS_REF: tl.constexpr, BY_DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The running maxima of both models' logits, and what stands at each row's target."""
    for start in range(0, v, BLOCK):
        _at, cols, _inside, column, z, factor, ref, _delta = _tile(
            z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, start, v,
            HAS_REF, BY_DIFFERENCE, SOFTCAP, BLOCK,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(tl.where(column, z, float("-inf")), 1))
        if HAS_REF:
            ref_top = tl.maximum(ref_top, tl.max(tl.where(column, ref, float("-inf")), 1))
        here = column & (cols == target[:, None])
        target_z += tl.sum(tl.where(here, z, 0.0), 1)
        target_ref += tl.sum(tl.where(here, ref, 0.0), 1)
        target_factor += tl.sum(tl.where(here, factor, 0.0), 1)
    return top, ref_top, target_z, target_ref, target_factor


@triton.jit
def _lambda(top, ref_top, s, ref_s):
    """Difference of the two log-sum-exps. In this order: equal logits give exactly zero."""
    return (top - ref_top) + (tl.log(s) - tl.log(ref_s))


@triton.jit
def _first_centre(
    z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, v, top, ref_top,
    HAS_REF: tl.constexpr, BY_DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Lambda of the first tile: its sums come before its KL."""
    s = tl.zeros_like(top)
    ref_s = tl.zeros_like(top)
    for start in range(0, v, BLOCK):
        _at, _cols, _inside, column, z, _factor, ref, _delta = _tile(
            z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, start, v,
            HAS_REF, BY_DIFFERENCE, SOFTCAP, BLOCK,
        )  # fmt: skip
        s += tl.sum(tl.where(column, tl.exp(z - top[:, None]), 0.0), 1)
        ref_s += tl.sum(tl.where(column, tl.exp(ref - ref_top[:, None]), 0.0), 1)
    return _lambda(top, ref_top, s, ref_s)


@triton.jit
def _sums(
    z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, v, e_ptr, ez_ptr, ed_ptr,
    top, ref_top, centre, s, q, ref_s, a, b,
    HAS_REF: tl.constexpr, BY_DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, WANT_KL: tl.constexpr,
    FAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add this tile to the sums of each row, and write the factors of the bases."""
    for start in range(0, v, BLOCK):
        at, _cols, inside, column, z, factor, ref, delta = _tile(
            z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, start, v,
            HAS_REF, BY_DIFFERENCE, SOFTCAP, BLOCK,
        )  # fmt: skip
        e = tl.where(column, tl.exp(z - top[:, None]), 0.0)
        below = tl.where(column, z - top[:, None], 0.0)
        s += tl.sum(e, 1)
        q += tl.sum(e * below, 1)
        if HAS_REF:
            ref_s += tl.sum(tl.where(column, tl.exp(ref - ref_top[:, None]), 0.0), 1)
        if WANT_KL:
            u = centre[:, None] - delta
            # u beyond FAR: e * expm1(u) would be 0 * inf for underflowed e; the term is then the reference's mass
            near = e * _phi(tl.minimum(u, FAR))
            far = tl.exp(ref + (centre - top)[:, None]) - e * (1.0 + u)
            b += tl.sum(tl.where(column, tl.where(u > FAR, far, near), 0.0), 1)
            a -= tl.sum(tl.where(column, e * u, 0.0), 1)
            if ed_ptr is not None:
                value = tl.where(column, -u * e * factor, 0.0)
                tl.store(ed_ptr + at, value.to(ed_ptr.dtype.element_ty), mask=inside)
        if ez_ptr is not None:
            value = e * below * factor
            tl.store(ez_ptr + at, value.to(ez_ptr.dtype.element_ty), mask=inside)
        if e_ptr is not None:
            tl.store(e_ptr + at, (e * factor).to(e_ptr.dtype.element_ty), mask=inside)
    return s, q, ref_s, a, b


@triton.jit
def _recentre(moved, s, a, b):
    """The KL's sums around a centre that lies ``moved`` further on."""
    small = tl.minimum(tl.maximum(moved, -1.0), 1.0)
    phi = _phi(small)
    growth = small + phi
    direct = a - moved * s  # exact enough once the shift itself is of order one
    return direct, tl.where(tl.abs(moved) <= 1.0, (1.0 + growth) * b + s * phi - a * growth, direct)


@triton.jit(do_not_specialize=["n", "first_column"])
def fold(
    z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, targets_ptr, state_ptr, e_ptr, ez_ptr, ed_ptr,
    n, v, first_column,
    FIRST: tl.constexpr, HAS_REF: tl.constexpr, BY_DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr,
    WANT_KL: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold one tile of raw head outputs ``[n, v]`` into the state of each row.

    Writes, where the pointer is given, the factors of the bases: ``e f``, ``e (z - top[:, None]) f``, ``e (delta - centre) f``,
    with ``e = exp(z - top[:, None])`` and ``f`` the slope of the soft cap. Never into the buffers that it reads.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = rows < n
    target = tl.load(targets_ptr + rows, mask=alive, other=0) - first_column
    state_ptr += rows

    top_old = tl.load(state_ptr, mask=alive, other=0.0)
    s_old = tl.load(state_ptr + n, mask=alive, other=0.0)
    q_old = tl.load(state_ptr + 2 * n, mask=alive, other=0.0)
    ref_top_old = tl.load(state_ptr + 3 * n, mask=alive, other=0.0)
    ref_s_old = tl.load(state_ptr + 4 * n, mask=alive, other=0.0)
    centre = tl.load(state_ptr + 5 * n, mask=alive, other=0.0)
    a_old = tl.load(state_ptr + 6 * n, mask=alive, other=0.0)
    b_old = tl.load(state_ptr + 7 * n, mask=alive, other=0.0)
    target_z = tl.load(state_ptr + 8 * n, mask=alive, other=0.0)
    target_ref = tl.load(state_ptr + 9 * n, mask=alive, other=0.0)
    target_factor = tl.load(state_ptr + 10 * n, mask=alive, other=0.0)

    top = top_old
    ref_top = ref_top_old
    if FIRST:
        top = tl.full(top_old.shape, float("-inf"), top_old.dtype)
        ref_top = tl.full(top_old.shape, float("-inf"), top_old.dtype)
    top, ref_top, target_z, target_ref, target_factor = _maxima(
        z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, v, target,
        top, ref_top, target_z, target_ref, target_factor, HAS_REF, BY_DIFFERENCE, SOFTCAP, BLOCK,
    )  # fmt: skip

    rescale = tl.exp(top_old - top)
    shift = top_old - top
    ref_rescale = tl.exp(ref_top_old - ref_top)
    if FIRST:
        rescale = tl.zeros_like(rescale)
        shift = tl.zeros_like(shift)
        ref_rescale = tl.zeros_like(ref_rescale)
    if FIRST and WANT_KL:
        centre = _first_centre(
            z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, v, top, ref_top,
            HAS_REF, BY_DIFFERENCE, SOFTCAP, BLOCK,
        )  # fmt: skip

    s = rescale * s_old
    q = rescale * (q_old + shift * s_old)
    ref_s = ref_rescale * ref_s_old
    a = rescale * a_old
    b = rescale * b_old
    s, q, ref_s, a, b = _sums(
        z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, v, e_ptr, ez_ptr, ed_ptr,
        top, ref_top, centre, s, q, ref_s, a, b, HAS_REF, BY_DIFFERENCE, SOFTCAP, WANT_KL, FAR, BLOCK,
    )  # fmt: skip

    moved = tl.zeros_like(s)
    if WANT_KL:  # around the Lambda of all tiles so far
        new = _lambda(top, ref_top, s, ref_s)
        moved = new - centre
        a, b = _recentre(moved, s, a, b)
        centre = new

    tl.store(state_ptr, top, mask=alive)
    tl.store(state_ptr + n, s, mask=alive)
    tl.store(state_ptr + 2 * n, q, mask=alive)
    tl.store(state_ptr + 3 * n, ref_top, mask=alive)
    tl.store(state_ptr + 4 * n, ref_s, mask=alive)
    tl.store(state_ptr + 5 * n, centre, mask=alive)
    tl.store(state_ptr + 6 * n, a, mask=alive)
    tl.store(state_ptr + 7 * n, b, mask=alive)
    tl.store(state_ptr + 8 * n, target_z, mask=alive)
    tl.store(state_ptr + 9 * n, target_ref, mask=alive)
    tl.store(state_ptr + 10 * n, target_factor, mask=alive)
    tl.store(state_ptr + 11 * n, rescale, mask=alive)
    tl.store(state_ptr + 12 * n, shift, mask=alive)
    tl.store(state_ptr + 13 * n, moved, mask=alive)


@triton.jit(do_not_specialize=["n", "first_column"])
def d_logits(
    z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, targets_ptr, lse_ptr, entropy_ptr, mean_delta_ptr,
    g_logps_ptr, g_entropy_ptr, g_kl_ptr, out_ptr, n, v, first_column,
    HAS_REF: tl.constexpr, BY_DIFFERENCE: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of raw head outputs, from the statistics of its rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = rows < n
    target = tl.load(targets_ptr + rows, mask=alive, other=0) - first_column
    lse = tl.load(lse_ptr + rows, mask=alive, other=0.0)
    for start in range(0, v, BLOCK):
        at, cols, inside, _column, z, factor, _ref, delta = _tile(
            z_ptr, ref_ptr, bias_ptr, ref_bias_ptr, scales_ptr, rows, alive, start, v,
            HAS_REF, BY_DIFFERENCE, SOFTCAP, BLOCK,
        )  # fmt: skip
        logp = z - lse[:, None]
        prob = tl.exp(logp)
        dz = tl.zeros_like(z)
        if g_logps_ptr is not None:
            dz += tl.load(g_logps_ptr + rows, mask=alive, other=0.0)[:, None] * (
                tl.where(cols == target[:, None], 1.0, 0.0) - prob
            )
        if g_entropy_ptr is not None:  # -p (z - E[z]) with z - E[z] = log p + H
            dz -= (
                tl.load(g_entropy_ptr + rows, mask=alive, other=0.0)[:, None]
                * prob
                * (logp + tl.load(entropy_ptr + rows, mask=alive, other=0.0)[:, None])
            )
        if g_kl_ptr is not None:  # p (delta - E[delta])
            dz += (
                tl.load(g_kl_ptr + rows, mask=alive, other=0.0)[:, None]
                * prob
                * (delta - tl.load(mean_delta_ptr + rows, mask=alive, other=0.0)[:, None])
            )
        value = dz * tl.load(scales_ptr + 2) * factor
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
