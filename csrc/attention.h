// Causal attention of many short token sequences that share a prefix.
#pragma once

#include <cstdint>

namespace fastfpl {

struct PrefixAttention {
  int64_t groups, shared, segments;  // G, S, C
  const int64_t* starts;             // (C + 1) first suffix row of every segment; R = starts[C]
  int64_t heads, size;               // H and the numbers of one head, at most 128; W = H size
  bool last_only;                    // only the last row of a segment is a query
  int64_t threads;
};

// qkv, d_qkv (G, S + R, 3 W); bias (3 W) or null; sos (2, W) or null: key and value of a token that
// stands before all others; mixed, d_mixed (G, S + R, W), with last_only (G, C, W).
template <class T>
void prefix_attention_fwd(const T* qkv, const T* bias, const T* sos, T* mixed,
                          const PrefixAttention& a);
template <class T>
void prefix_attention_bwd(const T* d_mixed, const T* qkv, const T* bias, const T* sos, T* d_qkv,
                          const PrefixAttention& a);

}  // namespace fastfpl
