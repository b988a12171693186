// 4-bit weights of bitsandbytes: w = code[nibble] * scale, the high nibble of a byte first, one scale per block.
// Doubly quantised scales are code2[absmax8] * absmax2 + offset; product and sum are rounded apart, as there.
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

inline float block_scale(const Dequantize4bit& a, int64_t block) {
  if (!a.absmax2) return static_cast<const float*>(a.absmax)[block];
  const float scaled = a.code2[static_cast<const uint8_t*>(a.absmax)[block]] * a.absmax2[block / a.blocksize2];
  return scaled + a.offset;
}

// A block has 16 different values: they are scaled and rounded once.
template <class T>
void dequantize_4bit_range(const Dequantize4bit& a, int64_t block_begin, int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    const Reg scale = splat_reg(block_scale(a, block));
    T values[16];
    for (int64_t i = 0; i < 16; i += Reg::size) store(values + i, load_reg(a.code + i) * scale);

    const int64_t first = block * a.blocksize, left = a.numel - first;
    const int64_t count = left < a.blocksize ? left : a.blocksize;
    const uint8_t* packed = a.packed + first / 2;
    T* out = static_cast<T*>(a.out) + first;
    for (int64_t i = 0; i < count / 2; ++i) {
      out[2 * i] = values[packed[i] >> 4];
      out[2 * i + 1] = values[packed[i] & 15];
    }
    if (count % 2) out[count - 1] = values[packed[count / 2] >> 4];
  }
}

void dequantize_4bit(const Dequantize4bit& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) { dequantize_4bit_range<decltype(t)>(a, begin, end); });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
