// Attention on the CPU: argument checks, outputs, threads and their memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "checks.h"
#include "kernels.h"

namespace fastlora {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

// A thread's smallest share, in scores.
constexpr int64_t kGrainScores = 8192;

void require_heads(const char* op, const char* name, const Tensor& t, const Tensor& q, int64_t heads, int64_t tokens) {
  require(t.dim() == 4 && t.scalar_type() == q.scalar_type() && t.size(0) == q.size(0) && t.size(1) == heads &&
              t.size(2) == tokens && t.size(3) == q.size(3) && (t.stride(3) == 1 || t.numel() == 0),
          op, name, t, torch::headeronly::toString(q.scalar_type()), " (", q.size(0), ", ", heads, ", ", tokens, ", ",
          q.size(3), ") with contiguous rows");
}

Heads heads(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// An empty tensor of the shape of t in (batch, token, head, dim) memory.
Tensor new_heads(const Tensor& t) {
  return torch::stable::transpose(new_empty(t, {t.size(0), t.size(2), t.size(1), t.size(3)}), 1, 2);
}

FlashAttention arguments(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real,
    const Tensor& first, double scale, bool causal) {
  require(q.dim() == 4 && is_kernel_dtype(q), op, "q", q, "(batch, heads, tokens, dim) of Float, BFloat16 or Half");
  require(k.dim() == 4 && k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, "k", k,
          "(batch, heads, tokens, dim) with a divisor of ", q.size(1), " heads");
  require_heads(op, "q", q, q, q.size(1), q.size(2));
  require_heads(op, "k", k, q, k.size(1), k.size(2));
  require_heads(op, "v", v, q, k.size(1), k.size(2));
  const int64_t B = q.size(0), queries = q.size(2), keys = k.size(2);
  if (real) {
    require(real->dim() == 2 && real->size(0) == B && real->size(1) == keys && real->scalar_type() == ScalarType::Bool &&
                (real->stride(1) == 1 || keys <= 1),
            op, "real", *real, "Bool (", B, ", ", keys, ") with contiguous rows");
  }
  require(first.dim() == 2 && (first.size(0) == B || first.size(0) == 1) && first.size(1) == queries &&
              first.is_contiguous() && first.scalar_type() == ScalarType::Long,
          op, "first", first, "contiguous Long (", B, " or 1, ", queries, ")");
  FlashAttention a{};
  a.q = heads(q), a.k = heads(k), a.v = heads(v);
  a.first = static_cast<const int64_t*>(first.const_data_ptr());
  a.first_batch = first.size(0) > 1 ? queries : 0;
  a.real = real ? static_cast<const uint8_t*>(real->const_data_ptr()) : nullptr;
  a.real_batch = real ? real->stride(0) : 0;
  a.batches = B, a.heads = q.size(1), a.key_heads = k.size(1), a.queries = queries, a.keys = keys, a.dim = q.size(3);
  a.scale = static_cast<float>(scale), a.causal = causal;
  return a;
}

using Bytes = std::unique_ptr<char, decltype(&std::free)>;

Bytes aligned(int64_t bytes) {
  Bytes memory(static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(64, bytes))), &std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

std::tuple<Tensor, Tensor> fused_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real, const Tensor& first,
    double scale, bool causal) {
  FlashAttention a = arguments("fused_attention_fwd", q, k, v, real, first, scale, causal);
  Tensor out = new_heads(q), lse = new_empty(q, {a.batches, a.heads, a.queries}, ScalarType::Float);
  a.out = heads(out), a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const FlashAttentionKernels& isa = kernels().flash_attention[static_cast<int>(dtype_of(q))];
  const int64_t blocks = a.batches * a.heads * ((a.queries + isa.block - 1) / isa.block);
  const int64_t grain = std::max<int64_t>(1, kGrainScores / (isa.block * std::max<int64_t>(1, a.keys)));
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const Bytes scratch = aligned(isa.fwd_scratch(a));
    isa.fwd(a, scratch.get(), begin, end);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> fused_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& real, const Tensor& first, double scale, bool causal) {
  const char* op = "fused_attention_bwd";
  FlashAttention a = arguments(op, q, k, v, real, first, scale, causal);
  require_heads(op, "dout", dout, q, a.heads, a.queries);
  require_heads(op, "out", out, q, a.heads, a.queries);
  require(lse.dim() == 3 && lse.size(0) == a.batches && lse.size(1) == a.heads && lse.size(2) == a.queries &&
              lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
          op, "lse", lse, "contiguous Float (", a.batches, ", ", a.heads, ", ", a.queries, ")");
  Tensor dq = new_heads(q), dk = new_heads(k), dv = new_heads(k);
  a.out = heads(out), a.dout = heads(dout), a.dq = heads(dq), a.dk = heads(dk), a.dv = heads(dv);
  a.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  const FlashAttentionKernels& isa = kernels().flash_attention[static_cast<int>(dtype_of(q))];
  const int64_t scores = a.heads / a.key_heads * a.queries * a.keys;
  const int64_t grain = std::max<int64_t>(1, kGrainScores / std::max<int64_t>(1, scores));
  parallel_for(0, a.batches * a.key_heads, grain, [&](int64_t begin, int64_t end) {
    const Bytes scratch = aligned(isa.bwd_scratch(a));
    isa.bwd(a, scratch.get(), begin, end);
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("fused_attention_fwd", TORCH_BOX(&fastlora::fused_attention_fwd));
  m.impl("fused_attention_bwd", TORCH_BOX(&fastlora::fused_attention_bwd));
}
