// The forward pass of one query block over the chunks of its tile.
#pragma once
#include "blocks.h"
#include "chunk.h"
#include "skip.h"

namespace {

// Columns of S that hold queries, rounded up to what products need.
template <bool BF> inline int columns(const Queries &q) { return (int)round_up(q.lanes, Products<BF>::LANES); }

template <bool BF>
void forward_block(const SfCall &c, const Keys<BF> &keys, const Rules &rules, const Logits &logits, const Dropout &dropout,
                   int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w) {
    typedef Products<BF> P;
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    uint64_t any_lane = 0;
    for (int i = 0; i < BQ; i++) any_lane |= (uint64_t)(q.token[i] >= 0) << i;
    if (!any_lane) return;
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    int n = columns<BF>(q);
    const int64_t Dv = round_up(c.Dv, P::PADDED);
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
                pack_lanes<BF>(c, c.q, b, h, q, q.real, c.D, w.qt.p);
                memset(w.ot.p, 0, Dv * BQ * 4);
                for (int i = 0; i < BQ; i++) w.m[i] = -INF, w.l[i] = 0;
                if (dropout.on()) dropout.of_queries(q, b, h, w.drawn[0], w.drawn[1]);
                if (c.stat) peaks.clear();
            }
            const Operands<BF> o = operands<BF, false>(c, keys, k, holes, w.see, w);
            Edges<BF> x(k);
            P::score(x.to - x.from, n, round_up(c.D, P::GRAIN), o.k + x.from * o.ldk, o.ldk, w.qt.p, BQ, w.s + x.from * BQ, BQ);
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
            fill_rows(w.s.p, x.a, k.a, -INF);
            fill_rows(w.s.p, k.b, x.e, -INF);
            if (c.skipped && !skips.cut(w.s.p, q, w.m, n, x.a, x.e)) return;
            const auto weigh = [&](const auto &law) {
                online_softmax<BF>(w.s.p, x.a, x.e, logits.factor, w.m, w.l, w.ot.p, Dv, n, w.weights(), law);
            };
            if (dropout.on()) weigh(dropout.draw(rules, k, b, h, w.drawn, w.key_words));
            else weigh(All());
            P::multiply(round_up(c.Dv, P::TILE), n, x.e - x.a, o.t + x.a * o.t_key, o.t_row, o.t_key, w.weights() + x.a * BQ, BQ,
                        w.ot.p, BQ, ADD);
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
