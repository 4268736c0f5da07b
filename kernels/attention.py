"""Attention of packed prompts: a shared prefix and ragged suffix segments, both directions.

One rule says what a row sees, by its number in the group: rows up to itself that are of the prefix
or not before ``begin``, where its own segment begins (behind the prefix for the prefix' own rows).
So a tile is any run of rows, and a program walks over the prefix and over the rows from the first
``begin`` of its tile on. The backward pass asks twice, and keeps three numbers a row and head in
between: a program of queries gives their gradient, a program of keys those of keys and values.
Every query sees the prefix: its gradient is summed in parts, then over the parts in their order.

A head wider than BLOCK_D is worked on in CHUNKS; a program gives the gradient of one of them.
Loops have their bounds before they begin, so that Triton can fetch for a step while another is
multiplied; a ``while`` it does not look into.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfpl.kernels.launching import cdiv, launched, on_its_device, power
from fastfpl.kernels.lifetime import keep
from fastfpl.kernels.precision import allows_tf32
from fastfpl.kernels.rounding import quotient

__all__ = ["prefix_attention_bwd", "prefix_attention_fwd"]

# the interpreter takes the bits of bfloat16 for an integer in tl.dot: there alone, compute wide
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# below every score, and finite: a row without keys stays free of NaN
_NEVER = tl.constexpr(-1e30)
# weights are powers of two: that is what cards have, and exp would round once more. Scores are not
# scaled before they are subtracted: what is left is small, and so is what its scaling rounds off
_LOG2_E = tl.constexpr(1.4426950408889634)
# programs that fill a large card several times over: more parts of a sum gain nothing
_PROGRAMS = 1024


@triton.jit
def _cells(base, rows, keep, chunk, STEP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Point to a chunk of one head in some rows; say which cells are inside."""
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = keep[:, None]
    if HEAD % BLOCK_D != 0:
        mask = mask & (d < HEAD)[None, :]
    return base + rows[:, None] * STEP + d[None, :], mask


@triton.jit
def _load(
    base,
    bias,
    rows,
    keep,
    chunk,
    STEP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Load a chunk of one head of some rows, the bias of its columns added."""
    cells, mask = _cells(base, rows, keep, chunk, STEP, HEAD, BLOCK_D)
    value = tl.load(cells, mask=mask, other=0.0)
    if INTERPRETED:
        value = value.to(ACC)
    if bias is not None:
        d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        shift = tl.load(bias + d, mask=d < HEAD, other=0.0)
        value = (value.to(ACC) + shift.to(ACC)[None, :]).to(value.dtype)
    return value


@triton.jit
def _store(
    base,
    rows,
    keep,
    chunk,
    value,
    STEP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cells, mask = _cells(base, rows, keep, chunk, STEP, HEAD, BLOCK_D)
    tl.store(cells, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _first(x):
    """Round float32 to the bfloat16 that the matrix units take."""
    x = x.to(tl.bfloat16)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply two matrices; of float32 every number is three of bfloat16, which hold all its bits.

    Six products of parts count: as many instructions of the matrix units as tf32x3 takes, which
    drops 2**-22 of a term. The units cut off what they add up: the first parts' product, of few
    bits, has a sum of its own, to which the rest's is added as float32 is, rounded.
    """
    if PRECISION == "bf16x6":
        a0, b0 = _first(a), _first(b)
        a, b = a - a0.to(tl.float32), b - b0.to(tl.float32)
        a1, b1 = _first(a), _first(b)
        a2, b2 = _first(a - a1.to(tl.float32)), _first(b - b1.to(tl.float32))
        rest = tl.dot(a2, b0, out_dtype=ACC)
        rest = tl.dot(a1, b1, rest, out_dtype=ACC)
        rest = tl.dot(a0, b2, rest, out_dtype=ACC)
        rest = tl.dot(a1, b0, rest, out_dtype=ACC)
        rest = tl.dot(a0, b1, rest, out_dtype=ACC)
        # of an infinity: it is in the first parts
        rest = tl.where(rest == rest, rest, 0.0)
        # a sum would be made one with the product, and be the matrix units' again
        one = tl.full(rest.shape, 1.0, dtype=ACC)
        return tl.fma(tl.dot(a0, b0, out_dtype=ACC), one, rest)
    else:
        return tl.dot(a, b, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def _dots(
    a,
    a_bias,
    a_rows,
    a_keep,
    b,
    b_bias,
    b_rows,
    b_keep,
    A_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply rows of one matrix by rows of another, over all numbers of a head."""
    out = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for chunk in tl.static_range((HEAD + BLOCK_D - 1) // BLOCK_D):
        left = _load(a, a_bias, a_rows, a_keep, chunk, A_STEP, HEAD, BLOCK_D, ACC)
        right = _load(b, b_bias, b_rows, b_keep, chunk, B_STEP, HEAD, BLOCK_D, ACC)
        out += _product(left, tl.trans(right), ACC, PRECISION)
    return out


@triton.jit
def _mix(weights, values, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply by a matrix as it is stored; the weights are rounded to its dtype."""
    return _product(weights.to(values.dtype), values, ACC, PRECISION)


@triton.jit
def _token_dots(
    x,
    bias,
    rows,
    keep,
    token,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Multiply rows by the one row of the constant token."""
    out = tl.zeros([BLOCK], dtype=ACC)
    for chunk in tl.static_range((HEAD + BLOCK_D - 1) // BLOCK_D):
        left = _load(x, bias, rows, keep, chunk, STEP, HEAD, BLOCK_D, ACC)
        out += tl.sum(left.to(ACC) * _token(token, chunk, HEAD, BLOCK_D, ACC), 1)
    return out


@triton.jit
def _token(token, chunk, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.load(token + d, mask=d < HEAD, other=0.0).to(ACC)[None, :]


@triton.jit
def _queries(tile, begin, ends, queries, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Give the queries of a tile: say which exist, their rows, where what they see begins."""
    query = tile * BLOCK + tl.arange(0, BLOCK)
    live = query < queries
    row = query
    if LAST:
        row = tl.load(ends + query, mask=live, other=0)
    return query, live, row, tl.load(begin + row, mask=live, other=0)


@triton.jit
def _keys_of(live, row, start, shared, rows):
    """Bound the keys behind the prefix that a tile of queries sees."""
    first = tl.min(tl.where(live, start, rows), 0)
    end = tl.max(tl.where(live, row, -1), 0) + 1
    return tl.maximum(first, shared), end


@triton.jit
def _sees(row, start, key, there, shared):
    """Say which keys (columns) a query (row) sees."""
    own = (key < shared)[None, :] | (key[None, :] >= start[:, None])
    return own & (key[None, :] <= row[:, None]) & there[None, :]


@triton.jit
def _steps(first, end, shared, BLOCK: tl.constexpr):
    """Count the steps through the prefix, and those and the ones from ``first`` to ``end``."""
    lead = (tl.minimum(shared, end) + BLOCK - 1) // BLOCK
    return lead, lead + (tl.maximum(end - first, 0) + BLOCK - 1) // BLOCK


@triton.jit
def _keys_from(step, lead, first, BLOCK: tl.constexpr):
    """Say where the keys of a step begin: in the prefix, then from ``first`` on."""
    return tl.where(step < lead, step * BLOCK, first + (step - lead) * BLOCK)


@triton.jit
def _prefix_attention_fwd_kernel(
    mixed,
    qkv,
    bias,
    sos,
    begin,
    ends,
    tiles,
    rows,
    queries,
    shared,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    STEP: tl.constexpr = 3 * WIDTH
    HEADS: tl.constexpr = WIDTH // HEAD
    UNIT: tl.constexpr = SCALE * _LOG2_E
    CHUNKS: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    at = ((pid // CHUNKS) % HEADS) * HEAD
    chunk = pid % CHUNKS
    pid = pid // (CHUNKS * HEADS)
    group = (pid // tiles).to(tl.int64)
    query, live, row, start = _queries(pid % tiles, begin, ends, queries, LAST, BLOCK_M)
    first, end = _keys_of(live, row, start, shared, rows)
    lead, steps = _steps(first, end, shared, BLOCK_N)

    q = qkv + group * rows * STEP + at
    k = q + WIDTH
    v = k + WIDTH
    q_bias, k_bias, v_bias = None, None, None
    if bias is not None:
        q_bias, k_bias, v_bias = bias + at, bias + WIDTH + at, bias + 2 * WIDTH + at
    if sos is None:
        top = tl.full([BLOCK_M], _NEVER, dtype=ACC)
        total = tl.zeros([BLOCK_M], dtype=ACC)
        out = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    else:
        top = _token_dots(q, q_bias, row, live, sos + at, STEP, BLOCK_M, HEAD, BLOCK_D, ACC)
        total = tl.full([BLOCK_M], 1.0, dtype=ACC)
        out = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
        out += _token(sos + WIDTH + at, chunk, HEAD, BLOCK_D, ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        at_key = _keys_from(step, lead, first, BLOCK_N)
        key = at_key + tl.arange(0, BLOCK_N)
        there = key < tl.where(at_key < shared, shared, end)
        score = _dots(
            q, q_bias, row, live, k, k_bias, key, there,
            STEP, STEP, BLOCK_M, BLOCK_N, HEAD, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        score = tl.where(_sees(row, start, key, there, shared), score, _NEVER)
        above = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2((score - above[:, None]) * UNIT)
        fade = tl.exp2((top - above) * UNIT)
        total = total * fade + tl.sum(p, 1)
        value = _load(v, v_bias, key, there, chunk, STEP, HEAD, BLOCK_D, ACC)
        out = out * fade[:, None] + _mix(p, value, ACC, PRECISION)
        top = above
    out = out * quotient(1.0, total)[:, None]
    _store(mixed + group * queries * WIDTH + at, query, live, chunk, out, WIDTH, HEAD, BLOCK_D)


@triton.jit
def _prefix_attention_bwd_query_kernel(
    d_qkv,
    highest,
    share,
    mean,
    d_mixed,
    qkv,
    bias,
    sos,
    begin,
    ends,
    tiles,
    rows,
    queries,
    shared,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    STEP: tl.constexpr = 3 * WIDTH
    HEADS: tl.constexpr = WIDTH // HEAD
    UNIT: tl.constexpr = SCALE * _LOG2_E
    CHUNKS: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    head = (pid // CHUNKS) % HEADS
    at = head * HEAD
    chunk = pid % CHUNKS
    pid = pid // (CHUNKS * HEADS)
    group = (pid // tiles).to(tl.int64)
    query, live, row, start = _queries(pid % tiles, begin, ends, queries, LAST, BLOCK_M)
    first, end = _keys_of(live, row, start, shared, rows)
    lead, steps = _steps(first, end, shared, BLOCK_N)

    q = qkv + group * rows * STEP + at
    k = q + WIDTH
    v = k + WIDTH
    d_o = d_mixed + group * queries * WIDTH + at
    q_bias, k_bias, v_bias = None, None, None
    if bias is not None:
        q_bias, k_bias, v_bias = bias + at, bias + WIDTH + at, bias + 2 * WIDTH + at
    # first the softmax, and the mean of its gradient: drift = sum p d_p
    if sos is None:
        top = tl.full([BLOCK_M], _NEVER, dtype=ACC)
        total = tl.zeros([BLOCK_M], dtype=ACC)
        drift = tl.zeros([BLOCK_M], dtype=ACC)
    else:
        token = _token_dots(q, q_bias, row, live, sos + at, STEP, BLOCK_M, HEAD, BLOCK_D, ACC)
        d_token = _token_dots(
            d_o, None, query, live, sos + WIDTH + at, WIDTH, BLOCK_M, HEAD, BLOCK_D, ACC
        )
        top = token
        total = tl.full([BLOCK_M], 1.0, dtype=ACC)
        drift = d_token
    for step in tl.range(0, steps, num_stages=STAGES):
        at_key = _keys_from(step, lead, first, BLOCK_N)
        key = at_key + tl.arange(0, BLOCK_N)
        there = key < tl.where(at_key < shared, shared, end)
        score = _dots(
            q, q_bias, row, live, k, k_bias, key, there,
            STEP, STEP, BLOCK_M, BLOCK_N, HEAD, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        score = tl.where(_sees(row, start, key, there, shared), score, _NEVER)
        d_p = _dots(
            d_o, None, query, live, v, v_bias, key, there,
            WIDTH, STEP, BLOCK_M, BLOCK_N, HEAD, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        above = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2((score - above[:, None]) * UNIT)
        fade = tl.exp2((top - above) * UNIT)
        total = total * fade + tl.sum(p, 1)
        drift = drift * fade + tl.sum(p * d_p, 1)
        top = above
    # not top + log2(total) in one number: what that loses to rounding, all weights of a row would
    inverse = quotient(1.0, total)
    drift = drift * inverse
    note = (group * HEADS + head) * queries + query
    if chunk == 0:
        tl.store(highest + note, top, mask=live)
        tl.store(share + note, inverse, mask=live)
        tl.store(mean + note, drift, mask=live)

    # then the gradient of the scores, p (d_p - drift), times the keys
    d_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    if sos is not None:
        d_token = tl.exp2((token - top) * UNIT) * (d_token - drift)
        d_q += d_token[:, None] * _token(sos + at, chunk, HEAD, BLOCK_D, ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        at_key = _keys_from(step, lead, first, BLOCK_N)
        key = at_key + tl.arange(0, BLOCK_N)
        there = key < tl.where(at_key < shared, shared, end)
        score = _dots(
            q, q_bias, row, live, k, k_bias, key, there,
            STEP, STEP, BLOCK_M, BLOCK_N, HEAD, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        score = tl.where(_sees(row, start, key, there, shared), score, _NEVER)
        d_p = _dots(
            d_o, None, query, live, v, v_bias, key, there,
            WIDTH, STEP, BLOCK_M, BLOCK_N, HEAD, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        d_score = tl.exp2((score - top[:, None]) * UNIT) * (d_p - drift[:, None])
        again = _load(k, k_bias, key, there, chunk, STEP, HEAD, BLOCK_D, ACC)
        d_q += _mix(d_score, again, ACC, PRECISION)
    d_q = d_q * (SCALE * inverse)[:, None]
    _store(d_qkv + group * rows * STEP + at, row, live, chunk, d_q, STEP, HEAD, BLOCK_D)


@triton.jit
def _prefix_attention_bwd_key_kernel(
    d_qkv,
    partial,
    highest,
    share,
    mean,
    d_mixed,
    qkv,
    bias,
    begin,
    ends,
    asked,
    tiles,
    parts,
    per_part,
    rows,
    queries,
    shared,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    LAST: tl.constexpr,
    LEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    STEP: tl.constexpr = 3 * WIDTH
    HEADS: tl.constexpr = WIDTH // HEAD
    UNIT: tl.constexpr = SCALE * _LOG2_E
    CHUNKS: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    head = (pid // CHUNKS) % HEADS
    at = head * HEAD
    chunk = pid % CHUNKS
    pid = pid // (CHUNKS * HEADS)
    tile = pid % tiles
    part = (pid // tiles) % parts
    group = (pid // (tiles * parts)).to(tl.int64)
    if LEAD:
        # prefix: all queries, in parts
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = key < shared
        query_at = part * per_part
        query_end = tl.minimum(query_at + per_part, queries)
    else:
        # other rows: queries from the first that sees the tile's first row to the last of its last
        key = shared + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = key < rows
        query_at = tl.load(asked + 2 * (shared + tile * BLOCK_N))
        query_end = tl.load(asked + 2 * tl.minimum(shared + tile * BLOCK_N + BLOCK_N, rows) - 1)

    q = qkv + group * rows * STEP + at
    k = q + WIDTH
    v = k + WIDTH
    d_o = d_mixed + group * queries * WIDTH + at
    notes = (group * HEADS + head) * queries
    q_bias, k_bias, v_bias = None, None, None
    if bias is not None:
        q_bias, k_bias, v_bias = bias + at, bias + WIDTH + at, bias + 2 * WIDTH + at
    d_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    for at_query in tl.range(query_at, query_end, BLOCK_M, num_stages=STAGES):
        query = at_query + tl.arange(0, BLOCK_M)
        live = query < query_end
        row = query
        if LAST:
            row = tl.load(ends + query, mask=live, other=0)
        start = tl.load(begin + row, mask=live, other=0)
        top = tl.load(highest + notes + query, mask=live, other=0.0)
        inverse = tl.load(share + notes + query, mask=live, other=0.0)
        drift = tl.load(mean + notes + query, mask=live, other=0.0)
        # keys are rows here: what was computed is the left factor of both products
        score = _dots(
            k, k_bias, key, there, q, q_bias, row, live,
            STEP, STEP, BLOCK_N, BLOCK_M, HEAD, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        own = (key < shared)[:, None] | (key[:, None] >= start[None, :])
        sees = own & (key[:, None] <= row[None, :]) & live[None, :]
        p = tl.exp2(tl.where(sees, (score - top[None, :]) * UNIT, _NEVER)) * inverse[None, :]
        d_out = _load(d_o, None, query, live, chunk, WIDTH, HEAD, BLOCK_D, ACC)
        d_v += _mix(p, d_out, ACC, PRECISION)
        d_p = _dots(
            v, v_bias, key, there, d_o, None, query, live,
            STEP, WIDTH, BLOCK_N, BLOCK_M, HEAD, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        asking = _load(q, q_bias, row, live, chunk, STEP, HEAD, BLOCK_D, ACC)
        d_k += _mix(p * (d_p - drift[None, :]), asking, ACC, PRECISION)
    d_k *= SCALE

    d_q = d_qkv + group * rows * STEP + at
    if LAST and part == 0:
        # rows that end no segment ask nothing
        idle = there & (tl.load(begin + key + 1, mask=there, other=0) != key + 1)
        none = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
        _store(d_q, key, idle | (key < shared), chunk, none, STEP, HEAD, BLOCK_D)
    if partial is None:
        _store(d_q + WIDTH, key, there, chunk, d_k, STEP, HEAD, BLOCK_D)
        _store(d_q + 2 * WIDTH, key, there, chunk, d_v, STEP, HEAD, BLOCK_D)
    else:
        # of every group and part: keys and values of the prefix
        out = partial + (group * parts + part) * shared * (2 * WIDTH) + at
        _store(out, key, there, chunk, d_k, 2 * WIDTH, HEAD, BLOCK_D)
        _store(out + WIDTH, key, there, chunk, d_v, 2 * WIDTH, HEAD, BLOCK_D)


@triton.jit
def _prefix_attention_bwd_sum_kernel(
    d_qkv,
    partial,
    parts,
    rows,
    shared,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):
    BLOCKS: tl.constexpr = (2 * WIDTH + BLOCK_W - 1) // BLOCK_W
    pid = tl.program_id(0)
    column = (pid % BLOCKS) * BLOCK_W + tl.arange(0, BLOCK_W)
    row = (pid // BLOCKS) % shared
    group = (pid // BLOCKS // shared).to(tl.int64)
    inside = column < 2 * WIDTH
    base = partial + (group * parts * shared + row) * (2 * WIDTH)
    total = tl.zeros([BLOCK_W], dtype=ACC)
    first = 0
    while first < parts:
        part = first + tl.arange(0, BLOCK_R)
        piece = tl.load(
            base + part[:, None] * (shared * 2 * WIDTH) + column[None, :],
            mask=(part < parts)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(piece, 0)
        first += BLOCK_R
    out = d_qkv + (group * rows + row) * (3 * WIDTH) + WIDTH + column
    tl.store(out, total.to(d_qkv.dtype.element_ty), mask=inside)


@on_its_device
def prefix_attention_fwd(
    qkv: Tensor,
    bias: Tensor | None,
    shared: int,
    starts: tuple[int, ...],
    heads: int,
    sos: Tensor | None,
    last_only: bool,
    *,
    block: int | None = None,
    step: int | None = None,
) -> Tensor:
    """Mix values: qkv (G, S + R, 3 W) -> (G, S + R, W), or (G, C, W) of the segments' last rows.

    ``bias`` (3 W,) is added to ``qkv``; ``sos`` (2, W) holds key and value of a token that every
    row sees. ``block`` is the number of queries of a tile, ``step`` the keys taken at once; by
    default both follow from the dtype and ``last_only``.
    """
    groups, rows, triple = qkv.shape
    begin, ends, _ = keep(_tables(shared, starts, last_only, qkv.device))
    queries = len(ends) if last_only else rows
    mixed = qkv.new_empty(groups, queries, triple // 3)
    settings = _settings(qkv, heads, last_only, step)
    block = block or _block(qkv, heads, last_only)
    tiles = cdiv(queries, block)
    programs = tiles * heads * _chunks(settings) * groups
    if programs:
        launched(
            _prefix_attention_fwd_kernel,
            programs,
            *(mixed, qkv, bias, sos, begin, ends, tiles, rows, queries, shared),
            BLOCK_M=block,
            **settings,
        )
    return mixed


@on_its_device
def prefix_attention_bwd(
    d_mixed: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    shared: int,
    starts: tuple[int, ...],
    heads: int,
    sos: Tensor | None,
    last_only: bool,
    *,
    block: int | None = None,
    step: int | None = None,
    programs: int = _PROGRAMS,
) -> Tensor:
    """Give the gradient with respect to ``qkv``; softmax and all else is computed again.

    ``block`` is the number of queries, and of keys, of a tile, ``step`` of the others taken at
    once; ``programs`` how many there should be at least for the prefix, whose gradient is a sum
    over all queries.
    """
    groups, rows, _ = qkv.shape
    queries, width = d_mixed.shape[1:]
    if not d_mixed.numel():
        return torch.zeros_like(qkv)
    begin, ends, asked = keep(_tables(shared, starts, last_only, qkv.device))
    settings = _settings(qkv, heads, last_only, step)
    chunks = _chunks(settings)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    d_qkv = torch.empty_like(qkv)
    notes = [qkv.new_empty(groups, heads, queries, dtype=wide) for _ in range(3)]
    block_q = block or _block(qkv, heads, last_only)
    tiles = cdiv(queries, block_q)
    launched(
        _prefix_attention_bwd_query_kernel,
        tiles * heads * chunks * groups,
        *(d_qkv, *notes, d_mixed, qkv, bias, sos, begin, ends),
        *(tiles, rows, queries, shared),
        BLOCK_M=block_q,
        **settings,
    )

    settings["BLOCK_M"] = step or 16
    tables = (*notes, d_mixed, qkv, bias, begin, ends, asked)
    narrow = width // heads <= 64
    own = settings | {"BLOCK_N": block or (64 if narrow else 32)}
    if settings["PRECISION"] == "bf16x6" or qkv.dtype == torch.float64:
        # what is multiplied in parts is three numbers, what is wide is two: 32 x 16 of the
        # gradients leave room for them
        own |= {"BLOCK_N": block or (32 if narrow else 16), "BLOCK_D": 16}
    tiles = cdiv(rows - shared, own["BLOCK_N"])
    launched(
        _prefix_attention_bwd_key_kernel,
        tiles * heads * _chunks(own) * groups,
        *(d_qkv, None, *tables, tiles, 1, queries, rows, queries, shared),
        LEAD=False,
        **own,
    )
    if not shared:
        return d_qkv

    settings["BLOCK_N"] = 16 if shared <= 16 else 32
    tiles = cdiv(shared, settings["BLOCK_N"])
    per_part = 64 * cdiv(queries, 64 * cdiv(programs, tiles * heads * groups))
    parts = cdiv(queries, per_part)
    shape = (groups, parts, shared, 2, width)
    partial = qkv.new_empty(shape, dtype=wide) if parts > 1 else None
    launched(
        _prefix_attention_bwd_key_kernel,
        tiles * heads * chunks * groups * parts,
        *(d_qkv, partial, *tables, tiles, parts, per_part, rows, queries, shared),
        LEAD=True,
        **settings,
    )
    if partial is not None:
        columns = 128
        launched(
            _prefix_attention_bwd_sum_kernel,
            groups * shared * cdiv(2 * width, columns),
            *(d_qkv, partial, parts, rows, shared),
            WIDTH=width,
            BLOCK_R=32,
            BLOCK_W=columns,
            ACC=settings["ACC"],
            num_warps=4,
        )
    return d_qkv


def _block(qkv: Tensor, heads: int, last_only: bool) -> int:
    """Choose the queries of a tile: 16 rows for each of four warps.

    Where each stands for a whole segment, 16 already see four keys of five in vain. Of a wide head
    in float64, 32 leave the registers that Triton 3.9 spilled on sm_90.
    """
    if last_only:
        return 16
    return 32 if qkv.dtype == torch.float64 and qkv.shape[-1] > 192 * heads else 64


def _settings(qkv: Tensor, heads: int, last_only: bool, step: int | None) -> dict[str, Any]:
    precision = "ieee"  # says nothing but for float32
    if qkv.dtype == torch.float32:
        precision = "tf32" if allows_tf32() else "bf16x6"
    width = qkv.shape[-1] // 3
    return dict(_settings_of(qkv.dtype, width, width // heads, last_only, step, precision))


@functools.lru_cache(maxsize=64)
def _settings_of(
    dtype: torch.dtype, width: int, head: int, last_only: bool, step: int | None, precision: str
) -> dict[str, Any]:
    half = dtype in (torch.float16, torch.bfloat16)
    # so much of a head at a time as leaves no register spilled: half where it is in several pieces
    widest = (64 if half else 32) // (1 if head <= 64 else 2)
    return {
        "WIDTH": width,
        "HEAD": head,
        "SCALE": head**-0.5,
        "LAST": last_only,
        "BLOCK_N": step or (32 if half else 16),
        "BLOCK_D": max(16, min(widest, power(head))),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": precision,
        # the next keys and values are on their way while these are multiplied; of float64 there is
        # no room for both
        "STAGES": 1 if dtype == torch.float64 else 2,
        # what a query holds of a wide head, or in float64, is spread over twice the threads
        "num_warps": 4 if head <= 64 and dtype != torch.float64 else 8,
        "maxnreg": 255,  # of itself the assembler keeps to fewer on some cards, and spills
    }


def _chunks(settings: dict[str, Any]) -> int:
    return cdiv(settings["HEAD"], settings["BLOCK_D"])


@functools.lru_cache(maxsize=1024)  # a pass in parts has two for each part
def _tables(
    shared: int, starts: tuple[int, ...], last_only: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Say what the rows of a group are.

    Returns, for each row and one more, where its segment begins, the prefix counted as rows without
    one; the last row of each segment; for each row the first query that sees it and the end of
    them, queries numbered as in the result.
    """
    begin, asked = [shared] * shared, [(0, 0)] * shared
    for c, (a, b) in enumerate(itertools.pairwise(starts)):
        begin += [shared + a] * (b - a)
        for row in range(shared + a, shared + b):
            asked.append((c, c + 1) if last_only else (row, shared + b))
    begin.append(shared + starts[-1])
    ends = [shared + b - 1 for b in starts[1:]]

    def table(rows: list[Any]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=device)

    return table(begin), table(ends), table(asked)
