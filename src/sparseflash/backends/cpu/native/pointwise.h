// Pointwise attention: the weight of a pair is f(scale * S), independent of other pairs; no row statistics.
#pragma once
#include "drive.h"

namespace {

// f and its slope, both times out_scale: silu(x) = x / (1 + exp(-x)), or relu(x)^2.
struct Pointwise {
    float scale, factor;
    bool silu;
    const uint64_t *see = nullptr;  // null where all keys are visible
    static constexpr bool sums = false;

    explicit Pointwise(const SfCall &c) : scale(c.scale), factor(c.out_scale), silu(c.weights == SF_SILU) {}

    template <bool FINE> inline vf value(int j, int i, vf s) const {
        vf x = s * scale, f;
        if (silu) f = x / (1.f + exp2v<FINE>(x * -LOG2E));
        else f = vmax(x, set1(0.f)), f = f * f;
        return seen(j, i, f * factor);
    }
    struct Lane {};
    inline Lane lane(int) const { return {}; }
    // like Slopes::one: p, the weight of the pair; ds = y (its entry of dP) * f'(score)
    template <bool PLAIN, bool FINE>
    inline void one(const Lane &, int j, int i, vf s, vf y, vf &p, vf &ds, vf &) const {
        vf x = s * scale, slope;
        if (silu) {
            vf share = 1.f / (1.f + exp2v<FINE>(x * -LOG2E));
            p = x * share;
            slope = share * (1.f + x * (1.f - share));
        } else {
            vf up = vmax(x, set1(0.f));
            p = up * up;
            slope = up + up;
        }
        p = p * factor;
        ds = slope * y * factor;
        if (PLAIN) return;
        p = seen(j, i, p);
        ds = seen(j, i, ds);
    }
    inline vf seen(int j, int i, vf x) const { return see ? pick(see[j] >> i, x, set1(0.f)) : x; }
};

// Bit mask of the queries of a block that see any key of the chunk.
inline uint64_t seeing(const Queries &q, const Chunk &k, const uint64_t *see) {
    if (!k.partial) return q.real;
    uint64_t some = 0;
    for (int j = k.a; j < k.b; j++) some |= see[j];
    return some;
}

template <bool BF>
void pointwise_block(const SfCall &c, const Keys<BF> &keys, const Rules &rules, Pointwise law, int64_t b, int64_t h,
                     int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w) {
    typedef Products<BF> P;
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int n = columns<BF>(q);
    const int64_t Dv = round_up(c.Dv, P::PADDED);
    uint64_t alive = 0;
    if (q.real)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            if (!alive) {
                pack_lanes<BF>(c, c.q, b, h, q, q.real, c.D, w.qt.p);
                memset(w.ot.p, 0, Dv * BQ * 4);
            }
            alive |= seeing(q, k, w.see);
            law.see = k.partial ? w.see : nullptr;
            const Operands<BF> o = operands<BF, false>(c, keys, k, holes, w.see, w);
            const Edges<BF> x(k);
            float *s = w.s.p;
            P::score(x.to - x.from, n, round_up(c.D, P::GRAIN), o.k + x.from * o.ldk, o.ldk, w.qt.p, BQ, s + x.from * BQ, BQ);
            auto weight = [&](int j, int i) {
                return j >= k.a && j < k.b ? law.value<P::FINE>(j, i, load(s + j * BQ + i)) : set1(0.f);
            };
            for (int j = x.a; j < x.e; j += P::PAIR)
                for (int i = 0; i < n; i += W) {
                    if constexpr (BF) P::store_pairs(w.p + j * BQ + 2 * i, weight(j, i), weight(j + 1, i));
                    else store(s + j * BQ + i, weight(j, i));
                }
            P::multiply(round_up(c.Dv, P::TILE), n, x.e - x.a, o.t + x.a * o.t_key, o.t_row, o.t_key, w.weights() + x.a * BQ, BQ,
                        w.ot.p, BQ, ADD);
        });
    const int64_t ld = round_up(c.Dv, 16);
    if (alive) lanes_to_rows(w.ot.p, c.Dv, w.spare.p);
    for (int i = 0; i < BQ; i++) {
        if (q.token[i] < 0) continue;
        float *out = w.spare + i * ld;
        if (!(alive >> i & 1)) memset(out, 0, ld * 4);
        write_row(c.out, b, h, q.token[i], c.out_dtype, c.Dv, out, 1.f);
    }
}

template <bool BF>
void pointwise_slopes_block(const SfCall &c, const Keys<BF> &keys, const Rules &rules, Pointwise law, int64_t b, int64_t h,
                            int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, KeyGrads &grads) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int n = columns<BF>(q);
    uint64_t alive = 0;  // dout of a row that sees nothing may be anything: find these rows before reading
    if (q.real)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (alive != q.real && (!k.partial || look(rules, q, k, w.see, holes))) alive |= seeing(q, k, w.see);
        });
    if (alive) {
        pack_lanes<BF>(c, c.q, b, h, q, alive, c.D, w.qt.p, w.qr.p);
        pack_lanes<BF>(c, c.dout, b, h, q, alive, c.Dv, w.dot.p, w.dor.p);
        memset(w.ot.p, 0, round_up(c.D, 32) * BQ * 4);
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            law.see = k.partial ? w.see : nullptr;
            const Operands<BF> o = operands<BF, true>(c, keys, k, holes, w.see, w);
            const Steps<BF> x(k, n, law.see);
            scores<BF>(c, o, x, w, w);
            float *s = w.s.p, *g = w.g.p;
            fill_rows(s, x.a, k.a, 0.f), fill_rows(s, k.b, x.e, 0.f);
            fill_rows(g, x.a, k.a, 0.f), fill_rows(g, k.b, x.e, 0.f);
            if (k.partial) weigh<false>(law, k, x, n, w);
            else weigh<true>(law, k, x, n, w);
            add_products<BF>(c, k, o, x, n, w, w, grads);
        });
        lanes_to_rows(w.ot.p, c.D, w.spare.p);
    }
    for (int i = 0; i < BQ; i++) {
        if (q.token[i] < 0) continue;
        float *dq = w.spare + i * round_up(c.D, 16);
        if (!(alive >> i & 1)) memset(dq, 0, c.D * 4);
        write_row(c.dq, b, h, q.token[i], c.grad_dtype, c.D, dq, c.scale);
    }
}

template <bool BF> int pointwise_forward(const SfCall &c, SfParallel parallel) {
    const Pointwise law(c);
    auto block = [&](const Keys<BF> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<BF> &w) { pointwise_block<BF>(c, keys, rules, law, b, h, tile, row, rows, w); };
    return forward_over<BF>(c, parallel, block);
}

template <bool BF> int pointwise_backward(const SfCall &c, SfParallel parallel) {
    const Pointwise law(c);
    auto block = [&](const Keys<BF> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<BF> &w, KeyGrads &grads, const BiasGrads &) {
        pointwise_slopes_block<BF>(c, keys, rules, law, b, h, tile, row, rows, w, grads);
    };
    return backward_over<BF>(c, parallel, block);
}

}  // namespace
