// The backward of one query block: P and dS of each chunk of its tile, five products; dK and dV are added to memory
// that belongs to the task alone.
#pragma once
#include "forward.h"

namespace {

// dK and dV of one packed head (or of a share of its tiles), fp32 in row space. Blocks of BK rows are cleared when first
// touched, so untouched ones cost nothing.
struct KeyGrads {
    float *k, *v;
    char *touched;
    int64_t ldk, ldv;

    void touch(int64_t row) {
        int64_t block = row / BK;
        if (touched[block]) return;
        touched[block] = 1;
        memset(k + block * BK * ldk, 0, BK * ldk * 4);
        memset(v + block * BK * ldv, 0, BK * ldv * 4);
    }
};

// Bias gradients of one share: [Tk] by key, [Tq+Tk-1] by distance; or null.
struct BiasGrads { float *key, *distance; };

// Delta of a query, which dS = P (dP - delta) subtracts: dout . out - dlse.
inline float row_delta(const SfCall &c, int64_t b, int64_t h, int64_t t, float *dout, float *out) {
    const int64_t row = (b * c.Hq + h) * c.Tq + t;
    const float slope = c.dlse ? c.dlse[row] : 0.f;
    if (c.delta) return c.delta[row] - slope;
    read_row(c.dout, row_of(c.dout, b, h, t, c.dtype), c.dtype, c.Dv, dout);
    read_row(c.out, row_of(c.out, b, h, t, c.out_dtype), c.out_dtype, c.Dv, out);
    float x = 0;
    for (int64_t d = 0; d < c.Dv; d++) x += dout[d] * out[d];
    return x - slope;
}

// Computes P and dS of a vector of queries and one key: x is the logit's x without bias, y the entry of dP.
struct Slopes {
    const SfCall &c;
    const Logits &logits;
    const float *top, *rest2, *delta;
    const uint64_t *see;   // null where all keys are visible
    const float *bias, *pair;  // biases by key, and by (key, query); or null
    bool sums;             // also sum dS over queries: the gradient of key_bias

    // Row statistics of W queries.
    struct Lane { vf top, rest2, delta; };
    inline Lane lane(int i) const { return {load(top + i), load(rest2 + i), load(delta + i)}; }

    template <bool PLAIN, bool FINE>
    inline void one(const Lane &q, int j, int i, vf x, vf y, vf &p, vf &ds, vf &total) const {
        vf biased = PLAIN || !bias ? x : x + bias[j];
        if (!PLAIN && pair) biased += load(pair + j * BQ + i);
        p = exp2v<FINE>((biased - q.top) * logits.factor - q.rest2);
        ds = p * (y - q.delta);
        if (PLAIN) return;
        uint64_t m = see ? see[j] >> i : ~0ull;
        p = pick(m, p, set1(0.f));
        ds = pick(m, ds, set1(0.f));
        if (sums) total += ds;
        if (c.softcap > 0) {
            vf t = x / logits.outer;
            ds = pick(m, ds * (1.f - t * t), set1(0.f));
        }
    }
};

// Slopes with dropout: P becomes what V was multiplied with.
struct DroppedSlopes {
    const Slopes &whole;
    const Draw &draw;
    const vf scale;
    const bool &sums = whole.sums;

    struct Lane { Slopes::Lane whole; Draw::Lane drawn; };
    inline Lane lane(int i) const { return {whole.lane(i), draw.lane(i)}; }

    template <bool PLAIN, bool FINE>
    inline void one(const Lane &q, int j, int i, vf x, vf y, vf &p, vf &ds, vf &total) const {
        const vf factor = draw.left(q.drawn, j, scale);
        whole.one<PLAIN, FINE>(q.whole, j, i, x, y * factor, p, ds, total);
        p *= factor;
    }
};

// Turns S and dP of a chunk into P and dS in place, fp32. Law: Slopes, DroppedSlopes or Pointwise.
template <bool PLAIN, class Law>
inline void weigh_rows(const Law &law, const Chunk &k, int n, float *s, float *g, float *sums) {
    for (int i = 0; PLAIN && i < n; i += W) {  // no sums over queries: keep the queries' statistics in registers
        const auto lane = law.lane(i);
        for (int j = k.a; j < k.b; j++) {
            vf p, ds, none = {};
            law.template one<true, true>(lane, j, i, load(s + j * BQ + i), load(g + j * BQ + i), p, ds, none);
            store(s + j * BQ + i, p);
            store(g + j * BQ + i, ds);
        }
    }
    for (int j = k.a; !PLAIN && j < k.b; j++) {
        vf total = {};
#pragma GCC unroll 4
        for (int i = 0; i < n; i += W) {
            vf p, ds;
            law.template one<PLAIN, true>(law.lane(i), j, i, load(s + j * BQ + i), load(g + j * BQ + i), p, ds, total);
            store(s + j * BQ + i, p);
            store(g + j * BQ + i, ds);
        }
        if (law.sums) sums[j] = sum(total);
    }
}
// weigh_rows in bf16: writes P and dS as rows of queries (pr, dr), and dS as pairs of keys (dp).
template <bool PLAIN, class P, class Law>
inline void weigh_pairs(const Law &law, int a, int e, const Chunk &k, int n, const float *s, const float *g, typename P::Item *pr,
                        typename P::Item *dr, typename P::Item *dp, float *sums) {
    for (int j = a; j < e; j += 2) {
        vf t0 = {}, t1 = {};
        bool in0 = j >= k.a && j < k.b, in1 = j + 1 >= k.a && j + 1 < k.b;
        for (int i = 0; i < n; i += 32) {
            vf p00, p01, p10, p11, d00, d01, d10, d11;
            const float *x = s + j * BQ + i, *y = g + j * BQ + i;
            const auto low = law.lane(i), high = law.lane(i + 16);
            if (PLAIN || in0) {
                law.template one<PLAIN, false>(low, j, i, load(x), load(y), p00, d00, t0);
                law.template one<PLAIN, false>(high, j, i + 16, load(x + 16), load(y + 16), p01, d01, t0);
            } else p00 = p01 = d00 = d01 = set1(0.f);
            if (PLAIN || in1) {
                law.template one<PLAIN, false>(low, j + 1, i, load(x + BQ), load(y + BQ), p10, d10, t1);
                law.template one<PLAIN, false>(high, j + 1, i + 16, load(x + BQ + 16), load(y + BQ + 16), p11, d11, t1);
            } else p10 = p11 = d10 = d11 = set1(0.f);
            typename P::Item *d = dr + j * BQ + i;
            P::store(pr + j * BQ + i, P::narrow(p00, p01));
            P::store(pr + (j + 1) * BQ + i, P::narrow(p10, p11));
            const auto even = P::narrow(d00, d01), odd = P::narrow(d10, d11);
            P::store(d, even);
            P::store(d + BQ, odd);
            P::mix_rows(dp + j * BQ + 2 * i, even, odd);
        }
        if (!PLAIN && law.sums) {
            if (in0) sums[j] = sum(t0);
            if (in1) sums[j + 1] = sum(t1);
        }
    }
}

// Adds a scratch tile, whose first row is chunk row `from`, to the key rows that its rows belong to.
inline void add_rows(const Chunk &k, int from, const float *tile, float *to, int64_t ld) {
    for (int j = k.a; j < k.b; j++) {
        float *x = to + (k.gather ? k.gather[j] : k.base + j) * ld;
        const float *y = tile + (j - from) * ld;
        for (int64_t d = 0; d < ld; d += W) store(x + d, load(x + d) + load(y + d));
    }
}

// Steps: rows [a, e) of a chunk with the lanes [from, to) that see any of them, both in multiples of 16 (32 for AMX). On a
// causal diagonal, products over all lanes would multiply zeros for a good part.
struct Step { int a, e, from, to; };
template <bool BF> struct Steps : Edges<BF> {
    Step step[BK / 16];
    int count = 0;

    // n: lanes of the block; `see` is null where every key is visible.
    Steps(const Chunk &k, int n, const uint64_t *see) : Edges<BF>(k) {
        const int size = most(Products<BF>::TILE, 16), first = this->from, last = this->to;
        if (!see) step[count++] = {first, last, 0, n};
        for (int row = first, next; see && row < last; row = next) {
            next = least((int)round_down(row, size) + size, last);
            uint64_t some = 0;
            for (int j = most(row, k.a); j < least(next, k.b); j++) some |= see[j];
            const int from = some ? (int)round_down(__builtin_ctzll(some), size) : 0;
            const int to = least(n, some ? (int)round_up(64 - __builtin_clzll(some), size) : size);
            if (count && step[count - 1].from == from && step[count - 1].to == to) step[count - 1].e = next;
            else step[count++] = {row, next, from, to};
        }
    }
    const Step *begin() const { return step; }
    const Step *end() const { return step + count; }
};

// S^T = K Q^T and dP^T = V dO^T.
template <bool BF>
inline void scores(const SfCall &c, const Operands<BF> &o, const Steps<BF> &steps, const Lanes<BF> &x, Scratch<BF> &w,
                   Reach keys = FAR) {
    typedef Products<BF> P;
    const int64_t D = round_up(c.D, P::GRAIN), Dv = round_up(c.Dv, P::GRAIN);
    for (const Step &t : steps) {
        const int rows = t.e - t.a, lanes = t.to - t.from, from = P::PAIR * t.from;
        const int64_t at = t.a * BQ + t.from;
        P::score(rows, lanes, D, o.k + t.a * o.ldk, o.ldk, x.qt + from, BQ, w.s + at, BQ, keys);
        P::score(rows, lanes, Dv, o.v + t.a * o.ldv, o.ldv, x.dot + from, BQ, w.g + at, BQ, keys);
    }
}

// Adds one of dV += P^T dO and dK += dS^T Q, given `keys` (P^T or dS^T) and `queries` (dO or Q); through w.spare where the
// keys are scattered, or share an AMX tile with other rows.
template <bool BF>
inline void add_keys(const Chunk &k, const Operands<BF> &o, const Steps<BF> &steps, const typename Products<BF>::Item *keys,
                     const typename Products<BF>::Item *queries, float *to, int64_t ld, Scratch<BF> &w) {
    const int first = steps.from;
    float *c = o.own_rows ? w.spare.p : to + (k.base + first) * ld;
    for (const Step &t : steps)
        Products<BF>::multiply(t.e - t.a, ld, t.to - t.from, keys + t.a * BQ + t.from, BQ, 1, queries + t.from * ld, ld,
                               c + (t.a - first) * ld, ld, o.own_rows ? SET : ADD_FAR);
    if (o.own_rows) add_rows(k, first, c, to, ld);
}

// dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T.
template <bool BF>
inline void add_products(const SfCall &c, const Chunk &k, const Operands<BF> &o, const Steps<BF> &steps, int n,
                         const Lanes<BF> &x, Scratch<BF> &w, KeyGrads &grads, Reach keys = FAR) {
    typedef Products<BF> P;
    const int a = steps.a;
    if (k.gather) for (int j = k.a; j < k.b; j++) grads.touch(k.gather[j]);
    else grads.touch(k.base);
    add_keys<BF>(k, o, steps, w.weight_rows(), x.dor.p, grads.v, grads.ldv, w);
    add_keys<BF>(k, o, steps, w.slope_rows(), x.qr.p, grads.k, grads.ldk, w);
    P::multiply(round_up(c.D, P::TILE), n, steps.e - a, o.t + a * o.t_key, o.t_row, o.t_key, w.slopes() + a * BQ, BQ, x.ot.p, BQ,
                ADD, keys);
}

// P and dS of a chunk: fp32 in place, bf16 in the three layouts the products read. PLAIN: no mask, softcap or bias.
template <bool PLAIN, bool BF, class Law>
inline void weigh(const Law &law, const Chunk &k, const Steps<BF> &steps, int n, Scratch<BF> &w) {
    if constexpr (BF)
        weigh_pairs<PLAIN, Products<BF>>(law, steps.a, steps.e, k, n, w.s.p, w.g.p, w.pr.p, w.dr.p, w.p.p, w.sums);
    else weigh_rows<PLAIN>(law, k, n, w.s.p, w.g.p, w.sums);
}

// The backward of one block of queries, chunk by chunk.
template <bool BF> struct BackwardBlock {
    const SfCall &c;
    const Rules &rules;
    const Logits &logits;
    const Dropout &dropout;
    const int64_t b, h;
    Lanes<BF> &x;
    Queries q;
    uint64_t alive = 0;  // rows that saw a key in the forward; the others have zero gradients
    int n = 0;
    bool packed = false;

    void load(int64_t row, int64_t rows, int64_t row_in_tile) {
        q.load(rules, row, rows, row_in_tile);
        const Given norm(c, b, h);
        for (int i = 0; i < BQ; i++)
            if ((q.real >> i & 1) && !norm.none(q.token[i])) alive |= 1ull << i;
        n = columns<BF>(q);
    }

    void pack(Scratch<BF> &w) {
        packed = true;
        const Given norm(c, b, h);
        for (int i = 0; i < BQ; i++) {
            x.delta[i] = x.top[i] = 0;
            x.rest2[i] = NO_ROW;
            if (!(alive >> i & 1)) continue;
            int64_t t = q.token[i];
            x.delta[i] = row_delta(c, b, h, t, w.spare.p, w.spare + round_up(c.Dv, 32));
            x.top[i] = norm.top[t];
            x.rest2[i] = norm.rest[t] * LOG2E;
        }
        pack_lanes<BF>(c, c.q, b, h, q, alive, c.D, x.qt.p, x.qr.p);
        pack_lanes<BF>(c, c.dout, b, h, q, alive, c.Dv, x.dot.p, x.dor.p);
        memset(x.ot.p, 0, round_up(c.D, 32) * BQ * 4);
        if (dropout.on()) dropout.of_queries(q, b, h, x.drawn[0], x.drawn[1]);
    }

    // Writes dS as the gradient of the pair bias; each pair is visited once.
    void write_pairs(const Chunk &k, const Scratch<BF> &w) {
        for (int j = k.a; j < k.b; j++) {
            const int64_t t = rules.key_token(k.gather ? k.gather[j] : k.base + j);
            const uint64_t some = k.partial ? alive & w.see[j] : alive;
            for (int i = 0; t >= 0 && i < q.lanes; i++)
                if (some >> i & 1)
                    c.dpair[((b * c.Hq + h) * c.Tq + q.token[i]) * c.Tk + t] =
                        Products<BF>::value(w.slope_rows()[j * BQ + i]);
        }
    }

    // Adds dS to the gradient of the bias by distance: sums along the diagonals of a chunk.
    void add_distances(const Chunk &k, const Scratch<BF> &w, float *to) {
        const bool in_order = !rules.q_order && alive == (q.lanes < 64 ? (1ull << q.lanes) - 1 : ~0ull);
        for (int j = k.a; j < k.b; j++) {
            const int64_t t = rules.key_token(k.gather ? k.gather[j] : k.base + j);
            if (t < 0) continue;
            const auto slope = [&](int i) { return Products<BF>::value(w.slope_rows()[j * BQ + i]); };
            float *x = to + c.Tk - 1 - t;
            if (in_order) {  // pairs that are not seen have dS = 0
                x += q.token[0];
                for (int i = 0; i < q.lanes; i++) x[i] += slope(i);
                continue;
            }
            for (int i = 0; i < q.lanes; i++)
                if (alive >> i & 1) x[q.token[i]] += slope(i);
        }
    }

    // Processes one chunk; false if no query of the block sees it. reach: NEAR if another block has just visited the same keys.
    bool visit(Chunk k, const Keys<BF> &keys, Reach reach, const float *key_bias, Scratch<BF> &w, KeyGrads &grads,
               const BiasGrads &biases) {
        bool holes = false;
        float *dbias = biases.key;
        if (!alive || (k.partial && !look(rules, q, k, w.see, holes))) return false;
        if (!packed) pack(w);
        const Operands<BF> o = operands<BF, true>(c, keys, k, holes, w.see, w);
        const Steps<BF> steps(k, n, k.partial ? w.see : nullptr);
        scores<BF>(c, o, steps, x, w, reach);
        float *s = w.s.p, *g = w.g.p;
        if (logits.bent) {
            logits.bias(rules, key_bias, k, w.bias);
            logits.bend(c, k, nullptr, s);
            if (has_pairs(c)) fill_pairs(c, rules, q, k, b, h, w.pair.p);
        }
        // P = exp(logit - lse), dS = P (dP - delta)
        const bool biased = key_bias != nullptr;
        const float *pair = has_pairs(c) ? w.pair.p : nullptr;
        Slopes slopes = {c, logits, x.top, x.rest2, x.delta, k.partial ? w.see : nullptr, biased ? w.bias : nullptr, pair, dbias != nullptr};
        const bool plain = !k.partial && !dbias && !biased && !pair && c.softcap == 0;
        fill_rows(s, steps.a, k.a, -INF), fill_rows(s, k.b, steps.e, -INF);
        fill_rows(g, steps.a, k.a, 0.f), fill_rows(g, k.b, steps.e, 0.f);
        const auto weigh_by = [&](const auto &law) {
            if (plain) weigh<true>(law, k, steps, n, w);
            else weigh<false>(law, k, steps, n, w);
        };
        if (dropout.on()) {
            const Draw draw = dropout.draw(rules, k, b, h, x.drawn, w.key_words);
            weigh_by(DroppedSlopes{slopes, draw, set1(dropout.scale())});
        } else weigh_by(slopes);
        if (c.dpair) write_pairs(k, w);
        if (biases.distance) add_distances(k, w, biases.distance);
        if (dbias)
            for (int j = k.a; j < k.b; j++) {
                int64_t t = rules.key_token(k.gather ? k.gather[j] : k.base + j);
                if (t >= 0) dbias[t] += w.sums[j];
            }
        add_products<BF>(c, k, o, steps, n, x, w, grads, reach);
        return true;
    }

    void write(Scratch<BF> &w) {
        if (packed) lanes_to_rows(x.ot.p, c.D, w.spare.p);
        for (int i = 0; i < BQ; i++) {
            if (q.token[i] < 0) continue;
            float *dq = w.spare + i * round_up(c.D, 16);
            if (!packed || !(alive >> i & 1)) memset(dq, 0, c.D * 4);
            write_row(c.dq, b, h, q.token[i], c.grad_dtype, c.D, dq, c.scale);
        }
    }
};

// Runs up to two query blocks of a tile together over its chunks: the second finds the chunk's dK and dV in the cache, where
// the first has just left them.
template <bool BF>
void backward_blocks(const SfCall &c, const Keys<BF> &keys, const Rules &rules, const Logits &logits, const Dropout &dropout,
                     int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, KeyGrads &grads,
                     const BiasGrads &biases) {
    BackwardBlock<BF> first = {c, rules, logits, dropout, b, h, w}, second = {c, rules, logits, dropout, b, h, w.next};
    const int64_t from = row - tile * c.plan.tile;
    first.load(row, least<int64_t>(rows, BQ), from);
    if (rows > BQ) second.load(row + BQ, rows - BQ, from + BQ);
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    if (first.alive | second.alive)
        for_each_chunk(c, b, h, tile, [&](const Chunk &k) {
            bool visited = first.visit(k, keys, FAR, key_bias, w, grads, biases);
            second.visit(k, keys, visited ? NEAR : FAR, key_bias, w, grads, biases);
        });
    first.write(w);
    if (rows > BQ) second.write(w);
}

}  // namespace
