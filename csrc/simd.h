// What every vectorised loop of this folder needs: clones per processor, an exponential, lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// One plain function is compiled three times and the processor's best is bound at load time. Clang
// and MSVC lack the attribute for this use; elsewhere than x86-64 there is nothing to choose.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define FASTFPL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTFPL_CLONES
#endif

// A helper that is not inlined into its clone would run as the slowest one.
#if defined(__GNUC__)
#define FASTFPL_INLINE inline __attribute__((always_inline))
#define FASTFPL_RESTRICT __restrict__
#else
#define FASTFPL_INLINE __forceinline
#define FASTFPL_RESTRICT __restrict
#endif

namespace fastfpl {

// exp(x) for x <= 0 to about one ulp; 0 below the smallest normal number. No branch, no table: the
// loops that call it vectorise. 2^k comes from the bits of x / log 2 + 1.5 * 2^(mantissa bits).
FASTFPL_INLINE float exp_of_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float k = shifted - 12582912.0f;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes' polynomial
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  float y = p * (r * r) + r + 1.0f;
  uint32_t bits, power;
  std::memcpy(&bits, &y, 4);
  std::memcpy(&power, &shifted, 4);
  bits += power << 23;
  std::memcpy(&y, &bits, 4);
  return x < -87.0f ? 0.0f : y;
}

FASTFPL_INLINE double exp_of_negative(double x) {
  const double clamped = x < -708.0 ? -708.0 : x;
  const double shifted = clamped * 1.4426950408889634 + 6755399441055744.0;
  const double k = shifted - 6755399441055744.0;
  const double r = (clamped - k * 6.93145751953125e-1) - k * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;  // Taylor to r^13: the rest is below 1e-17 for |r| <= log(2) / 2
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  double y = p * (r * r) + r + 1.0;
  uint64_t bits, power;
  std::memcpy(&bits, &y, 8);
  std::memcpy(&power, &shifted, 8);
  bits += power << 52;
  std::memcpy(&y, &bits, 8);
  return x < -708.0 ? 0.0 : y;
}

// 64 bytes of numbers with the arithmetic of one, in as many registers as the processor needs.
#if defined(__GNUC__)
template <class Real>
struct VectorOf {
  typedef Real type __attribute__((vector_size(64)));
};
#else
template <class Real>
struct VectorOf {
  struct type {
    Real at[64 / sizeof(Real)];
    type& operator+=(const type& other) {
      for (size_t i = 0; i < 64 / sizeof(Real); ++i) at[i] += other.at[i];
      return *this;
    }
    friend type operator*(type x, Real factor) {
      for (Real& value : x.at) value *= factor;
      return x;
    }
  };
};
#endif
template <class Real>
using Vector = typename VectorOf<Real>::type;

// By reference: as a value it would be passed differently by each clone.
template <class Real>
FASTFPL_INLINE void load_lanes(const Real* from, Vector<Real>& x) {
  std::memcpy(&x, from, 64);
}

template <class Real>
FASTFPL_INLINE void store_lanes(Real* to, const Vector<Real>& x) {
  std::memcpy(to, &x, 64);
}

}  // namespace fastfpl
