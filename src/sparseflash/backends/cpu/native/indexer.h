// A learned indexer's choice: for each query the topk keys of its range [low, high) with the largest
//
//   score[s][t] = sum over h of weight[s][h] * max(0, q[h][s] . k[t]);   ties go to the lower key.
//
// Keys are columns, 64 at a time, and the heads of a group of queries are rows: the sum over heads runs down the rows, and
// a product leaves one line of 64 scores per query. Candidates above the query's bar are appended in the order of their
// keys; when the buffer is full, its topk best stay and the worst of these becomes the bar. So memory does not grow with
// the number of keys, and few keys pass once there is a bar.
//
// Scores are compared as integers in the order of floats; NaN ranks with -inf, below everything else.
#pragma once
#include "scratch.h"

namespace {

template <bool BF> struct Indexer {
    static constexpr int64_t KEYS = 64, QUERIES = 16;
    typedef Products<BF> P;
    typedef typename P::Item Item;
    static constexpr int64_t GRID = 16 * P::PAIR;       // products and transpositions need multiples of it, of rows and of D
    static constexpr int32_t NEVER = INT32_MIN, LOWEST = (int32_t)0x807fffff;  // NEVER: below all scores; LOWEST: -inf

    const SfIndexer &c;
    int64_t D = round_up(c.D, GRID), chunks = (c.Tk + KEYS - 1) / KEYS;
    int64_t group = most<int64_t>(1, KEYS / c.H);       // queries whose heads form the rows of one product
    int64_t room = round_up(most<int64_t>(2 * c.topk, 256), KEYS) + KEYS;
    Buffer<Item> columns = {};                          // K^T in chunks of 64 keys; bf16: in pairs along D
    Buffer<uint64_t> real = {};                         // bit mask per chunk: keys that may be chosen

    // The candidates of one query so far, in the order of keys; a new one must exceed `bar`.
    struct Best {
        int32_t *score, *key;
        int64_t n;
        int32_t bar;
    };
    struct Desk {
        Buffer<Item> rows;
        Buffer<float> products;
        Buffer<int32_t> held;
        Best best[QUERIES];
    };

    static int32_t ordered(int32_t x) { return x ^ (x >> 31 & INT32_MAX); }  // its own inverse
    static uint64_t between(int64_t low, int64_t high) {  // bits low .. high - 1 of 64
        if (low < 0) low = 0;
        if (low >= KEYS || high <= low) return 0;
        return ~0ull << low & (high >= KEYS ? ~0ull : (1ull << high) - 1);
    }
    uint64_t seen(int64_t b, int64_t chunk, int64_t low, int64_t high) const {
        return real[b * chunks + chunk] & between(low - chunk * KEYS, high - chunk * KEYS);
    }
    int64_t low(int64_t b, int64_t s) const { return most(c.low[b * c.Tq + s], 0); }
    int64_t high(int64_t b, int64_t s) const { return least<int64_t>(c.high[b * c.Tq + s], c.Tk); }

    // Packs chunk i of K, up to 64 rows and zeros for the rest, as columns.
    void pack(int64_t i, int) {
        const int64_t b = i / chunks, first = i % chunks * KEYS, n = least(KEYS, c.Tk - first);
        uint64_t &keys = real[i];
        keys = between(0, n);
        for (int64_t j = 0; c.keep && j < n; j++)
            if (!c.keep[b * c.Tk + first + j]) keys &= ~(1ull << j);
        Item *to = columns + i * KEYS * D;
        alignas(64) Item lines[16 * 256];
        for (int64_t j0 = 0; j0 < KEYS; j0 += 16) {
            for (int64_t j = 0; j < 16; j++) {
                const int64_t t = j0 + j;
                P::copy(c.k, keys >> t & 1 ? row_of(c.k, b, 0, first + t, c.dtype) : nullptr, c.dtype, c.D, lines + j * D, D);
            }
            for (int64_t d = 0; d < D; d += GRID) transpose16(lines + d, D / P::PAIR, to + d * KEYS + P::PAIR * j0, KEYS);
        }
    }
    void multiply(int64_t rows, const Item *a, const Item *b, float *out) const {
        P::multiply(round_up(rows, P::GRAIN), KEYS, round_up(c.D, P::GRAIN), a, D, 1, b, KEYS, out, KEYS, SET);
    }
    // Folds the products of a query's heads into 64 scores, as ordered integers.
    void fold(const float *products, const float *weight, int32_t *scores) const {
        for (int64_t j = 0; j < KEYS; j += COLUMNS * W) {
            vf sum[COLUMNS] = {};
            for (int64_t h = 0; h < c.H; h++)
#pragma GCC unroll 4
                for (int i = 0; i < COLUMNS; i++)
                    sum[i] += weight[h] * vmax(set1(0.f), load(products + h * KEYS + j + i * W));
#pragma GCC unroll 4
            for (int i = 0; i < COLUMNS; i++) {
                vi x = (vi)sum[i];
                x ^= (x >> 31) & INT32_MAX;
                x = sum[i] == sum[i] ? x : (vi){} + LOWEST;
                memcpy(scores + j + i * W, &x, sizeof x);
            }
        }
    }

    // The k-th largest of n scores, by bisection over bits. `score` has room for 64 more.
    static int32_t reached_by(int32_t *score, int64_t n, int64_t k) {
        for (int64_t i = n; i < round_up(n, KEYS); i++) score[i] = NEVER;
        int32_t found = NEVER;
        for (int bit = 31; bit >= 0; bit--) {
            const int32_t higher = (int32_t)((uint32_t)found + (1u << bit));
            int64_t many = 0;
            for (int64_t i = 0; i < n; i += KEYS) many += __builtin_popcountll(lanes<GE>(score + i, higher));
            if (many >= k) found = higher;
        }
        return found;
    }
    void shrink(Best &x) const {
        if (x.n <= c.topk) return;
        const int32_t worst = reached_by(x.score, x.n, c.topk);
        int64_t above = 0, n = 0;
        for (int64_t i = 0; i < x.n; i++) above += x.score[i] > worst;
        int64_t ties = c.topk - above;
        for (int64_t i = 0; i < x.n; i++) {
            const bool tie = x.score[i] == worst && ties > 0, stays = x.score[i] > worst || tie;
            x.score[n] = x.score[i];
            x.key[n] = x.key[i];
            n += stays;
            ties -= tie;
        }
        x.n = n;
        x.bar = worst;
    }
    void add(Best &x, uint64_t keys, int64_t first, const int32_t *scores) const {
        keys &= lanes<GT>(scores, x.bar);
        if (!keys) return;
        if (x.n + KEYS > room) {
            shrink(x);
            keys &= lanes<GT>(scores, x.bar);
        }
        for (; keys; keys &= keys - 1, x.n++) {
            const int j = __builtin_ctzll(keys);
            x.score[x.n] = scores[j];
            x.key[x.n] = (int32_t)(first + j);
        }
    }
    void write(int64_t b, int64_t s, Best &x) const {
        shrink(x);
        const int64_t at = (b * c.Tq + s) * c.topk;
        for (int64_t i = 0; i < c.topk; i++) c.index[at + i] = i < x.n ? x.key[i] : -1;
        for (int64_t i = 0; c.scores && i < c.topk; i++) {
            const int32_t bits = ordered(i < x.n ? x.score[i] : LOWEST);
            memcpy(c.scores + at + i, &bits, 4);
        }
    }

    // Fast path: queries that see at most topk keys choose all of them without scores. False if some query sees more.
    bool all_fit(int64_t b, int64_t s0, int64_t n, Best *best) const {
        if (c.scores) return false;
        for (int64_t s = s0; s < s0 + n; s++) {
            int64_t many = 0;
            for (int64_t i = low(b, s) / KEYS; i * KEYS < high(b, s); i++)
                many += __builtin_popcountll(seen(b, i, low(b, s), high(b, s)));
            if (many > c.topk) return false;
        }
        for (int64_t s = s0; s < s0 + n; s++)
            for (int64_t i = low(b, s) / KEYS; i * KEYS < high(b, s); i++)
                for (uint64_t keys = seen(b, i, low(b, s), high(b, s)); keys; keys &= keys - 1)
                    best[s - s0].key[best[s - s0].n++] = (int32_t)(i * KEYS + __builtin_ctzll(keys));
        return true;
    }

    void choose(int64_t b, int64_t s0, int64_t n, Desk &desk) const {
        for (int64_t i = 0; i < n; i++) {
            int32_t *held = desk.held + i * 2 * room;
            desk.best[i] = {held, held + room, 0, NEVER};
        }
        if (!all_fit(b, s0, n, desk.best)) {
            int64_t from = c.Tk, to = 0;
            for (int64_t i = 0; i < n; i++) {
                from = least(from, low(b, s0 + i));
                to = most(to, high(b, s0 + i));
                for (int64_t h = 0; h < c.H; h++)
                    P::copy(c.q, row_of(c.q, b, h, s0 + i, c.dtype), c.dtype, c.D, desk.rows + (i * c.H + h) * D, D);
            }
            memset(desk.rows + n * c.H * D, 0, GRID * D * sizeof(Item));
            alignas(64) int32_t scores[KEYS];
            for (int64_t chunk = from / KEYS; chunk * KEYS < to; chunk++)
                for (int64_t i = 0; i < n; i += group) {
                    const int64_t m = least(group, n - i);
                    multiply(m * c.H, desk.rows + i * c.H * D, columns + (b * chunks + chunk) * KEYS * D, desk.products + 0);
                    for (int64_t j = i; j < i + m; j++) {
                        const uint64_t keys = seen(b, chunk, low(b, s0 + j), high(b, s0 + j));
                        if (!keys) continue;
                        fold(desk.products + (j - i) * c.H * KEYS, c.weights + (b * c.Tq + s0 + j) * c.H, scores);
                        add(desk.best[j], keys, chunk * KEYS, scores);
                    }
                }
        }
        for (int64_t i = 0; i < n; i++) write(b, s0 + i, desk.best[i]);
    }

    int run(SfParallel parallel) {
        Rooms<Desk> desks;
        const bool ok = columns.make(c.B * chunks * KEYS * D) && real.make(c.B * chunks) && desks.make(c.threads, [&](Desk &desk) {
            return desk.rows.make((QUERIES * c.H + GRID) * D) && desk.held.make(QUERIES * 2 * room) &&
                   desk.products.make(round_up(group * c.H, GRID) * KEYS);
        });
        if (!ok) return 1;
        auto packing = [&](int64_t i, int thread) { pack(i, thread); };
        in_parallel(parallel, c.threads, c.B * chunks, packing);
        const int64_t blocks = (c.Tq + QUERIES - 1) / QUERIES;
        auto choosing = [&](int64_t i, int thread) {  // last queries first: the costliest under causality
            P::prepare_thread();
            const int64_t s0 = (blocks - 1 - i / c.B) * QUERIES;
            choose(i % c.B, s0, least(QUERIES, c.Tq - s0), desks[thread]);
        };
        in_parallel(parallel, c.threads, c.B * blocks, choosing);
        return 0;
    }
};

template <bool BF> int run_indexer(const SfIndexer &c, SfParallel parallel) { return Indexer<BF>{c}.run(parallel); }

}  // namespace
