// Attention in bf16 for AVX-512 with products of bf16 pairs; see isa_avx512.cpp. Everything else is AVX-512's.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

#define FASTLORA_ISA avx512_bf16
#define FASTLORA_BF16_PAIRS
#include "vec_avx512.h"

#include "vec_avx512_bf16.h"

#include "flash_attention_table.h"

namespace fastlora {

extern const FlashAttentionKernels flash_attention_avx512_bf16 = avx512_bf16::flash_attention<Bf16>();

}  // namespace fastlora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
