// AVX-512: fp32 arithmetic, every storage type.
#define SF_HAS_BF16 0
#define SF_VECTORS "vec_avx512.h"
#include "kernel.h"
SF_EXPORT(avx512)
