// Any compiler with vector extensions: fp32 arithmetic, every storage type.
#define SF_VECTORS "vec_portable.h"
#define SF_HAS_BF16 0
#include "kernel.h"
SF_EXPORT(portable)
