#pragma once

#include "flash_attention_bwd.h"
#include "flash_attention_fwd.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

template <class T>
constexpr FlashAttentionKernels flash_attention() {
  return {flash_attention_fwd_scratch<T>, flash_attention_fwd<T>, flash_attention_bwd_scratch<T>, flash_attention_bwd<T>,
          kQueries};
}

}  // namespace
}  // namespace FASTLORA_ISA
}  // namespace fastlora
