// What a transformer block computes besides matrix products and attention, row by row, for frozen
// weights: values, and gradients with respect to the inputs.
#pragma once

#include <cstdint>

#include "number.h"

namespace fastfpl {

enum class Activation { kQuickGelu, kGelu };

// x (rows, W) -> h, the LayerNorm of x, and base = x + shift (shift and base may both be null);
// mean and rstd (rows) are what the gradient needs. weight, bias (W).
template <class T>
void norm_fwd(const T* x, const wide<T>* weight, const wide<T>* bias, const T* shift, T* h, T* base,
              wide<T>* mean, wide<T>* rstd, double eps, int64_t rows, int64_t width,
              int64_t threads);

// d_x += the gradient of x from d_h.
template <class T>
void norm_bwd(const T* d_h, const T* x, const wide<T>* weight, const wide<T>* mean,
              const wide<T>* rstd, T* d_x, int64_t rows, int64_t width, int64_t threads);

// u, a (rows, F), bias (F): a = act(u + bias).
template <class T>
void activation_fwd(const T* u, const T* bias, T* a, Activation kind, int64_t rows, int64_t width,
                    int64_t threads);

// d becomes the gradient of u where it was that of a.
template <class T>
void activation_bwd(T* d, const T* u, const T* bias, Activation kind, int64_t rows, int64_t width,
                    int64_t threads);

// y (rows, D) -> f = y / norm, norm (rows).
template <class T>
void unit_fwd(const T* y, T* f, wide<T>* norm, int64_t rows, int64_t width, int64_t threads);

// d_y from d_f.
template <class T>
void unit_bwd(const T* d_f, const T* f, const wide<T>* norm, T* d_y, int64_t rows, int64_t width,
              int64_t threads);

}  // namespace fastfpl
