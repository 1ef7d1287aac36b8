// Largest weight of each block of tokens, stat_tile queries by stat_unit keys, whatever order the plan gives the rows.
#pragma once
#include "softmax.h"

namespace {

inline int64_t units_of(const SfCall &c) { return (c.Tk + c.stat_unit - 1) / c.stat_unit; }

// Runs of adjacent lanes whose queries lie in one stat_tile. Lanes without a query join the run after them: their weights are 0.
struct TileRuns {
    struct Run { int from, to; int64_t tile; } run[BQ];
    int n = 0;

    TileRuns(const Queries &q, int64_t size) {
        for (int i = 0; i < q.lanes; i++) {
            if (!(q.real >> i & 1)) continue;
            const int64_t tile = q.token[i] / size;
            if (n && run[n - 1].tile == tile) run[n - 1].to = i + 1;
            else run[n] = {n ? run[n - 1].to : 0, i + 1, tile}, n++;
        }
    }
    const Run *begin() const { return run; }
    const Run *end() const { return run + n; }
};

// Reduces x[from .. to - 1], none of which is negative, with `both`, in whole vectors where the range covers them.
template <class Both> inline float across(const float *x, int from, int to, Both both) {
    vf all = {};
    float one = 0;
    auto join = [&](float y) { one = both(set1(one), set1(y))[0]; };
    int i = from;
    for (; i < to && i % W; i++) join(x[i]);
    for (; i + W <= to; i += W) all = both(all, load(x + i));
    for (; i < to; i++) join(x[i]);
    for (i = 0; i < W; i++) join(all[i]);
    return one;
}

// Calls f(unit, from, to) for each run [from, to) of a chunk's keys whose tokens lie in one stat_unit.
template <class F> inline void by_units(const SfCall &c, const Rules &rules, const Chunk &k, F f) {
    int64_t unit = -1, low = 0;
    int from = k.a;
    for (int j = k.a; j < k.b; j++) {
        const int64_t token = rules.key_token(k.gather ? k.gather[j] : k.base + j);
        if (token < 0 || (unit >= 0 && token >= low && token < low + c.stat_unit)) continue;
        if (unit >= 0) f(unit, from, j);
        unit = token / c.stat_unit, low = unit * c.stat_unit, from = j;
    }
    if (unit >= 0) f(unit, from, k.b);
}

// The largest x of each query of a block in each stat_unit, [units][64]; `finish` turns them into weights.
struct Peaks {
    const SfCall &c;
    float *x;

    void clear() const { fill_rows(x, 0, (int)units_of(c), -INF); }
    void take(const Rules &rules, const Chunk &k, int n, const float *s) const {
        by_units(c, rules, k, [&](int64_t unit, int from, int to) {
            float *y = x + unit * BQ;
            for (int i = 0; i < n; i += 4 * W) {
                vf top[4];
                const int some = least(4, (n - i + W - 1) / W);
                for (int g = 0; g < some; g++) top[g] = load(y + i + g * W);
                for (int j = from; j < to; j++)
#pragma GCC unroll 4
                    for (int g = 0; g < some; g++) top[g] = vmax(top[g], load(s + j * BQ + i + g * W));
                for (int g = 0; g < some; g++) store(y + i + g * W, top[g]);
            }
        });
    }
    // Atomic maximum: query blocks of several threads may lie in one stat_tile. The result is independent of their order.
    static void raise(float *to, float x) {
        int32_t bits, now = __atomic_load_n((int32_t *)to, __ATOMIC_RELAXED);
        memcpy(&bits, &x, 4);  // non-negative floats compare as their bits do
        while (now < bits && !__atomic_compare_exchange_n((int32_t *)to, &now, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
    // Writes the weights of rows whose largest x is m and whose sum of exponentials is l.
    void finish(const Logits &logits, int64_t b, int64_t h, const Queries &q, const float *m, const float *l) const {
        alignas(64) float level[BQ], share[BQ], p[BQ];
        for (int i = 0; i < BQ; i++) {
            const bool some = (q.real >> i & 1) && l[i] > 0;
            level[i] = some ? m[i] : 0.f;
            share[i] = some ? 1.f / l[i] : 0.f;
        }
        const TileRuns runs(q, c.stat_tile);
        const int64_t units = units_of(c);
        float *to = c.stat + (b * c.Hq + h) * c.stat_width;
        for (int64_t unit = 0; unit < units; unit++) {
            for (int i = 0; i < BQ; i += W)
                store(p + i, exp2v<true>((load(x + unit * BQ + i) - load(level + i)) * logits.factor) * load(share + i));
            for (auto &run : runs) {
                const float top = across(p, run.from, run.to, [](vf a, vf b) { return vmax(a, b); });
                if (top > 0) raise(to + run.tile * units + unit, top);
            }
        }
    }
};

}  // namespace
