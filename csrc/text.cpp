#include "text.h"

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace fastfpl {
namespace {

// Phi(x), the normal distribution. Near 0 an odd polynomial of erf, beyond it exp(-z^2) g(1 / (1 +
// .36 z)); both fitted by least squares of the relative error, which is below 1e-9. In float the
// result errs by a third of what 1 + erf(x / sqrt 2) does, which cancels for negative x.
FASTFPL_INLINE float normal_cdf(float x) {
  const float z = x * 0.70710678f, a = z < 0 ? -z : z, s = z * z;
  float p = -9.769223489e-06f;
  p = p * s + 1.129953067e-04f;
  p = p * s - 8.488387466e-04f;
  p = p * s + 5.221303812e-03f;
  p = p * s - 2.686551812e-02f;
  p = p * s + 1.128378382e-01f;
  p = p * s - 3.761263854e-01f;
  p = p * s + 1.128379167e+00f;
  const float near = 0.5f + 0.5f * (z * p);
  const float t = 1 / (1 + 0.36f * a);
  float q = 3.883075302e-02f;
  q = q * t - 2.423433130e-01f;
  q = q * t + 4.515875618e-01f;
  q = q * t - 2.783367618e-01f;
  q = q * t + 3.296583741e-01f;
  q = q * t + 8.875464973e-02f;
  q = q * t + 2.081728652e-01f;
  q = q * t + 2.002865116e-01f;
  q = q * t + 2.033600984e-01f;
  q = q * t - 9.863908450e-06f;
  const float tail = 0.5f * q * exp_of_negative(-s);
  const float far = z < 0 ? tail : 1 - tail;
  return a < 1 ? near : far;
}

FASTFPL_INLINE double normal_cdf(double x) {
  return 0.5 * std::erfc(-x * 0.70710678118654752440);
}

template <class R>
FASTFPL_INLINE R sigmoid(R x) {
  const R e = exp_of_negative(x < 0 ? x : -x);
  return (x < 0 ? e : R(1)) / (1 + e);
}

template <class R>
struct QuickGelu {
  FASTFPL_INLINE static R value(R x) { return x * sigmoid(R(1.702) * x); }
  FASTFPL_INLINE static R slope(R x) {
    const R s = sigmoid(R(1.702) * x);
    return s + R(1.702) * x * s * (1 - s);
  }
};

template <class R>
struct Gelu {
  FASTFPL_INLINE static R value(R x) { return x * normal_cdf(x); }
  FASTFPL_INLINE static R slope(R x) {
    return normal_cdf(x) + x * R(0.39894228040143267794) * exp_of_negative(R(-0.5) * x * x);
  }
};

template <class T>
FASTFPL_INLINE void norm_rows(const T* x, const wide<T>* FASTFPL_RESTRICT weight,
                              const wide<T>* FASTFPL_RESTRICT bias, const T* shift, T* h, T* base,
                              wide<T>* mean, wide<T>* rstd, double eps, int64_t width,
                              int64_t begin, int64_t end) {
  using R = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* FASTFPL_RESTRICT in = x + i * width;
    T* FASTFPL_RESTRICT out = h + i * width;
    R sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) sum += widen(in[j]);
    const R m = sum / R(width);
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < width; ++j) {
      const R off = widen(in[j]) - m;
      square += off * off;
    }
    const R r = 1 / std::sqrt(square / R(width) + R(eps));
    mean[i] = m, rstd[i] = r;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j)
      narrow((widen(in[j]) - m) * r * weight[j] + bias[j], out[j]);
    if (!base) continue;
    T* FASTFPL_RESTRICT moved = base + i * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) narrow(widen(in[j]) + widen(shift[j]), moved[j]);
  }
}

template <class T>
FASTFPL_INLINE void norm_gradient(const T* d_h, const T* x, const wide<T>* FASTFPL_RESTRICT weight,
                                  const wide<T>* mean, const wide<T>* rstd, T* d_x, int64_t width,
                                  int64_t begin, int64_t end) {
  using R = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* FASTFPL_RESTRICT d = d_h + i * width;
    const T* FASTFPL_RESTRICT in = x + i * width;
    T* FASTFPL_RESTRICT to = d_x + i * width;
    const R m = mean[i], r = rstd[i];
    R sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (int64_t j = 0; j < width; ++j) {
      const R g = widen(d[j]) * weight[j];
      sum += g;
      along += g * ((widen(in[j]) - m) * r);
    }
    sum /= R(width), along /= R(width);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const R unit = (widen(in[j]) - m) * r;
      narrow(widen(to[j]) + r * (widen(d[j]) * weight[j] - sum - unit * along), to[j]);
    }
  }
}

template <class F, class T>
FASTFPL_INLINE void activate_rows(const T* u, const T* FASTFPL_RESTRICT bias, T* a, int64_t width,
                                  int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* FASTFPL_RESTRICT in = u + i * width;
    T* FASTFPL_RESTRICT out = a + i * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) narrow(F::value(widen(in[j]) + widen(bias[j])), out[j]);
  }
}

template <class F, class T>
FASTFPL_INLINE void activation_gradient(T* d, const T* u, const T* FASTFPL_RESTRICT bias,
                                        int64_t width, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* FASTFPL_RESTRICT in = u + i * width;
    T* FASTFPL_RESTRICT to = d + i * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j)
      narrow(widen(to[j]) * F::slope(widen(in[j]) + widen(bias[j])), to[j]);
  }
}

template <class T>
FASTFPL_INLINE void unit_rows(const T* y, T* f, wide<T>* norm, int64_t width, int64_t begin,
                              int64_t end) {
  using R = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* FASTFPL_RESTRICT in = y + i * width;
    T* FASTFPL_RESTRICT out = f + i * width;
    R square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < width; ++j) square += widen(in[j]) * widen(in[j]);
    norm[i] = std::sqrt(square);
    const R by = 1 / norm[i];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) narrow(widen(in[j]) * by, out[j]);
  }
}

template <class T>
FASTFPL_INLINE void unit_gradient(const T* d_f, const T* f, const wide<T>* norm, T* d_y,
                                  int64_t width, int64_t begin, int64_t end) {
  using R = wide<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* FASTFPL_RESTRICT d = d_f + i * width;
    const T* FASTFPL_RESTRICT unit = f + i * width;
    T* FASTFPL_RESTRICT to = d_y + i * width;
    R along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t j = 0; j < width; ++j) along += widen(d[j]) * widen(unit[j]);
    const R by = 1 / norm[i];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) narrow((widen(d[j]) - along * widen(unit[j])) * by, to[j]);
  }
}

// The attribute belongs on plain functions, one a type.
#define FASTFPL_RANGES(T)                                                                          \
  FASTFPL_CLONES void norm_range(const T* x, const wide<T>* weight, const wide<T>* bias,           \
                                 const T* shift, T* h, T* base, wide<T>* mean, wide<T>* rstd,      \
                                 double eps, int64_t width, int64_t begin, int64_t end) {          \
    norm_rows(x, weight, bias, shift, h, base, mean, rstd, eps, width, begin, end);                \
  }                                                                                                \
  FASTFPL_CLONES void norm_gradient_range(const T* d_h, const T* x, const wide<T>* weight,         \
                                          const wide<T>* mean, const wide<T>* rstd, T* d_x,        \
                                          int64_t width, int64_t begin, int64_t end) {             \
    norm_gradient(d_h, x, weight, mean, rstd, d_x, width, begin, end);                             \
  }                                                                                                \
  FASTFPL_CLONES void activation_range(const T* u, const T* bias, T* a, Activation kind,           \
                                       int64_t width, int64_t begin, int64_t end) {                \
    if (kind == Activation::kQuickGelu)                                                            \
      activate_rows<QuickGelu<wide<T>>>(u, bias, a, width, begin, end);                            \
    else                                                                                           \
      activate_rows<Gelu<wide<T>>>(u, bias, a, width, begin, end);                                 \
  }                                                                                                \
  FASTFPL_CLONES void activation_gradient_range(T* d, const T* u, const T* bias, Activation kind,  \
                                                int64_t width, int64_t begin, int64_t end) {       \
    if (kind == Activation::kQuickGelu)                                                            \
      activation_gradient<QuickGelu<wide<T>>>(d, u, bias, width, begin, end);                      \
    else                                                                                           \
      activation_gradient<Gelu<wide<T>>>(d, u, bias, width, begin, end);                           \
  }                                                                                                \
  FASTFPL_CLONES void unit_range(const T* y, T* f, wide<T>* norm, int64_t width, int64_t begin,    \
                                 int64_t end) {                                                    \
    unit_rows(y, f, norm, width, begin, end);                                                      \
  }                                                                                                \
  FASTFPL_CLONES void unit_gradient_range(const T* d_f, const T* f, const wide<T>* norm, T* d_y,   \
                                          int64_t width, int64_t begin, int64_t end) {             \
    unit_gradient(d_f, f, norm, d_y, width, begin, end);                                           \
  }
FASTFPL_RANGES(float)
FASTFPL_RANGES(double)
FASTFPL_RANGES(bf16)
#undef FASTFPL_RANGES

// Threads pay from some ten microseconds of work on: a row's number takes about a nanosecond.
int64_t worth(int64_t threads, int64_t numbers) {
  return std::max<int64_t>(1, std::min(threads, numbers >> 13));
}

}  // namespace

template <class T>
void norm_fwd(const T* x, const wide<T>* weight, const wide<T>* bias, const T* shift, T* h, T* base,
              wide<T>* mean, wide<T>* rstd, double eps, int64_t rows, int64_t width,
              int64_t threads) {
  parallel(worth(threads, rows * width), rows, [&](int64_t, int64_t begin, int64_t end) {
    norm_range(x, weight, bias, shift, h, base, mean, rstd, eps, width, begin, end);
  });
}

template <class T>
void norm_bwd(const T* d_h, const T* x, const wide<T>* weight, const wide<T>* mean,
              const wide<T>* rstd, T* d_x, int64_t rows, int64_t width, int64_t threads) {
  parallel(worth(threads, rows * width), rows, [&](int64_t, int64_t begin, int64_t end) {
    norm_gradient_range(d_h, x, weight, mean, rstd, d_x, width, begin, end);
  });
}

template <class T>
void activation_fwd(const T* u, const T* bias, T* a, Activation kind, int64_t rows, int64_t width,
                    int64_t threads) {
  parallel(worth(threads, rows * width), rows, [&](int64_t, int64_t begin, int64_t end) {
    activation_range(u, bias, a, kind, width, begin, end);
  });
}

template <class T>
void activation_bwd(T* d, const T* u, const T* bias, Activation kind, int64_t rows, int64_t width,
                    int64_t threads) {
  parallel(worth(threads, rows * width), rows, [&](int64_t, int64_t begin, int64_t end) {
    activation_gradient_range(d, u, bias, kind, width, begin, end);
  });
}

template <class T>
void unit_fwd(const T* y, T* f, wide<T>* norm, int64_t rows, int64_t width, int64_t threads) {
  parallel(worth(threads, rows * width), rows, [&](int64_t, int64_t begin, int64_t end) {
    unit_range(y, f, norm, width, begin, end);
  });
}

template <class T>
void unit_bwd(const T* d_f, const T* f, const wide<T>* norm, T* d_y, int64_t rows, int64_t width,
              int64_t threads) {
  parallel(worth(threads, rows * width), rows, [&](int64_t, int64_t begin, int64_t end) {
    unit_gradient_range(d_f, f, norm, d_y, width, begin, end);
  });
}

#define FASTFPL_INSTANTIATE(T)                                                                    \
  template void norm_fwd<T>(const T*, const wide<T>*, const wide<T>*, const T*, T*, T*, wide<T>*, \
                            wide<T>*, double, int64_t, int64_t, int64_t);                         \
  template void norm_bwd<T>(const T*, const T*, const wide<T>*, const wide<T>*, const wide<T>*,   \
                            T*, int64_t, int64_t, int64_t);                                       \
  template void activation_fwd<T>(const T*, const T*, T*, Activation, int64_t, int64_t, int64_t); \
  template void activation_bwd<T>(T*, const T*, const T*, Activation, int64_t, int64_t, int64_t); \
  template void unit_fwd<T>(const T*, T*, wide<T>*, int64_t, int64_t, int64_t);                   \
  template void unit_bwd<T>(const T*, const T*, const wide<T>*, T*, int64_t, int64_t, int64_t);
FASTFPL_INSTANTIATE(float)
FASTFPL_INSTANTIATE(double)
FASTFPL_INSTANTIATE(bf16)
#undef FASTFPL_INSTANTIATE

}  // namespace fastfpl
