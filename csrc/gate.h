// The fused part of the attention gate over prompt experts: from projected images and experts to
// logits, and back. Every product with a weight matrix is left to the caller.
#pragma once

#include <cstdint>

namespace fastfpl {

struct Gate {
  int64_t clients, classes, experts, heads, width;  // U, C, E, H, d = D / H
  int64_t images;                                   // B, padded
  double scale;
  int64_t threads;
};

// The next multiple of a vector's numbers, of so many bytes each: what images are padded to with
// zeros, and d in the rows of gate_bwd.
constexpr int64_t gate_padded(int64_t count, int64_t bytes) {
  const int64_t lanes = 64 / bytes;
  return (count + lanes - 1) / lanes * lanes;
}

// logit_cb = sum_h sum_e softmax_e(scale q_hb . k_ceh) (z_hb . v_ceh).
// qz (U, 2, H, d, B): queries q, then z; kv (U, C, E, 2, H, d): keys, then values.
// logits (U, C, B); stats (U, C, H, 3, B), or null where no gradient is wanted: of each softmax the
// q . k of its largest score, one over its sum, and the mean of the values: with all the weight on
// one expert exactly its value.
template <class Real>
void gate_fwd(const Real* qz, const Real* kv, Real* logits, Real* stats, const Gate& g);

// d_logits (U, C, B); rows (U, 2, H, B, d padded): q and z again, each image's numbers together.
// d_qz (U, chunks, 2, H, d, B), zeros at first: one part a chunk of classes, to be added up;
// d_kv like kv. Either may be null, rows with d_kv.
template <class Real>
void gate_bwd(const Real* d_logits, const Real* qz, const Real* rows, const Real* kv,
              const Real* stats, Real* d_qz, Real* d_kv, int64_t chunks, const Gate& g);

}  // namespace fastfpl
