// Included once by each isa_*.cpp, after its Reg: the row loops, compiled for that instruction set, and their table.
// Everything but the table has internal linkage, so no function compiled for AVX can stand in for another.
#pragma once

#include "attention.h"
#include "cross_entropy.h"
#include "dequantize_4bit.h"
#include "flash_attention_table.h"
#include "rms_norm.h"
#include "rope.h"
#include "swiglu.h"
#include "tall_product.h"

#define FASTLORA_STRING_(x) #x
#define FASTLORA_STRING(x) FASTLORA_STRING_(x)

namespace fastlora {

extern const Kernels FASTLORA_KERNELS = {
    FASTLORA_STRING(FASTLORA_ISA),
    FASTLORA_ISA::rms_norm_fwd,
    FASTLORA_ISA::rms_norm_bwd,
    FASTLORA_ISA::rms_norm_dw,
    FASTLORA_ISA::rope,
    FASTLORA_ISA::swiglu_fwd,
    FASTLORA_ISA::swiglu_bwd,
    FASTLORA_ISA::cross_entropy_rows,
    FASTLORA_ISA::dequantize_4bit,
    FASTLORA_ISA::attention_softmax,
    FASTLORA_ISA::attention_softmax_bwd,
    FASTLORA_ISA::accumulate,
    FASTLORA_ISA::tall_product,
    FASTLORA_ISA::Vec::size,
    {FASTLORA_ISA::flash_attention<float>(), FASTLORA_ISA::flash_attention<Bf16>(), FASTLORA_ISA::flash_attention<Fp16>()},
};

}  // namespace fastlora
