// KL divergence of a learned indexer from the attention that it stands in for: for each query, with
//
//   p[t] = sum over heads of exp(scale q . k[t] - lse), normalised;   score[t] as in `indexer.h`,
//   loss = sum over t of p[t] (log p[t] - log softmax(score)[t]),
//
// and its gradients, which follow from dloss / dscore = softmax(score) - p.
//
// A block is a few queries that go over the same keys, 64 at a time, in two passes: the first sums up softmax and loss, the
// second uses these sums for the gradients. Scores and p are kept in between; products of heads are computed again. A query
// with a key list of its own is a block by itself.
#pragma once
#include <algorithm>
#include "gemm.h"
#include "scratch.h"

namespace {

struct IndexerLoss {
    static constexpr int64_t KEYS = 64, QUERIES = 16, GRID = 16;  // GRID: transpositions need dimensions that are multiples of it
    static constexpr int64_t TASKS = 32, HELD = 64 << 20;         // shares of dK; floats that all shares hold, at most

    const SfIndexerLoss &c;
    int64_t D = round_up(c.D, GRID), Dm = round_up(c.Dm, GRID), group = c.Hq / c.Hkv;
    int64_t size = c.index ? 1 : QUERIES, blocks = (c.Tq + size - 1) / size;
    int64_t width = round_up(c.index ? c.n : c.Tk, KEYS), k_rows = round_up(c.Tk, KEYS);

    struct Desk {
        Buffer<float> rows, columns, q, main_q, products, score, p, dq, dk, weights, dw, lse2;
        Buffer<int32_t> keys;

        bool make(const IndexerLoss &x) {
            const int64_t n = x.size, H = x.c.H, wide = most(x.D, x.Dm);
            return rows.make(KEYS * wide) && columns.make(KEYS * wide) && q.make(n * H * x.D) &&
                   main_q.make(n * x.c.Hq * x.Dm) && products.make(n * most(H, x.group) * KEYS) &&
                   score.make(n * x.width) && p.make(n * x.width) && dq.make(n * H * x.D) && dk.make(KEYS * x.D) &&
                   weights.make(n * H) && dw.make(n * H * W) && lse2.make(n * x.c.Hq) && keys.make(x.width);
        }
    };
    // Lane-wise sums of a query over its keys: maximum score, softmax sum, and the sums of p, p log p and p * score.
    struct Sums {
        vf top, soft, mass, own, cross;
    };
    // Queries s0 .. s0 + n - 1 over m keys: those of a list, or `from`, `from` + 1, ...
    struct Block {
        int64_t b, s0, n, from, m;
        const int32_t *keys;

        int64_t key(int64_t j) const { return keys ? keys[j] : from + j; }
    };

    int64_t low(int64_t b, int64_t s) const { return most(c.low[b * c.Tq + s], 0); }
    int64_t high(int64_t b, int64_t s) const { return least<int64_t>(c.high[b * c.Tq + s], c.Tk); }
    bool real(int64_t b, int64_t key) const { return !c.keep || c.keep[b * c.Tk + key]; }
    static uint64_t between(int64_t low, int64_t high) {  // bits low .. high - 1 of 64
        low = most<int64_t>(low, 0);
        if (low >= KEYS || high <= low) return 0;
        return ~0ull << low & (high >= KEYS ? ~0ull : (1ull << high) - 1);
    }

    Block block(int64_t b, int64_t number, Desk &w) const {
        const int64_t s0 = number * size;
        Block x = {b, s0, least(size, c.Tq - s0), 0, 0, nullptr};
        if (c.index) {
            const int32_t *given = c.index + (b * c.Tq + s0) * c.n;
            int32_t *keys = w.keys.p;
            for (int64_t j = 0; j < c.n; j++)
                if (given[j] >= low(b, s0) && given[j] < high(b, s0) && real(b, given[j])) keys[x.m++] = given[j];
            if (!std::is_sorted(keys, keys + x.m)) std::sort(keys, keys + x.m);
            x.m = std::unique(keys, keys + x.m) - keys;
            x.keys = keys;
            return x;
        }
        int64_t from = c.Tk, to = 0;
        for (int64_t s = s0; s < s0 + x.n; s++)
            if (low(b, s) < high(b, s)) from = least(from, low(b, s)), to = most(to, high(b, s));
        x.from = round_down(from, KEYS);
        x.m = most<int64_t>(to - x.from, 0);
        return x;
    }
    // Bit masks of the 64 keys from the j-th on: seen[i] by query i; returns their union.
    uint64_t look(const Block &x, int64_t j, uint64_t *seen) const {
        uint64_t some = 0, keys = between(0, x.m - j);
        if (!x.keys && c.keep)
            for (uint64_t left = keys; left; left &= left - 1)
                if (!real(x.b, x.from + j + __builtin_ctzll(left))) keys &= ~(left & -left);
        for (int64_t i = 0; i < x.n; i++) {
            seen[i] = keys;
            if (!x.keys) seen[i] &= between(low(x.b, x.s0 + i) - x.from - j, high(x.b, x.s0 + i) - x.from - j);
            some |= seen[i];
        }
        return some;
    }

    // Loads 64 keys of a head as rows and as columns; zeros for keys that no query sees.
    void fetch(const Block &x, int64_t j, uint64_t some, const SfView &k, int64_t h, int32_t dtype, int64_t n, int64_t wide,
               Desk &w) const {
        for (int64_t i = 0; i < KEYS; i++) {
            float *to = w.rows + i * wide;
            const int64_t here = some >> i & 1 ? n : 0;
            if (here) read_row(k, row_of(k, x.b, h, x.key(j + i), dtype), dtype, n, to);
            memset(to + here, 0, (wide - here) * sizeof *to);
        }
        for (int64_t i = 0; i < KEYS; i += GRID)
            for (int64_t d = 0; d < wide; d += GRID)
                transpose16(w.rows + i * wide + d, wide, w.columns + d * KEYS + i, KEYS);
    }
    void multiply(int64_t rows, int64_t n, int64_t wide, const float *q, Desk &w) const {
        gemm_f32(rows, KEYS, n, q, wide, 1, w.columns.p, KEYS, w.products.p, KEYS, SET);
    }

    void load_queries(const Block &x, Desk &w) const {
        auto copy = [&](const SfView &q, int64_t h, int64_t s, int32_t dtype, int64_t n, int64_t wide, float *to) {
            read_row(q, row_of(q, x.b, h, s, dtype), dtype, n, to);
            memset(to + n, 0, (wide - n) * sizeof *to);
        };
        for (int64_t i = 0; i < x.n; i++)
            for (int64_t h = 0; h < c.H; h++) {
                copy(c.q_index, h, x.s0 + i, c.index_dtype, c.D, D, w.q + (i * c.H + h) * D);
                w.weights[i * c.H + h] = c.weights[(x.b * c.Tq + x.s0 + i) * c.H + h] * c.index_scale;
            }
        for (int64_t h = 0; h < c.Hq; h++)
            for (int64_t i = 0; i < x.n; i++) {
                copy(c.q, h, x.s0 + i, c.dtype, c.Dm, Dm, w.main_q + (h * x.n + i) * Dm);
                const float lse = c.lse[(x.b * c.Hq + h) * c.Tq + x.s0 + i];
                w.lse2[h * x.n + i] = lse == -INF ? INF : lse * LOG2E;  // a head that saw nothing counts nothing
            }
        memset(w.dq.p, 0, x.n * c.H * D * sizeof(float));
        memset(w.dw.p, 0, x.n * c.H * W * sizeof(float));
    }

    // Computes p of 64 keys, not yet normalised.
    void attend(const Block &x, int64_t j, uint64_t some, Desk &w) const {
        const float inner = c.softcap > 0 ? c.scale / c.softcap : c.scale * LOG2E, outer = c.softcap * LOG2E;
        for (int64_t i = 0; i < x.n; i++) memset(w.p + i * width + j, 0, KEYS * sizeof(float));
        for (int64_t g = 0; g < c.Hkv; g++) {
            fetch(x, j, some, c.k, g, c.dtype, c.Dm, Dm, w);
            multiply(group * x.n, c.Dm, Dm, w.main_q + g * group * x.n * Dm, w);
            for (int64_t r = 0; r < group * x.n; r++) {
                float *p = w.p + r % x.n * width + j;
                const float *s = w.products + r * KEYS;
                const vf lse2 = set1(w.lse2[g * group * x.n + r]);
                for (int i = 0; i < KEYS; i += W) {
                    vf y = load(s + i) * inner;
                    if (c.softcap > 0) y = tanhv(y) * outer;
                    store(p + i, load(p + i) + exp2v<true>(y - lse2));
                }
            }
        }
    }
    // Computes the indexer's scores of 64 keys.
    void score(const Block &x, int64_t j, uint64_t some, Desk &w) const {
        fetch(x, j, some, c.k_index, 0, c.index_dtype, c.D, D, w);
        multiply(x.n * c.H, c.D, D, w.q.p, w);
        for (int64_t i = 0; i < x.n; i++)
            for (int l = 0; l < KEYS; l += W) {
                vf sum = {};
                for (int64_t h = 0; h < c.H; h++)
                    sum += w.weights[i * c.H + h] * vmax(set1(0.f), load(w.products + (i * c.H + h) * KEYS + l));
                store(w.score + i * width + j + l, sum);
            }
    }
    void sum_up(uint64_t seen, const float *score, const float *p, Sums &x) const {
        for (int l = 0; l < KEYS; l += W) {
            vf s = pick(seen >> l, load(score + l), set1(-INF)), y = pick(seen >> l, load(p + l), set1(0.f));
            vf top = vmax(x.top, s);
            x.soft = x.soft * exp2v<true>((x.top - top) * LOG2E) + exp2v<true>((s - top) * LOG2E);
            x.top = top;
            x.mass += y;
            x.own += y * logv(vmax(y, set1(1e-37f)));
            x.cross += y * pick(seen >> l, s, set1(0.f));
        }
    }
    // Loss of a query; also the lse of its scores and the sum of its p.
    static float finish(const Sums &x, float &lse, float &mass) {
        float top = -INF;
        double soft = 0, own = 0, cross = 0, all = 0;
        for (int i = 0; i < W; i++) top = most(top, (float)x.top[i]);
        for (int i = 0; i < W; i++) {
            soft += (double)x.soft[i] * exp((double)x.top[i] - top);
            own += x.own[i];
            cross += x.cross[i];
            all += x.mass[i];
        }
        const double log_soft = top + log(soft);
        lse = (float)log_soft;
        mass = (float)all;
        return all > 0 ? (float)((own - cross) / all - log(all) + log_soft) : all == 0 ? 0.f : (float)all;  // or NaN
    }
    // Turns the products into dloss / dproduct, from which dq and dk follow by products with k and q; adds up dw.
    void slope(int64_t i, int64_t j, uint64_t seen, float lse, float mass, Desk &w) const {
        const float part = 1 / most(mass, 1.2e-38f);
        vf of_score[KEYS / W];
        for (int l = 0; l < KEYS; l += W) {
            vf soft = exp2v<true>((load(w.score + i * width + j + l) - lse) * LOG2E);
            of_score[l / W] = pick(seen >> l, soft - load(w.p + i * width + j + l) * part, set1(0.f));
        }
        for (int64_t h = i * c.H; h < (i + 1) * c.H; h++) {
            vf sum = load(w.dw + h * W);
            for (int l = 0; l < KEYS; l += W) {
                float *at = w.products + h * KEYS + l;
                const vf y = pick(seen >> l, load(at), set1(0.f));
                sum += of_score[l / W] * vmax(set1(0.f), y);
                store(at, y > 0.f ? of_score[l / W] * w.weights[h] : set1(0.f));
            }
            store(w.dw + h * W, sum);
        }
    }

    void run_block(const Block &x, Desk &w, float *dk) const {
        uint64_t seen[QUERIES];
        Sums sums[QUERIES];
        float lse[QUERIES], mass[QUERIES];
        for (int64_t i = 0; i < x.n; i++) sums[i] = Sums{set1(-3e38f), vf{}, vf{}, vf{}, vf{}};
        load_queries(x, w);
        int64_t made = -1;  // the keys whose products w.products holds
        for (int64_t j = 0; j < x.m; j += KEYS)
            if (uint64_t some = look(x, j, seen)) {
                attend(x, j, some, w);
                score(x, j, some, w);
                made = j;
                for (int64_t i = 0; i < x.n; i++) sum_up(seen[i], w.score + i * width + j, w.p + i * width + j, sums[i]);
            }
        for (int64_t i = 0; i < x.n; i++) c.loss[x.b * c.Tq + x.s0 + i] = finish(sums[i], lse[i], mass[i]);
        for (int64_t j = 0; j < x.m; j += KEYS)
            if (uint64_t some = look(x, j, seen)) {
                if (made != j) {
                    fetch(x, j, some, c.k_index, 0, c.index_dtype, c.D, D, w);
                    multiply(x.n * c.H, c.D, D, w.q.p, w);
                    made = j;
                }
                for (int64_t i = 0; i < x.n; i++) slope(i, j, seen[i], lse[i], mass[i], w);
                gemm_f32(x.n * c.H, D, KEYS, w.products.p, KEYS, 1, w.rows.p, D, w.dq.p, D, ADD);
                float *to = x.keys ? w.dk.p : dk + (x.from + j) * D;
                gemm_f32(KEYS, D, x.n * c.H, w.products.p, 1, KEYS, w.q.p, D, to, D, x.keys ? SET : ADD_FAR);
                for (uint64_t left = x.keys ? some : 0; left; left &= left - 1) {
                    const int64_t i = __builtin_ctzll(left);
                    float *row = dk + x.keys[j + i] * D;
                    for (int64_t d = 0; d < D; d += W) store(row + d, load(row + d) + load(to + i * D + d));
                }
            }
        const int64_t first = (x.b * c.Tq + x.s0) * c.H;
        for (int64_t r = 0; r < x.n * c.H; r++) {
            memcpy(c.dq + (first + r) * c.D, w.dq + r * D, c.D * sizeof(float));
            c.dw[first + r] = sum(load(w.dw + r * W)) * c.index_scale;
        }
    }

    // Blocks are dealt out to a number of shares that does not depend on the threads; so the sums do not either.
    int run(SfParallel parallel) {
        const int64_t shares = most<int64_t>(
            1, least(least((TASKS + c.B - 1) / c.B, blocks), HELD / most<int64_t>(c.B * k_rows * D, 1)));
        Buffer<float> dk;
        Buffer<char> room;
        struct Desks {
            Buffer<char> &room;
            int made = 0;
            ~Desks() { while (made > 0) ((Desk *)room.p)[--made].~Desk(); }
        } desks = {room};
        bool ok = dk.make(c.B * shares * k_rows * D) && room.make(c.threads * (int64_t)sizeof(Desk));
        for (; ok && desks.made < c.threads; desks.made++) ok = (new (room + desks.made * sizeof(Desk)) Desk())->make(*this);
        if (!ok) return 1;
        auto share = [&](int64_t i, int thread) {
            Desk &w = ((Desk *)room.p)[thread];
            float *own = dk + i * k_rows * D;
            memset(own, 0, k_rows * D * sizeof(float));
            for (int64_t number = i % shares; number < blocks; number += shares) run_block(block(i / shares, number, w), w, own);
        };
        auto gather = [&](int64_t i, int) {  // of a key, all shares
            const float *from = dk + (i / c.Tk * shares * k_rows + i % c.Tk) * D;
            float *to = c.dk + i * c.D;
            memcpy(to, from, c.D * sizeof(float));
            for (int64_t part = 1; part < shares; part++)
                for (int64_t d = 0; d < c.D; d++) to[d] += from[part * k_rows * D + d];
        };
        in_parallel(parallel, c.threads, c.B * shares, share);
        in_parallel(parallel, c.threads, c.B * c.Tk, gather);
        return 0;
    }
};

inline int indexer_loss(const SfIndexerLoss &c, SfParallel parallel) { return IndexerLoss{c}.run(parallel); }

}  // namespace
