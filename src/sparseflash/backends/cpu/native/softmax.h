// From scores to weights: scale, softcap, bias, masking, and the online softmax of a block.
#pragma once
#include <math.h>
#include "bias.h"

namespace {

// A logit is unit * x. x is the score q.k as the product gives it; with a softcap, a bias or a scale that is not positive
// ("bent") x is the logit itself and unit = 1.
//
// exp(logit - lse) is never taken of one rounded lse, whose last place is worth more than 1 where logits are large.
// The normaliser of a row stays in two parts, `top` (the largest x) and `rest` (log of the sum of exp(unit * (x - top))):
// x - top is exact where it matters, and rest is small. lse = unit * top + rest.
struct Logits {
    float unit, factor;   // factor = unit * log2(e): exponentials have base 2
    bool bent;            // x is not the score: there is a softcap, a bias, or a scale that is not positive
    float inner, outer;   // bend: tanh(score * inner) * outer with a softcap, else score * inner

    explicit Logits(const SfCall &c) {
        bent = c.softcap > 0 || c.key_bias.data || has_pairs(c) || !(c.scale > SMALLEST_UNIT);
        inner = c.softcap > 0 ? c.scale / c.softcap : c.scale;
        outer = c.softcap;
        unit = bent ? 1.f : c.scale;
        factor = unit * LOG2E;
    }
    void bias(const Rules &r, const float *key_bias, const Chunk &k, float *to) const {
        if (key_bias)
            for (int j = k.a; j < k.b; j++) {
                int64_t t = r.key_token(k.gather ? k.gather[j] : k.base + j);
                to[j] = t < 0 ? 0.f : key_bias[t];
            }
    }
    vf bend(const SfCall &c, vf x) const {
        x *= inner;
        return c.softcap > 0 ? tanhv(x) * outer : x;
    }
    // `bias` may be null: the backward adds it later, since the softcap's derivative takes the score alone.
    void bend(const SfCall &c, const Chunk &k, const float *bias, float *s) const {
        for (int j = k.a; j < k.b; j++)
            for (int i = 0; i < BQ; i += W) {
                vf x = bend(c, load(s + j * BQ + i));
                store(s + j * BQ + i, bias ? x + bias[j] : x);
            }
    }
    static void add(const Chunk &k, const float *pair, float *s) {
        for (int64_t i = k.a * BQ; i < k.b * BQ; i += W) store(s + i, load(s + i) + load(pair + i));
    }
    // Writes the normaliser of a row, whose largest x is m and whose sum of exponentials is l.
    void finish(const SfCall &c, int64_t row, float m, float l) const {
        const double rest = l == 0 ? 0. : log((double)l);
        c.lse[row] = l == 0 ? -INF : (float)((double)m * unit + rest);
        if (!c.norm) return;
        c.norm[row] = l == 0 ? -INF : m;
        c.norm[c.B * c.Hq * c.Tq + row] = (float)rest;
    }
};
constexpr float NO_ROW = INF;  // the rest of a lane without a row: exp(x - inf) = 0

// The normaliser that the forward wrote for each row of a head.
struct Given {
    const float *top, *rest;  // by query token of the head

    Given(const SfCall &c, int64_t b, int64_t h)
        : top(c.norm + (b * c.Hq + h) * c.Tq), rest(top + c.B * c.Hq * c.Tq) {}
    bool none(int64_t t) const { return top[t] == -INF; }  // the query sees no key
};

inline void hide(const Chunk &k, const uint64_t *see, float *s, float with) {
    for (int j = k.a; j < k.b; j++) {
        uint64_t m = see[j];
        if (m == ~0ull) continue;
        for (int i = 0; i < BQ; i += W) store(s + j * BQ + i, pick(m >> i, load(s + j * BQ + i), set1(with)));
    }
}
inline void fill_rows(float *s, int from, int to, float with) {
    for (int64_t i = (int64_t)from * BQ; i < (int64_t)to * BQ; i++) s[i] = with;
}

// Online softmax: rows [a,b) of S enter the running maximum m and sum l; S becomes P (fp32 in place, or bf16 pairs in p).
// The accumulator O^T [Dv][64] is rescaled only if some maximum grew. Weights that dropout drops count in l, but are 0 in P.
template <bool BF, int G, class Law>
inline void softmax_lanes(int i0, float *s, int a, int b, float factor, float *m, float *l, float *ot, int64_t Dv,
                          [[maybe_unused]] typename Products<BF>::Item *p, const Law &drop) {
    vf top[G];
    for (int g = 0; g < G; g++) top[g] = set1(-INF);
    for (int j = a; j < b; j++)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) top[g] = vmax(top[g], load(s + j * BQ + i0 + g * W));
    vf ref[G];
    bool grew = false;
    for (int g = 0; g < G; g++) {
        ref[g] = load(m + i0 + g * W);
        grew |= any_greater(top[g], ref[g]);
    }
    if (grew) {
        vf shrink[G];
        for (int g = 0; g < G; g++) {
            vf now = vmax(ref[g], top[g]);
            vf safe = now == -INF ? set1(0.f) : now;
            // exactly 1 where a maximum did not grow: exp2v(0) is not, and other queries' keys would show in the last bit
            shrink[g] = now == ref[g] ? set1(1.f) : exp2v<true>((ref[g] - safe) * factor);
            ref[g] = now;
            store(m + i0 + g * W, now);
            store(l + i0 + g * W, load(l + i0 + g * W) * shrink[g]);
        }
        for (int64_t d = 0; d < Dv; d++)
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                float *o = ot + d * BQ + i0 + g * W;
                store(o, load(o) * shrink[g]);
            }
    }
    vf total[G];
    typename Law::Lane drawn[G];
    for (int g = 0; g < G; g++) {
        drawn[g] = drop.lane(i0 + g * W);
        ref[g] = ref[g] == -INF ? set1(0.f) : ref[g];
        total[g] = load(l + i0 + g * W);
    }
    if constexpr (!BF) {
        for (int j = a; j < b; j++)
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                float *x = s + j * BQ + i0 + g * W;
                vf e = exp2v<true>((load(x) - ref[g]) * factor);
                total[g] += e;
                store(x, drop.left(drawn[g], j, e));
            }
    } else {
        for (int j = a; j < b; j += 2)
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                const float *x = s + j * BQ + i0 + g * W;
                vf e = exp2v<false>((load(x) - ref[g]) * factor), f = exp2v<false>((load(x + BQ) - ref[g]) * factor);
                total[g] += e + f;
                e = drop.left(drawn[g], j, e), f = drop.left(drawn[g], j + 1, f);
                Products<BF>::store_pairs(p + j * BQ + 2 * (i0 + g * W), e, f);
            }
    }
    for (int g = 0; g < G; g++) store(l + i0 + g * W, total[g]);
}
template <bool BF, class Law>
inline void online_softmax(float *s, int a, int b, float factor, float *m, float *l, float *ot, int64_t Dv, int lanes,
                           typename Products<BF>::Item *p, const Law &drop) {
    int i = 0;
    for (; i + 4 * W <= lanes; i += 4 * W) softmax_lanes<BF, 4>(i, s, a, b, factor, m, l, ot, Dv, p, drop);
    for (; i < lanes; i += W) softmax_lanes<BF, 1>(i, s, a, b, factor, m, l, ot, Dv, p, drop);
}

}  // namespace
