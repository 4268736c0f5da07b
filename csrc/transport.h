// Plans of entropic transport between P patches and N <= 2 prompts, one problem after another.
#pragma once

#include <cstdint>

namespace fastfpl {

struct Transport {
  int64_t problems, patches, prompts;  // B, P, N
  double eps, mass, tol;
  bool balanced;
  int64_t max_iter, threads;
};

// sim, plan (B, P, N); iterations, residual (B). Returns the index of the first value of sim that
// is not finite after division by eps, or -1; the plan is then meaningless.
template <class Real>
int64_t transport_plan(const Real* sim, Real* plan, int64_t* iterations, Real* residual,
                       const Transport& t);

}  // namespace fastfpl
