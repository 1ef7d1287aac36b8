// Statistics of P = exp(S - lse) for a given lse, streamed: sums or maxima over each key, row, list entry, diagonal or
// block. With dout, statistics of influences instead: the first-order change of out . dout if the pair is removed and the
// rest of its row renormalised, |P (delta - dP) / (1 - P)|; where 1 - P is no more than rounding, |P dP|.
#pragma once
#include "few.h"

namespace {

// Accumulates statistics: into one head's results, or into a share of them.
struct Tally {
    const SfCall &c;
    float *stat;

    // True if no two tiles add to the same result: then tiles write results directly, without shares.
    static bool within_tiles(const SfCall &c) { return c.over == SF_OVER_ROW || c.over == SF_OVER_ENTRY || c.over == SF_OVER_BLOCK; }

    vf both(vf x, vf y) const { return c.peak ? vmax(x, y) : x + y; }
    float across(vf x) const {
        if (!c.peak) return sum(x);
        float top = 0;
        for (int i = 0; i < W; i++) top = most(top, (float)x[i]);
        return top;
    }
    void take(int64_t at, float x) { stat[at] = c.peak ? most(stat[at], x) : stat[at] + x; }
    void row(int64_t query, float x) { stat[query] = x; }
    void key(int64_t token, float x) { take(token, x); }
    void entry(int64_t tile, int64_t n, float x) {
        if (n >= 0 && n < c.entry_width) take(tile * c.entry_width + n, x);
    }
    void block(const TileRuns &runs, int64_t unit, const float *x) {
        for (auto &run : runs)
            take(run.tile * units_of(c) + unit, ::across(x, run.from, run.to, [&](vf a, vf b) { return both(a, b); }));
    }
    void pair(int64_t query, int64_t token, float x) { take(query - token + c.Tk - 1, x); }
};

// Sums the weights of a chunk by diagonal, if rows and keys are tokens in order: `query` is row 0, `key` is chunk row 0. A
// diagonal runs through vectors at every offset, but keys that are W apart shift it by a whole vector. So keys b, b + W, ..
// share one set of register sums, to which vectors are added unshifted.
// Example, W = 16: row 35 and key 50 are vector v = 2, lane 3, and b = 2, m = 3: sum[2 - 3 + 7], lane 3, stored at
// first + 6 * 16 - 2 + 3 = (query + 35) - (key + 50) + Tk - 1.
template <class Weight> inline void by_diagonal(Tally &tally, const Chunk &k, int n, int64_t query, int64_t key, Weight weight) {
    constexpr int ACROSS = BQ / W, DOWN = BK / W, WIDE = ACROSS + DOWN - 1;
    const int64_t width = tally.c.stat_width, first = query - key + tally.c.Tk - 1 - (DOWN - 1) * W;
    for (int b = 0; b < W; b++) {
        vf sum[WIDE];
#pragma GCC unroll 16
        for (int u = 0; u < WIDE; u++) sum[u] = vf{};
#pragma GCC unroll 8
        for (int m = 0; m < DOWN; m++) {
            const int j = b + m * W;
            if (j < k.a || j >= k.b) continue;
#pragma GCC unroll 4
            for (int v = 0; v < ACROSS; v++) {
                if (v * W >= n) break;
                vf &x = sum[v - m + DOWN - 1];
                x = tally.both(x, weight(j, v * W));
            }
        }
#pragma GCC unroll 16
        for (int u = 0; u < WIDE; u++) {
            const int64_t at = first + u * W - b;
            if (at >= 0 && at + W <= width) store(tally.stat + at, tally.both(load(tally.stat + at), sum[u]));
            else
                for (int l = 0; l < W; l++) if (at + l >= 0 && at + l < width) tally.take(at + l, sum[u][l]);
        }
    }
}

// Bit mask of the rows of a block that see some key: other rows count nothing.
inline uint64_t with_mass(const Queries &q, const Given &norm) {
    uint64_t alive = 0;
    for (int i = 0; i < BQ; i++) alive |= (uint64_t)((q.real >> i & 1) && !norm.none(q.token[i])) << i;
    return alive;
}

// Turns weights p into influences, given dP = dout . v and the row's delta.
inline vf influence(vf p, vf dp, vf delta, float rounding) {
    const vf left = 1.f - p, x = left < rounding ? p * dp : p * (delta - dp) / left;
    return vmax(x, -x);
}
inline float rounding_of(int32_t dtype) { return dtype == SF_F32 ? 0x1p-16f : dtype == SF_F16 ? 0x1p-10f : 0x1p-7f; }

template <bool BF, bool SLOPES>
void stats_block(const SfCall &c, const Keys<BF> &keys, const Rules &rules, const Logits &logits, int64_t b, int64_t h,
                 int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, Tally tally) {
    typedef Products<BF> P;
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    const Given norm(c, b, h);
    if (!(q.real = with_mass(q, norm))) return;
    for (int i = 0; i < BQ; i++) {
        const bool real = q.real >> i & 1;
        w.top[i] = real ? norm.top[q.token[i]] : 0.f;
        w.rest2[i] = real ? norm.rest[q.token[i]] * LOG2E : NO_ROW;
        w.m[i] = 0;
        if (SLOPES) w.delta[i] = real ? c.delta[(b * c.Hq + h) * c.Tq + q.token[i]] : 0.f;
    }
    int n = columns<BF>(q);
    pack_lanes<BF>(c, c.q, b, h, q, q.real, c.D, w.qt.p);
    if (SLOPES) pack_lanes<BF>(c, c.dout, b, h, q, q.real, c.Dv, w.dot.p);
    const TileRuns runs(q, c.over == SF_OVER_BLOCK ? c.stat_tile : INT32_MAX);
    const float rounding = rounding_of(c.dtype);
    const bool tokens = c.over == SF_OVER_DIAGONAL && !c.plan.q_order.data && !c.plan.k_order.data;
    for_each_chunk<NAMED>(c, b, h, tile, [&](const Chunk &given) {
        Chunk k = given;
        bool holes = false;
        // full entries too: rows without any key must not count
        if (!look(rules, q, k, w.see, holes)) return;
        const Operands<BF> o = operands<BF, SLOPES>(c, keys, k, false, w.see, w);
        float *s = w.s.p;
        const Edges<BF> x(k);
        auto score = [&](int64_t D, const typename P::Item *keys, int64_t ld, const typename P::Item *queries, float *to) {
            P::score(x.to - x.from, n, round_up(D, P::GRAIN), keys + x.from * ld, ld, queries, BQ, to + x.from * BQ, BQ);
        };
        score(c.D, o.k, o.ldk, w.qt.p, s);
        if (SLOPES) score(c.Dv, o.v, o.ldv, w.dot.p, w.g.p);
        if (logits.bent) {
            logits.bias(rules, key_bias, k, w.bias);
            logits.bend(c, k, key_bias ? w.bias : nullptr, s);
        }
        auto weight = [&](int j, int i) {
            vf p = exp2v<true>((load(s + j * BQ + i) - load(w.top + i)) * logits.factor - load(w.rest2 + i));
            if (SLOPES) p = influence(p, load(w.g + j * BQ + i), load(w.delta + i), rounding);
            return pick(w.see[j] >> i, p, set1(0.f));
        };
        if (c.over == SF_OVER_BLOCK) {
            by_units(c, rules, k, [&](int64_t unit, int from, int to) {
                alignas(64) float lanes[BQ] = {};
                for (int i = 0; i < n; i += W) {
                    vf all = {};
                    for (int j = from; j < to; j++) all = tally.both(all, weight(j, i));
                    store(lanes + i, all);
                }
                tally.block(runs, unit, lanes);
            });
            return;
        }
        if (tokens && !k.gather) return by_diagonal(tally, k, n, row, k.base, weight);
        for (int j = k.a; j < k.b; j++) {
            int64_t token = rules.key_token(k.gather ? k.gather[j] : k.base + j);
            if (token < 0) continue;
            vf all = {};
            for (int i = 0; i < n; i += W) {
                const vf p = weight(j, i);
                all = tally.both(all, p);
                if (c.over == SF_OVER_ROW) store(w.m + i, tally.both(load(w.m + i), p));
                else if (c.over == SF_OVER_DIAGONAL) store(s + j * BQ + i, p);
            }
            if (c.over == SF_OVER_KEY) tally.key(token, tally.across(all));
            else if (c.over == SF_OVER_ENTRY) tally.entry(tile, k.entry_of(j), tally.across(all));
            else if (c.over == SF_OVER_DIAGONAL)
                for (int i = 0; i < q.lanes; i++)
                    if (q.real >> i & 1) tally.pair(q.token[i], token, s[j * BQ + i]);
        }
    });
    if (c.over == SF_OVER_ROW)
        for (int i = 0; i < BQ; i++) if (q.real >> i & 1) tally.row(q.token[i], w.m[i]);
}

// stats_block for tiles of few queries, one query at a time.
template <bool BF, bool SLOPES>
void few_stats(const SfCall &c, const Keys<BF> &keys, const Rules &rules, const Logits &logits, int64_t b, int64_t h,
               int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, Tally tally) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    const Given norm(c, b, h);
    if (!(q.real = with_mass(q, norm))) return;
    Query<BF> query[FEW];
    Seen<BF> seen;
    vf total[FEW] = {};
    for (int i = 0; i < rows; i++)
        if (q.real >> i & 1) {
            query[i].q.take(c, c.q, b, h, q.token[i], c.D);
            if (SLOPES) query[i].dout.take(c, c.dout, b, h, q.token[i], c.Dv);
        }
    const float rounding = rounding_of(c.dtype);
    float *s = w.s.p;
    for_each_chunk<NAMED>(c, b, h, tile, [&](const Chunk &given) {
        Chunk k = given;
        bool holes = false;
        if (k.partial && !look(rules, q, k, w.see, holes)) return;
        for (int i = 0; i < q.lanes; i++) {
            if (!(q.real >> i & 1)) continue;
            if (k.partial || !(q.real & ((1ull << i) - 1))) seen.find(rules, keys, k, w.see, i, key_bias);
            query[i].q.score(seen.k, seen.n, c.D, s);
            if (SLOPES) query[i].dout.score(seen.v, seen.n, c.Dv, w.g.p);
            const float top = norm.top[q.token[i]], rest2 = norm.rest[q.token[i]] * LOG2E;
            const float delta = SLOPES ? c.delta[(b * c.Hq + h) * c.Tq + q.token[i]] : 0.f;
            for (int j = 0; j < seen.n; j += W) {
                vf p = exp2v<true>((seen.logits(c, logits, s, j) - top) * logits.factor - rest2);
                if (SLOPES) {  // lanes behind the last key have no influence
                    p = influence(p, load(w.g + j), set1(delta), rounding);
                    if (j + W > seen.n) p = pick((1ull << (seen.n - j)) - 1, p, set1(0.f));
                }
                total[i] = tally.both(total[i], p);
                store(s + j, p);
            }
            if (c.over == SF_OVER_ENTRY)
                for (int j = 0; j < seen.n; j++) tally.entry(tile, k.entry_of(seen.at[j]), s[j]);
            else if (c.over != SF_OVER_ROW)
                for (int j = 0; j < seen.n; j++) {
                    int64_t token = rules.key_token(seen.row[j]);
                    if (token < 0) continue;
                    if (c.over == SF_OVER_KEY) tally.key(token, s[j]);
                    else if (c.over == SF_OVER_BLOCK)
                        tally.take(q.token[i] / c.stat_tile * units_of(c) + token / c.stat_unit, s[j]);
                    else tally.pair(q.token[i], token, s[j]);
                }
        }
    });
    if (c.over == SF_OVER_ROW)
        for (int i = 0; i < rows; i++) if (q.real >> i & 1) tally.row(q.token[i], tally.across(total[i]));
}

// Over keys and diagonals, several tiles add to one result: the tiles of a head are split into a fixed number of shares, which
// are combined in order, so the result does not depend on the number of threads. Over rows and entries no two tiles meet; over
// blocks a task takes as many tiles as end on the edge of a block together.
inline int64_t tiles_together(const SfCall &c) {
    if (c.over != SF_OVER_BLOCK) return 1;
    return c.plan.q_order.data ? c.plan.tiles : common_multiple(c.plan.tile, c.stat_tile) / c.plan.tile;
}

template <bool BF, bool SLOPES> int stats_of(const SfCall &c, SfParallel parallel) {
    const SfPlan &p = c.plan;
    const bool few = few_queries(c), apart = Tally::within_tiles(c);
    const int64_t heads = c.B * c.Hq, width = c.stat_width;
    const int64_t shares = apart ? 1 : most<int64_t>(1, least<int64_t>(8, p.tiles));
    const int64_t together = most<int64_t>(1, tiles_together(c)), groups = (p.tiles + together - 1) / together;
    const int64_t wanted = most<int64_t>(1, p.tiles * least<int64_t>(p.tile, BQ) / BQ);
    const int64_t runs = apart ? least(wanted, most<int64_t>(groups, 1)) : shares;
    Packed<BF, SLOPES> packed;
    Buffer<float> part;
    Desks<BF> scratch;
    if (!width) return 0;
    if (packed.make(c, parallel, few) || !scratch.make(c, SLOPES)) return 1;
    if (!apart && !part.make(heads * shares * width)) return 1;
    float *into = apart ? c.stat : part.p;
    Logits logits(c);
    auto clear = [&](int64_t i, int) { memset(into + i * width, 0, width * 4); };
    auto task = [&](int64_t i, int thread) {
        Products<BF>::prepare_thread();
        int64_t run = i % runs, b = i / runs / c.Hq, h = i / runs % c.Hq;
        Tally tally = {c, into + (apart ? i / runs : i) * width};
        Rules rules(c, b, h);
        const Keys<BF> keys = packed.keys(c, b, h);
        const int64_t first = run * groups / runs * together, last = least((run + 1) * groups / runs * together, p.tiles);
        for (int64_t r = first; r < last; r++) {
            int64_t end = least(p.q_rows, (r + 1) * p.tile);
            for (int64_t row = r * p.tile; row < end; row += BQ) {
                auto block = few ? few_stats<BF, SLOPES> : stats_block<BF, SLOPES>;
                block(c, keys, rules, logits, b, h, r, row, least<int64_t>(BQ, end - row), scratch[thread], tally);
            }
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
    in_parallel(parallel, c.threads, heads * shares, clear);
    in_parallel(parallel, c.threads, heads * runs, task);
    if (!apart) in_parallel(parallel, c.threads, heads, gather);
    return 0;
}

template <bool BF> int stats(const SfCall &c, SfParallel parallel) {
    return c.dout.data ? stats_of<BF, true>(c, parallel) : stats_of<BF, false>(c, parallel);
}

}  // namespace
