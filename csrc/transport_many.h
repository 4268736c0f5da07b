// One problem of any N prompts, any weights: Newton steps on the shares of the columns.
//
// With v = exp(g), the row-capped plan T(g) minimises a convex function of the N numbers g whose
// gradient is (columns of T) - (their targets). What all g share, their level, is found exactly each
// time: given g, a row of T is min(1, sum_n exp(z + g)) of its bound, so that the level is a root in
// one scalar over P numbers. In what is left, the Hessian is the Laplacian of a graph with
//     edge(n, k) = sum over capped rows of T_n T_k  +  free_n free_k / free
// (free: the columns of the rows below their bound), a matrix of N - 1. A step solves it for the
// logarithms of target / column, which makes the step exact where columns are exponentials of g; a
// line search on the derivative along the step keeps it convergent everywhere.
//
// CLIP's similarities take 3 to 10 passes. Where those of [-1, 1] at eps = .005 fill whole rows, the
// search for which rows these are takes 50 to 100 and at worst some 450. Beginning at a higher
// temperature halves the worst of them and lengthens as many others; steps longer than one do not
// help.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd.h"
#include "transport.h"

namespace fastfpl {

// Arrays over the patches, all of one thread, `stride` numbers apart. Lanes beyond the patches have
// weight zero: no loop has a rest.
template <class Real>
struct Lanes {
  Real *z, *p, *weight, *top, *sum, *value, *shared;
  int64_t stride, lanes;

  static int64_t padded(int64_t patches) {
    constexpr int64_t line = 64 / sizeof(Real);
    return (patches + line - 1) / line * line;
  }
  static int64_t size(int64_t patches, int64_t prompts) {
    return (2 * prompts + 5) * padded(patches);
  }

  Lanes(Real* memory, int64_t patches, int64_t prompts)
      : stride(padded(patches)), lanes(padded(patches)) {
    z = memory, p = z + prompts * stride, weight = p + prompts * stride;
    top = weight + stride, sum = top + stride, value = sum + stride, shared = value + stride;
  }
};

template <class Real>
struct Many {
  Lanes<Real> a;
  int64_t K;  // columns with mass
  bool balanced;
  double wanted[kMostPrompts], total;  // of the columns, in units of a mean row's bound
  double bound;                        // of all rows
  double g[kMostPrompts], column[kMostPrompts], free[kMostPrompts], all_free;
  double gap[kMostPrompts], miss;  // logarithms of target / column, and the largest of them

  // Row sums of exp(z + g) over their largest entry; p holds the entries over it.
  FASTFPL_INLINE void exponentials() {
    const int64_t L = a.lanes;
    Real* FASTFPL_RESTRICT top = a.top;
    Real* FASTFPL_RESTRICT sum = a.sum;
    for (int64_t n = 0; n < K; ++n) {
      // log v in two floats: it may be 400, where a float's last bit is 3e-5
      const Real high = Real(g[n]), low = Real(g[n] - double(high));
      const Real* FASTFPL_RESTRICT z = a.z + n * a.stride;
      Real* FASTFPL_RESTRICT p = a.p + n * a.stride;
      if (n == 0) {
#pragma omp simd
        for (int64_t m = 0; m < L; ++m) p[m] = (z[m] + high) + low, top[m] = p[m], sum[m] = 0;
      } else {
#pragma omp simd
        for (int64_t m = 0; m < L; ++m) {
          p[m] = (z[m] + high) + low;
          top[m] = p[m] > top[m] ? p[m] : top[m];
        }
      }
    }
    for (int64_t n = 0; n < K; ++n) {
      Real* FASTFPL_RESTRICT p = a.p + n * a.stride;
#pragma omp simd
      for (int64_t m = 0; m < L; ++m) {
        p[m] = exp_of_negative(p[m] - top[m]);
        sum[m] += p[m];
      }
    }
  }

  // Moves all g to the level at which the capped rows add up; `guess` is where to look first.
  FASTFPL_INLINE void find_level(double guess, double near) {
    if (balanced || std::isinf(near)) return;
    // summed from the side that is small, so that the last rows' room is known as well as the total
    const Real base = total > .5 * bound ? Real(1) : Real(0);
    const double room = .1 * (bound - total);
    const int64_t L = a.lanes;
    const Real* FASTFPL_RESTRICT top = a.top;
    const Real* FASTFPL_RESTRICT sum = a.sum;
    const Real* FASTFPL_RESTRICT weight = a.weight;
    double low = -std::numeric_limits<double>::infinity(), high = -low;
    double level = guess;
    for (int64_t i = 0; i < 200; ++i) {
      const Real up = Real(level), rest = Real(level - double(up));
      Real part = 0, loose = 0;
#pragma omp simd reduction(+ : part, loose)
      for (int64_t m = 0; m < L; ++m) {
        const Real x = (top[m] + up) + rest;
        const Real v = sum[m] * exp_of_negative(x < 0 ? x : Real(0));
        part += weight[m] * ((v < 1 ? v : Real(1)) - base);
        loose += v < 1 ? weight[m] * v : Real(0);
      }
      const double held = double(part) + double(base) * bound, by = std::log(total / held);
      if (std::abs(by) <= near && std::abs(total - held) <= room) break;
      (by > 0 ? low : high) = level;
      double next = level + by * held / double(loose);
      if ((std::isinf(low) || std::isinf(high)) && !(std::abs(next - level) < 2)) {
        // far away: now look from where on every row is below its share, and where all are capped
        Real least = std::numeric_limits<Real>::max(), most = -least;
        for (int64_t m = 0; m < L; ++m) {
          least = top[m] < least ? top[m] : least;
          most = top[m] > most ? top[m] : most;
        }
        low = std::max(low, std::log(total / bound / double(2 * K)) - double(most));
        high = std::min(high, 1e-3 - double(least));
      }
      if (!(next > low && next < high)) {
        next = low + (high - low) / 2;
        if (!(next > low && next < high)) break;
      }
      level = next;
    }
    for (int64_t n = 0; n < K; ++n) g[n] += level;
    const Real up = Real(level), rest = Real(level - double(up));
    Real* FASTFPL_RESTRICT moved = a.top;
#pragma omp simd
    for (int64_t m = 0; m < L; ++m) moved[m] = (moved[m] + up) + rest;
  }

  // Sums of the plan's columns. `value` is then what p must be multiplied with, weight included,
  // and `shared` the same for products of two columns in capped rows.
  FASTFPL_INLINE void columns() {
    const int64_t L = a.lanes;
    const Real* FASTFPL_RESTRICT top = a.top;
    const Real* FASTFPL_RESTRICT sum = a.sum;
    const Real* FASTFPL_RESTRICT weight = a.weight;
    Real* FASTFPL_RESTRICT value = a.value;
    Real* FASTFPL_RESTRICT shared = a.shared;
    if (balanced) {
#pragma omp simd
      for (int64_t m = 0; m < L; ++m) {
        const Real u = 1 / sum[m];
        value[m] = weight[m] * u, shared[m] = weight[m] * u * u;
      }
    } else {
#pragma omp simd
      for (int64_t m = 0; m < L; ++m) {
        const Real e = exp_of_negative(top[m] < 0 ? top[m] : Real(0));
        const Real u = 1 / sum[m];
        const bool capped = sum[m] * e >= 1;
        value[m] = weight[m] * (capped ? u : e);
        shared[m] = capped ? weight[m] * u * u : Real(0);
      }
    }
    all_free = 0;
    for (int64_t n = 0; n < K; ++n) {
      const Real* FASTFPL_RESTRICT p = a.p + n * a.stride;
      Real held = 0, loose = 0;
#pragma omp simd reduction(+ : held, loose)
      for (int64_t m = 0; m < L; ++m) {
        const Real t = p[m] * value[m];
        held += t;
        loose += shared[m] > 0 ? Real(0) : t;
      }
      column[n] = double(held), free[n] = balanced ? 0 : double(loose);
      all_free += free[n];
    }
    miss = 0;
    for (int64_t n = 0; n < K; ++n) {
      // finite: a column may be too small for a number
      const double least = std::numeric_limits<Real>::min();
      gap[n] = std::log(wanted[n] / std::max(column[n], least));
      miss = std::max(miss, std::abs(gap[n]));
    }
  }

  FASTFPL_INLINE void evaluate(double guess, double near) {
    exponentials();
    find_level(guess, near);
    columns();
  }

  static constexpr double kNothing = 1e8 * double(std::numeric_limits<Real>::min());

  // The step for g and the derivative along it; `damping` mixes in the graph of a plan without
  // structure, for which the step is the scaling of the columns.
  FASTFPL_INLINE double direction(double damping, double* d) const {
    double edge[kMostPrompts][kMostPrompts], held = 0, mean = 0;
    int64_t last = 0;
    for (int64_t n = 0; n < K; ++n) {
      held += column[n], mean += column[n] * gap[n];
      if (column[n] > column[last]) last = n;
    }
    mean /= held;
    for (int64_t n = 0; n < K; ++n) edge[n][n] = 0;
    for (int64_t n = 0; n < K; ++n)
      for (int64_t k = 0; k < n; ++k) {
        const Real* FASTFPL_RESTRICT pn = a.p + n * a.stride;
        const Real* FASTFPL_RESTRICT pk = a.p + k * a.stride;
        const Real* FASTFPL_RESTRICT shared = a.shared;
        Real both = 0;
#pragma omp simd reduction(+ : both)
        for (int64_t m = 0; m < a.lanes; ++m) both += pn[m] * pk[m] * shared[m];
        double x = double(both) + damping * column[n] * column[k] / held;
        if (all_free > 0) x += free[n] * free[k] / all_free;
        edge[n][k] = edge[k][n] = x;
        edge[n][n] += x, edge[k][k] += x;
      }
    // Cholesky of the Laplacian without the row of the largest column, whose step is zero
    double l[kMostPrompts][kMostPrompts], y[kMostPrompts];
    int64_t index[kMostPrompts], size = 0;
    for (int64_t n = 0; n < K; ++n)
      if (n != last && column[n] > kNothing) index[size++] = n;
    bool sound = true;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double x = i == j ? edge[index[i]][index[i]] : -edge[index[i]][index[j]];
        for (int64_t k = 0; k < j; ++k) x -= l[i][k] * l[j][k];
        if (i == j) {
          sound = sound && x > 0;
          l[i][i] = std::sqrt(x);
        } else {
          l[i][j] = x / l[j][j];
        }
      }
      double x = column[index[i]] * (gap[index[i]] - mean);
      for (int64_t k = 0; k < i; ++k) x -= l[i][k] * y[k];
      y[i] = x / l[i][i];
    }
    for (int64_t i = size - 1; i >= 0; --i) {
      double x = y[i];
      for (int64_t k = i + 1; k < size; ++k) x -= l[k][i] * y[k];
      y[i] = x / l[i][i];
      sound = sound && std::isfinite(y[i]);
    }
    // a column that has all but vanished is first scaled to where it can be seen
    for (int64_t n = 0; n < K; ++n) d[n] = n == last ? 0 : gap[n] - mean;
    for (int64_t i = 0; i < size; ++i) d[index[i]] = y[i];
    double slope = sound ? along(d) : 0;
    if (!(slope < 0)) {  // a scaling of the columns always leads down
      for (int64_t n = 0; n < K; ++n) d[n] = gap[n];
      slope = along(d);
    }
    return slope;
  }

  FASTFPL_INLINE double along(const double* d) const {
    double slope = 0, held = 0;
    for (int64_t n = 0; n < K; ++n) held += column[n];
    held /= total;  // the level is never quite right, and no matter here
    for (int64_t n = 0; n < K; ++n) slope += (column[n] - wanted[n] * held) * d[n];
    return slope;
  }

  // Iterates; returns the passes over the similarities. g and the plan's factors are then the best.
  FASTFPL_INLINE int64_t solve(double tol, int64_t max_iter, double& residual) {
    double from[kMostPrompts], d[kMostPrompts], best_g[kMostPrompts];
    double best = std::numeric_limits<double>::infinity();
    int64_t n = 0, since = 0;
    bool polishing = false, settled = false;  // settled: the level is as near as tol asks
    evaluate(0, std::max(tol / 8, 1e-2));
    ++n;
    while (true) {
      double now = miss;
      if (now < best) {
        best = now, since = 0;
        for (int64_t i = 0; i < K; ++i) best_g[i] = g[i];
      } else if (++since > 40 && best < 1e-3) {
        break;  // rounding
      }
      if (polishing || n >= max_iter || now <= tol / 32) break;
      polishing = now <= tol;
      const double damping = std::min(1e-4, 1e-2 * now) * std::exp2(double(since));
      const double slope = direction(std::min(1., damping), d);
      double most = 0, largest = 1, level = 0, noise = 0;
      for (int64_t i = 0; i < K; ++i) {
        noise += 8 * double(std::numeric_limits<Real>::epsilon()) * column[i] * std::abs(d[i]);
        most = std::max(most, std::abs(d[i])), largest = std::max(largest, std::abs(g[i]));
        from[i] = g[i], level -= free[i] * d[i];
      }
      level = all_free > 0 ? level / all_free : 0;
      // a wrong level may fall on one column alone
      double near = std::max(tol / 8, std::min(1e-2, .02 * now)) / double(K);
      // nothing is left but the level, which moves free rows alone and so the shares; or rounding
      const double finest = tol / 8 / double(K);
      if (most <= 1e-16 * largest) polishing = polishing || settled, near = finest;
      settled = near <= finest;
      double t = 1, low = 0, high = 1, slope_low = slope;
      for (int64_t i = 0;; ++i) {
        for (int64_t j = 0; j < K; ++j) g[j] = from[j] + t * d[j];
        evaluate(std::abs(t * level) < 50 ? t * level : 0, near);
        ++n;
        const double here = along(d);
        if (here <= -.5 * slope + noise || miss <= .5 * now) break;
        if (polishing || n >= max_iter || i == 30) break;
        high = t;
        const double secant = low + (t - low) * slope_low / (slope_low - here);
        t = std::min(std::max(secant, low + .1 * (high - low)), low + .5 * (high - low));
      }
    }
    if (miss > best) {
      for (int64_t i = 0; i < K; ++i) g[i] = best_g[i];
      evaluate(0, std::numeric_limits<double>::infinity());  // the level as it was
    }
    residual = miss;
    return n;
  }
};

// Solves problem b, whose z lie in `a`, and leaves the plan in a.p; returns sum plan * z.
template <class Real, class Given>
FASTFPL_INLINE Real solve_many(const Arrays<Given>& x, const Transport& t, int64_t b,
                               const Lanes<Real>& a, double& residual) {
  const int64_t P = t.patches, N = t.prompts;
  Many<Real> s{a, 0, t.balanced};
  const Given* rows = x.rows ? x.rows + b * P : nullptr;
  const Given* columns = x.columns ? x.columns + b * N : nullptr;
  double bound = 0, held = 0, sum[kMostPrompts];
  for (int64_t m = 0; m < P; ++m) bound += rows ? double(rows[m]) : 1 / double(P);
  for (int64_t n = 0; n < N; ++n) {
    sum[n] = columns ? double(columns[n]) : t.mass / double(N);
    held += sum[n];
  }
  // bounds of one on average, and no weight beyond the patches
  const double unit = double(P) / bound;
  for (int64_t m = 0; m < P; ++m) a.weight[m] = rows ? Real(double(rows[m]) * unit) : Real(1);
  std::fill(a.weight + P, a.weight + a.lanes, Real(0));
  if (rows && !t.balanced) {  // a row is weight * min(1, sum_n exp(z + g)): z in units of its bound
    for (int64_t m = 0; m < P; ++m) {
      if (!(a.weight[m] > 0)) continue;
      const Real unit_bound = std::log(a.weight[m]);
      for (int64_t n = 0; n < N; ++n) a.z[n * a.stride + m] -= unit_bound;
    }
  }
  s.bound = double(P), s.total = t.balanced ? s.bound : held * unit;
  int64_t place[kMostPrompts];
  for (int64_t n = 0; n < N; ++n) {
    Real* z = a.z + n * a.stride;
    std::fill(z + P, z + a.lanes, Real(0));
    if (!(sum[n] > 0)) continue;
    s.wanted[s.K] = sum[n] / held * s.total;
    place[s.K] = n;
    if (s.K != n) std::copy(z, z + a.lanes, a.z + s.K * a.stride);
    ++s.K;
  }
  for (int64_t k = 0; k < s.K; ++k) {
    const Real* z = a.z + k * a.stride;
    Real mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t m = 0; m < a.lanes; ++m) mean += a.weight[m] * z[m];
    s.g[k] = std::log(s.wanted[k] / s.total) - double(mean) / double(P);
  }
  x.iterations[b] = s.solve(t.tol, t.max_iter, residual);

  Real score = 0;
  for (int64_t k = s.K - 1; k >= 0; --k) {
    // a column without a number stays empty; its residual says so
    const double v = s.column[k] > 0 ? sum[place[k]] / s.column[k] : 0;
    const Real* z = a.z + k * a.stride;
    const Real* p = a.p + k * a.stride;
    Real* out = a.p + place[k] * a.stride;  // place[k] >= k: what is still needed lies before it
#pragma omp simd reduction(+ : score)
    for (int64_t m = 0; m < P; ++m) {
      const Real part = p[m] * a.value[m];  // rounded as in the column's sum
      const Real plan = Real(double(part) * v);
      out[m] = plan;
      score += plan * z[m];
    }
  }
  for (int64_t n = 0; n < N; ++n)
    if (!(sum[n] > 0)) std::fill(a.p + n * a.stride, a.p + n * a.stride + P, Real(0));
  return score;
}

}  // namespace fastfpl
