// x @ w.T of few rows x [M, K] and a weight [N, K] as it lies, both bfloat16 or both float16, accumulated in float32.
//
// Such a product is the reading of w: every row of it is read once, for up to eight rows of x.

#include "common.h"

namespace {

enum class Type { kBFloat16, kFloat16 };

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

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::BufferR2<ffi::F32>> out,
                  int64_t widest) {
  if (x.element_type() != w.element_type() || (w.element_type() != ffi::BF16 && w.element_type() != ffi::F16)) {
    return ffi::Error::InvalidArgument("matmul: x and w both bfloat16 or both float16 expected");
  }
  const size_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  const Type type = w.element_type() == ffi::BF16 ? Type::kBFloat16 : Type::kFloat16;
  const Kernel kernel = Choose(type, widest);
  Product product = {reinterpret_cast<const uint16_t*>(w.untyped_data()), out->typed_data(), m, n, k,
                     kernel.pack(reinterpret_cast<const uint16_t*>(x.untyped_data()), m, k)};
  Share(pool, n, k * sizeof(uint16_t), /*multiple=*/4,
        [product = std::move(product), kernel](size_t begin, size_t end) { kernel.run(product, begin, end); });
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
