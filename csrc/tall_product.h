// narrowᵀ (mask ∘ wide), summed over the rows in fp32: narrow (M, R) with few columns, wide (M, cols). The gradients of
// low-rank factors are of this kind. A block of the result stays in registers while a run of rows goes by; every element
// is a sum of sums of kRun rows, whatever the number of threads.
#pragma once

#include "vec.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kRun = 128;
constexpr int64_t kAhead = 8;                          // rows of prefetch: they lie too far apart for the processor's own
constexpr int kMembers = Reg::size == 16 ? 8 : 4;      // columns of narrow that the registers hold sums for

// The mask of the lanes at p; those past the last byte are not kept.
template <bool whole>
inline uint32_t mask_bits(const uint8_t* p, int64_t bytes) {
  constexpr int64_t size = Vec::size / 8;
  uint32_t bits = 0;
  if (whole) {
    __builtin_memcpy(&bits, p, size);
  } else {
    for (int64_t i = 0; i < size && i < bytes; ++i) bits |= static_cast<uint32_t>(p[i]) << (8 * i);
  }
  return bits;
}

// n vectors by name: the elements of an array would be written to memory at every step.
template <int n>
struct Sums {
  Vec sum = splat(0.0f);
  Sums<n - 1> rest;

  void add(const float* factors, Vec x) {
    sum = fma(splat(*factors), x, sum);
    rest.add(factors + 1, x);
  }
  void finish(float* out, int64_t row, int64_t left, bool first) const {
    store(out, first ? sum : load(out, left) + sum, left);
    rest.finish(out + row, row, left, first);
  }
};
template <>
struct Sums<0> {
  void add(const float*, Vec) {}
  void finish(float*, int64_t, int64_t, bool) const {}
};

// whole: all lanes lie before the end of the row. A call in the loop, as for a tail, would keep the sums in memory.
template <int members, bool whole, bool masked, class T>
void tall_product_sums(const TallProduct& a, int64_t row_begin, int64_t row_end, int64_t col, int64_t member) {
  const T* wide = static_cast<const T*>(a.wide) + row_begin * a.cols + col;
  const float* narrow = a.narrow + row_begin * a.members + member;
  const int64_t cols = a.cols, left = cols - col, stride = a.members;
  Sums<members> sums;
  for (int64_t row = row_begin; row < row_end; ++row, wide += cols, narrow += stride) {
    __builtin_prefetch(wide + kAhead * cols);
    Vec x = whole ? load(wide) : load(wide, left);
    if (masked) x = keep(x, mask_bits<whole>(a.mask + row * a.mask_row + col / 8, a.mask_row - col / 8));
    sums.add(narrow, x);
  }
  sums.finish(a.out + member * cols + col, cols, left, row_begin == 0);
}

template <int members, bool masked, class T>
void tall_product_block(const TallProduct& a, int64_t row_begin, int64_t row_end, int64_t col, int64_t member) {
  if (col + Vec::size <= a.cols) {
    tall_product_sums<members, true, masked, T>(a, row_begin, row_end, col, member);
  } else {
    tall_product_sums<members, false, masked, T>(a, row_begin, row_end, col, member);
  }
}

template <bool masked, class T>
void tall_product_range(const TallProduct& a, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < a.rows; row += kRun) {
    const int64_t row_end = row + kRun < a.rows ? row + kRun : a.rows;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col = block * Vec::size;
      int64_t i = 0;
      for (; i + kMembers <= a.members; i += kMembers) tall_product_block<kMembers, masked, T>(a, row, row_end, col, i);
      for (; i + 2 <= a.members; i += 2) tall_product_block<2, masked, T>(a, row, row_end, col, i);
      if (i < a.members) tall_product_block<1, masked, T>(a, row, row_end, col, i);
    }
  }
}

// In blocks of Vec::size columns.
void tall_product(const TallProduct& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) {
    if (a.mask) {
      tall_product_range<true, decltype(t)>(a, begin, end);
    } else {
      tall_product_range<false, decltype(t)>(a, begin, end);
    }
  });
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
