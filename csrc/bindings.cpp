// The CPU kernels of torch.ops.fastlora: argument checks, outputs, threads. The schemas are defined in Python
// (fastlora/kernels); the row loops are one header per kernel family. Only PyTorch's stable ABI is used, so that one
// shared object serves several versions of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"
#include "kernels.h"

namespace fastlora {
namespace {

using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::parallel_for;

// A thread's smallest share of the work, in elements; below it, waking a thread costs more than it saves.
constexpr int64_t kGrain = 32768;

int64_t grain_rows(int64_t cols) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols));
}

void require_matrix(const char* op, const char* name, const Tensor& t) {
  require(t.dim() == 2 && t.is_contiguous() && is_kernel_dtype(t), op, name, t,
          "a contiguous matrix of Float, BFloat16 or Half");
}

void require_weight(const char* op, const Tensor& weight, const Tensor& x) {
  const bool dtype_ok = weight.scalar_type() == x.scalar_type() || weight.scalar_type() == ScalarType::Float;
  require(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous() && dtype_ok, op, "weight", weight,
          "contiguous (", x.size(1), ") of Float or of x's dtype, ", torch::headeronly::toString(x.scalar_type()));
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps) {
  require_matrix("rms_norm_fwd", "x", x);
  require_weight("rms_norm_fwd", weight, x);
  const int64_t rows = x.size(0), cols = x.size(1);
  Tensor y = new_empty(x, {rows, cols}, weight.scalar_type());
  Tensor rstd = new_empty(x, {rows}, ScalarType::Float);

  const RmsNormFwd args{
      dtype_of(x),          dtype_of(weight), x.const_data_ptr(),
      weight.const_data_ptr(), y.mutable_data_ptr(), static_cast<float*>(rstd.mutable_data_ptr()),
      cols,                 static_cast<float>(eps)};
  const Kernels& isa = kernels();
  parallel_for(0, rows, grain_rows(cols), [&](int64_t begin, int64_t end) { isa.rms_norm_fwd(args, begin, end); });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
    const std::optional<Tensor>& dresidual, bool need_dw, bool need_n) {
  require_matrix("rms_norm_bwd", "x", x);
  require_weight("rms_norm_bwd", weight, x);
  require_matrix("rms_norm_bwd", "dy", dy);
  require_like("rms_norm_bwd", "dy", dy, x, dy);
  if (dresidual) require_like("rms_norm_bwd", "dresidual", *dresidual, x, x);
  const int64_t rows = x.size(0), cols = x.size(1);
  require(rstd.dim() == 1 && rstd.size(0) == rows && rstd.is_contiguous() && rstd.scalar_type() == ScalarType::Float,
          "rms_norm_bwd", "rstd", rstd, "contiguous Float (", rows, ")");

  // Each block of rows has its own partial sum of dw. Blocks depend on the number of rows alone: the result is the same
  // for any number of threads. At most 256 of them, so the partial sums stay small beside x.
  const int64_t block_rows = std::max<int64_t>(32, (rows + 255) / 256);
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  Tensor dx = empty_like(x);
  Tensor n = need_n ? empty_like(dy) : new_empty(dy, {0});
  Tensor dw = new_empty(weight, {need_dw ? cols : 0});
  Tensor partials = new_empty(x, {need_dw ? blocks : 0, 2, cols}, ScalarType::Float);
  float* dw_partials = need_dw ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;

  const RmsNormBwd args{
      dtype_of(x),
      dtype_of(weight),
      dtype_of(dy),
      dy.const_data_ptr(),
      x.const_data_ptr(),
      weight.const_data_ptr(),
      static_cast<const float*>(rstd.const_data_ptr()),
      dresidual ? dresidual->const_data_ptr() : nullptr,
      dx.mutable_data_ptr(),
      need_n ? n.mutable_data_ptr() : nullptr,
      dw_partials,
      rows,
      cols,
      block_rows};
  const Kernels& isa = kernels();
  parallel_for(0, blocks, grain_rows(block_rows * cols), [&](int64_t begin, int64_t end) {
    isa.rms_norm_bwd(args, begin, end);
  });
  if (need_dw) {
    const RmsNormDw dw_args{dtype_of(weight), dw_partials, dw.mutable_data_ptr(), blocks, cols};
    parallel_for(0, cols, grain_rows(blocks), [&](int64_t begin, int64_t end) {
      isa.rms_norm_dw(dw_args, begin, end);
    });
  }
  return {dx, dw, n};
}

RopeHeads rope_heads(const Tensor& in, const Tensor& out) {
  return {in.const_data_ptr(), out.mutable_data_ptr(), in.size(1),    in.stride(0), in.stride(1),
          in.stride(2),        out.stride(0),          out.stride(1), out.stride(2)};
}

std::tuple<Tensor, Tensor> rope(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse) {
  require(q.dim() == 4 && q.size(3) % 2 == 0 && (q.size(3) == 0 || q.stride(3) == 1) && is_kernel_dtype(q), "rope",
          "q", q, "(B, heads, T, D) of Float, BFloat16 or Half with D even and of stride 1");
  const int64_t batch = q.size(0), tokens = q.size(2), dim = q.size(3);
  require(k.dim() == 4 && k.size(0) == batch && k.size(2) == tokens && k.size(3) == dim &&
              (dim == 0 || k.stride(3) == 1) && k.scalar_type() == q.scalar_type(),
          "rope", "k", k, torch::headeronly::toString(q.scalar_type()), " (", batch, ", heads, ", tokens, ", ", dim,
          ") with a last dimension of stride 1, to go with q");
  const bool table_dtype_ok = cos.scalar_type() == q.scalar_type() || cos.scalar_type() == ScalarType::Float;
  require(cos.dim() == 3 && (cos.size(0) == 1 || cos.size(0) == batch) && cos.size(1) == tokens &&
              cos.size(2) == dim && cos.is_contiguous() && table_dtype_ok,
          "rope", "cos", cos, "contiguous (1 or ", batch, ", ", tokens, ", ", dim, ") of Float or of q's dtype, ",
          torch::headeronly::toString(q.scalar_type()));
  require_like("rope", "sin", sin, cos, cos);

  Tensor q_out = empty_like(q), k_out = empty_like(k);
  const Rope args{
      dtype_of(q),
      dtype_of(cos),
      rope_heads(q, q_out),
      rope_heads(k, k_out),
      cos.const_data_ptr(),
      sin.const_data_ptr(),
      cos.size(0) == 1 ? 0 : tokens * dim,
      tokens,
      dim,
      inverse};
  const Kernels& isa = kernels();
  parallel_for(0, batch * tokens, grain_rows((q.size(1) + k.size(1)) * dim), [&](int64_t begin, int64_t end) {
    isa.rope(args, begin, end);
  });
  return {q_out, k_out};
}

Tensor swiglu_fwd(const Tensor& gate, const Tensor& up) {
  require_matrix("swiglu_fwd", "gate", gate);
  require_like("swiglu_fwd", "up", up, gate, gate);
  Tensor h = empty_like(gate);
  const SwigluFwd args{dtype_of(gate), gate.const_data_ptr(), up.const_data_ptr(), h.mutable_data_ptr()};
  const Kernels& isa = kernels();
  parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) { isa.swiglu_fwd(args, begin, end); });
  return h;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dh, const Tensor& gate, const Tensor& up) {
  require_matrix("swiglu_bwd", "gate", gate);
  require_like("swiglu_bwd", "up", up, gate, gate);
  require_like("swiglu_bwd", "dh", dh, gate, gate);
  Tensor dgate = empty_like(gate), dup = empty_like(up);
  const SwigluBwd args{
      dtype_of(gate),
      dh.const_data_ptr(),
      gate.const_data_ptr(),
      up.const_data_ptr(),
      dgate.mutable_data_ptr(),
      dup.mutable_data_ptr()};
  const Kernels& isa = kernels();
  parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) { isa.swiglu_bwd(args, begin, end); });
  return {dgate, dup};
}

Tensor cross_entropy_rows(const Tensor& logits, const Tensor& labels, const Tensor& scale, bool need_grad) {
  const char* op = "cross_entropy_rows";
  require_matrix(op, "logits", logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  require(labels.dim() == 1 && labels.size(0) == rows && labels.is_contiguous() &&
              labels.scalar_type() == ScalarType::Long,
          op, "labels", labels, "contiguous Long (", rows, ")");
  require(scale.dim() == 0 && scale.scalar_type() == ScalarType::Float, op, "scale", scale, "a Float scalar tensor");

  const int64_t* label = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    require(label[row] >= 0 && label[row] < vocab, op, "labels", labels, "every label in [0, ", vocab, "), not ",
            label[row], " as in row ", row);
  }
  Tensor loss = new_empty(logits, {rows}, ScalarType::Float);
  const CrossEntropyRows args{
      dtype_of(logits),
      need_grad ? logits.mutable_data_ptr() : const_cast<void*>(logits.const_data_ptr()),
      label,
      static_cast<float*>(loss.mutable_data_ptr()),
      vocab,
      *static_cast<const float*>(scale.const_data_ptr()),
      need_grad};
  const Kernels& isa = kernels();
  parallel_for(0, rows, grain_rows(vocab), [&](int64_t begin, int64_t end) {
    isa.cross_entropy_rows(args, begin, end);
  });
  return loss;
}

Tensor dequantize_4bit(
    const Tensor& packed, const Tensor& absmax, const Tensor& code, const std::optional<Tensor>& absmax2,
    const std::optional<Tensor>& code2, const std::optional<Tensor>& offset, int64_t blocksize, int64_t blocksize2,
    int64_t numel, ScalarType dtype) {
  const char* op = "dequantize_4bit";
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  const auto require_vector = [&](const char* name, const Tensor& t, int64_t size, ScalarType type) {
    require(t.dim() == 1 && t.size(0) >= size && t.is_contiguous() && t.scalar_type() == type, op, name, t,
            "a contiguous vector of ", torch::headeronly::toString(type), " with ", size, " elements");
  };
  require_vector("packed", packed, (numel + 1) / 2, ScalarType::Byte);
  require_vector("absmax", absmax, blocks, absmax2 ? ScalarType::Byte : ScalarType::Float);
  require_vector("code", code, 16, ScalarType::Float);
  if (absmax2) {
    require_vector("absmax2", *absmax2, (blocks + blocksize2 - 1) / blocksize2, ScalarType::Float);
    require_vector("code2", *code2, 256, ScalarType::Float);
    require(offset->numel() == 1 && offset->scalar_type() == ScalarType::Float, op, "offset", *offset, "one Float");
  }
  Tensor out = new_empty(packed, {numel}, dtype);
  require(is_kernel_dtype(out), op, "dtype", out, "Float, BFloat16 or Half");
  const auto floats = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  const Dequantize4bit args{
      dtype_of(out),
      static_cast<const uint8_t*>(packed.const_data_ptr()),
      absmax.const_data_ptr(),
      static_cast<const float*>(code.const_data_ptr()),
      floats(absmax2),
      floats(code2),
      offset ? *floats(offset) : 0.0f,
      out.mutable_data_ptr(),
      blocksize,
      blocksize2,
      numel};
  const Kernels& isa = kernels();
  parallel_for(0, blocks, grain_rows(blocksize), [&](int64_t begin, int64_t end) {
    isa.dequantize_4bit(args, begin, end);
  });
  return out;
}

AttentionRows attention_rows(
    const char* op, const Tensor& scores, const Tensor& first, const Tensor& last, const std::optional<Tensor>& bias,
    double scale) {
  require(scores.dim() == 3 && scores.is_contiguous() && is_kernel_dtype(scores), op, "scores", scores,
          "a contiguous (heads, queries, keys) of Float, BFloat16 or Half");
  const int64_t queries = scores.size(1), keys = scores.size(2);
  for (const auto& [name, bound] : {std::pair{"first", &first}, std::pair{"last", &last}}) {
    require(bound->dim() == 1 && bound->size(0) == queries && bound->is_contiguous() &&
                bound->scalar_type() == ScalarType::Long,
            op, name, *bound, "contiguous Long (", queries, ")");
  }
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == keys && bias->is_contiguous() &&
                bias->scalar_type() == ScalarType::Float,
            op, "bias", *bias, "contiguous Float (", keys, ")");
  }
  return {
      dtype_of(scores),
      scores.mutable_data_ptr(),
      nullptr,
      nullptr,
      static_cast<const int64_t*>(first.const_data_ptr()),
      static_cast<const int64_t*>(last.const_data_ptr()),
      bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      queries,
      keys,
      static_cast<float>(scale)};
}

Tensor attention_softmax(
    const Tensor& scores, const Tensor& first, const Tensor& last, const std::optional<Tensor>& bias, double scale) {
  AttentionRows args = attention_rows("attention_softmax", scores, first, last, bias, scale);
  Tensor lse = new_empty(scores, {scores.size(0), args.queries}, ScalarType::Float);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  const Kernels& isa = kernels();
  parallel_for(0, lse.numel(), grain_rows(args.keys), [&](int64_t begin, int64_t end) {
    isa.attention_softmax(args, begin, end);
  });
  return lse;
}

void attention_softmax_bwd(
    const Tensor& scores, const Tensor& dp, const Tensor& first, const Tensor& last, const std::optional<Tensor>& bias,
    double scale) {
  const char* op = "attention_softmax_bwd";
  AttentionRows args = attention_rows(op, scores, first, last, bias, scale);
  require_like(op, "dp", dp, scores, scores);
  args.dp = dp.mutable_data_ptr();
  const Kernels& isa = kernels();
  parallel_for(0, scores.size(0) * args.queries, grain_rows(args.keys), [&](int64_t begin, int64_t end) {
    isa.attention_softmax_bwd(args, begin, end);
  });
}

void accumulate(const Tensor& total, const Tensor& parts) {
  const char* op = "accumulate";
  require(parts.dim() == 3 && parts.is_contiguous() && is_kernel_dtype(parts), op, "parts", parts,
          "a contiguous (groups · members, rows, cols) of Float, BFloat16 or Half");
  const int64_t rows = parts.size(1), cols = parts.size(2);
  require(total.dim() == 3 && total.scalar_type() == ScalarType::Float && total.size(1) == rows &&
              total.size(2) == cols && total.stride(1) == cols && total.stride(2) == 1,
          op, "total", total, "Float (groups, ", rows, ", ", cols, ") with contiguous groups");
  const int64_t groups = total.size(0), members = groups ? parts.size(0) / groups : 0;
  require(groups * members == parts.size(0), op, "parts", parts, "a first size that ", groups, " divides");
  const Accumulate args{
      dtype_of(parts), parts.const_data_ptr(), static_cast<float*>(total.mutable_data_ptr()), members, rows, cols,
      total.stride(0)};
  const Kernels& isa = kernels();
  parallel_for(0, groups * rows, grain_rows(members * cols), [&](int64_t begin, int64_t end) {
    isa.accumulate(args, begin, end);
  });
}

Tensor tall_product(const Tensor& narrow, const Tensor& wide, const std::optional<Tensor>& mask) {
  const char* op = "tall_product";
  require_matrix(op, "wide", wide);
  const int64_t rows = wide.size(0), cols = wide.size(1);
  require(narrow.dim() == 2 && narrow.size(0) == rows && narrow.is_contiguous() &&
              narrow.scalar_type() == ScalarType::Float,
          op, "narrow", narrow, "contiguous Float (", rows, ", members)");
  require_mask(op, mask, wide);
  const int64_t members = narrow.size(1);
  Tensor out = new_empty(narrow, {members, cols});
  if (rows == 0) torch::stable::zero_(out);
  const TallProduct args{
      dtype_of(wide),
      static_cast<const float*>(narrow.const_data_ptr()),
      wide.const_data_ptr(),
      mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
      static_cast<float*>(out.mutable_data_ptr()),
      rows,
      members,
      cols,
      (cols + 7) / 8};
  const Kernels& isa = kernels();
  const int64_t block = isa.tall_product_block;
  parallel_for(0, (cols + block - 1) / block, grain_rows(rows * block), [&](int64_t begin, int64_t end) {
    isa.tall_product(args, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fastlora::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastlora::rms_norm_bwd));
  m.impl("rope", TORCH_BOX(&fastlora::rope));
  m.impl("swiglu_fwd", TORCH_BOX(&fastlora::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&fastlora::swiglu_bwd));
  m.impl("cross_entropy_rows", TORCH_BOX(&fastlora::cross_entropy_rows));
  m.impl("dequantize_4bit", TORCH_BOX(&fastlora::dequantize_4bit));
  m.impl("attention_softmax", TORCH_BOX(&fastlora::attention_softmax));
  m.impl("attention_softmax_bwd", TORCH_BOX(&fastlora::attention_softmax_bwd));
  m.impl("accumulate", TORCH_BOX(&fastlora::accumulate));
  m.impl("tall_product", TORCH_BOX(&fastlora::tall_product));
}
