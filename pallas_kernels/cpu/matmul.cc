// x @ w.T of few rows x [M, K] and a weight [N, K] as it lies, both bfloat16 or both float16, accumulated in float32.
//
// Such a product is the reading of w: every row of it is read once, for up to eight rows of x.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

namespace ffi = xla::ffi;

enum class Type { kBFloat16, kFloat16 };

constexpr size_t kFirstCache = 16 << 10;  // bytes of x that are in use at once: half of a first level cache
constexpr size_t kLeadBytes = 32 << 10;  // of w, how far ahead it is fetched
constexpr size_t kChunkBytes = 256 << 10;  // of w, what a thread takes at once: a part of its second level cache
constexpr size_t kSmallestChunkBytes = 32 << 10;
constexpr size_t kChunkRows = 128;

struct Product {
  const uint16_t* w;  // [n, k]
  float* out;  // [m, n]
  size_t m, n, k;
  std::vector<uint16_t> packed;  // x
};

struct Kernel {
  std::vector<uint16_t> (*pack)(const uint16_t* x, size_t m, size_t k);
  void (*run)(const Product& product, size_t begin, size_t end);
};

namespace portable {
#define TARGET
#define VECTOR_BYTES 16
#include "dot.inc"
#undef TARGET
#undef VECTOR_BYTES
}  // namespace portable

#ifdef __x86_64__

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#define FROM_FLOAT16(pairs, upper) _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)pairs, upper))
#include "dot.inc"
#undef TARGET
#undef VECTOR_BYTES
#undef FROM_FLOAT16
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,fma")))
#define VECTOR_BYTES 64
#define FROM_FLOAT16(pairs, upper) _mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)pairs, upper))
#include "dot.inc"
#undef TARGET
}  // namespace avx512

namespace avx512_bf16 {
#define TARGET __attribute__((target("avx512f,avx512bf16,fma")))
#define BFLOAT16_DOT
#include "dot.inc"
#undef TARGET
#undef VECTOR_BYTES
#undef FROM_FLOAT16
#undef BFLOAT16_DOT
}  // namespace avx512_bf16

#endif

// The kernel of the widest instruction set that the machine has, up to the given index into INSTRUCTION_SETS of
// library.py. What has AVX2 has F16C.
Kernel Choose(Type type, int64_t widest) {
  const auto index = static_cast<size_t>(type);
#ifdef __x86_64__
  if (widest >= 3 && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::kKernels[index];
  if (widest >= 2 && __builtin_cpu_supports("avx512f")) return avx512::kKernels[index];
  if (widest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kKernels[index];
#endif
  return portable::kKernels[index];
}

// A product that threads share. Each takes chunks of rows until there are none.
struct Job {
  Product product;
  Kernel kernel;
  size_t chunk_rows, chunks;
  std::atomic<size_t> taken{0}, finished{0};

  void Work() {
    for (size_t chunk; (chunk = taken.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const size_t begin = chunk * chunk_rows;
      kernel.run(product, begin, std::min(begin + chunk_rows, product.n));
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::BufferR2<ffi::F32>> out,
                  int64_t widest) {
  if (x.element_type() != w.element_type() || (w.element_type() != ffi::BF16 && w.element_type() != ffi::F16)) {
    return ffi::Error::InvalidArgument("matmul: x and w both bfloat16 or both float16 expected");
  }
  const size_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  const Type type = w.element_type() == ffi::BF16 ? Type::kBFloat16 : Type::kFloat16;
  const size_t threads = std::max<int64_t>(1, pool.num_threads());

  // Late tasks find no chunk left, after this call has returned: they own the job too.
  auto job = std::make_shared<Job>();
  job->kernel = Choose(type, widest);
  job->product = {reinterpret_cast<const uint16_t*>(w.untyped_data()), out->typed_data(), m, n, k,
                  job->kernel.pack(reinterpret_cast<const uint16_t*>(x.untyped_data()), m, k)};
  const size_t share = n * k * sizeof(uint16_t) / (8 * threads);
  const size_t bytes = std::max(kSmallestChunkBytes, std::min(kChunkBytes, share));
  job->chunk_rows = std::min(kChunkRows, std::max<size_t>(4, bytes / (k * sizeof(uint16_t)) / 4 * 4));
  job->chunks = (n + job->chunk_rows - 1) / job->chunk_rows;

  for (size_t i = 1; i < std::min(threads, job->chunks); ++i) pool.Schedule([job] { job->Work(); });
  job->Work();
  // Chunks that another thread is at work on. Tasks that have not started are not waited for.
  for (int spins = 0; job->finished.load(std::memory_order_acquire) < job->chunks; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Phi4mmMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("widest"));
