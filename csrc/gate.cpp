#include "gate.h"

#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace fastfpl {
namespace {

// Numbers of a vector.
template <class Real>
constexpr int64_t kLanes = sizeof(Vector<Real>) / sizeof(Real);

// Rows of a product that are accumulated at once: with two vectors each, 8 sums hide the latency
// of a multiply-add and still fit the registers of AVX2.
constexpr int kRows = 4;

// out[r] (+)= sum_t a[r a_row + t a_depth] x[t] for N rows of V vectors.
template <class Real, int N, int V, bool kAdd>
FASTFPL_INLINE void product(const Real* a, int64_t a_row, int64_t a_depth, const Real* x,
                            int64_t x_row, int64_t depth, Real* out, int64_t out_row) {
  using Lane = Vector<Real>;
  constexpr int64_t lanes = kLanes<Real>;
  Lane sum[N][V];
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sum[r][v] = Lane{};
      if (kAdd) load_lanes(out + r * out_row + v * lanes, sum[r][v]);
    }
  for (int64_t t = 0; t < depth; ++t) {
    Lane row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) load_lanes(x + t * x_row + v * lanes, row[v]);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r * a_row + t * a_depth];
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_lanes(out + r * out_row + v * lanes, sum[r][v]);
}

// The same for any number of rows, in pieces of about equal size.
template <class Real, int V, bool kAdd>
FASTFPL_INLINE void products(int64_t rows, const Real* a, int64_t a_row, int64_t a_depth,
                             const Real* x, int64_t x_row, int64_t depth, Real* out,
                             int64_t out_row) {
  const int64_t pieces = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = rows * i / pieces, count = rows * (i + 1) / pieces - begin;
    const Real* from = a + begin * a_row;
    Real* to = out + begin * out_row;
    if (count == 4)
      product<Real, 4, V, kAdd>(from, a_row, a_depth, x, x_row, depth, to, out_row);
    else if (count == 3)
      product<Real, 3, V, kAdd>(from, a_row, a_depth, x, x_row, depth, to, out_row);
    else if (count == 2)
      product<Real, 2, V, kAdd>(from, a_row, a_depth, x, x_row, depth, to, out_row);
    else
      product<Real, 1, V, kAdd>(from, a_row, a_depth, x, x_row, depth, to, out_row);
  }
}

// Scores and values of E experts for J = V vectors of images: both (E, J).
template <class Real, int V>
FASTFPL_INLINE void project(const Gate& g, const Real* q, const Real* z, const Real* k,
                            const Real* v, Real* score, Real* value) {
  constexpr int64_t J = V * kLanes<Real>;
  const int64_t row = 2 * g.heads * g.width;
  products<Real, V, false>(g.experts, k, row, 1, q, g.images, g.width, score, J);
  products<Real, V, false>(g.experts, v, row, 1, z, g.images, g.width, value, J);
}

template <class Real, int V>
FASTFPL_INLINE void mix(const Gate& g, const Real* q, const Real* z, const Real* k, const Real* v,
                        Real* logits, Real* stats, Real* FASTFPL_RESTRICT score,
                        Real* FASTFPL_RESTRICT value) {
  constexpr int64_t J = V * kLanes<Real>;
  project<Real, V>(g, q, z, k, v, score, value);
  const Real scale = Real(g.scale);
  Real high[J], sum[J], mean[J];
#pragma omp simd
  for (int64_t j = 0; j < J; ++j) high[j] = score[j], sum[j] = 0, mean[j] = 0;
  for (int64_t e = 1; e < g.experts; ++e) {
#pragma omp simd
    for (int64_t j = 0; j < J; ++j) {
      const Real s = score[e * J + j];
      high[j] = (s - high[j]) * scale > 0 ? s : high[j];
    }
  }
  for (int64_t e = 0; e < g.experts; ++e) {
#pragma omp simd
    for (int64_t j = 0; j < J; ++j) {
      // scaled last: fused into one rounding, s scale - high would not be 0 for the highest
      const Real w = exp_of_negative((score[e * J + j] - high[j]) * scale);
      sum[j] += w;
      mean[j] += w * value[e * J + j];
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < J; ++j) {
    sum[j] = 1 / sum[j];
    mean[j] *= sum[j];
    logits[j] += mean[j];
  }
  if (stats) {
    std::copy(high, high + J, stats);
    std::copy(sum, sum + J, stats + g.images);
    std::copy(mean, mean + J, stats + 2 * g.images);
  }
}

// Classes [begin, end) of all clients.
template <class Real>
FASTFPL_INLINE void forward(const Real* qz, const Real* kv, Real* logits, Real* stats,
                            const Gate& g, int64_t begin, int64_t end, Real* scratch) {
  constexpr int64_t lanes = kLanes<Real>;
  const int64_t B = g.images, side = g.heads * g.width;
  Real *score = scratch, *value = scratch + g.experts * 2 * lanes;
  for (int64_t c = begin; c < end; ++c) {
    const Real* client = qz + c / g.classes * 2 * side * B;
    Real* out = logits + c * B;
    std::fill(out, out + B, Real(0));
    for (int64_t h = 0; h < g.heads; ++h) {
      const Real *k = kv + c * g.experts * 2 * side + h * g.width, *v = k + side;
      const Real *q = client + h * g.width * B, *z = q + side * B;
      Real* kept = stats ? stats + (c * g.heads + h) * 3 * B : nullptr;
      int64_t b = 0;
      for (; b + 2 * lanes <= B; b += 2 * lanes)
        mix<Real, 2>(g, q + b, z + b, k, v, out + b, kept ? kept + b : nullptr, score, value);
      if (b < B)
        mix<Real, 1>(g, q + b, z + b, k, v, out + b, kept ? kept + b : nullptr, score, value);
    }
  }
}

// Of V vectors of images: the gradients of scores and values in place of them, and what they give.
template <class Real, int V>
FASTFPL_INLINE void unmix(const Gate& g, const Real* q, const Real* z, const Real* k, const Real* v,
                          const Real* stats, const Real* d_logits, Real* d_q, Real* d_z,
                          const Real* q_rows, const Real* z_rows, int64_t padded, Real* d_k,
                          Real* d_v, Real* FASTFPL_RESTRICT score, Real* FASTFPL_RESTRICT value) {
  constexpr int64_t lanes = kLanes<Real>, J = V * lanes;
  project<Real, V>(g, q, z, k, v, score, value);
  const Real scale = Real(g.scale);
  const Real *high = stats, *inverse = stats + g.images, *mean = stats + 2 * g.images;
  for (int64_t e = 0; e < g.experts; ++e) {
#pragma omp simd
    for (int64_t j = 0; j < J; ++j) {
      const Real w =
          exp_of_negative((score[e * J + j] - high[j]) * scale) * inverse[j] * d_logits[j];
      score[e * J + j] = scale * w * (value[e * J + j] - mean[j]);
      value[e * J + j] = w;
    }
  }
  const int64_t row = 2 * g.heads * g.width;
  if (d_q) {
    products<Real, V, true>(g.width, k, 1, row, score, J, g.experts, d_q, g.images);
    products<Real, V, true>(g.width, v, 1, row, value, J, g.experts, d_z, g.images);
  }
  if (!d_k) return;
  int64_t i = 0;
  for (; i + 2 * lanes <= padded; i += 2 * lanes) {
    products<Real, 2, true>(g.experts, score, J, 1, q_rows + i, padded, J, d_k + i, padded);
    products<Real, 2, true>(g.experts, value, J, 1, z_rows + i, padded, J, d_v + i, padded);
  }
  if (i < padded) {
    products<Real, 1, true>(g.experts, score, J, 1, q_rows + i, padded, J, d_k + i, padded);
    products<Real, 1, true>(g.experts, value, J, 1, z_rows + i, padded, J, d_v + i, padded);
  }
}

// Chunks [begin, end) of all clients: the classes of a chunk, and its part of d_qz.
template <class Real>
FASTFPL_INLINE void backward(const Real* d_logits, const Real* qz, const Real* rows, const Real* kv,
                             const Real* stats, Real* d_qz, Real* d_kv, int64_t chunks,
                             const Gate& g, int64_t begin, int64_t end, Real* scratch) {
  constexpr int64_t lanes = kLanes<Real>;
  const int64_t B = g.images, E = g.experts, side = g.heads * g.width;
  const int64_t padded = gate_padded(g.width, sizeof(Real));
  Real *score = scratch, *value = score + E * 2 * lanes;
  Real *d_k = value + E * 2 * lanes, *d_v = d_k + E * padded;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t u = chunk / chunks, i = chunk % chunks;
    const int64_t first = u * g.classes + g.classes * i / chunks;
    const int64_t last = u * g.classes + g.classes * (i + 1) / chunks;
    for (int64_t c = first; c < last; ++c) {
      for (int64_t h = 0; h < g.heads; ++h) {
        const int64_t place = c * E * 2 * side + h * g.width, head = h * g.width * B;
        const Real *k = kv + place, *v = k + side;
        const Real *q = qz + u * 2 * side * B + head, *z = q + side * B;
        const Real* kept = stats + (c * g.heads + h) * 3 * B;
        Real* d_q = d_qz ? d_qz + chunk * 2 * side * B + head : nullptr;
        Real* d_z = d_q ? d_q + side * B : nullptr;
        const Real* q_rows = rows ? rows + (u * 2 * g.heads + h) * B * padded : nullptr;
        const Real* z_rows = rows ? q_rows + g.heads * B * padded : nullptr;
        if (d_kv) std::fill(d_k, d_v + E * padded, Real(0));
        auto of = [](auto* from, int64_t at) { return from ? from + at : from; };
        const Real* by = d_logits + c * B;
        Real* into = d_kv ? d_k : nullptr;
        int64_t b = 0;
        for (; b + 2 * lanes <= B; b += 2 * lanes)
          unmix<Real, 2>(g, q + b, z + b, k, v, kept + b, by + b, of(d_q, b), of(d_z, b),
                         of(q_rows, b * padded), of(z_rows, b * padded), padded, into, d_v, score,
                         value);
        if (b < B)
          unmix<Real, 1>(g, q + b, z + b, k, v, kept + b, by + b, of(d_q, b), of(d_z, b),
                         of(q_rows, b * padded), of(z_rows, b * padded), padded, into, d_v, score,
                         value);
        for (int64_t e = 0; d_kv && e < E; ++e) {
          Real* out = d_kv + place + e * 2 * side;
          std::copy(d_k + e * padded, d_k + e * padded + g.width, out);
          std::copy(d_v + e * padded, d_v + e * padded + g.width, out + side);
        }
      }
    }
  }
}

// The attribute belongs on plain functions, one a type.
#define FASTFPL_GATE(Real)                                                                         \
  FASTFPL_CLONES void forward_range(const Real* qz, const Real* kv, Real* logits, Real* stats,     \
                                    const Gate& g, int64_t begin, int64_t end, Real* scratch) {    \
    forward(qz, kv, logits, stats, g, begin, end, scratch);                                        \
  }                                                                                                \
  FASTFPL_CLONES void backward_range(const Real* d_logits, const Real* qz, const Real* rows,       \
                                     const Real* kv, const Real* stats, Real* d_qz, Real* d_kv,    \
                                     int64_t chunks, const Gate& g, int64_t begin, int64_t end,    \
                                     Real* scratch) {                                              \
    backward(d_logits, qz, rows, kv, stats, d_qz, d_kv, chunks, g, begin, end, scratch);           \
  }
FASTFPL_GATE(float)
FASTFPL_GATE(double)
#undef FASTFPL_GATE

// A vector of scores and values costs 2 d multiply-adds and about 20 instructions, at 3 a ns; a
// second thread pays from 20 us on. Backward is three times as much.
template <class Real>
int64_t threads_for(const Gate& g, int64_t times) {
  const double vectors = double(g.clients) * double(g.classes) * double(g.experts) *
                         double(g.heads) * double(g.images / kLanes<Real>);
  const double microseconds = double(times) * vectors * double(2 * g.width + 20) / 3000;
  return std::max<int64_t>(1, std::min(g.threads, int64_t(microseconds / 20)));
}

// A scratch area of `size` numbers a thread, each of whole cache lines.
template <class Real, class Work>
void with_scratch(int64_t threads, int64_t count, int64_t size, const Work& work) {
  const int64_t line = kLanes<Real>, stride = (size + line - 1) / line * line;
  std::vector<Real> memory(threads * stride + line);
  Real* scratch = memory.data();
  while (reinterpret_cast<uintptr_t>(scratch) % 64) ++scratch;
  parallel(threads, count, [&](int64_t i, int64_t begin, int64_t end) {
    work(begin, end, scratch + i * stride);
  });
}

}  // namespace

template <class Real>
void gate_fwd(const Real* qz, const Real* kv, Real* logits, Real* stats, const Gate& g) {
  const int64_t size = 4 * g.experts * kLanes<Real>;
  with_scratch<Real>(threads_for<Real>(g, 1), g.clients * g.classes, size,
                     [&](int64_t begin, int64_t end, Real* scratch) {
                       forward_range(qz, kv, logits, stats, g, begin, end, scratch);
                     });
}

template <class Real>
void gate_bwd(const Real* d_logits, const Real* qz, const Real* rows, const Real* kv,
              const Real* stats, Real* d_qz, Real* d_kv, int64_t chunks, const Gate& g) {
  const int64_t lanes = kLanes<Real>;
  const int64_t padded = gate_padded(g.width, sizeof(Real));
  const int64_t size = g.experts * (4 * lanes + 2 * padded);
  with_scratch<Real>(threads_for<Real>(g, 3), g.clients * chunks, size,
                     [&](int64_t begin, int64_t end, Real* scratch) {
                       backward_range(d_logits, qz, rows, kv, stats, d_qz, d_kv, chunks, g, begin,
                                      end, scratch);
                     });
}

template void gate_fwd<float>(const float*, const float*, float*, float*, const Gate&);
template void gate_fwd<double>(const double*, const double*, double*, double*, const Gate&);
template void gate_bwd<float>(const float*, const float*, const float*, const float*, const float*,
                              float*, float*, int64_t, const Gate&);
template void gate_bwd<double>(const double*, const double*, const double*, const double*,
                               const double*, double*, double*, int64_t, const Gate&);

}  // namespace fastfpl
