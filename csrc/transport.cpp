#include "transport.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace fastfpl {
namespace {

// The reference iterates on v; here the same fixed point is a root in two scalars. With
// v = exp(level +- share/2), the row-capped plan T(level, share) has a total that rises with level
// and, along the levels that give the right total, a first column that rises with share. Newton
// steps on the logarithms of total and column ratio, each inside a bracket that always holds the
// root: the logarithm of an exponential is linear, so that far starts cost no more than near ones.
struct Sums {            // over the patches, of P * T
  double first, second;  // columns
  double free1, free2;   // columns of the rows below their cap
  double mixed;          // product of both columns in the capped rows
};

// log v. At eps = .005 it is up to 400, where a float's last bit is 3e-5; with a second float for
// the rest, rows near their cap, where z and log v cancel, keep the precision of z.
template <class Real>
struct LogV {
  Real high1, high2, low1, low2;

  FASTFPL_INLINE LogV(double level, double share)
      : high1(Real(level + share / 2)),
        high2(Real(level - share / 2)),
        low1(Real(level + share / 2 - double(high1))),
        low2(Real(level - share / 2 - double(high2))) {}
};

template <class Real>
FASTFPL_INLINE void row(Real z1, Real z2, const LogV<Real>& g, Real floor, Real& e1, Real& e2,
                        Real& sum) {
  const Real t1 = (z1 + g.high1) + g.low1, t2 = (z2 + g.high2) + g.low2;
  const Real high = t1 > t2 ? t1 : t2;
  const Real base = high > floor ? high : floor;
  e1 = exp_of_negative(t1 - base);
  e2 = exp_of_negative(t2 - base);
  sum = e1 + e2;
}

template <class Real>
FASTFPL_INLINE Sums pass(const Real* FASTFPL_RESTRICT z1, const Real* FASTFPL_RESTRICT z2,
                         int64_t patches, double level, double share, Real floor) {
  const LogV<Real> g(level, share);
  Real first = 0, second = 0, free1 = 0, free2 = 0, mixed = 0;
#pragma omp simd reduction(+ : first, second, free1, free2, mixed)
  for (int64_t m = 0; m < patches; ++m) {
    Real e1, e2, sum;
    row(z1[m], z2[m], g, floor, e1, e2, sum);
    const bool capped = sum >= 1;
    const Real u = 1 / (capped ? sum : Real(1));
    const Real t1 = e1 * u, t2 = e2 * u;
    first += t1;
    second += t2;
    free1 += capped ? Real(0) : e1;
    free2 += capped ? Real(0) : e2;
    mixed += capped ? t1 * t2 : Real(0);
  }
  return {double(first), double(second), double(free1), double(free2), double(mixed)};
}

FASTFPL_INLINE double inside(double x, double low, double high) {
  return x > low && x < high ? x : low + (high - low) / 2;
}

// Solve problems [begin, end); returns the first bad index among them, or -1.
template <class Real>
FASTFPL_INLINE int64_t solve(const Real* sim, Real* plan, int64_t* iterations, Real* residual,
                             const Transport& t, int64_t begin, int64_t end, Real* z1, Real* z2) {
  const int64_t P = t.patches, N = t.prompts;
  const Real scale = Real(1 / t.eps);
  const Real floor = t.balanced ? -std::numeric_limits<Real>::infinity() : Real(0);
  const Real nothing = -std::numeric_limits<Real>::max() / 4;
  const double target = (t.balanced ? 1 : t.mass) * double(P), column = target / double(N);
  // About where a normal distribution leaves `mass` above: logit(p) / 1.7 is within .02 of probit.
  const double spread = t.balanced ? 0 : std::log(t.mass / (1 - t.mass)) / 1.702;
  const double log_half_mass = std::log(t.mass / 2);

  for (int64_t b = begin; b < end; ++b) {
    const Real* s = sim + b * P * N;
    Real low = s[0], high = s[0], bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : bad)
    for (int64_t i = 0; i < P * N; ++i) {
      low = s[i] < low ? s[i] : low;
      high = s[i] > high ? s[i] : high;
      bad += s[i] * (4 * scale) * 0;
    }
    if (bad != 0 || std::isnan(bad)) {
      for (int64_t i = 0; i < P * N; ++i)
        if (!std::isfinite(s[i] * (4 * scale))) return b * P * N + i;
    }

    const Real centre = low / 2 + high / 2;  // differences of near numbers are exact
    Real near = 0, far = 0, mean = 0, square = 0, gap = 0;
    low = (low - centre) * scale, high = (high - centre) * scale;
    if (N == 2) {
      near = nothing, far = -nothing;
#pragma omp simd reduction(max : near) reduction(min : far) reduction(+ : gap)
      for (int64_t m = 0; m < P; ++m) {
        const Real a = (s[2 * m] - centre) * scale, c = (s[2 * m + 1] - centre) * scale;
        z1[m] = a, z2[m] = c;
        near = a - c > near ? a - c : near;
        far = a - c < far ? a - c : far;
        gap += a - c;
      }
    } else {
      for (int64_t m = 0; m < P; ++m) z1[m] = (s[m] - centre) * scale, z2[m] = nothing;
    }

    // share: at -near every row prefers the second column, at -far the first.
    double share_low = -double(near), share_high = -double(far);
    double share = inside(-double(gap) / double(P), share_low, share_high);
    const LogV<Real> tilt(0, share);
#pragma omp simd reduction(+ : mean, square)
    for (int64_t m = 0; m < P; ++m) {
      const Real a = z1[m] + tilt.high1, c = z2[m] + tilt.high2, z = a > c ? a : c;
      mean += z, square += z * z;
    }
    mean /= Real(P);
    const double deviation = std::sqrt(std::max(square / Real(P) - mean * mean, Real(0)));
    // level: at its lower end every row is below mass / P, at its upper end every row is capped.
    auto lowest = [&] { return log_half_mass - double(high) - std::abs(share) / 2; };
    auto highest = [&] { return std::abs(share) / 2 - double(low); };
    double level_low = lowest(), level_high = highest();
    double level =
        t.balanced ? 0 : inside(log_half_mass - mean + spread * deviation, level_low, level_high);

    Sums sums{};
    double miss = 0, best = std::numeric_limits<double>::infinity(), best_level = 0, best_share = 0;
    int64_t n = 0;
    bool polishing = false;
    while (true) {
      sums = pass(z1, z2, P, level, share, floor);
      ++n;
      const double total = sums.first + sums.second;
      const double level_gap = t.balanced ? 0 : std::log(target / total);
      const double share_gap = N == 2 ? std::log(sums.second / sums.first) : 0;
      miss = std::abs(std::log(column / sums.first));
      if (N == 2) miss = std::max(miss, std::abs(std::log(column / sums.second)));
      if (miss < best) best = miss, best_level = level, best_share = share;
      if (polishing || n >= t.max_iter || miss <= t.tol / 32) break;
      polishing = miss <= t.tol;  // one more step: Newton's last is worth all before it

      const double free = sums.free1 + sums.free2;
      const double newton = level_gap * total / free;  // infinite where every row is capped
      const double enough = std::max(t.tol / 8, .1 * std::min(std::abs(share_gap), 1.0));
      double next = level;
      if (std::abs(level_gap) > enough && !(polishing && N == 2)) {
        (level_gap > 0 ? level_low : level_high) = level;
        next = inside(level + newton, level_low, level_high);
      }
      if (next != level) {
        level = next;
        continue;
      }
      // The total is now so near that it cannot change the sign of share_gap, or as near as can be.
      if (N == 1) break;
      (share_gap > 0 ? share_low : share_high) = share;
      const double slope = (free > 0 ? sums.free1 * sums.free2 / free : 0) + sums.mixed;
      next = inside(share + share_gap * sums.first * sums.second / (total * slope), share_low,
                    share_high);
      if (next == share && !polishing) break;
      if (free > 0) level += newton - (sums.free1 - sums.free2) / (2 * free) * (next - share);
      share = next;
      if (!t.balanced) {
        level_low = lowest(), level_high = highest();
        level = inside(level, level_low, level_high);
      }
    }
    if (miss > best) {  // the last step led into rounding, or max_iter cut the search short
      level = best_level, share = best_share, miss = best;
      sums = pass(z1, z2, P, level, share, floor);
    }
    iterations[b] = n;
    residual[b] = Real(miss);

    const double per = t.mass / double(N);
    const Real v1 = Real(per / sums.first), v2 = Real(per / sums.second);
    const LogV<Real> g(level, share);
    Real* out = plan + b * P * N;
    if (N == 2) {
#pragma omp simd
      for (int64_t m = 0; m < P; ++m) {
        Real e1, e2, sum;
        row(z1[m], z2[m], g, floor, e1, e2, sum);
        const Real u = 1 / (sum >= 1 ? sum : Real(1));
        out[2 * m] = e1 * u * v1;
        out[2 * m + 1] = e2 * u * v2;
      }
    } else {
      for (int64_t m = 0; m < P; ++m) {
        Real e1, e2, sum;
        row(z1[m], z2[m], g, floor, e1, e2, sum);
        out[m] = e1 / (sum >= 1 ? sum : Real(1)) * v1;
      }
    }
  }
  return -1;
}

// The attribute belongs on plain functions, one a type.
FASTFPL_CLONES int64_t solve_range(const float* sim, float* plan, int64_t* iterations,
                                   float* residual, const Transport& t, int64_t begin, int64_t end,
                                   float* scratch, int64_t stride) {
  return solve(sim, plan, iterations, residual, t, begin, end, scratch, scratch + stride);
}

FASTFPL_CLONES int64_t solve_range(const double* sim, double* plan, int64_t* iterations,
                                   double* residual, const Transport& t, int64_t begin, int64_t end,
                                   double* scratch, int64_t stride) {
  return solve(sim, plan, iterations, residual, t, begin, end, scratch, scratch + stride);
}

}  // namespace

template <class Real>
int64_t transport_plan(const Real* sim, Real* plan, int64_t* iterations, Real* residual,
                       const Transport& t) {
  // About 7 ns a patch (AVX-512) in five passes; more threads pay from 50 us on.
  const double microseconds = 7e-3 * double(t.problems) * double(t.patches);
  const int64_t threads = std::max<int64_t>(
      1, std::min({t.threads, t.problems, static_cast<int64_t>(microseconds / 50)}));
  // A whole number of cache lines for each array: sums then do not depend on who computes them.
  const int64_t line = 64 / sizeof(Real), stride = (t.patches + line - 1) / line * line;
  std::vector<Real> memory(threads * 2 * stride + line);
  Real* scratch = memory.data();
  while (reinterpret_cast<uintptr_t>(scratch) % 64) ++scratch;
  std::vector<int64_t> bad(threads, -1);
  parallel(threads, t.problems, [&](int64_t i, int64_t begin, int64_t end) {
    bad[i] = solve_range(sim, plan, iterations, residual, t, begin, end,
                         scratch + i * 2 * stride, stride);
  });
  for (int64_t index : bad)
    if (index >= 0) return index;
  return -1;
}

template int64_t transport_plan<float>(const float*, float*, int64_t*, float*, const Transport&);
template int64_t transport_plan<double>(const double*, double*, int64_t*, double*,
                                        const Transport&);

}  // namespace fastfpl
