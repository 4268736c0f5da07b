#include "transport.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"
#include "threads.h"
#include "transport_many.h"
#include "transport_pair.h"

namespace fastfpl {
namespace {

// Copies a problem's numbers to one array a prompt; false if one of them is not finite after the
// division by eps. `kRow` is the distance between patches where it is known.
template <int64_t kRow, int64_t kPrompts, class Real>
FASTFPL_INLINE bool gather(const Real* FASTFPL_RESTRICT s, int64_t patches, int64_t row,
                           int64_t prompts, Real scale, const Lanes<Real>& a, Real& low,
                           Real& high) {
  const int64_t step = kRow ? kRow : row, count = kPrompts ? kPrompts : prompts;
  Real bad = 0, least = s[0], most = s[0];
  for (int64_t n = 0; n < count; ++n) {
    Real* FASTFPL_RESTRICT z = a.z + n * a.stride;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : bad)
    for (int64_t m = 0; m < patches; ++m) {
      const Real x = s[m * step + n];
      z[m] = x;
      least = x < least ? x : least;
      most = x > most ? x : most;
      bad += x * (4 * scale) * 0;
    }
  }
  low = least, high = most;
  return bad == 0;
}

template <class Real>
FASTFPL_INLINE bool gathered(const Real* s, int64_t patches, int64_t row, int64_t prompts,
                             Real scale, const Lanes<Real>& a, Real& low, Real& high) {
  if (prompts == 1 && row == 1) return gather<1, 1>(s, patches, row, prompts, scale, a, low, high);
  if (prompts == 2 && row == 2) return gather<2, 2>(s, patches, row, prompts, scale, a, low, high);
  if (prompts == 4 && row == 4) return gather<4, 4>(s, patches, row, prompts, scale, a, low, high);
  return gather<0, 0>(s, patches, row, prompts, scale, a, low, high);
}

// In double what was given in float.
template <class Real>
FASTFPL_INLINE Real solve_wide(const Arrays<Real>& x, const Transport& t, int64_t b,
                               const Lanes<Real>& a, const Lanes<double>& wide, double& residual) {
  for (int64_t n = 0; n < t.prompts; ++n)
    for (int64_t m = 0; m < t.patches; ++m)
      wide.z[n * wide.stride + m] = double(a.z[n * a.stride + m]);
  const double score = solve_many<double>(x, t, b, wide, residual);
  for (int64_t n = 0; n < t.prompts; ++n)
    for (int64_t m = 0; m < t.patches; ++m)
      a.p[n * a.stride + m] = Real(wide.p[n * wide.stride + m]);
  return Real(score);
}

// Solve problems [begin, end); returns the first bad index among them, or -1.
template <class Real>
FASTFPL_INLINE int64_t solve(const Arrays<Real>& x, const Transport& t, int64_t begin, int64_t end,
                             Real* memory, double* spare) {
  const int64_t P = t.patches, N = t.prompts, row = t.classes * N;
  const Real scale = Real(1 / t.eps);
  const bool pair = N <= 2 && !x.rows;
  const Real floor = t.balanced ? -std::numeric_limits<Real>::infinity() : Real(0);
  const Real nothing = -std::numeric_limits<Real>::max() / 4;
  const Lanes<Real> a(memory, P, std::max<int64_t>(N, 2));
  const Lanes<double> wide(spare, P, N);
  const Real kFar = 32;

  for (int64_t b = begin; b < end; ++b) {
    const int64_t place = b / t.classes * P * row + b % t.classes * N;
    const Real* s = x.sim + place;
    Real* plan = x.plan + place;
    Real low, high;
    if (!gathered(s, P, row, N, scale, a, low, high)) {
      for (int64_t m = 0; m < P; ++m)
        for (int64_t n = 0; n < N; ++n)
          if (!std::isfinite(s[m * row + n] * (4 * scale))) return place + m * row + n;
    }
    const Real centre = low / 2 + high / 2;  // differences of near numbers are exact
    low = (low - centre) * scale, high = (high - centre) * scale;
    for (int64_t n = 0; n < N; ++n) {
      Real* z = a.z + n * a.stride;
#pragma omp simd
      for (int64_t m = 0; m < P; ++m) z[m] = (z[m] - centre) * scale;
    }
    double residual;
    Real score = 0;
    if (pair) {
      Real *z1 = a.z, *z2 = a.z + a.stride, *t1 = a.p, *t2 = a.p + a.stride;
      if (N == 1) std::fill(z2, z2 + P, nothing);
      double level, share;
      Sums sums{};
      x.iterations[b] = solve_pair(z1, z2, t, low, high, level, share, residual, sums);
      const double per = t.mass / double(N);
      const Real v1 = Real(per / sums.first), v2 = N == 2 ? Real(per / sums.second) : Real(0);
      const LogV<Real> g(level, share);
#pragma omp simd reduction(+ : score)
      for (int64_t m = 0; m < P; ++m) {
        Real e1, e2, sum;
        pair_row(z1[m], z2[m], g, floor, e1, e2, sum);
        const Real u = 1 / (sum >= 1 ? sum : Real(1));
        t1[m] = e1 * u * v1, t2[m] = e2 * u * v2;
        score += t1[m] * z1[m] + (N == 2 ? t2[m] * z2[m] : Real(0));
      }
      if (N == 2 && row == 2) {
#pragma omp simd
        for (int64_t m = 0; m < P; ++m) plan[2 * m] = t1[m], plan[2 * m + 1] = t2[m];
      } else {
        for (int64_t m = 0; m < P; ++m) {
          plan[m * row] = t1[m];
          if (N == 2) plan[m * row + 1] = t2[m];
        }
      }
    } else {
      // far apart, the last bit of z + g would be as large as tol: what is above a cap cancels;
      // sums of floats end at some 2e-6
      if (sizeof(Real) == 8 || (high - low < kFar && t.tol >= 1e-5))
        score = solve_many<Real>(x, t, b, a, residual);
      else
        score = solve_wide(x, t, b, a, wide, residual);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t m = 0; m < P; ++m) plan[m * row + n] = a.p[n * a.stride + m];
    }
    x.residual[b] = Real(residual);
    // the plan's total is exact, so that what all similarities share need not be summed
    if (x.logits) x.logits[b] = Real(t.mass) * centre + Real(t.eps) * score;
  }
  return -1;
}

// The attribute belongs on plain functions, one a type.
FASTFPL_CLONES int64_t solve_range(const Arrays<float>& arrays, const Transport& t, int64_t begin,
                                   int64_t end, float* memory, double* spare) {
  return solve(arrays, t, begin, end, memory, spare);
}

FASTFPL_CLONES int64_t solve_range(const Arrays<double>& arrays, const Transport& t, int64_t begin,
                                   int64_t end, double* memory, double* spare) {
  return solve(arrays, t, begin, end, memory, spare);
}

template <class Real>
FASTFPL_INLINE void weigh(const Real* FASTFPL_RESTRICT plan, const Real* FASTFPL_RESTRICT by,
                          Real* FASTFPL_RESTRICT out, int64_t patches, int64_t classes,
                          int64_t prompts, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {  // (b, p)
    const Real* w = by + r / patches * classes;
    const int64_t at = r * classes * prompts;
    if (prompts == 2) {
#pragma omp simd
      for (int64_t c = 0; c < classes; ++c) {
        out[at + 2 * c] = plan[at + 2 * c] * w[c];
        out[at + 2 * c + 1] = plan[at + 2 * c + 1] * w[c];
      }
    } else {
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t n = 0; n < prompts; ++n)
          out[at + c * prompts + n] = plan[at + c * prompts + n] * w[c];
    }
  }
}

FASTFPL_CLONES void weigh_range(const float* plan, const float* by, float* out, int64_t patches,
                                int64_t classes, int64_t prompts, int64_t begin, int64_t end) {
  weigh(plan, by, out, patches, classes, prompts, begin, end);
}

FASTFPL_CLONES void weigh_range(const double* plan, const double* by, double* out, int64_t patches,
                                int64_t classes, int64_t prompts, int64_t begin, int64_t end) {
  weigh(plan, by, out, patches, classes, prompts, begin, end);
}

}  // namespace

template <class Real>
int64_t transport_plan(const Arrays<Real>& arrays, const Transport& t) {
  const int64_t problems = t.images * t.classes;
  // About 7 ns a patch and pair of prompts (AVX-512); more threads pay from 50 us on.
  const double pairs = double(t.prompts) * double(t.prompts + 1) / 6;
  const double microseconds = 7e-3 * double(problems) * double(t.patches) * std::max(pairs, 1.0);
  const int64_t threads = std::max<int64_t>(
      1, std::min({t.threads, problems, static_cast<int64_t>(microseconds / 50)}));
  // Whole cache lines a thread: sums then do not depend on who computes them.
  const int64_t prompts = std::max<int64_t>(t.prompts, 2);
  const bool many = t.prompts > 2 || arrays.rows;
  const int64_t each = Lanes<Real>::size(t.patches, prompts) * int64_t(sizeof(Real)) / 8;
  const int64_t spare = many && sizeof(Real) < 8 ? Lanes<double>::size(t.patches, t.prompts) : 0;
  std::vector<double> memory(threads * (each + spare) + 8);
  double* scratch = memory.data();
  while (reinterpret_cast<uintptr_t>(scratch) % 64) ++scratch;
  std::vector<int64_t> bad(threads, -1);
  parallel(threads, problems, [&](int64_t i, int64_t begin, int64_t end) {
    double* mine = scratch + i * (each + spare);
    bad[i] = solve_range(arrays, t, begin, end, reinterpret_cast<Real*>(mine), mine + each);
  });
  for (int64_t index : bad)  // in the order of the problems, whatever the number of threads
    if (index >= 0) return index;
  return -1;
}

template <class Real>
void weigh_plan(const Real* plan, const Real* by, Real* out, int64_t images, int64_t patches,
                int64_t classes, int64_t prompts, int64_t threads) {
  const int64_t rows = images * patches;
  const int64_t useful = 1 + rows * classes * prompts / (1 << 16);
  parallel(std::min(threads, useful), rows, [&](int64_t, int64_t begin, int64_t end) {
    weigh_range(plan, by, out, patches, classes, prompts, begin, end);
  });
}

template int64_t transport_plan<float>(const Arrays<float>&, const Transport&);
template int64_t transport_plan<double>(const Arrays<double>&, const Transport&);
template void weigh_plan<float>(const float*, const float*, float*, int64_t, int64_t, int64_t,
                                int64_t, int64_t);
template void weigh_plan<double>(const double*, const double*, double*, int64_t, int64_t, int64_t,
                                 int64_t, int64_t);

}  // namespace fastfpl
