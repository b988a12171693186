// The kernels for AVX2, FMA and F16C. The target is set here and not by compiler flags, which the build cannot give to
// one file alone; the pragma also keeps AVX out of everything that is included before it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTLORA_ISA avx2
#define FASTLORA_KERNELS kernels_avx2
#include "vec_avx2.h"

#include "isa_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
