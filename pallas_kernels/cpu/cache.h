// A cache of keys or values as the kernels of attention take it.

#include <optional>

#include "common.h"

namespace {

enum class Type { kFloat32, kBFloat16, kInt8 };

struct Cache {
  const void* values;  // [B, K, S, H]
  const float* scales;  // [B, K, S], or null
};

inline std::optional<Type> TypeOf(const ffi::AnyBuffer& values) {
  switch (values.element_type()) {
    case ffi::F32: return Type::kFloat32;
    case ffi::BF16: case ffi::U16: return Type::kBFloat16;
    case ffi::S8: return Type::kInt8;
    default: return {};
  }
}

// The scales of int8; those of other types have no elements.
inline Cache CacheOf(ffi::AnyBuffer& values, ffi::Buffer<ffi::F32>& scales) {
  return {values.untyped_data(), values.element_type() == ffi::S8 ? scales.typed_data() : nullptr};
}

}  // namespace
