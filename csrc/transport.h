// Plans of entropic transport between P patches and N <= 16 prompts, one problem after another.
#pragma once

#include <cstdint>

namespace fastfpl {

constexpr int64_t kMostPrompts = 16;

// Problem (b, c) has its numbers at [b, :, c, :] of arrays (B, P, C, N): the order in which one
// matrix product of all patches with all prompts leaves them. With C = 1 they are (B, P, N).
struct Transport {
  int64_t images, classes, patches, prompts;  // B, C, P, N
  double eps, mass, tol;
  bool balanced;
  int64_t max_iter, threads;
};

template <class Real>
struct Arrays {
  const Real* sim;      // (B, P, C, N)
  const Real* rows;     // (B C, P) bounds of the rows, or null for 1 / P, balanced mass / P, each
  const Real* columns;  // (B C, N) sums of the columns, or null for mass / N each; as rows are
  Real* plan;           // (B, P, C, N), may be sim
  Real* logits;         // (B, C) sums of plan * sim, or null; null with rows
  int64_t* iterations;  // (B, C)
  Real* residual;       // (B, C)
};

// Returns the index of a value of sim that is not finite after division by eps, the first of the
// first such problem, or -1; the results are then meaningless. Where rows and columns are given, mass is their common total in
// units of the rows' total.
template <class Real>
int64_t transport_plan(const Arrays<Real>& arrays, const Transport& t);

// out[b, p, c, n] = plan[b, p, c, n] * by[b, c]
template <class Real>
void weigh_plan(const Real* plan, const Real* by, Real* out, int64_t images, int64_t patches,
                int64_t classes, int64_t prompts, int64_t threads);

}  // namespace fastfpl
