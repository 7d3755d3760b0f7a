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

#define KERNEL "dot.inc"
#include "sets.inc"

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::BufferR2<ffi::F32>> out,
                  int64_t widest) {
  if (x.element_type() != w.element_type() || (w.element_type() != ffi::BF16 && w.element_type() != ffi::F16)) {
    return ffi::Error::InvalidArgument("matmul: x and w both bfloat16 or both float16 expected");
  }
  const size_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  const Type type = w.element_type() == ffi::BF16 ? Type::kBFloat16 : Type::kFloat16;
  const Kernel kernel = Choose(static_cast<size_t>(type), /*multiple=*/16, widest);
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
