// Entry points of softmax attention: blocks of 64 queries, or one query at a time where a tile has few.
#pragma once
#include "few.h"

namespace {

template <bool BF> int forward(const SfCall &c, SfParallel parallel) {
    Logits logits(c);
    Dropout dropout(c);
    if (dropout.make(parallel)) return 1;
    const bool few = few_queries(c);
    auto block = [&](const Keys<BF> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<BF> &w) {
        if (few) few_forward<BF>(c, keys, rules, logits, dropout, b, h, tile, row, rows, w);
        else forward_block<BF>(c, keys, rules, logits, dropout, b, h, tile, row, rows, w);
    };
    return forward_over<BF>(c, parallel, block, few);
}

template <bool BF> int backward(const SfCall &c, SfParallel parallel) {
    Logits logits(c);
    Dropout dropout(c);
    if (dropout.make(parallel)) return 1;
    const bool few = few_queries(c);
    auto block = [&](const Keys<BF> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<BF> &w, KeyGrads &grads, const BiasGrads &biases) {
        if (few) few_backward<BF>(c, keys, rules, logits, dropout, b, h, tile, row, rows, w, grads, biases);
        else backward_blocks<BF>(c, keys, rules, logits, dropout, b, h, tile, row, rows, w, grads, biases);
    };
    return backward_over<BF, 2>(c, parallel, block, few);
}

}  // namespace
