// The kernels for AVX-512 (F, BW, VL, DQ). The target is set here and not by compiler flags, which the build cannot give to
// one file alone; the pragma also keeps AVX out of everything that is included before it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
// GCC 12 objects to its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

#define FASTLORA_ISA avx512
#define FASTLORA_KERNELS kernels_avx512
#include "vec_avx512.h"

#include "isa_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
