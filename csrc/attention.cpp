#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "number.h"
#include "simd.h"
#include "threads.h"

namespace fastfpl {
namespace {

// Rows of a chunk: a chunk holds whole segments, and is what one thread works on at a time. Its size
// does not depend on the number of threads, and so neither does any sum.
constexpr int64_t kRows = 64;
constexpr int64_t kLine = 16;  // columns of the tiles: a cache line of floats

struct Chunk {
  int64_t first, last;  // segments [first, last)
};

std::vector<Chunk> chunks_of(const PrefixAttention& a) {
  std::vector<Chunk> chunks;
  for (int64_t c = 0; c < a.segments;) {
    int64_t end = c + 1;
    while (end < a.segments && a.starts[end + 1] - a.starts[c] <= kRows) ++end;
    chunks.push_back({c, end});
    c = end;
  }
  return chunks;
}

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Every row of a tile has `depth` numbers: those of a head, filled up with zeros to whole blocks, so
// that the sums of a block stay in registers whatever the head's size.
constexpr int kBlock = 32;

// out (n, columns) = a (n, depth) * b (depth, columns); n a multiple of 4, columns of kLine.
template <class R>
FASTFPL_INLINE void rows_by_tiles(const R* FASTFPL_RESTRICT a, const R* FASTFPL_RESTRICT b,
                                  R* FASTFPL_RESTRICT out, int64_t n, int64_t columns,
                                  int64_t depth) {
  for (int64_t j = 0; j < columns; j += kLine)
    for (int64_t i = 0; i < n; i += 4) {
      R sum[4][kLine] = {};
      for (int64_t d = 0; d < depth; ++d) {
        const R* line = b + d * columns + j;
        for (int r = 0; r < 4; ++r) {
          const R x = a[(i + r) * depth + d];
#pragma omp simd
          for (int l = 0; l < kLine; ++l) sum[r][l] += x * line[l];
        }
      }
      for (int r = 0; r < 4; ++r)
        for (int l = 0; l < kLine; ++l) out[(i + r) * columns + j + l] = sum[r][l];
    }
}

// out (n, depth) += a (n, count) * b (count, depth), where a(i, j) = a[i * down + j * right].
template <class R>
FASTFPL_INLINE void add_product(const R* FASTFPL_RESTRICT a, int64_t down, int64_t right,
                                const R* FASTFPL_RESTRICT b, R* FASTFPL_RESTRICT out, int64_t n,
                                int64_t count, int64_t depth) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t block = 0; block < depth; block += kBlock) {
      R sum[kBlock];
      R* to = out + i * depth + block;
      for (int d = 0; d < kBlock; ++d) sum[d] = to[d];
      for (int64_t j = 0; j < count; ++j) {
        const R x = a[i * down + j * right];
        const R* from = b + j * depth + block;
#pragma omp simd
        for (int d = 0; d < kBlock; ++d) sum[d] += x * from[d];
      }
      for (int d = 0; d < kBlock; ++d) to[d] = sum[d];
    }
}

template <class R>
FASTFPL_INLINE R dot(const R* FASTFPL_RESTRICT a, const R* FASTFPL_RESTRICT b, int64_t depth) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < depth; ++d) sum += a[d] * b[d];
  return sum;
}

template <class R>
FASTFPL_INLINE void add_scaled(R x, const R* FASTFPL_RESTRICT from, R* FASTFPL_RESTRICT to,
                               int64_t depth) {
#pragma omp simd
  for (int64_t d = 0; d < depth; ++d) to[d] += x * from[d];
}

// One head of one group: a strided matrix of rows, read with its bias and written back.
template <class T>
struct Head {
  const T* base;  // row 0, first number of the head
  const T* bias;  // or null
  int64_t stride, size;

  FASTFPL_INLINE void read(int64_t row, wide<T> by, wide<T>* FASTFPL_RESTRICT out) const {
    const T* from = base + row * stride;
    for (int64_t d = 0; d < size; ++d)
      out[d] = by * (widen(from[d]) + (bias ? widen(bias[d]) : wide<T>(0)));
    for (int64_t d = size; d < up(size, kBlock); ++d) out[d] = 0;
  }
};

template <class T>
FASTFPL_INLINE void write(const wide<T>* FASTFPL_RESTRICT from, wide<T> by, T* FASTFPL_RESTRICT to,
                          int64_t size) {
  for (int64_t d = 0; d < size; ++d) narrow(by * from[d], to[d]);
}

template <class T>
struct Qkv {
  Head<T> q, k, v;

  FASTFPL_INLINE Qkv(const T* qkv, const T* bias, const PrefixAttention& a, int64_t g, int64_t h) {
    const int64_t width = a.heads * a.size, rows = a.shared + a.starts[a.segments];
    const T* first = qkv + g * rows * 3 * width + h * a.size;
    const T* more = bias ? bias + h * a.size : nullptr;
    q = {first, more, 3 * width, a.size};
    k = {first + width, bias ? more + width : nullptr, 3 * width, a.size};
    v = {first + 2 * width, bias ? more + 2 * width : nullptr, 3 * width, a.size};
  }
};

// What a chunk attends to besides itself. `count` keys, filled up with zeros to `columns`.
template <class R>
struct Shared {
  int64_t count, columns, depth;
  std::vector<R> k, v, k_t, v_t;  // (columns, depth) and transposed (depth, columns)

  void reserve(int64_t rows, int64_t size, bool all) {
    const int64_t numbers = up(rows, kLine) * up(size, kBlock);
    for (auto* x : {&k, &v, &k_t}) x->reserve(numbers);
    if (all) v_t.reserve(numbers);
  }

  // `all`: also the two that only gradients need.
  template <class T>
  FASTFPL_INLINE void load(const Qkv<T>& x, int64_t rows, bool all) {
    count = rows, columns = up(rows, kLine), depth = up(x.k.size, kBlock);
    k.assign(columns * depth, 0), v.assign(columns * depth, 0);
    k_t.resize(columns * depth);
    for (int64_t j = 0; j < count; ++j) {
      x.k.read(j, 1, &k[j * depth]);
      x.v.read(j, 1, &v[j * depth]);
    }
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t d = 0; d < depth; ++d) k_t[d * columns + j] = k[j * depth + d];
    if (!all) return;
    v_t.resize(columns * depth);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t d = 0; d < depth; ++d) v_t[d * columns + j] = v[j * depth + d];
  }
};

// A run of rows that hold whole segments, with the queries among them.
template <class R>
struct Work {
  int64_t depth;
  std::vector<R> q, k, v, out;       // rows of the chunk; q and out (queries, depth)
  std::vector<R> score, own;         // of the shared keys (queries, columns); of one query's own
  std::vector<R> d_out, d_k, d_v, d_score, d_own, sos_k, sos_v;
  std::vector<int64_t> row, begin;   // of every query: its row in the chunk, its segment's first

  // For so many rows, queries and scores of shared keys at most.
  void reserve(int64_t rows, int64_t asked, int64_t scores, int64_t size, bool all) {
    const int64_t n = up(asked, 4), d = up(size, kBlock);
    row.reserve(asked), begin.reserve(asked);
    q.reserve(n * d), out.reserve(std::max(n, all ? rows : int64_t(0)) * d);
    k.reserve(rows * d), v.reserve(rows * d);
    score.reserve(scores), own.reserve(rows + 1), d_own.reserve(rows + 1);
    sos_k.reserve(d), sos_v.reserve(d);
    if (!all) return;
    d_out.reserve(n * d), d_k.reserve(rows * d), d_v.reserve(rows * d), d_score.reserve(scores);
  }

  FASTFPL_INLINE void queries(const PrefixAttention& a, const Chunk& chunk) {
    row.clear(), begin.clear();
    const int64_t origin = a.starts[chunk.first];
    for (int64_t c = chunk.first; c < chunk.last; ++c) {
      const int64_t first = a.starts[c] - origin, end = a.starts[c + 1] - origin;
      for (int64_t i = a.last_only ? end - 1 : first; i < end; ++i)
        row.push_back(i), begin.push_back(first);
    }
  }

  // Everything of the chunk whose first row is `origin` in its group.
  template <class T>
  FASTFPL_INLINE void load(const Qkv<T>& x, const T* sos, const PrefixAttention& a, int64_t h,
                           int64_t origin, int64_t rows) {
    const int64_t n = up(row.size(), 4), width = a.heads * a.size;
    const R scale = R(1 / std::sqrt(double(a.size)));
    depth = up(a.size, kBlock);
    q.assign(n * depth, 0);
    for (size_t i = 0; i < row.size(); ++i)
      x.q.read(origin + row[i], scale, &q[i * depth]);
    k.resize(rows * depth), v.resize(rows * depth);
    for (int64_t j = 0; j < rows; ++j) {
      x.k.read(origin + j, 1, &k[j * depth]);
      x.v.read(origin + j, 1, &v[j * depth]);
    }
    if (sos) {
      sos_k.resize(depth), sos_v.resize(depth);
      const Head<T> key{sos + h * a.size, nullptr, 0, a.size};
      const Head<T> value{sos + width + h * a.size, nullptr, 0, a.size};
      key.read(0, 1, sos_k.data());
      value.read(0, 1, sos_v.data());
    }
    own.resize(rows + 1), d_own.resize(rows + 1);
  }

  // The softmax of query i over shared keys (left in `score`), SOS and own rows (in `own`).
  FASTFPL_INLINE void weigh(const Shared<R>& shared, size_t i, bool sos) {
    R* FASTFPL_RESTRICT p = score.data() + i * shared.columns;
    R* FASTFPL_RESTRICT o = own.data();
    const R* query = &q[i * depth];
    const int64_t mine = row[i] - begin[i] + 1;
    R high = -std::numeric_limits<R>::infinity();
    if (sos) high = o[mine] = dot(query, sos_k.data(), depth);
    for (int64_t j = 0; j < mine; ++j) {
      o[j] = dot(query, &k[(begin[i] + j) * depth], depth);
      high = o[j] > high ? o[j] : high;
    }
#pragma omp simd reduction(max : high)
    for (int64_t j = 0; j < shared.count; ++j) high = p[j] > high ? p[j] : high;
    R sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < shared.count; ++j) sum += p[j] = exp_of_negative(p[j] - high);
    const int64_t others = mine + (sos ? 1 : 0);
    for (int64_t j = 0; j < others; ++j) sum += o[j] = exp_of_negative(o[j] - high);
    const R by = 1 / sum;
    for (int64_t j = 0; j < shared.count; ++j) p[j] *= by;
    for (int64_t j = shared.count; j < shared.columns; ++j) p[j] = 0;
    for (int64_t j = 0; j < others; ++j) o[j] *= by;
  }
};

template <class R>
FASTFPL_INLINE void forward_rows(Work<R>& w, const Shared<R>& shared, bool sos) {
  const int64_t n = up(w.row.size(), 4), depth = w.depth;
  w.score.resize(n * shared.columns);
  rows_by_tiles(w.q.data(), shared.k_t.data(), w.score.data(), n, shared.columns,
                depth);
  w.out.assign(n * depth, 0);
  for (size_t i = 0; i < w.row.size(); ++i) {
    w.weigh(shared, i, sos);
    const int64_t mine = w.row[i] - w.begin[i] + 1;
    for (int64_t j = 0; j < mine; ++j)
      add_scaled(w.own[j], &w.v[(w.begin[i] + j) * depth], &w.out[i * depth], depth);
    if (sos) add_scaled(w.own[mine], w.sos_v.data(), &w.out[i * depth], depth);
  }
  add_product(w.score.data(), shared.columns, 1, shared.v.data(), w.out.data(), w.row.size(),
              shared.count, depth);
}

// Gradients of the chunk's own queries (into w.out), keys and values, and of the shared ones, which
// are added to d_k and d_v (count, depth). w.d_out holds the gradient of the outputs.
template <class R>
FASTFPL_INLINE void backward_rows(Work<R>& w, const Shared<R>& shared, bool sos, int64_t rows,
                                  R* d_k, R* d_v) {
  const int64_t n = up(w.row.size(), 4), columns = shared.columns, depth = w.depth;
  w.score.resize(n * columns), w.d_score.resize(n * columns);
  rows_by_tiles(w.q.data(), shared.k_t.data(), w.score.data(), n, columns, depth);
  rows_by_tiles(w.d_out.data(), shared.v_t.data(), w.d_score.data(), n, columns,
                depth);
  w.out.assign(n * depth, 0), w.d_k.assign(rows * depth, 0), w.d_v.assign(rows * depth, 0);
  for (size_t i = 0; i < w.row.size(); ++i) {
    w.weigh(shared, i, sos);
    const int64_t mine = w.row[i] - w.begin[i] + 1, first = w.begin[i];
    const R* d_out = &w.d_out[i * depth];
    const R* FASTFPL_RESTRICT p = &w.score[i * columns];
    R* FASTFPL_RESTRICT d_p = &w.d_score[i * columns];
    R mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < columns; ++j) mean += p[j] * d_p[j];
    for (int64_t j = 0; j < mine; ++j) {
      w.d_own[j] = dot(d_out, &w.v[(first + j) * depth], depth);
      mean += w.own[j] * w.d_own[j];
    }
    if (sos) mean += w.own[mine] * dot(d_out, w.sos_v.data(), depth);
    for (int64_t j = 0; j < columns; ++j) d_p[j] = p[j] * (d_p[j] - mean);
    for (int64_t j = 0; j < mine; ++j) {
      const R d = w.own[j] * (w.d_own[j] - mean);
      add_scaled(d, &w.k[(first + j) * depth], &w.out[i * depth], depth);
      add_scaled(d, &w.q[i * depth], &w.d_k[(first + j) * depth], depth);
      add_scaled(w.own[j], d_out, &w.d_v[(first + j) * depth], depth);
    }
    if (sos) {
      const R d = w.own[mine] * (dot(d_out, w.sos_v.data(), depth) - mean);
      add_scaled(d, w.sos_k.data(), &w.out[i * depth], depth);
    }
  }
  const int64_t real = w.row.size();
  add_product(w.d_score.data(), columns, 1, shared.k.data(), w.out.data(), real, shared.count,
              depth);
  add_product(w.d_score.data(), 1, columns, w.q.data(), d_k, shared.count, real, depth);
  add_product(w.score.data(), 1, columns, w.d_out.data(), d_v, shared.count, real, depth);
}

// The prefix' own rows are one segment that shares nothing but SOS.
PrefixAttention prefix_alone(const PrefixAttention& a, const int64_t* whole) {
  PrefixAttention one = a;
  one.shared = 0, one.segments = 1, one.starts = whole, one.last_only = false;
  return one;
}

// What a thread works in.
template <class R>
struct Scratch {
  Shared<R> shared;
  Work<R> work;
};

// Of every thread, as large as any item needs it: an allocation that fails among threads could not
// be reported, and would end the process.
template <class R>
std::vector<Scratch<R>> scratch_of(const PrefixAttention& a, const std::vector<Chunk>& chunks,
                                   int64_t threads, bool gradients) {
  int64_t rows = a.shared, asked = 0;
  for (const Chunk& chunk : chunks) {
    const int64_t length = a.starts[chunk.last] - a.starts[chunk.first];
    rows = std::max(rows, length);
    asked = std::max(asked, a.last_only ? chunk.last - chunk.first : length);
  }
  const int64_t scores = up(asked, 4) * up(a.shared, kLine);  // the prefix itself shares no key
  if (!a.last_only) asked = std::max(asked, a.shared);
  std::vector<Scratch<R>> scratch(threads);
  for (auto& one : scratch) {
    one.shared.reserve(a.shared, a.size, gradients);
    one.work.reserve(rows, asked, scores, a.size, gradients);
  }
  return scratch;
}

template <class T>
FASTFPL_INLINE void forward_range(const T* qkv, const T* bias, const T* sos, T* mixed,
                                  const PrefixAttention& a, const Chunk* chunks, int64_t count,
                                  int64_t begin, int64_t end, Scratch<wide<T>>& scratch) {
  using R = wide<T>;
  const int64_t width = a.heads * a.size, rows = a.shared + a.starts[a.segments];
  const int64_t outputs = a.last_only ? a.segments : rows, whole[2] = {0, a.shared};
  const bool prefix = a.shared && !a.last_only;
  const PrefixAttention alone = prefix_alone(a, whole);
  // in locals, whose members the compiler keeps in registers
  Shared<R> shared = std::move(scratch.shared), nothing;
  nothing.count = nothing.columns = 0;
  Work<R> w = std::move(scratch.work);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t g = item / a.heads / (count + 1), at = item % (a.heads * (count + 1));
    const int64_t h = at / (count + 1), i = at % (count + 1);
    const Qkv<T> x(qkv, bias, a, g, h);
    T* out = mixed + g * outputs * width + h * a.size;
    if (i == count) {  // the prefix comes after the chunks
      if (!prefix) continue;
      w.queries(alone, {0, 1});
      w.load(x, sos, a, h, 0, a.shared);
      forward_rows(w, nothing, sos);
      for (int64_t r = 0; r < a.shared; ++r)
        write(&w.out[r * w.depth], R(1), out + r * width, a.size);
      continue;
    }
    if (i == 0 || item == begin) shared.load(x, a.shared, false);
    const Chunk& chunk = chunks[i];
    const int64_t origin = a.starts[chunk.first];
    w.queries(a, chunk);
    w.load(x, sos, a, h, a.shared + origin, a.starts[chunk.last] - origin);
    forward_rows(w, shared, sos);
    const int64_t first = a.last_only ? chunk.first : a.shared + origin;
    for (size_t r = 0; r < w.row.size(); ++r)
      write(&w.out[r * w.depth], R(1), out + (first + r) * width, a.size);
  }
  scratch = {std::move(shared), std::move(w)};
}

// Phase 0: the chunks, each leaving its part of the prefix' gradient in `parts`
// (G, H, chunks, 2, S, depth). Phase 1: the prefix' rows, with the parts added in their order.
template <class T>
FASTFPL_INLINE void backward_range(int phase, const T* d_mixed, const T* qkv, const T* bias,
                                   const T* sos, T* d_qkv, wide<T>* parts, const PrefixAttention& a,
                                   const Chunk* chunks, int64_t count, int64_t begin, int64_t end,
                                   Scratch<wide<T>>& scratch) {
  using R = wide<T>;
  const int64_t width = a.heads * a.size, rows = a.shared + a.starts[a.segments];
  const int64_t outputs = a.last_only ? a.segments : rows, whole[2] = {0, a.shared};
  const int64_t depth = up(a.size, kBlock), part = 2 * a.shared * depth;
  const R scale = R(1 / std::sqrt(double(a.size)));
  const PrefixAttention alone = prefix_alone(a, whole);
  // in locals, whose members the compiler keeps in registers
  Shared<R> shared = std::move(scratch.shared), nothing;
  nothing.count = nothing.columns = 0;
  Work<R> w = std::move(scratch.work);
  auto read_gradient = [&](const T* from, size_t queries) {
    w.d_out.assign(up(queries, 4) * depth, 0);
    const Head<T> head{from, nullptr, width, a.size};
    for (size_t r = 0; r < queries; ++r) head.read(r, 1, &w.d_out[r * depth]);
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t per = phase ? 1 : count;
    const int64_t g = item / per / a.heads, h = item / per % a.heads, i = item % per;
    const Qkv<T> x(qkv, bias, a, g, h);
    const T* d_out = d_mixed + g * outputs * width + h * a.size;
    T* d_q = d_qkv + g * rows * 3 * width + h * a.size;
    R* mine = parts + (g * a.heads + h) * count * part;
    if (phase) {
      w.row.clear(), w.begin.clear();
      if (!a.last_only) w.queries(alone, {0, 1});
      w.load(x, sos, a, h, 0, a.shared);
      read_gradient(d_out, w.row.size());
      backward_rows<R>(w, nothing, sos, a.shared, nullptr, nullptr);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t n = 0; n < a.shared * depth; ++n) {
          w.d_k[n] += mine[c * part + n];
          w.d_v[n] += mine[c * part + a.shared * depth + n];
        }
      w.out.resize(std::max<size_t>(w.out.size(), a.shared * depth));  // zeros where no row asks
      for (int64_t r = 0; r < a.shared; ++r) {
        T* to = d_q + r * 3 * width;
        write(&w.out[r * depth], scale, to, a.size);
        write(&w.d_k[r * depth], R(1), to + width, a.size);
        write(&w.d_v[r * depth], R(1), to + 2 * width, a.size);
      }
      continue;
    }
    if (i == 0 || item == begin) shared.load(x, a.shared, true);
    const Chunk& chunk = chunks[i];
    const int64_t origin = a.starts[chunk.first], length = a.starts[chunk.last] - origin;
    w.queries(a, chunk);
    w.load(x, sos, a, h, a.shared + origin, length);
    const int64_t first = a.last_only ? chunk.first : a.shared + origin;
    read_gradient(d_out + first * width, w.row.size());
    R* d_k = mine + i * part;
    std::fill(d_k, d_k + part, R(0));
    backward_rows(w, shared, sos, length, d_k, d_k + a.shared * depth);
    T* to = d_q + (a.shared + origin) * 3 * width;
    for (int64_t r = 0; r < length; ++r) {
      if (a.last_only)
        for (int64_t d = 0; d < a.size; ++d) narrow(R(0), to[r * 3 * width + d]);
      write(&w.d_k[r * depth], R(1), to + r * 3 * width + width, a.size);
      write(&w.d_v[r * depth], R(1), to + r * 3 * width + 2 * width, a.size);
    }
    for (size_t r = 0; r < w.row.size(); ++r)
      write(&w.out[r * depth], scale, to + w.row[r] * 3 * width, a.size);
  }
  scratch = {std::move(shared), std::move(w)};
}

// The attribute belongs on plain functions, one a type.
#define FASTFPL_RANGES(T)                                                                         \
  FASTFPL_CLONES void forward_some(const T* qkv, const T* bias, const T* sos, T* mixed,           \
                                   const PrefixAttention& a, const Chunk* chunks, int64_t count,  \
                                   int64_t begin, int64_t end, Scratch<wide<T>>& scratch) {       \
    forward_range(qkv, bias, sos, mixed, a, chunks, count, begin, end, scratch);                  \
  }                                                                                               \
  FASTFPL_CLONES void backward_some(int phase, const T* d_mixed, const T* qkv, const T* bias,     \
                                    const T* sos, T* d_qkv, wide<T>* parts,                       \
                                    const PrefixAttention& a, const Chunk* chunks, int64_t count, \
                                    int64_t begin, int64_t end, Scratch<wide<T>>& scratch) {      \
    backward_range(phase, d_mixed, qkv, bias, sos, d_qkv, parts, a, chunks, count, begin, end,    \
                   scratch);                                                                      \
  }
FASTFPL_RANGES(float)
FASTFPL_RANGES(double)
FASTFPL_RANGES(bf16)
#undef FASTFPL_RANGES

}  // namespace

template <class T>
void prefix_attention_fwd(const T* qkv, const T* bias, const T* sos, T* mixed,
                          const PrefixAttention& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  const int64_t count = chunks.size(), items = a.groups * a.heads * (count + 1);
  const int64_t threads = std::max<int64_t>(1, std::min(a.threads, items));
  auto scratch = scratch_of<wide<T>>(a, chunks, threads, false);
  parallel(threads, items, [&](int64_t i, int64_t begin, int64_t end) {
    forward_some(qkv, bias, sos, mixed, a, chunks.data(), count, begin, end, scratch[i]);
  });
}

template <class T>
void prefix_attention_bwd(const T* d_mixed, const T* qkv, const T* bias, const T* sos, T* d_qkv,
                          const PrefixAttention& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  const int64_t count = chunks.size(), heads = a.groups * a.heads;
  const int64_t threads = std::max<int64_t>(1, std::min(a.threads, heads * count));
  std::vector<wide<T>> parts(heads * count * 2 * a.shared * up(a.size, kBlock));
  auto scratch = scratch_of<wide<T>>(a, chunks, threads, true);
  for (int phase = 0; phase < (a.shared ? 2 : 1); ++phase)
    parallel(threads, phase ? heads : heads * count, [&](int64_t i, int64_t begin, int64_t end) {
      backward_some(phase, d_mixed, qkv, bias, sos, d_qkv, parts.data(), a, chunks.data(), count,
                    begin, end, scratch[i]);
    });
}

#define FASTFPL_INSTANTIATE(T)                                                                   \
  template void prefix_attention_fwd<T>(const T*, const T*, const T*, T*, const PrefixAttention&); \
  template void prefix_attention_bwd<T>(const T*, const T*, const T*, const T*, T*,              \
                                        const PrefixAttention&);
FASTFPL_INSTANTIATE(float)
FASTFPL_INSTANTIATE(double)
FASTFPL_INSTANTIATE(bf16)
#undef FASTFPL_INSTANTIATE

}  // namespace fastfpl
