// Statistics of P = exp(S - lse) for a given lse, streamed: sums or maxima over each key, row, list entry or diagonal.
#pragma once
#include "forward.h"

namespace {

template <bool BF>
void stats_block(const SfCall &c, const Keys &keys, const Rules &rules, const Logits &logits, int64_t b, int64_t h,
                 int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, float *stat) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int64_t head = (b * c.Hq + h) * c.Tq;
    uint64_t alive = 0;
    for (int i = 0; i < BQ; i++) {
        bool on = (q.real >> i & 1) && c.lse[head + q.token[i]] != -INF;
        alive |= (uint64_t)on << i;
        w.lse2[i] = on ? c.lse[head + q.token[i]] * LOG2E : INF;
        w.m[i] = 0;
    }
    if (!alive) return;
    q.real = alive;
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    const bool peak = c.peak;
    int n = columns(q, BF);
    if (BF) {
#if SF_HAS_BF16
        pack_lanes(c.q, b, h, q, alive, c.D, w.qtb.p, nullptr);
#endif
    } else {
        pack_lanes(c, c.q, b, h, q, alive, c.D, w.qt.p, w.keep.p);
    }
    auto take = [&](float &to, float x) { to = peak ? (x > to ? x : to) : to + x; };
    for_each_chunk<true>(c, b, h, tile, [&](const Chunk &given) {
        Chunk k = given;
        bool holes = false;
        // also for full entries: lanes that saw nothing must not count
        if (!look(rules, q, k, w.see, holes)) return;
        Operands o = operands<BF, false>(c, keys, k, false, w.see, w);
        float *s = w.s.p;
        if (!BF) {
            gemm_f32(k.b - k.a, n, c.D, o.k + k.a * o.ldk, o.ldk, 1, w.qt.p, BQ, s + k.a * BQ, BQ, SET);
        } else {
#if SF_HAS_BF16
            int from = GRAIN > 2 ? (int)round_down(k.a, GRAIN) : k.a, to = GRAIN > 2 ? (int)round_up(k.b, GRAIN) : k.b;
            gemm_bf16(to - from, n, round_up(c.D, GRAIN), o.kb + from * o.ldk, o.ldk, w.qtb.p, BQ, s + from * BQ, BQ, SET);
#endif
        }
        if (logits.bent) {
            logits.bias(rules, key_bias, k, w.bias);
            logits.bend(c, k, w.bias, s);
        }
        float all = 0;
        for (int j = k.a; j < k.b; j++) {
            int64_t token = rules.key_token(k.base + j);
            if (token < 0) continue;
            vf key = {};
            for (int i = 0; i < n; i += W) {
                vf p = exp2v<true>(load(s + j * BQ + i) * logits.factor - load(w.lse2 + i));
                p = pick(w.see[j] >> i, p, set1(0.f));
                store(s + j * BQ + i, p);
                key = peak ? vmax(key, p) : key + p;
            }
            if (c.over == SF_OVER_ROW) {
                for (int i = 0; i < n; i += W) {
                    vf p = load(s + j * BQ + i), m = load(w.m + i);
                    store(w.m + i, peak ? vmax(m, p) : m + p);
                }
            } else if (c.over == SF_OVER_DIAGONAL) {
                for (int i = 0; i < q.lanes; i++)
                    if (alive >> i & 1) take(stat[q.token[i] - token + c.Tk - 1], s[j * BQ + i]);
            } else {
                float x = 0;
                if (peak) for (int i = 0; i < W; i++) x = most(x, (float)key[i]);
                else x = sum(key);
                if (c.over == SF_OVER_KEY) take(stat[token], x);
                else take(all, x);
            }
        }
        if (c.over == SF_OVER_ENTRY && k.entry >= 0 && k.entry < c.entry_width) take(stat[tile * c.entry_width + k.entry], all);
    });
    if (c.over == SF_OVER_ROW)
        for (int i = 0; i < BQ; i++) if (alive >> i & 1) stat[q.token[i]] = w.m[i];
}

// Tiles of a head are shared out in a fixed number of runs whose results are combined in order: the result does not
// depend on the number of threads.
template <bool BF> int stats(const SfCall &c, SfParallel parallel) {
    const SfPlan &p = c.plan;
    constexpr int64_t RUNS = 8;
    const int64_t heads = c.B * c.Hq, runs = most<int64_t>(1, least(RUNS, p.tiles)), width = c.stat_width;
    Packed<BF, false> packed;
    Buffer<float> part;
    Desks<BF> scratch;
    if (packed.make(c, parallel) || !part.make(heads * runs * width) || !scratch.make(c, false)) return 1;
    Logits logits(c);
    auto task = [&](int64_t i, int thread) {
#if SF_HAS_BF16
        if (BF) prepare_thread();
#endif
        int64_t run = i % runs, b = i / runs / c.Hq, h = i / runs % c.Hq;
        float *stat = part + i * width;
        memset(stat, 0, width * 4);
        Rules rules(c, b, h);
        Keys keys = packed.keys(c, b, h);
        for (int64_t r = run * p.tiles / runs; r < (run + 1) * p.tiles / runs; r++) {
            int64_t end = least(p.q_rows, (r + 1) * p.tile);
            for (int64_t row = r * p.tile; row < end; row += BQ)
                stats_block<BF>(c, keys, rules, logits, b, h, r, row, least<int64_t>(BQ, end - row), scratch[thread], stat);
        }
    };
    auto gather = [&](int64_t i, int) {
        for (int64_t j = 0; j < width; j++) {
            float x = 0;
            for (int64_t run = 0; run < runs; run++) {
                float y = part[(i * runs + run) * width + j];
                x = c.peak ? most(x, y) : x + y;
            }
            c.stat[i * width + j] = x;
        }
    };
    in_parallel(parallel, c.threads, heads * runs, task);
    in_parallel(parallel, c.threads, heads, gather);
    return 0;
}

}  // namespace
