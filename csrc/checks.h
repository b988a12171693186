// Argument checks whose messages name the argument, what was got and what is needed.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_kernel_dtype(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f32;
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline std::string describe(const Tensor& t) {
  std::ostringstream out;
  out << torch::headeronly::toString(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ")";
  if (!t.is_contiguous()) {
    out << " with strides (";
    for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.stride(i);
    out << ")";
  }
  if (!t.is_cpu()) out << " not on the CPU";
  return out.str();
}

// Not STD_TORCH_CHECK: that would open every message with the name of this helper and its line. The exception is the
// same one, and Python sees a RuntimeError.
template <class... Needed>
void require(bool ok, const char* op, const char* name, const Tensor& got, const Needed&... needed) {
  if (ok && got.is_cpu()) return;
  std::ostringstream message;
  message << "fastlora::" << op << ": " << name << " is " << describe(got) << "; needed: ";
  (message << ... << needed);
  throw std::runtime_error(message.str());
}

// `t` has the shape of `like`, the dtype of `typed`, and is contiguous.
inline void require_like(
    const char* op, const char* name, const Tensor& t, const Tensor& like, const Tensor& typed) {
  require(same_shape(t, like) && t.scalar_type() == typed.scalar_type() && t.is_contiguous(), op, name, t,
          "a contiguous tensor of shape and dtype ", torch::headeronly::toString(typed.scalar_type()), describe(like));
}

// A dropout mask of a matrix: a bit for every element, rows padded to whole bytes.
inline void require_mask(const char* op, const std::optional<Tensor>& mask, const Tensor& of) {
  if (!mask) return;
  const int64_t rows = of.size(0), bytes = (of.size(1) + 7) / 8;
  require(mask->dim() == 2 && mask->size(0) == rows && mask->size(1) == bytes && mask->is_contiguous() &&
              mask->scalar_type() == ScalarType::Byte,
          op, "mask", *mask, "contiguous Byte (", rows, ", ", bytes, ")");
}

}  // namespace fastlora
