// Attention of one query of each row and head over the live keys of a cache [B, K, S, H], accumulated in float32.
//
// Such an attention is the reading of the cache: the query heads of a kv head go over it together. The keys are cut into
// blocks, which threads share. Each block has a softmax of its own, and these are merged in the end.

#include <cmath>

#include "cache.h"

namespace {

constexpr size_t kBlock = 512;  // keys
constexpr size_t kHeads = 4;  // that are worked on at once

struct Block {
  size_t row;  // of the cache: a kv head of a row of the batch
  size_t first, count;  // keys
};

struct Attention {
  const float* q;  // [B, K, group, H]
  Cache k, v;
  size_t group, length, width;  // query heads of a kv head, S, H
  float scale;
  std::vector<Block> blocks;
  std::unique_ptr<float[]> partial;  // [blocks, group, 2 + H]: largest score, sum of weights, weighted sum of values
};

using Kernel = void (*)(const Attention& attention, size_t begin, size_t end);

#define KERNEL "decode_attention.inc"
#include "sets.inc"

// Merges what `count` blocks, `stride` apart, have found for a head.
void Merge(const float* partial, size_t count, size_t stride, size_t width, float* out) {
  float largest = -INFINITY, total = 0;
  for (size_t i = 0; i < count; ++i) largest = std::max(largest, partial[i * stride]);
  std::fill(out, out + width, 0.0f);
  for (size_t i = 0; i < count; ++i) {
    const float* part = partial + i * stride;
    const float share = std::exp(part[0] - largest);
    total += share * part[1];
    for (size_t h = 0; h < width; ++h) out[h] += share * part[2 + h];
  }
  for (size_t h = 0; h < width; ++h) out[h] /= total;
}

ffi::Error DecodeAttention(ffi::ThreadPool pool, ffi::BufferR3<ffi::F32> q, ffi::AnyBuffer k,
                           ffi::Buffer<ffi::F32> k_scales, ffi::AnyBuffer v, ffi::Buffer<ffi::F32> v_scales,
                           ffi::BufferR1<ffi::S32> lengths, ffi::Result<ffi::BufferR3<ffi::F32>> out, float scale,
                           int64_t widest) {
  const std::optional<Type> type = TypeOf(k);
  if (!type) return ffi::Error::InvalidArgument("decode attention: a cache of float32, bfloat16 or int8 expected");
  const size_t batch = k.dimensions()[0], kv_heads = k.dimensions()[1], length = k.dimensions()[2];
  const size_t width = k.dimensions()[3], group = q.dimensions()[1] / kv_heads, stride = 2 + width;
  if (width % 8 != 0) return ffi::Error::InvalidArgument("decode attention: a multiple of 8 numbers a head expected");
  Attention attention = {q.typed_data(), CacheOf(k, k_scales), CacheOf(v, v_scales), group, length, width, scale, {}, {}};
  const auto live = [&](size_t b) -> size_t {
    return std::clamp<int64_t>(lengths.typed_data()[b], 0, static_cast<int64_t>(length));
  };
  for (size_t row = 0; row < batch * kv_heads; ++row) {
    for (size_t first = 0, keys = live(row / kv_heads); first < keys; first += kBlock) {
      attention.blocks.push_back({row, first, std::min(kBlock, keys - first)});
    }
  }
  attention.partial.reset(new float[attention.blocks.size() * group * stride]);
  const Kernel kernel = Choose(static_cast<size_t>(*type), width, widest);
  Share(pool, attention.blocks.size(), 2 * k.size_bytes() / (batch * kv_heads * length) * kBlock,
        /*multiple=*/4, [&](size_t begin, size_t end) { kernel(attention, begin, end); });

  const float* partial = attention.partial.get();
  for (size_t row = 0; row < batch * kv_heads; ++row) {
    const size_t count = (live(row / kv_heads) + kBlock - 1) / kBlock;
    for (size_t head = 0; head < group; ++head) {
      Merge(partial + head * stride, count, group * stride, width, out->typed_data() + (row * group + head) * width);
    }
    partial += count * group * stride;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Phi4mmDecodeAttention, DecodeAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("widest"));
