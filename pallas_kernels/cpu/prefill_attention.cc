// Attention of T queries of each row to the keys of a cache [C, K, S, H] up to their own, accumulated in float32.
//
// Unlike that of one query it is bound by arithmetic: two products of matrices with a softmax between them. The queries
// are cut into tiles, in which the query heads of a kv head stand side by side and which threads share. A tile goes over
// the keys block by block, and what it has so far shrinks when a larger score appears.

#include <cfloat>
#include <cmath>

#include "cache.h"

namespace {

constexpr size_t kKeys = 96;  // of a block
constexpr size_t kTileRows = 192;  // queries of all heads in a tile, at most: its parts fill half a second level cache

struct Attention {
  const float* q;  // [B, T, N, H]
  Cache k, v;
  const int32_t *starts, *slots;  // [B]: position of the first query, row of the cache
  float* out;  // [B, T, N, H]
  size_t batch, queries, heads, kv_heads, slot_count, length, width;  // B, T, N, K, C, S, H
  float scale;

  size_t Group() const { return heads / kv_heads; }
  size_t TileQueries() const { return std::max<size_t>(1, kTileRows / Group()); }
  size_t Steps() const { return (queries + TileQueries() - 1) / TileQueries(); }  // tiles of the same keys
};

using Kernel = void (*)(const Attention& attention, size_t begin, size_t end);

#define KERNEL "prefill_attention.inc"
#include "sets.inc"

ffi::Error PrefillAttention(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> q, ffi::AnyBuffer k,
                            ffi::Buffer<ffi::F32> k_scales, ffi::AnyBuffer v, ffi::Buffer<ffi::F32> v_scales,
                            ffi::BufferR1<ffi::S32> starts, ffi::BufferR1<ffi::S32> slots,
                            ffi::Result<ffi::BufferR4<ffi::F32>> out, float scale, int64_t widest) {
  const std::optional<Type> type = TypeOf(k);
  if (!type) return ffi::Error::InvalidArgument("prefill attention: a cache of float32, bfloat16 or int8 expected");
  const auto size = [](const auto& buffer, size_t axis) { return static_cast<size_t>(buffer.dimensions()[axis]); };
  const Attention attention = {
      q.typed_data(), CacheOf(k, k_scales), CacheOf(v, v_scales), starts.typed_data(), slots.typed_data(),
      out->typed_data(), size(q, 0), size(q, 1), size(q, 2), size(k, 1), size(k, 0), size(k, 2), size(k, 3), scale};
  if (attention.width % 8 != 0) {
    return ffi::Error::InvalidArgument("prefill attention: a multiple of 8 numbers a head expected");
  }
  const Kernel kernel = Choose(static_cast<size_t>(*type), attention.width, widest);
  Share(pool, attention.batch * attention.kv_heads * attention.Steps(), kChunkBytes, /*multiple=*/1,
        [&](size_t begin, size_t end) { kernel(attention, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Phi4mmPrefillAttention, PrefillAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR4<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("widest"));
