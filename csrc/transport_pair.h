// One problem of one or two prompts whose rows have equal bounds, as roots in two scalars.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd.h"
#include "transport.h"

namespace fastfpl {

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
FASTFPL_INLINE void pair_row(Real z1, Real z2, const LogV<Real>& g, Real floor, Real& e1, Real& e2,
                        Real& sum) {
  const Real t1 = (z1 + g.high1) + g.low1, t2 = (z2 + g.high2) + g.low2;
  const Real high = t1 > t2 ? t1 : t2;
  const Real base = high > floor ? high : floor;
  e1 = exp_of_negative(t1 - base);
  e2 = exp_of_negative(t2 - base);
  sum = e1 + e2;
}

template <class Real>
FASTFPL_INLINE Sums pair_pass(const Real* FASTFPL_RESTRICT z1, const Real* FASTFPL_RESTRICT z2,
                         int64_t patches, double level, double share, Real floor) {
  const LogV<Real> g(level, share);
  Real first = 0, second = 0, free1 = 0, free2 = 0, mixed = 0;
#pragma omp simd reduction(+ : first, second, free1, free2, mixed)
  for (int64_t m = 0; m < patches; ++m) {
    Real e1, e2, sum;
    pair_row(z1[m], z2[m], g, floor, e1, e2, sum);
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

// Iterates from z to level and share; returns the passes over the similarities. `low` and `high` are
// the smallest and largest z; an absent second prompt has z2 = `nothing` everywhere.
template <class Real>
FASTFPL_INLINE int64_t solve_pair(const Real* FASTFPL_RESTRICT z1, const Real* FASTFPL_RESTRICT z2,
                                  const Transport& t, Real low, Real high, double& level,
                                  double& share, double& residual, Sums& sums) {
  const int64_t P = t.patches, N = t.prompts;
  const Real floor = t.balanced ? -std::numeric_limits<Real>::infinity() : Real(0);
  const double target = (t.balanced ? 1 : t.mass) * double(P), column = target / double(N);
  // About where a normal distribution leaves `mass` above: logit(p) / 1.7 is within .02 of probit.
  const double spread = t.balanced ? 0 : std::log(t.mass / (1 - t.mass)) / 1.702;
  const double log_half_mass = std::log(t.mass / 2);

  Real near = 0, far = 0, mean = 0, square = 0, gap = 0;
  if (N == 2) {
    near = std::numeric_limits<Real>::lowest(), far = -near;
#pragma omp simd reduction(max : near) reduction(min : far) reduction(+ : gap)
    for (int64_t m = 0; m < P; ++m) {
      const Real by = z1[m] - z2[m];
      near = by > near ? by : near;
      far = by < far ? by : far;
      gap += by;
    }
  }
  // share: at -near every row prefers the second column, at -far the first.
  double share_low = -double(near), share_high = -double(far);
  share = inside(-double(gap) / double(P), share_low, share_high);
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
  level =
      t.balanced ? 0 : inside(log_half_mass - mean + spread * deviation, level_low, level_high);

  double miss = 0, best = std::numeric_limits<double>::infinity(), best_level = 0, best_share = 0;
  int64_t n = 0;
  bool polishing = false;
  while (true) {
    sums = pair_pass(z1, z2, P, level, share, floor);
    ++n;
    const double total = sums.first + sums.second;
    const double level_gap = t.balanced ? 0 : std::log(target / total);
    const double gap1 = std::log(column / sums.first);
    const double gap2 = N == 2 ? std::log(column / sums.second) : gap1;
    const double share_gap = gap1 - gap2;
    miss = std::max(std::abs(gap1), std::abs(gap2));
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
    sums = pair_pass(z1, z2, P, level, share, floor);
  }
  residual = miss;
  return n;
}

}  // namespace fastfpl
