// The contract between bindings.cpp (torch, threads, checks) and the row loops (one copy per instruction set).
// Free of torch and of std templates: what the AVX translation units share with the rest must hold no inline code,
// or the linker could keep the AVX copy of it and run that on a machine without AVX.
#pragma once

#include <cstdint>

namespace fastlora {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

enum class DType : int8_t { f32, bf16, f16 };

struct RmsNormFwd {
  DType x_type, weight_type;  // weight_type is x_type or f32
  const void* x;              // (M, cols)
  const void* weight;         // (cols)
  void* y;                    // (M, cols), dtype of weight
  float* rstd;                // (M)
  int64_t cols;
  float eps;
};

struct RmsNormBwd {
  DType x_type, weight_type, dy_type;
  const void* dy;  // (M, cols)
  const void* x;
  const void* weight;
  const float* rstd;
  const void* dresidual;  // (M, cols), dtype of x, added to dx; or null
  void* dx;
  void* n;             // (M, cols), dtype of dy, the forward's output again; or null
  float* dw_partials;  // (blocks, 2, cols): the block's sum of dw, and scratch; or null
  int64_t rows, cols;
  int64_t block_rows;
};

struct RmsNormDw {
  DType weight_type;
  const float* dw_partials;
  void* dw;
  int64_t blocks, cols;
};

struct RopeHeads {
  const void* in;
  void* out;
  int64_t heads;
  int64_t in_batch, in_head, in_token;  // strides, in elements
  int64_t out_batch, out_head, out_token;
};

struct Rope {
  DType type, table_type;  // table_type is type or f32
  RopeHeads q, k;
  const void* cos;  // (1 or B, tokens, dim)
  const void* sin;
  int64_t table_batch;  // stride of a batch in cos and sin, 0 where they are shared
  int64_t tokens, dim;
  bool inverse;
};

struct SwigluFwd {
  DType type;
  const void *gate, *up;
  void* h;
};

struct SwigluBwd {
  DType type;
  const void *dh, *gate, *up;
  void *dgate, *dup;
};

struct CrossEntropyRows {
  DType type;
  void* logits;  // (M, vocab), overwritten with the gradient when need_grad
  const int64_t* labels;
  float* loss;
  int64_t vocab;
  float scale;
  bool need_grad;
};

struct Dequantize4bit {
  DType type;
  const uint8_t* packed;  // (numel / 2, rounded up)
  const void* absmax;     // (blocks), f32; uint8 where absmax2 is given
  const float* code;      // (16)
  const float* absmax2;   // (blocks / blocksize2, rounded up), or null
  const float* code2;     // (256), or null
  float offset;
  void* out;  // (numel)
  int64_t blocksize, blocksize2, numel;
};

struct AttentionRows {
  DType type;
  void* scores;                 // (heads, queries, keys), overwritten with the probabilities
  void* dp;                     // the same, overwritten with the gradient of the scores; null in the forward
  float* lse;                   // (heads, queries), written by the forward: infinity where nothing is seen
  const int64_t *first, *last;  // (queries): the keys first <= j < last are seen,
  const float* bias;            // (keys): but those with -infinity here; or null
  int64_t queries, keys;
  float scale;  // greater than 0
};

struct Heads {
  const void* data;              // (batch, head, token, dim), dim contiguous
  int64_t batch, head, token;  // strides, in elements
};

struct FlashAttention {
  Heads q, k, v, out, dout;  // out is written by the forward
  Heads dq, dk, dv;          // written by the backward
  float* lse;                // (batches, heads, queries), written by the forward
  const int64_t* first;      // (batches or 1, queries): the first key a query sees, or less
  const uint8_t* real;       // (batches, keys): 0 for keys that nothing sees; or null
  int64_t first_batch, real_batch;  // strides
  int64_t batches, heads, key_heads, queries, keys, dim;
  float scale;  // greater than 0
  bool causal;
};

struct Accumulate {
  DType type;
  const void* parts;  // (groups, members, rows, cols)
  float* total;       // (groups, rows, cols), a group total_group elements after the last
  int64_t members, rows, cols, total_group;
};

struct TallProduct {
  DType type;
  const float* narrow;  // (rows, members)
  const void* wide;     // (rows, cols)
  const uint8_t* mask;  // (rows, mask_row), a bit for every element of wide; or null
  float* out;           // (members, cols)
  int64_t rows, members, cols, mask_row;
};

// Of one dtype. A thread brings `scratch(args)` bytes of memory, aligned to 64, for its range.
struct FlashAttentionKernels {
  int64_t (*fwd_scratch)(const FlashAttention&);
  void (*fwd)(const FlashAttention&, char* scratch, int64_t block_begin, int64_t block_end);
  int64_t (*bwd_scratch)(const FlashAttention&);
  void (*bwd)(const FlashAttention&, char* scratch, int64_t head_begin, int64_t head_end);
  int64_t block;  // queries in a block
};

// One instruction set's kernels. Each works on the half-open range [begin, end) of its parallel dimension.
struct Kernels {
  const char* isa;
  void (*rms_norm_fwd)(const RmsNormFwd&, int64_t row_begin, int64_t row_end);
  void (*rms_norm_bwd)(const RmsNormBwd&, int64_t block_begin, int64_t block_end);
  void (*rms_norm_dw)(const RmsNormDw&, int64_t col_begin, int64_t col_end);
  void (*rope)(const Rope&, int64_t batch_token_begin, int64_t batch_token_end);
  void (*swiglu_fwd)(const SwigluFwd&, int64_t begin, int64_t end);
  void (*swiglu_bwd)(const SwigluBwd&, int64_t begin, int64_t end);
  void (*cross_entropy_rows)(const CrossEntropyRows&, int64_t row_begin, int64_t row_end);
  void (*dequantize_4bit)(const Dequantize4bit&, int64_t block_begin, int64_t block_end);
  void (*attention_softmax)(const AttentionRows&, int64_t row_begin, int64_t row_end);
  void (*attention_softmax_bwd)(const AttentionRows&, int64_t row_begin, int64_t row_end);
  void (*accumulate)(const Accumulate&, int64_t row_begin, int64_t row_end);
  void (*tall_product)(const TallProduct&, int64_t block_begin, int64_t block_end);
  int64_t tall_product_block;  // columns in a block
  FlashAttentionKernels flash_attention[3];  // by DType
};

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const FlashAttentionKernels flash_attention_avx512_bf16;  // of bf16: AVX-512's other kernels go with it
#endif

// The widest instruction set of this machine, or the one FASTLORA_CPU_ISA names. Throws std::runtime_error.
const Kernels& kernels();

}  // namespace fastlora
