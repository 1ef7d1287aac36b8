// Pointwise attention: every pair has the weight f(scale * S), whatever its neighbours are; no row statistics.
#pragma once
#include "drive.h"

namespace {

// f and its slope, both times out_scale: silu(x) = x / (1 + exp(-x)), or relu(x)^2.
struct Pointwise {
    float scale, factor;
    bool silu;
    const uint64_t *see = nullptr;  // null where all is visible
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
    // as `Slopes`: the weight of a pair, and y (its entry of dP) times the slope of the score
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

// Queries of a block that see any key of the chunk.
inline uint64_t seeing(const Queries &q, const Chunk &k, const uint64_t *see) {
    if (!k.partial) return q.real;
    uint64_t some = 0;
    for (int j = k.a; j < k.b; j++) some |= see[j];
    return some;
}

template <bool BF>
void pointwise_block(const SfCall &c, const Keys &keys, const Rules &rules, Pointwise law, int64_t b, int64_t h,
                     int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int n = columns(q, BF);
    const int64_t Dv = BF ? round_up(c.Dv, 32) : c.Dv;
    uint64_t alive = 0;
    if (q.real)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            if (!alive) {
                if (!BF) pack_lanes(c, c.q, b, h, q, q.real, c.D, w.qt.p, w.spare.p);
#if SF_HAS_BF16
                else pack_lanes(c.q, b, h, q, q.real, c.D, w.qtb.p, nullptr);
#endif
                memset(w.ot.p, 0, Dv * BQ * 4);
            }
            alive |= seeing(q, k, w.see);
            law.see = k.partial ? w.see : nullptr;
            Operands o = operands<BF, false>(c, keys, k, holes, w.see, w);
            float *s = w.s.p;
            if (!BF) {
                gemm_f32(k.b - k.a, n, c.D, o.k + k.a * o.ldk, o.ldk, 1, w.qt.p, BQ, s + k.a * BQ, BQ, SET);
                for (int j = k.a; j < k.b; j++)
                    for (int i = 0; i < n; i += W) store(s + j * BQ + i, law.value<true>(j, i, load(s + j * BQ + i)));
                gemm_f32(c.Dv, n, k.b - k.a, o.v + k.a * o.ldv, 1, o.ldv, s + k.a * BQ, BQ, w.ot.p, BQ, ADD);
            } else {
#if SF_HAS_BF16
                const int a = (int)round_down(k.a, GRAIN), e = (int)round_up(k.b, GRAIN);
                const int from = GRAIN > 2 ? a : k.a, to = GRAIN > 2 ? e : k.b;
                gemm_bf16(to - from, n, round_up(c.D, GRAIN), o.kb + from * o.ldk, o.ldk, w.qtb.p, BQ, s + from * BQ, BQ, SET);
                auto weight = [&](int j, int i) {
                    return j >= k.a && j < k.b ? law.value<false>(j, i, load(s + j * BQ + i)) : set1(0.f);
                };
                for (int j = a; j < e; j += 2)
                    for (int i = 0; i < n; i += W) store_pairs(w.p + j * BQ + 2 * i, (__m512)weight(j, i), (__m512)weight(j + 1, i));
                gemm_bf16(GRAIN > 2 ? Dv : c.Dv, n, e - a, o.t + a, BK, w.p + a * BQ, BQ, w.ot.p, BQ, ADD);
#endif
            }
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
void pointwise_slopes_block(const SfCall &c, const Keys &keys, const Rules &rules, Pointwise law, int64_t b, int64_t h,
                            int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, KeyGrads &grads) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int n = columns(q, BF);
    uint64_t alive = 0;  // the gradient of a row that sees nothing may be anything: find out before it is read
    if (q.real)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (alive != q.real && (!k.partial || look(rules, q, k, w.see, holes))) alive |= seeing(q, k, w.see);
        });
    if (alive) {
        if (!BF) {
            pack_lanes(c, c.q, b, h, q, alive, c.D, w.qt.p, w.qr.p);
            pack_lanes(c, c.dout, b, h, q, alive, c.Dv, w.dot.p, w.dor.p);
        } else {
#if SF_HAS_BF16
            pack_lanes(c.q, b, h, q, alive, c.D, w.qtb.p, w.qrb.p);
            pack_lanes(c.dout, b, h, q, alive, c.Dv, w.dotb.p, w.dorb.p);
#endif
        }
        memset(w.ot.p, 0, round_up(c.D, 32) * BQ * 4);
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            law.see = k.partial ? w.see : nullptr;
            Operands o = operands<BF, true>(c, keys, k, holes, w.see, w);
            const Steps x(k, n, law.see, BF);
            scores<BF>(c, o, x, w, w);
            float *s = w.s.p, *g = w.g.p;
            if (!BF) {
                if (k.partial) weigh_rows<false>(law, k, n, s, g, nullptr);
                else weigh_rows<true>(law, k, n, s, g, nullptr);
            } else {
#if SF_HAS_BF16
                fill_rows(s, x.a, k.a, 0.f), fill_rows(s, k.b, x.e, 0.f);
                fill_rows(g, x.a, k.a, 0.f), fill_rows(g, k.b, x.e, 0.f);
                if (k.partial) weigh_pairs<false>(law, x.a, x.e, k, n, s, g, w.pr.p, w.dr.p, w.p.p, nullptr);
                else weigh_pairs<true>(law, x.a, x.e, k, n, s, g, w.pr.p, w.dr.p, w.p.p, nullptr);
#endif
            }
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
    auto block = [&](const Keys &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<BF> &w) { pointwise_block<BF>(c, keys, rules, law, b, h, tile, row, rows, w); };
    return forward_over<BF>(c, parallel, block);
}

template <bool BF> int pointwise_backward(const SfCall &c, SfParallel parallel) {
    const Pointwise law(c);
    auto block = [&](const Keys &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<BF> &w, KeyGrads &grads, const BiasGrads &) {
        pointwise_slopes_block<BF>(c, keys, rules, law, b, h, tile, row, rows, w, grads);
    };
    return backward_over<BF>(c, parallel, block);
}

}  // namespace
