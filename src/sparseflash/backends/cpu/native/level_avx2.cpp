// AVX2, FMA and F16C: fp32 arithmetic, every storage type.
#define SF_HAS_BF16 0
#define SF_VECTORS "vec_avx2.h"
#include "kernel.h"
SF_EXPORT(avx2)
