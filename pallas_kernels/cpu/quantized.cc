// x @ w.T of rows x [M, K] in float32 and a weight [N, K] of 8 or 4 bit integers as it lies, each times a scale
// that it shares with a group of columns of its row.
//
// Or, gated, with many rows of x, up * silu(gate): w has groups of rows of which one half gives gates and the other half
// what they let through.
//
// x is rounded to 8 bits, each row and block of columns with a scale of its own, and the products of a block are summed
// in integers. As with 16 bits, the time is that of reading w once; with many rows it is that of the products, and the
// scales of x are powers of two.

#include <cfloat>
#include <cmath>
#include <utility>

#include "common.h"

namespace {

constexpr size_t kWidestBlock = 128;  // columns that x is rounded in at most
constexpr size_t kManyRowsOfX = 24;  // from here on panels are faster; MANY_ROWS of matmul/cpu.py
constexpr size_t kMaxScales = kFirstCache / 64;  // of a row of w, while a part of x is in the first cache

struct Line {
  alignas(64) uint8_t bytes[64];
};

struct Product {
  const float* x;  // [m, k]
  const uint8_t* w;  // [n, k], with 4 bits the lower half of a byte is the even column
  const void* scales;  // [n, groups]
  bool float32_scales;  // otherwise bfloat16
  float* out;  // [m, outputs]
  size_t m, n, k, groups;
  size_t repeat;  // blocks that share a scale
  size_t gates;  // rows of w that follow each other, before as many that they are for; 0 if nothing is gated
  uint8_t* packed;  // x, tile by tile

  size_t Parts() const { return gates > 0 ? 2 : 1; }
  size_t Outputs() const { return n / Parts(); }

  // Of w, that gives a part of an output: the gate, then what it is for.
  size_t Row(size_t output, size_t part) const {
    return gates > 0 ? (output / gates * 2 + part) * gates + output % gates : output;
  }
};

struct Kernel {
  size_t tile;  // rows of x that are packed together
  size_t (*tile_bytes)(size_t k);
  void (*pack)(const Product& product, size_t begin, size_t end);  // these tiles
  void (*run)(const Product& product, size_t begin, size_t end);  // these outputs
  size_t multiple;  // of outputs, which `run` is best given
};

// For each set:
//   DOT(sums, w, x)  adds to each lane of four bytes the products of unsigned w and signed x
//   BYTE_OFFSET  is added to 8 bit weights, which makes them unsigned; 0 where DOT takes them as they are

namespace portable {
#define TARGET
#define VECTOR_BYTES 16
#define BYTE_OFFSET 0
#include "integers.inc"
#include "panels.inc"
#undef TARGET
#undef VECTOR_BYTES
#undef BYTE_OFFSET
}  // namespace portable

#ifdef __x86_64__

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define BYTE_OFFSET 0
// Pairs are summed in 16 bits, which hold them if one factor is below 128 in magnitude and the other at most that.
#define DOT(sums, w, x) _mm256_add_epi32((__m256i)sums, _mm256_madd_epi16( \
    _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w)), _mm256_set1_epi16(1)))
#include "integers.inc"
#include "panels.inc"
#undef TARGET
#undef BYTE_OFFSET
#undef DOT
}  // namespace avx2

namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define BYTE_OFFSET 128
#define DOT(sums, w, x) _mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x)
#include "integers.inc"
#include "panels.inc"
#undef TARGET
#undef VECTOR_BYTES
#undef BYTE_OFFSET
#undef DOT
}  // namespace avx_vnni

namespace avx512_vnni {
#define TARGET __attribute__((target("avx512f,avx512vnni,fma")))
#define VECTOR_BYTES 64
#define BYTE_OFFSET 128
#define DOT(sums, w, x) _mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x)
#include "integers.inc"
#include "panels.inc"
#undef TARGET
#undef VECTOR_BYTES
#undef BYTE_OFFSET
#undef DOT
}  // namespace avx512_vnni

#endif

// The kernel of the widest instruction set that the machine has, up to the given index into INSTRUCTION_SETS of
// library.py, whose last two stand for VNNI here, in 256 and 512 bits.
Kernel Choose(bool many, bool bytes, size_t block, int64_t widest) {
  const size_t index = block == 32 ? 0 : block == 64 ? 1 : 2;
#ifdef __x86_64__
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (widest >= 3 && __builtin_cpu_supports("avx512vnni")) return avx512_vnni::kKernels[many][bytes][index];
  if (widest >= 2 && fma && __builtin_cpu_supports("avxvnni")) return avx_vnni::kKernels[many][bytes][index];
  if (widest >= 1 && fma) return avx2::kKernels[many][bytes][index];
#endif
  return portable::kKernels[many][bytes][index];
}

ffi::Error QuantizedMatmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::AnyBuffer w, ffi::AnyBuffer scales,
                           ffi::Result<ffi::BufferR2<ffi::F32>> out, int64_t gated_groups, int64_t widest) {
  if (w.element_type() != ffi::S8 && w.element_type() != ffi::S4) {
    return ffi::Error::InvalidArgument("quantized matmul: a weight of int8 or int4 expected");
  }
  if (scales.element_type() != ffi::BF16 && scales.element_type() != ffi::F32) {
    return ffi::Error::InvalidArgument("quantized matmul: scales of bfloat16 or float32 expected");
  }
  const bool bytes = w.element_type() == ffi::S8;
  const size_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0], groups = scales.dimensions()[1];
  const size_t size = k / groups;
  if (k % groups != 0 || size % 32 != 0 || (groups > 1 && size != 32 && size != 64 && size % kWidestBlock != 0)) {
    return ffi::Error::InvalidArgument("quantized matmul: groups of 32, 64 or a multiple of 128 columns expected");
  }
  if (gated_groups < 0 || (gated_groups > 0 && (m < kManyRowsOfX || n % (2 * gated_groups) != 0))) {
    return ffi::Error::InvalidArgument("quantized matmul: gated, many rows of x and whole groups of w expected");
  }
  const size_t block = size == 32 || size == 64 ? size : kWidestBlock;
  const Kernel kernel = Choose(m >= kManyRowsOfX, bytes, block, widest);
  const size_t tiles = (m + kernel.tile - 1) / kernel.tile, tile_bytes = kernel.tile_bytes(k);
  thread_local std::vector<Line> packed;  // kept: its pages are slow to get anew
  packed.resize(std::max(packed.size(), (tiles * tile_bytes + sizeof(Line) - 1) / sizeof(Line)));
  const Product product = {x.typed_data(), reinterpret_cast<const uint8_t*>(w.untyped_data()), scales.untyped_data(),
                           scales.element_type() == ffi::F32, out->typed_data(), m, n, k, groups,
                           (size + block - 1) / block, gated_groups > 0 ? n / (2 * gated_groups) : 0,
                           packed.data()->bytes};
  Share(pool, tiles, tile_bytes, /*multiple=*/1,
        [=](size_t begin, size_t end) { kernel.pack(product, begin, end); });
  Share(pool, product.Outputs(), product.Parts() * (bytes ? k : k / 2), kernel.multiple,
        [=](size_t begin, size_t end) { kernel.run(product, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Phi4mmQuantizedMatmul, QuantizedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("gated_groups")
                                  .Attr<int64_t>("widest"));
