// AArch64: fp32 arithmetic, every storage type.
#define SF_HAS_BF16 0
#define SF_VECTORS "vec_neon.h"
#include "kernel.h"
SF_EXPORT(neon)
