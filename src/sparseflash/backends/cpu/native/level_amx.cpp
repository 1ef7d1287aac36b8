// AMX tiles for bf16 products, AVX-512 for the rest. SF_AMX_EMULATED runs the tile instructions in plain C++ (tests).
#define SF_HAS_BF16 1
#define SF_AMX 1
#define SF_VECTORS "vec_avx512.h"
#include "kernel.h"
SF_EXPORT(amx)
