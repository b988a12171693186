// Dropout masks as packed bits, and their use. Plain code: integers that every instruction set handles alike, in loops
// that memory bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

#include "checks.h"

namespace fastlora {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr int64_t kGrainBytes = 4096;

// SplitMix64 (Steele, Lea and Flood, 2014): a bijection of the counter, so that any element's bits can be made alone.
inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

Tensor dropout_mask(const Tensor& like, const Tensor& seed, double p) {
  const char* op = "dropout_mask";
  require(like.dim() == 2, op, "like", like, "a matrix");
  require(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, op, "seed", seed, "one Long");
  const int64_t rows = like.size(0), bytes = (like.size(1) + 7) / 8;
  const uint64_t key = mix(static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())));
  // An element is dropped where its 32 random bits are below p · 2³².
  const uint64_t threshold = static_cast<uint64_t>(std::llround(p * 4294967296.0));
  Tensor mask = new_empty(like, {rows, bytes}, ScalarType::Byte);
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  parallel_for(0, rows * bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      unsigned byte = 0;
      for (unsigned pair = 0; pair < 4; ++pair) {
        const uint64_t counter = 4 * static_cast<uint64_t>(i) + pair;
        const uint64_t random = mix(key + counter * 0x9e3779b97f4a7c15ULL);
        byte |= static_cast<unsigned>((random & 0xffffffffULL) >= threshold) << (2 * pair);
        byte |= static_cast<unsigned>((random >> 32) >= threshold) << (2 * pair + 1);
      }
      out[i] = static_cast<uint8_t>(byte);
    }
  });
  return mask;
}

// x where the bit is set, +0 elsewhere: on the bits of the element, whatever its type.
template <class Word>
void keep_rows(const Word* x, const uint8_t* mask, Word* out, int64_t cols, int64_t row_begin, int64_t row_end) {
  const int64_t bytes = (cols + 7) / 8;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Word* from = x + row * cols;
    const uint8_t* bits = mask + row * bytes;
    Word* to = out + row * cols;
    for (int64_t b = 0; b < cols / 8; ++b) {
      const unsigned byte = bits[b];
      for (int j = 0; j < 8; ++j) {
        to[8 * b + j] = from[8 * b + j] & static_cast<Word>(-static_cast<int64_t>(byte >> j & 1u));
      }
    }
    for (int64_t i = cols / 8 * 8; i < cols; ++i) {
      to[i] = from[i] & static_cast<Word>(-static_cast<int64_t>(bits[i / 8] >> (i % 8) & 1u));
    }
  }
}

Tensor apply_mask(const Tensor& x, const Tensor& mask) {
  const char* op = "apply_mask";
  const int64_t size = x.element_size();
  require(x.dim() == 2 && x.is_contiguous() && (size == 2 || size == 4 || size == 8), op, "x", x,
          "a contiguous matrix of a floating type");
  const int64_t rows = x.size(0), cols = x.size(1);
  require_mask(op, mask, x);
  Tensor out = torch::stable::empty_like(x);
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const auto keep = [&](auto word) {
      using Word = decltype(word);
      const auto* from = static_cast<const Word*>(x.const_data_ptr());
      keep_rows(from, bits, static_cast<Word*>(out.mutable_data_ptr()), cols, begin, end);
    };
    if (size == 2) keep(uint16_t{});
    if (size == 4) keep(uint32_t{});
    if (size == 8) keep(uint64_t{});
  });
  return out;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&fastlora::dropout_mask));
  m.impl("apply_mask", TORCH_BOX(&fastlora::apply_mask));
}
