// Skips blocks of keys whose weights are negligible, since every query of the block has met a much larger logit before:
// neither their weights nor the product with V are computed. `backends/reference/skipping.py` defines a block.
#pragma once
#include "softmax.h"

namespace {

struct Skips {
    static constexpr int CELL = 64;
    const SfCall &c;
    const float below;  // in units of x
    int64_t met = 0, gone = 0;  // blocks seen, blocks skipped

    Skips(const SfCall &c_, const Logits &logits) : c(c_), below(c_.skip_below / logits.unit) {}
    // True if a query's largest x in a block, `top`, is not negligible; `so_far` becomes the larger of both.
    bool counts(float top, float &so_far) const {
        so_far = most(so_far, top);
        return top > -INF && top >= so_far - below;
    }
    // Narrows rows [a,e) of a chunk to the blocks that count; false if none does. m: the largest x so far.
    bool cut(const float *s, const Queries &q, const float *m, int n, int &a, int &e) {
        alignas(64) float level[BQ], top[BQ];
        memcpy(level, m, sizeof level);
        int first = e, last = a;
        for (int low = a; low < e;) {
            const int high = least<int>((int)round_down(low, CELL) + CELL, e);
            for (int i = 0; i < n; i += W) {
                vf x = set1(-INF);
                for (int j = low; j < high; j++) x = vmax(x, load(s + j * BQ + i));
                store(top + i, x);
            }
            bool seen = false, count = false;
            for (int i = 0; i < q.lanes; i++) {
                if (!(q.real >> i & 1)) continue;
                seen |= top[i] > -INF;
                count |= counts(top[i], level[i]);
            }
            met += seen, gone += seen && !count;
            if (count) first = least(first, low), last = high;
            low = high;
        }
        a = first, e = last;
        return first < last;
    }
    // Adds the counts to those of the head; atomic, since other threads add to the same head.
    void tell(int64_t b, int64_t h) const {
        int64_t *to = c.skipped + (b * c.Hq + h) * 2;
        __atomic_fetch_add(to, met, __ATOMIC_RELAXED);
        __atomic_fetch_add(to + 1, gone, __ATOMIC_RELAXED);
    }
};

}  // namespace
