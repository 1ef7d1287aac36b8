// AVX-512 with bf16 dot products.
#define SF_HAS_BF16 1
#define SF_AMX 0
#define SF_VECTORS "vec_avx512.h"
#include "kernel.h"
SF_EXPORT(avx512bf16)
