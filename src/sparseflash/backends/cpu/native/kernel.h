// Flash attention over a plan, forward and backward: all kernels of one instruction-set level.
//
// Matrices are transposed: S^T = K Q^T has keys as rows and 64 queries as columns, so max, exp and sum run down the
// rows of S^T, lane by lane, without a horizontal reduction; O^T = V^T P^T.
#pragma once
#include "attention.h"
#include "decode.h"
#include "indexer.h"
#include "linear.h"
#include "pointwise.h"
#include "selection.h"
#include "stats.h"
#if !SF_HAS_BF16
#include "best.h"
#include "indexer_loss.h"
#include "lists.h"
#include "nm.h"
#include "pages.h"
#include "stick.h"
#endif

namespace {

template <bool BF> int run_forward(const SfCall &c, SfParallel parallel) {
    return c.weights == SF_SOFTMAX ? forward<BF>(c, parallel) : pointwise_forward<BF>(c, parallel);
}
template <bool BF> int run_backward(const SfCall &c, SfParallel parallel) {
    return c.weights == SF_SOFTMAX ? backward<BF>(c, parallel) : pointwise_backward<BF>(c, parallel);
}
template <bool BF> int run_decode(const SfDecode &c, SfParallel parallel) { return decode<BF>(c, parallel); }
template <bool BF> int run_stats(const SfCall &c, SfParallel parallel) { return stats<BF>(c, parallel); }

}  // namespace

#if SF_HAS_BF16
#define SF_RUN(kind, call, level) \
    extern "C" int sf_##kind##_##level(const call *c, SfParallel p) { return c->dtype == SF_BF16 ? run_##kind<true>(*c, p) : 2; }
#define SF_RUN_FP32(kind, call, level) \
    extern "C" int sf_##kind##_##level(const call *, SfParallel) { return 2; }
#else
#define SF_RUN(kind, call, level) \
    extern "C" int sf_##kind##_##level(const call *c, SfParallel p) { return run_##kind<false>(*c, p); }
#define SF_RUN_FP32(kind, call, level) \
    extern "C" int sf_##kind##_##level(const call *c, SfParallel p) { return kind(*c, p); }
#endif
#define SF_EXPORT(level)                                          \
    SF_RUN(forward, SfCall, level) SF_RUN(backward, SfCall, level) SF_RUN(stats, SfCall, level) \
    SF_RUN(decode, SfDecode, level) SF_RUN(indexer, SfIndexer, level) \
    SF_RUN(mass, SfMass, level) SF_RUN(probe, SfProbe, level) \
    SF_RUN(linear_forward, SfLinear, level) SF_RUN(linear_backward, SfLinear, level) \
    SF_RUN_FP32(stick_forward, SfCall, level) SF_RUN_FP32(stick_backward, SfCall, level) \
    SF_RUN_FP32(indexer_loss, SfIndexerLoss, level) \
    SF_RUN_FP32(best, SfBest, level) SF_RUN_FP32(heaviest, SfHeaviest, level) \
    SF_RUN_FP32(running, SfRunning, level) SF_RUN_FP32(nm, SfNM, level) SF_RUN_FP32(pages, SfPages, level) \
    SF_RUN_FP32(read_mask, SfMask, level) SF_RUN_FP32(list_units, SfUnits, level) SF_RUN_FP32(transpose, SfTranspose, level)
