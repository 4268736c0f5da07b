// Numbers as tensors store them, and the type that a loop computes in.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace fastfpl {

struct bf16 {
  uint16_t bits;
};

template <class T>
struct Wide {
  using type = T;
};
template <>
struct Wide<bf16> {
  using type = float;
};
template <class T>
using wide = typename Wide<T>::type;

FASTFPL_INLINE float widen(float x) { return x; }
FASTFPL_INLINE double widen(double x) { return x; }
FASTFPL_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

FASTFPL_INLINE void narrow(float x, float& out) { out = x; }
FASTFPL_INLINE void narrow(double x, double& out) { out = x; }
// To the nearest, ties to even; NaN stays NaN.
FASTFPL_INLINE void narrow(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

}  // namespace fastfpl
