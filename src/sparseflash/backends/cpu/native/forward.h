// The forward pass of one query block over the chunks of its tile.
#pragma once
#include "blocks.h"
#include "chunk.h"
#include "skip.h"

namespace {

// Columns of S that hold queries, as the products need them.
inline int columns(const Queries &q, bool pairs) { return (int)round_up(q.lanes, pairs ? 32 : W); }

template <bool BF>
void forward_block(const SfCall &c, const Keys &keys, const Rules &rules, const Logits &logits, const Dropout &dropout,
                   int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    uint64_t any_lane = 0;
    for (int i = 0; i < BQ; i++) any_lane |= (uint64_t)(q.token[i] >= 0) << i;
    if (!any_lane) return;
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    int n = columns(q, BF);
    int64_t Dv = BF ? round_up(c.Dv, 32) : c.Dv;
    const Peaks peaks = {c, w.peaks.p};
    Skips skips(c, logits);
    bool packed = false;
    if (q.real)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            if (!packed) {
                packed = true;
                if (!BF) pack_lanes(c, c.q, b, h, q, q.real, c.D, w.qt.p, w.spare.p);
#if SF_HAS_BF16
                else pack_lanes(c.q, b, h, q, q.real, c.D, w.qtb.p, nullptr);
#endif
                memset(w.ot.p, 0, Dv * BQ * 4);
                for (int i = 0; i < BQ; i++) w.m[i] = -INF, w.l[i] = 0;
                if (dropout.on()) dropout.of_queries(q, b, h, w.drawn[0], w.drawn[1]);
                if (c.stat) peaks.clear();
            }
            Operands o = operands<BF, false>(c, keys, k, holes, w.see, w);
            int a = k.a, e = k.b;
            if (!BF) {
                gemm_rows_f32(e - a, n, c.D, o.k + a * o.ldk, o.ldk, w.qt.p, BQ, w.s + a * BQ, BQ);
            } else {
#if SF_HAS_BF16
                a = (int)round_down(k.a, GRAIN);
                e = (int)round_up(k.b, GRAIN);
                int64_t depth = GRAIN > 2 ? round_up(c.D, 32) : round_up(c.D, 2);
                int from = GRAIN > 2 ? a : k.a, to = GRAIN > 2 ? e : k.b;
                gemm_bf16(to - from, n, depth, o.kb + from * o.ldk, o.ldk, w.qtb.p, BQ, w.s + from * BQ, BQ, SET);
#endif
            }
            if (logits.bent) {
                logits.bias(rules, key_bias, k, w.bias);
                logits.bend(c, k, key_bias ? w.bias : nullptr, w.s.p);
                if (has_pairs(c)) {
                    fill_pairs(c, rules, q, k, b, h, w.pair.p);
                    logits.add(k, w.pair.p, w.s.p);
                }
            }
            if (k.partial) hide(k, w.see, w.s.p, -INF);
            if (c.stat) peaks.take(rules, k, n, w.s.p);
            if (BF) {
                fill_rows(w.s.p, a, k.a, -INF);
                fill_rows(w.s.p, k.b, e, -INF);
            }
            if (c.skipped && !skips.cut(w.s.p, q, w.m, n, a, e)) return;
            if (dropout.on()) {
                const Draw draw = dropout.draw(rules, k, b, h, w.drawn, w.key_words);
                online_softmax<BF>(w.s.p, a, e, logits.factor, w.m, w.l, w.ot.p, Dv, n, w.p.p, draw);
            } else online_softmax<BF>(w.s.p, a, e, logits.factor, w.m, w.l, w.ot.p, Dv, n, w.p.p, All());
            if (!BF) gemm_f32(c.Dv, n, e - a, o.v + a * o.ldv, 1, o.ldv, w.s + a * BQ, BQ, w.ot.p, BQ, ADD);
#if SF_HAS_BF16
            else gemm_bf16(GRAIN > 2 ? Dv : c.Dv, n, e - a, o.t + a, BK, w.p + a * BQ, BQ, w.ot.p, BQ, ADD);
#endif
        });
    if (c.skipped) skips.tell(b, h);
    if (c.stat && packed) peaks.finish(logits, b, h, q, w.m, w.l);
    const int64_t ld = round_up(c.Dv, 16);
    if (packed) lanes_to_rows(w.ot.p, c.Dv, w.spare.p);
    for (int i = 0; i < BQ; i++) {
        if (q.token[i] < 0) continue;
        float total = packed && (q.real >> i & 1) ? w.l[i] : 0.f, *out = w.spare + i * ld;
        if (total == 0) memset(out, 0, ld * 4);
        logits.finish(c, (b * c.Hq + h) * c.Tq + q.token[i], w.m[i], total);
        write_row(c.out, b, h, q.token[i], c.out_dtype, c.Dv, out, total == 0 ? 0.f : dropout.scale() / total);
    }
}

}  // namespace
