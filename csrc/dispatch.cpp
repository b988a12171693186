// Which instruction set runs: decided once, at the first kernel call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastlora {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

Kernels avx512_bf16() {
  Kernels kernels = kernels_avx512;
  kernels.isa = "avx512_bf16";
  kernels.flash_attention[static_cast<int>(DType::bf16)] = flash_attention_avx512_bf16;
  return kernels;
}
#endif

const Kernels& choose() {
#if defined(__x86_64__)
  static const Kernels kernels_avx512_bf16 = avx512_bf16();
#endif
  // Widest first. Every processor with AVX2 also has F16C, which older compilers cannot ask about.
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&kernels_avx512_bf16, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {&kernels_avx512, has_avx512()},
      {&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kernels_plain, true},
  };

  const char* wanted = std::getenv("FASTLORA_CPU_ISA");
  std::string runs_here;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (wanted == nullptr || *wanted == '\0' || candidate.kernels->isa == std::string(wanted)) {
      return *candidate.kernels;
    }
    runs_here += (runs_here.empty() ? "" : ", ") + std::string(candidate.kernels->isa);
  }
  throw std::runtime_error("FASTLORA_CPU_ISA is '" + std::string(wanted) + "'; this machine and build run: " + runs_here);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastlora

// For `fastlora explain` and the benchmarks, through ctypes: the instruction set in use, or the error in words.
extern "C" __attribute__((visibility("default"))) const char* fastlora_cpu_isa() {
  try {
    return fastlora::kernels().isa;
  } catch (const std::exception& error) {
    static const std::string message = error.what();
    return message.c_str();
  }
}

// Whether the processor multiplies 16-bit matrices by the tile, which the library knows to use and these kernels do not.
extern "C" __attribute__((visibility("default"))) bool fastlora_cpu_has_amx() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}
