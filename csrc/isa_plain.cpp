// The kernels in plain code: vectors of four floats, which every compiler lowers to SSE2 or NEON.
#include "kernels.h"

#define FASTLORA_ISA plain
#define FASTLORA_KERNELS kernels_plain
#include "vec_plain.h"

#include "isa_table.h"
