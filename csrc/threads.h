// Work in parallel on as many threads as torch is set to.
//
// OpenMP where the compiler has it: libgomp is shared with torch by its soname, so that both use one
// pool of threads. With threads of our own, torch's would spin on the same cores meanwhile. As with
// torch itself, a child that was forked after the pool's first use must stay with one thread.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace fastfpl {

// Calls work(thread, begin, end) on disjoint ranges that make up [0, count), on at most `threads`
// threads; which range a thread gets depends on nothing but count and threads. No exceptions: what
// work needs is allocated before.
template <class Work>
void parallel(int64_t threads, int64_t count, const Work& work) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  if (threads == 1) {
    work(int64_t(0), int64_t(0), count);
    return;
  }
#if defined(_OPENMP)
  // fewer may come than were asked for
#pragma omp parallel num_threads(static_cast<int>(threads))
  for (int64_t i = omp_get_thread_num(); i < threads; i += omp_get_num_threads())
    work(i, count * i / threads, count * (i + 1) / threads);
#else
  std::vector<std::thread> pool;
  pool.reserve(threads);
  for (int64_t i = 1; i < threads; ++i) {
    const int64_t begin = count * i / threads, end = count * (i + 1) / threads;
    try {
      pool.emplace_back([&work, i, begin, end] { work(i, begin, end); });
    } catch (const std::system_error&) {  // no more threads to be had
      work(i, begin, end);
    }
  }
  work(int64_t(0), int64_t(0), count / threads);
  for (auto& thread : pool) thread.join();
#endif
}

}  // namespace fastfpl
