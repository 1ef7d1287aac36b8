// Tiles of few queries (up to 8): a key list per query, or a few new tokens. Instead of matrix products, one query at a time
// goes over the rows of the keys that it sees: W scores are W dot products, and all that follows are vectors along the head
// dimension. Keys are read in place, and keys that a query does not see are not touched.
#pragma once
#include "drive.h"

namespace {

constexpr int FEW = 8;  // most query rows of such a tile

inline bool few_queries(const SfCall &c) { return least(c.plan.tile, c.plan.q_rows) <= FEW; }

// The keys of a chunk that one query sees (statistics have no v).
template <bool BF> struct Seen {
    typedef typename Products<BF>::Item T;
    int n, at[BK + 1];  // number of keys; their places in the chunk
    int64_t row[BK + 1];
    const T *k[BK + W], *v[BK + W];
    float bias[BK + W];
    uint32_t words[2][BK + W];

    // Dropout's draw of one query with these keys, whose words are looked up by their place in the chunk.
    Draw draw(const Dropout &dropout, const uint32_t (*of_chunk)[BK], const uint32_t (*queries)[BQ], int lane) {
        for (int side = 0; side < 2; side++)
            for (int j = 0; j < round_up(n, W); j++) words[side][j] = of_chunk[side][at[least(j, n - 1)]];
        return {words[0], words[1], queries[0] + lane, queries[1] + lane, dropout.bar()};
    }
    void find(const Rules &rules, const Keys<BF> &x, const Chunk &c, const uint64_t *see, int lane, const float *key_bias,
              const float *pair = nullptr) {
        n = 0;
        for (int j = c.a; j < c.b; j++) {
            row[n] = c.gather ? c.gather[j] : c.base + j;
            at[n] = j;
            n += c.partial ? (int)(see[j] >> lane & 1) : 1;
        }
        for (int j = 0; j < n; j++) k[j] = x.k + row[j] * x.ldk;
        if (x.v) for (int j = 0; j < n; j++) v[j] = x.v + row[j] * x.ldv;
        for (int j = n; j < round_up(n, W); j++) k[j] = k[0], v[j] = v[0], bias[j] = 0;
        if (key_bias)
            for (int j = 0; j < n; j++) {
                int64_t t = rules.key_token(row[j]);
                bias[j] = t < 0 ? 0.f : key_bias[t];
            }
        if (pair)
            for (int j = 0; j < n; j++) bias[j] = (key_bias ? bias[j] : 0.f) + pair[at[j] * BQ + lane];
    }
    // x of the logits of keys j .. j + W - 1, from their scores s; -inf behind the last key.
    vf logits(const SfCall &c, const Logits &l, const float *s, int j) const {
        vf y = load(s + j);
        if (l.bent) y = l.bend(c, y);
        if (c.key_bias.data || has_pairs(c)) y += load(bias + j);
        return j + W > n ? pick((1ull << (n - j)) - 1, y, set1(-INF)) : y;
    }
};

// A row of q or dout in fp32, and in the dtype of the products.
template <bool BF> struct Line {
    typedef Products<BF> P;
    typedef typename P::Item Item;
    alignas(64) float x[SF_WIDEST];
    alignas(64) Item items[BF ? SF_WIDEST : 1];

    void take(const SfCall &c, const SfView &v, int64_t b, int64_t h, int64_t t, int64_t D) {
        const char *row = row_of(v, b, h, t, c.dtype);
        memset(x, 0, round_up(D, 32) * 4);
        read_row(v, row, c.dtype, D, x);
        if (BF) P::copy(v, row, c.dtype, D, items, round_up(D, 32));
    }
    // Dot products of the row with n rows of keys.
    void score(const Item *const *rows, int n, int64_t D, float *to) const {
        const Item *own;
        if constexpr (BF) own = items;
        else own = x;
        for (int j = 0; j < n; j += W) store(to + j, P::dots(own, rows + j, D));
    }
};

// A query, its accumulator and its row statistics.
template <bool BF> struct Query {
    Line<BF> q, dout;
    alignas(64) float sum[SF_WIDEST];
    float m, l, top, rest2, delta;
};

// sum[d] += p[j] * rows[j][d] over all j, for NV vectors of the head dimension from d on.
template <class P, int NV>
inline void add_weighted(const float *p, const typename P::Item *const *rows, int n, int64_t d, int64_t D, float *sum) {
    vf x[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) x[i] = load(sum + d + i * W);
    for (int j = 0; j < n; j++)
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) x[i] += p[j] * P::part(rows[j], d + i * W, D);
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) store(sum + d + i * W, x[i]);
}
// to[row[j]][d] += p[j] * x[d], for NV vectors from d on.
template <int NV> inline void add_outer(const float *p, const int64_t *row, int n, int64_t d, const float *x, float *to, int64_t ld) {
    vf y[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) y[i] = load(x + d + i * W);
    for (int j = 0; j < n; j++) {
        float *z = to + row[j] * ld + d;
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) store(z + i * W, load(z + i * W) + p[j] * y[i]);
    }
}
// add_outer for several queries, summed before they are added: equal terms drift less, and far memory is touched once.
template <int NV>
inline void add_outers(const float *const *p, const float *const *x, int queries, const int64_t *row, int n, int64_t d,
                       float *to, int64_t ld) {
    for (int j = 0; j < n; j++) {
        float *z = to + row[j] * ld + d;
        vf y[NV] = {};
        for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
            for (int i = 0; i < NV; i++) y[i] += p[q][j] * load(x[q] + d + i * W);
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) store(z + i * W, load(z + i * W) + y[i]);
    }
}
template <class F4, class F1> inline void by_vectors(int64_t D, F4 four, F1 one) {
    int64_t d = 0;
    for (; d + 4 * W <= D + W - 1; d += 4 * W) four(d);
    for (; d < D; d += W) one(d);
}

template <bool BF>
void few_forward(const SfCall &c, const Keys<BF> &keys, const Rules &rules, const Logits &logits, const Dropout &dropout,
                 int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    Query<BF> query[FEW];
    Seen<BF> seen;
    for (int i = 0; i < rows; i++) {
        Query<BF> &x = query[i];
        x.m = -INF, x.l = 0;
        memset(x.sum, 0, round_up(c.Dv, 32) * 4);
        if (q.real >> i & 1) x.q.take(c, c.q, b, h, q.token[i], c.D);
    }
    if (dropout.on()) dropout.of_queries(q, b, h, w.drawn[0], w.drawn[1]);
    float *s = w.s.p, *pair = has_pairs(c) ? w.pair.p : nullptr;
    const Peaks peaks = {c, w.peaks.p};
    if (c.stat) peaks.clear();
    Skips skips(c, logits);
    if (q.real)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            if (dropout.on()) dropout.of_keys(rules, k, b, h, w.key_words[0], w.key_words[1]);
            if (pair) fill_pairs(c, rules, q, k, b, h, pair);
            for (int i = 0; i < q.lanes; i++) {
                if (!(q.real >> i & 1)) continue;
                Query<BF> &x = query[i];
                if (k.partial || pair || !(q.real & ((1ull << i) - 1))) seen.find(rules, keys, k, w.see, i, key_bias, pair);
                if (!seen.n) continue;
                x.q.score(seen.k, seen.n, c.D, s);
                vf top = set1(-INF);
                for (int j = 0; j < seen.n; j += W) {
                    vf y = seen.logits(c, logits, s, j);
                    store(s + j, y);
                    top = vmax(top, y);
                }
                if (c.stat)
                    for (int j = 0; j < seen.n; j++) {
                        const int64_t token = rules.key_token(seen.row[j]);
                        float *y = w.peaks + token / c.stat_unit * BQ + i;
                        if (token >= 0) *y = most(*y, s[j]);
                    }
                float highest = -INF, m = x.m;
                for (int j = 0; j < W; j++) highest = most(highest, (float)top[j]);
                const bool counts = skips.counts(highest, m);
                if (c.skipped) {
                    skips.met += highest > -INF, skips.gone += highest > -INF && !counts;
                    if (!counts) continue;
                }
                if (m > x.m) {
                    vf shrink = exp2v<true>(set1(x.m - m) * logits.factor);  // 0 at the first key: exp2(-inf)
                    x.l *= shrink[0];
                    for (int64_t d = 0; d < c.Dv; d += W) store(x.sum + d, load(x.sum + d) * shrink);
                    x.m = m;
                }
                vf total = {}, safe = set1(m == -INF ? 0.f : m);
                for (int j = 0; j < seen.n; j += W) {
                    vf p = exp2v<true>((load(s + j) - safe) * logits.factor);
                    total += p;
                    store(s + j, p);
                }
                x.l += sum(total);
                if (dropout.on()) {
                    const Draw draw = seen.draw(dropout, w.key_words, w.drawn, i);
                    for (int j = 0; j < seen.n; j += W) store(s + j, draw.left(draw.lane(j), 0, load(s + j)));
                }
                by_vectors(c.Dv, [&](int64_t d) { add_weighted<Products<BF>, 4>(s, seen.v, seen.n, d, c.Dv, x.sum); },
                           [&](int64_t d) { add_weighted<Products<BF>, 1>(s, seen.v, seen.n, d, c.Dv, x.sum); });
            }
        });
    if (c.skipped) skips.tell(b, h);
    if (c.stat) {
        for (int i = 0; i < rows; i++) w.m[i] = query[i].m, w.l[i] = query[i].l;
        peaks.finish(logits, b, h, q, w.m, w.l);
    }
    for (int i = 0; i < rows; i++) {
        if (q.token[i] < 0) continue;
        Query<BF> &x = query[i];
        logits.finish(c, (b * c.Hq + h) * c.Tq + q.token[i], x.m, x.l);
        write_row(c.out, b, h, q.token[i], c.out_dtype, c.Dv, x.sum, x.l == 0 ? 0.f : dropout.scale() / x.l);
    }
}

template <bool BF>
void few_backward(const SfCall &c, const Keys<BF> &keys, const Rules &rules, const Logits &logits, const Dropout &dropout,
                  int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, KeyGrads &grads,
                  const BiasGrads &biases) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    const Given norm(c, b, h);
    Query<BF> query[FEW];
    Seen<BF> seen;
    uint64_t alive = 0;  // rows that saw a key in the forward; the others have zero gradients
    for (int i = 0; i < rows; i++) {
        Query<BF> &x = query[i];
        int64_t t = q.token[i];
        memset(x.sum, 0, round_up(c.D, 32) * 4);
        if (!(q.real >> i & 1) || norm.none(t)) continue;
        alive |= 1ull << i;
        x.q.take(c, c.q, b, h, t, c.D);
        x.dout.take(c, c.dout, b, h, t, c.Dv);
        x.delta = row_delta(c, b, h, t, w.spare.p, w.spare + round_up(c.Dv, 32));
        x.top = norm.top[t];
        x.rest2 = norm.rest[t] * LOG2E;
    }
    if (dropout.on()) dropout.of_queries(q, b, h, w.drawn[0], w.drawn[1]);
    // queries that see the same keys of a chunk are added together: their P, dS, dout and q
    const float *ps[FEW], *gs[FEW], *douts[FEW], *qs[FEW];
    float *pair = has_pairs(c) ? w.pair.p : nullptr;
    const bool asked = biases.key || biases.distance || c.dpair;
    if (alive)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            if (dropout.on()) dropout.of_keys(rules, k, b, h, w.key_words[0], w.key_words[1]);
            if (pair) fill_pairs(c, rules, q, k, b, h, pair);
            int together = 0;
            for (int i = 0; i < q.lanes; i++) {
                if (!(alive >> i & 1)) continue;
                Query<BF> &x = query[i];
                const int64_t own = q.token[i];
                float *s = w.s + i * BK, *g = w.g + i * BK;
                if (k.partial || pair || !(alive & ((1ull << i) - 1))) seen.find(rules, keys, k, w.see, i, key_bias, pair);
                if (!seen.n) continue;
                x.q.score(seen.k, seen.n, c.D, s);
                x.dout.score(seen.v, seen.n, c.Dv, g);
                const Draw draw = dropout.on() ? seen.draw(dropout, w.key_words, w.drawn, i) : Draw();
                if (dropout.on())
                    for (int j = 0; j < seen.n; j += W)
                        store(g + j, draw.left(draw.lane(j), 0, load(g + j) * dropout.scale()));
                for (int j = 0; j < seen.n; j += W) {
                    vf y = load(s + j), slope = set1(1.f);
                    if (logits.bent) y = logits.bend(c, y);
                    if (c.softcap > 0) slope -= (y / logits.outer) * (y / logits.outer);
                    if (key_bias || pair) y += load(seen.bias + j);
                    vf p = exp2v<true>((y - x.top) * logits.factor - x.rest2), ds = p * (load(g + j) - x.delta);
                    store(s + j, p);
                    store(g + j, ds);
                    for (int i = j; asked && i < least(j + W, seen.n); i++) {
                        const int64_t t = rules.key_token(seen.row[i]);
                        if (t < 0) continue;
                        if (biases.key) biases.key[t] += g[i];
                        if (biases.distance) biases.distance[own - t + c.Tk - 1] += g[i];
                        if (c.dpair) c.dpair[((b * c.Hq + h) * c.Tq + own) * c.Tk + t] = g[i];
                    }
                    store(g + j, ds * slope);
                    if (dropout.on()) store(s + j, draw.left(draw.lane(j), 0, p * dropout.scale()));
                }
                if (k.partial || q.lanes == 1) {
                    for (int j = 0; j < seen.n; j++) grads.touch(seen.row[j]);
                    by_vectors(c.Dv, [&](int64_t d) { add_outer<4>(s, seen.row, seen.n, d, x.dout.x, grads.v, grads.ldv); },
                               [&](int64_t d) { add_outer<1>(s, seen.row, seen.n, d, x.dout.x, grads.v, grads.ldv); });
                    by_vectors(c.D, [&](int64_t d) { add_outer<4>(g, seen.row, seen.n, d, x.q.x, grads.k, grads.ldk); },
                               [&](int64_t d) { add_outer<1>(g, seen.row, seen.n, d, x.q.x, grads.k, grads.ldk); });
                } else
                    ps[together] = s, gs[together] = g, douts[together] = x.dout.x, qs[together++] = x.q.x;
                by_vectors(c.D, [&](int64_t d) { add_weighted<Products<BF>, 4>(g, seen.k, seen.n, d, c.D, x.sum); },
                           [&](int64_t d) { add_weighted<Products<BF>, 1>(g, seen.k, seen.n, d, c.D, x.sum); });
            }
            if (!together) return;
            for (int j = 0; j < seen.n; j++) grads.touch(seen.row[j]);
            auto add = [&](int64_t D, const float *const *p, const float *const *x, float *to, int64_t ld) {
                by_vectors(D, [&](int64_t d) { add_outers<4>(p, x, together, seen.row, seen.n, d, to, ld); },
                           [&](int64_t d) { add_outers<1>(p, x, together, seen.row, seen.n, d, to, ld); });
            };
            add(c.Dv, ps, douts, grads.v, grads.ldv);
            add(c.D, gs, qs, grads.k, grads.ldk);
        });
    for (int i = 0; i < rows; i++)
        if (q.token[i] >= 0) write_row(c.dq, b, h, q.token[i], c.grad_dtype, c.D, query[i].sum, c.scale);
}

}  // namespace
