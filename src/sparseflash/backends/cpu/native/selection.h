// What `selection` estimates: weights of rows on columns by tile and unit; the softmax of some rows, by key and by distance.
//
// Keys are columns, packed in chunks of 64, and the scores of a row are contiguous: sums over rows stay in their lanes, and
// only a row's own sums are reduced across lanes, once. Scores are in units of log 2.
#pragma once
#include <algorithm>
#include "indexer.h"

namespace {

// Columns [B,H,m,E] packed for products: E^T in chunks of 64, bf16 in pairs along E; zeros for columns that are not real.
template <bool BF> struct Columns {
    typedef Products<BF> P;
    typedef typename P::Item Item;
    static constexpr int64_t WIDE = 64, GRID = 16 * P::PAIR;

    SfView view;
    int32_t dtype;
    int64_t heads, m, E, padded, chunks;
    Buffer<Item> items;
    Buffer<uint64_t> real;  // [B, chunks]: bit mask of the real columns

    int make(const SfView &v, int32_t dtype_, int64_t B, int64_t heads_, int64_t m_, int64_t E_, const uint8_t *keep,
             int threads, SfParallel parallel) {
        view = v;
        dtype = dtype_;
        heads = heads_;
        m = m_;
        E = E_;
        padded = round_up(E, GRID);
        chunks = (m + WIDE - 1) / WIDE;
        Buffer<Item> lines;
        if (!items.make(B * heads * chunks * WIDE * padded) || !real.make(B * chunks) || !lines.make(threads * 16 * padded)) return 1;
        for (int64_t i = 0; i < B * chunks; i++) {
            const int64_t b = i / chunks, first = i % chunks * WIDE, n = least(WIDE, m - first);
            uint64_t bits = Indexer<BF>::between(0, n);
            for (int64_t j = 0; keep && j < n; j++)
                if (!keep[b * m + first + j]) bits &= ~(1ull << j);
            real[i] = bits;
        }
        auto pack = [&](int64_t i, int thread) {
            const int64_t chunk = i % chunks, slot = i / chunks, b = slot / heads, h = slot % heads;
            const uint64_t there = real[b * chunks + chunk];
            Item *to = items + i * WIDE * padded, *line = lines + thread * 16 * padded;
            for (int64_t j0 = 0; j0 < WIDE; j0 += 16) {
                for (int64_t j = 0; j < 16; j++) {
                    const int64_t t = j0 + j;
                    copy(view, there >> t & 1 ? row_of(view, b, h, chunk * WIDE + t, dtype) : nullptr, line + j * padded);
                }
                for (int64_t d = 0; d < padded; d += GRID)
                    transpose16(line + d, padded / P::PAIR, to + d * WIDE + P::PAIR * j0, WIDE);
            }
        };
        in_parallel(parallel, threads, B * heads * chunks, pack);
        return 0;
    }
    // Copies a row of E items, padded with zeros; null: all zeros.
    void copy(const SfView &v, const char *from, Item *to) const {
        P::copy(v, from, dtype, E, to, padded);
    }
    static int64_t whole(int64_t rows) { return round_up(rows, P::GRAIN); }
    // Products of rows with the columns of a chunk. Long rows go in pieces, so that the columns' part stays in a near cache.
    void multiply(int64_t rows, const Item *a, int64_t slot, int64_t chunk, float *out, int64_t ld) const {
        const Item *b = items + (slot * chunks + chunk) * WIDE * padded;
        constexpr int64_t DEPTH = 128 * P::PAIR;
        for (int64_t d = 0; d < padded; d += DEPTH) {
            const int64_t n = least(DEPTH, padded - d);
            P::multiply(whole(rows), WIDE, n, a + d, padded, 1, b + d * WIDE, WIDE, out, ld, d ? ADD : SET);
        }
    }
    // Bit mask of a chunk's columns that a row sees, if it sees the columns below `limit`.
    uint64_t seen(int64_t b, int64_t chunk, int64_t limit) const {
        return real[b * chunks + chunk] & Indexer<BF>::between(0, limit - chunk * WIDE);
    }
};

// Turns a product into a score (scaled, softcapped, in units of log 2).
struct Score {
    float factor, softcap;
    Score(float scale, float softcap_) : factor(softcap_ ? scale : scale * LOG2E), softcap(softcap_) {}
    vf operator()(vf x) const {
        x *= factor;
        return softcap ? tanhv(x / softcap) * (softcap * LOG2E) : x;
    }
    // Turns 64 products into scores, -inf for unseen columns; returns the lane-wise maximum of them and `top`.
    vf apply(float *s, uint64_t seen, vf top) const {
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += W) {
            vf x = (*this)(load(s + i));
            if (seen != ~0ull) x = pick(seen >> i, x, set1(-INF));
            store(s + i, x);
            top = vmax(x, top);
        }
        return top;
    }
};

inline float largest(vf x) {
    float top = x[0];
    for (int i = 1; i < W; i++) top = most(top, (float)x[i]);
    return top;
}
constexpr float LOW = -1e30f;  // below every real score, and finite: -inf - LOW is -inf, not NaN

// ---------------------------------------------------------------- masses of tiles and units

template <bool BF> struct Mass {
    static constexpr int64_t BLOCK = 64;  // rows whose products are held
    typedef typename Columns<BF>::Item Item;

    const SfMass &c;
    Columns<BF> columns = {};
    int64_t wide = 0, R = 0, C = 0, per = 0;  // columns in whole chunks; tiles; units; tiles per task
    struct Desk {
        Buffer<Item> rows;
        Buffer<float> s, sum;
        float top[BLOCK];
    };

    // Adds a row's weights, times factor, to the sums of its tile (peak: takes the maximum).
    void take(const float *p, int64_t n, float factor, float *sum) const {
        for (int64_t j = 0; j < n; j += W) {
            vf x = load(p + j) * factor, y = load(sum + j);
            store(sum + j, c.peak ? vmax(x, y) : x + y);
        }
    }
    static void rescale(float *sum, int64_t n, float factor) {
        for (int64_t j = 0; j < n; j += W) store(sum + j, load(sum + j) * factor);
    }

    // Adds rows first .. first + n - 1 to the sums of their tiles; desk.sum begins at tile `tile`.
    void block(int64_t b, int64_t h, int64_t tile, int64_t first, int64_t n, Desk &desk) const {
        const int32_t *sees = c.sees + b * c.n + first;
        const float *level = c.level ? c.level + (b * c.Hq + h) * c.n + first : nullptr;
        const int64_t slot = b * c.Hkv + h / (c.Hq / c.Hkv);
        const Score score(c.scale, c.softcap);
        int64_t limit[BLOCK], end = 0;
        for (int64_t i = 0; i < n; i++) {
            limit[i] = most<int64_t>(0, least<int64_t>(sees[i], c.m));
            if (level && level[i] == -INF) limit[i] = 0;
            end = most(end, limit[i]);
            columns.copy(c.rows, limit[i] ? row_of(c.rows, b, h, first + i, c.dtype) : nullptr, desk.rows + i * columns.padded);
        }
        if (!end) return;
        memset(desk.rows + n * columns.padded, 0, (columns.whole(n) - n) * columns.padded * sizeof(Item));
        const int64_t chunks = (end + 63) / 64;
        for (int64_t x = 0; x < chunks; x++) columns.multiply(n, desk.rows + 0, slot, x, desk.s + x * 64, wide);
        for (int64_t i = 0; i < n; i++) {
            const int64_t own = (limit[i] + 63) / 64, at = (first + i) / c.tile - tile;
            float *s = desk.s + i * wide, *sum = desk.sum + at * wide;
            vf top = set1(LOW);
            for (int64_t x = 0; x < own; x++) top = score.apply(s + x * 64, columns.seen(b, x, limit[i]), top);
            float m = largest(top), factor = 1;
            if (!(m > LOW)) continue;
            if (c.joint) {
                if (m > desk.top[at]) {
                    rescale(sum, wide, (float)exp2v<true>(set1(desk.top[at] - m))[0]);
                    desk.top[at] = m;
                }
                m = desk.top[at];
            } else if (level) {
                m = level[i] * LOG2E;
            }
            vf total = {};
            for (int64_t j = 0; j < own * 64; j += W) {
                vf p = exp2v<true>(load(s + j) - m);
                store(s + j, p);
                total += p;
            }
            if (!c.joint && !level) factor = 1 / ::sum(total);
            take(s, own * 64, factor, sum);
        }
    }
    void write(const float *sum, float *out) const {
        float total = 0;
        for (int64_t u = 0; u < C; u++) {
            float x = 0;
            for (int64_t j = u * c.unit; j < least(c.m, (u + 1) * c.unit); j++) x = c.peak ? most(x, sum[j]) : x + sum[j];
            out[u] = x;
            total += x;
        }
        if (total != 0) for (int64_t u = 0; u < C; u++) out[u] /= total;
    }
    void tiles(int64_t b, int64_t h, int64_t tile, Desk &desk) const {
        const int64_t many = least(per, R - tile), first = tile * c.tile, last = least(c.n, (tile + many) * c.tile);
        memset(desk.sum.p, 0, many * wide * sizeof(float));
        for (int64_t i = 0; i < many; i++) desk.top[i] = LOW;
        for (int64_t row = first; row < last; row += BLOCK) block(b, h, tile, row, least(BLOCK, last - row), desk);
        for (int64_t i = 0; i < many; i++) write(desk.sum + i * wide, c.out + ((b * c.Hq + h) * R + tile + i) * C);
    }

    int run(SfParallel parallel) {
        wide = round_up(c.m, 64);
        R = (c.n + c.tile - 1) / c.tile;
        C = (c.m + c.unit - 1) / c.unit;
        per = most<int64_t>(1, BLOCK / c.tile);
        if (columns.make(c.columns, c.dtype, c.B, c.Hkv, c.m, c.E, c.keep, c.threads, parallel)) return 1;
        Rooms<Desk> desks;
        bool ok = desks.make(c.threads, [&](Desk &desk) {
            return desk.rows.make(columns.whole(BLOCK) * columns.padded) && desk.s.make(BLOCK * wide) && desk.sum.make(per * wide);
        });
        if (!ok) return 1;
        const int64_t parts = (R + per - 1) / per, heads = c.B * c.Hq;
        auto task = [&](int64_t i, int thread) {  // last tiles first: the costliest under causality
            Products<BF>::prepare_thread();
            const int64_t slot = i % heads;
            tiles(slot / c.Hq, slot % c.Hq, (parts - 1 - i / heads) * per, desks[thread]);
        };
        in_parallel(parallel, c.threads, heads * parts, task);
        return 0;
    }
};

// ---------------------------------------------------------------- the softmax of some rows

template <bool BF> struct Probe {
    static constexpr int64_t BLOCK = 64, PIECE = 256;  // rows, and keys, that are multiplied at a time
    static constexpr int64_t HELD = 16384;  // up to so many keys, all scores of a block of rows are held; with more, computed twice
    typedef typename Columns<BF>::Item Item;

    const SfProbe &c;
    Columns<BF> columns = {};
    int64_t stride = PIECE;  // of a row of scores
    struct Desk {
        Buffer<Item> rows;
        Buffer<float> s;
        alignas(64) float top[BLOCK * W], total[BLOCK * W];
        int64_t limit[BLOCK];
    };

    bool held() const { return c.Tk <= HELD; }
    // Scores of a piece of keys; the next row is `stride` further.
    float *piece(Desk &desk, int64_t first) const { return desk.s + (held() ? first : 0); }
    // Products of n rows with a piece of keys, up to key `end`.
    void products(int64_t slot, int64_t n, int64_t first, int64_t end, Desk &desk) const {
        for (int64_t x = first; x < least(first + PIECE, end); x += 64)
            columns.multiply(n, desk.rows + 0, slot, x / 64, piece(desk, first) + x - first, stride);
    }
    int64_t piece_of(int64_t limit, int64_t first) const {  // keys of the piece that a row may see, in whole chunks
        return limit <= first ? 0 : least(PIECE, round_up(limit - first, 64));
    }
    // Adds n weights of keys from `key` on by distance; `into` runs from the farthest distance to the nearest.
    void by_distance(const float *p, int64_t n, int64_t key, int64_t at, float *into) const {
        const int64_t to = key - at + c.width - 1 - c.before;
        if (to >= 0 && to + n <= c.width)
            for (int64_t j = 0; j < n; j += W) store(into + to + j, load(into + to + j) + load(p + j));
        else
            for (int64_t j = most<int64_t>(0, -to); j < least(n, c.width - to); j++) into[to + j] += p[j];
    }

    void rows(int64_t b, int64_t h, int64_t first_row, int64_t n, Desk &desk) const {
        const int64_t head = b * c.Hq + h, slot = b * c.Hkv + h / (c.Hq / c.Hkv);
        const Score score(c.scale, c.softcap);
        int64_t end = 0;
        for (int64_t i = 0; i < n; i++) {
            desk.limit[i] = most<int64_t>(0, least<int64_t>(c.sees[b * c.n + first_row + i], c.Tk));
            end = most(end, desk.limit[i]);
            const char *from = desk.limit[i] ? row_of(c.q, b, h, first_row + i, c.dtype) : nullptr;
            columns.copy(c.q, from, desk.rows + i * columns.padded);
            store(desk.top + i * W, set1(LOW));
            store(desk.total + i * W, set1(0.f));
        }
        memset(desk.rows + n * columns.padded, 0, (columns.whole(n) - n) * columns.padded * sizeof(Item));
        for (int64_t first = 0; first < end; first += PIECE) {  // pass 1: an online softmax in each lane
            products(slot, n, first, end, desk);
            for (int64_t i = 0; i < n; i++) {
                const int64_t many = piece_of(desk.limit[i], first);
                float *s = piece(desk, first) + i * stride;
                const vf old = load(desk.top + i * W);
                vf top = old, total = load(desk.total + i * W);
                for (int64_t j = 0; j < many; j += 64)
                    top = score.apply(s + j, columns.seen(b, (first + j) / 64, desk.limit[i]), top);
                total *= exp2v<true>(old - top);
                for (int64_t j = 0; j < many; j += W) total += exp2v<true>(load(s + j) - top);
                store(desk.top + i * W, top);
                store(desk.total + i * W, total);
            }
        }
        float top[BLOCK], factor[BLOCK];
        for (int64_t i = 0; i < n; i++) {
            const vf lanes = load(desk.top + i * W);
            top[i] = largest(lanes);
            const float total = sum(load(desk.total + i * W) * exp2v<true>(lanes - top[i]));
            const bool some = top[i] > LOW;
            factor[i] = some ? 1 / total : 0;
            c.lse[head * c.n + first_row + i] = some ? top[i] * LN2 + (float)logv(set1(total))[0] : -INF;
            if (!some) desk.limit[i] = 0;
        }
        float *keys = c.keys + head * c.Tk, *distances = c.distances + head * c.width;
        for (int64_t first = 0; first < end; first += PIECE) {
            if (!held()) products(slot, n, first, end, desk);
            for (int64_t i = 0; i < n; i++) {
                const int64_t many = piece_of(desk.limit[i], first);
                float *s = piece(desk, first) + i * stride;
                for (int64_t j = 0; !held() && j < many; j += 64) score.apply(s + j, columns.seen(b, (first + j) / 64, desk.limit[i]), set1(LOW));
                for (int64_t j = 0; j < many; j += W) store(s + j, exp2v<true>(load(s + j) - top[i]) * factor[i]);
                for (int64_t j = many; j < PIECE; j += W) store(s + j, set1(0.f));
                if (many) by_distance(s, many, first, c.at[b * c.n + first_row + i], distances);
            }
            for (int64_t j = 0; j < least(PIECE, c.Tk - first); j += W) {
                vf x = {};
                for (int64_t i = 0; i < n; i++) x += load(piece(desk, first) + i * stride + j);
                const int64_t left = c.Tk - first - j;
                if (left >= W) store(keys + first + j, load(keys + first + j) + x);
                else for (int64_t l = 0; l < left; l++) keys[first + j + l] += x[l];
            }
        }
    }

    int run(SfParallel parallel) {
        if (columns.make(c.k, c.dtype, c.B, c.Hkv, c.Tk, c.D, c.keep, c.threads, parallel)) return 1;
        stride = held() ? round_up(c.Tk, PIECE) + 16 : PIECE;  // a line more: rows a power of two apart would share few cache sets
        Rooms<Desk> desks;
        bool ok = desks.make(c.threads, [&](Desk &desk) {
            return desk.rows.make(columns.whole(BLOCK) * columns.padded) && desk.s.make(columns.whole(BLOCK) * stride);
        });
        if (!ok) return 1;
        auto task = [&](int64_t i, int thread) {
            Products<BF>::prepare_thread();
            memset(c.keys + i * c.Tk, 0, c.Tk * sizeof(float));
            memset(c.distances + i * c.width, 0, c.width * sizeof(float));
            for (int64_t row = 0; row < c.n; row += BLOCK) rows(i / c.Hq, i % c.Hq, row, least(BLOCK, c.n - row), desks[thread]);
            std::reverse(c.distances + i * c.width, c.distances + (i + 1) * c.width);
        };
        in_parallel(parallel, c.threads, c.B * c.Hq, task);
        return 0;
    }
};

template <bool BF> int run_mass(const SfMass &c, SfParallel parallel) { return Mass<BF>{c}.run(parallel); }
template <bool BF> int run_probe(const SfProbe &c, SfParallel parallel) { return Probe<BF>{c}.run(parallel); }

}  // namespace
