// What the kernels share: how the compilers are spoken to, and how threads share the work.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(Vector, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(Vector, a, b, ...) __builtin_shuffle(a, b, Vector{__VA_ARGS__})
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

namespace ffi = xla::ffi;

constexpr size_t kFirstCache = 16 << 10;  // bytes of x that are in use at once: half of a first level cache
constexpr size_t kLeadBytes = 32 << 10;  // how far ahead a weight or a cache is fetched
constexpr size_t kChunkBytes = 256 << 10;  // what a thread takes of it at once: a part of its second level cache
constexpr size_t kSmallestChunkBytes = 32 << 10;
constexpr size_t kChunkRows = 128;

// Work that threads share. Each has a stretch of the chunks, which it takes one after the other, so that what it fetches
// ahead is its own; then it takes those of the others, from the last on.
struct Job {
  std::function<void(size_t begin, size_t end)> run;
  size_t rows, chunk_rows, chunks;
  std::vector<std::atomic<uint64_t>> stretches;  // the first chunk that is left in the upper half, the end in the lower
  std::atomic<size_t> started{0}, finished{0};

  Job(std::function<void(size_t, size_t)> run, size_t rows, size_t chunk_rows, size_t threads)
      : run(std::move(run)), rows(rows), chunk_rows(chunk_rows), chunks((rows + chunk_rows - 1) / chunk_rows),
        stretches(std::min(threads, chunks)) {
    for (size_t i = 0; i < stretches.size(); ++i) {
      stretches[i] = i * chunks / stretches.size() << 32 | (i + 1) * chunks / stretches.size();
    }
  }

  // Takes the first or the last chunk that is left of a stretch; `chunks` if there is none.
  size_t Take(std::atomic<uint64_t>& stretch, bool first) {
    uint64_t left = stretch.load(std::memory_order_relaxed), after;
    do {
      if (left >> 32 == (left & UINT32_MAX)) return chunks;
      after = first ? left + (uint64_t{1} << 32) : left - 1;
    } while (!stretch.compare_exchange_weak(left, after, std::memory_order_relaxed));
    return first ? left >> 32 : after & UINT32_MAX;
  }

  void Work() {
    const size_t own = started.fetch_add(1, std::memory_order_relaxed);
    for (size_t i = 0; i < stretches.size(); ++i) {
      auto& stretch = stretches[(own + i) % stretches.size()];
      for (size_t chunk; (chunk = Take(stretch, /*first=*/i == 0)) < chunks;) {
        const size_t begin = chunk * chunk_rows;
        run(begin, std::min(begin + chunk_rows, rows));
        finished.fetch_add(1, std::memory_order_release);
      }
    }
  }
};

// Calls run(begin, end) for all rows of a weight or blocks of a cache, which have `row_bytes` each, in parts, a multiple
// of some rows but for the last, on the threads of the pool. Nothing that `run` refers to is used after the return.
inline void Share(ffi::ThreadPool& pool, size_t rows, size_t row_bytes, size_t multiple,
                  std::function<void(size_t, size_t)> run) {
  const size_t threads = std::max<int64_t>(1, pool.num_threads());
  const size_t bytes = std::max(kSmallestChunkBytes, std::min(kChunkBytes, rows * row_bytes / (8 * threads)));
  const size_t chunk_rows = std::max(multiple, std::min(kChunkRows, bytes / row_bytes) / multiple * multiple);
  // Late tasks find no chunk left, after this call has returned: they own the job too.
  const auto job = std::make_shared<Job>(std::move(run), rows, chunk_rows, threads);
  for (size_t i = 1; i < job->stretches.size(); ++i) pool.Schedule([job] { job->Work(); });
  job->Work();
  // Chunks that another thread is at work on. Tasks that have not started are not waited for.
  for (int spins = 0; job->finished.load(std::memory_order_acquire) < job->chunks; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace
