// Products of few query rows with many keys, whose rows are read where they lie.
//
// Scores: a vector is W / 4 quads of 32-bit lanes. Each quad belongs to one query; four items of a key (eight of bf16) are
// broadcast to all quads. So a key is read once for a pack of W / 4 queries, and only four lanes, not W, are left to add up:
// the sums of four keys become one vector, quad i of it the scores of query i.
// Weighted sums: lanes run along the head dimension. Example, W = 16: a pack has 4 queries; lane 4i + c of a vector of scores is
// query i with key c of four.
#pragma once
#include <type_traits>
#include "pack.h"
#include "records.h"

namespace {

constexpr int PACK = W / 4;         // queries of one vector of scores
constexpr int PACKS = COLUMNS;      // packs at a time, with four accumulators each
constexpr int STRIP = COLUMNS * W;  // rows of O are padded to a multiple of it
constexpr int DEEP = COLUMNS == 4 ? 8 : 4;  // rows of a weighted sum at a time: the more rows, the fewer columns in registers
constexpr int SPLIT = Products<SF_HAS_BF16>::SPLIT;  // keys of a piece

// Addresses of rows of K or V. Four rows are read together, each from another quarter of the piece: memory is faster with
// several streams.
struct KeyRows {
    const char *const *row;
    int64_t quarter;  // rows of a quarter

    // Row i of quarter c.
    const char *operator()(int64_t c, int64_t i) const { return row[c * quarter + i]; }
    KeyRows from(int64_t j) const { return {row + j / 4, quarter}; }
};

// Rows to prefetch while a product runs: four rows with every four keys. Where several products go over the same keys, each
// prefetches its share of the lines, so that requests are even. Into the second cache level: the first takes few requests at a
// time, and the core would wait.
struct Ahead {
    const char *const *rows[4];
    int64_t from[4], to[4];  // bytes of each of the four rows

    Ahead() {}
    Ahead(const KeyRows &k, int lines, int share, int shares) {
        for (int i = 0; i < 4; i++) {
            rows[i] = k.row + i * k.quarter;
            from[i] = 64 * most(4 * lines * share / shares - i * lines, 0);
            to[i] = 64 * least(4 * lines * (share + 1) / shares - i * lines, lines);
        }
    }
    // (Inlined by force: GCC takes a function that only prefetches for one without effect, and drops it.)
    __attribute__((always_inline)) void ask(int64_t i) const {
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            if (from[c] >= to[c]) continue;  // nothing is read, not even the address
            const char *row = rows[c][i];
            for (int64_t x = from[c]; x < to[c]; x += 64) __builtin_prefetch(row + x, 0, 2);
        }
    }
};

// Offset of the score of row i with the j-th key of a piece: [pack][key / 4][row of the pack][key % 4]. Weights replace the
// scores of their pack. Example, W 16, SPLIT 128: row 5, key 6 lies at 4 * 128 + 4 * 4 + 1 * 4 + 2 = 534.
template <class Item = float> constexpr int64_t place(int64_t i, int64_t j) {
    return i / PACK * PACK * SPLIT * (sizeof(float) / sizeof(Item)) + (j & ~(int64_t)3) * PACK + i % PACK * 4 + (j & 3);
}

// (`scores` and `weigh` are not inlined: inside other functions the compiler runs out of registers for addresses.)

// Scores of N packs of queries with four keys, whose rows have `quads` quads.
template <class T, int N>
inline __attribute__((always_inline)) void score_four(const typename T::Item *const *rows, int64_t quads,
                                                      const typename T::Item *q, float *s) {
    const int64_t ld = quads * T::QUAD * PACK;
    vf x[N][4] = {};
    for (int64_t i = 0; i < quads; i++) {
        vf y[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) y[c] = kept(quad(rows[c] + i * T::QUAD));
#pragma GCC unroll 4
        for (int p = 0; p < N; p++) {
            vf z = kept(load((const float *)(q + p * ld + i * T::QUAD * PACK)));
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) x[p][c] = T::dot(x[p][c], y[c], z);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < N; p++) store(s + place(p * PACK, 0), sum_quads(x[p][0], x[p][1], x[p][2], x[p][3]));
}

// Scores with n keys (a multiple of four), for each of `sides` heads, which lie `side` items apart in a row of K; the heads'
// queries and scores are `ldq` items and `lds` floats apart.
template <class T, int N, bool ALONE>
__attribute__((noinline)) void scores(const KeyRows &k, int n, int64_t sides, int64_t side, int64_t quads,
                                      const typename T::Item *q, int64_t ldq, float *s, int64_t lds, const Ahead *ahead) {
    for (int j = 0; j < n; j += 4) {
        const typename T::Item *rows[4];
        for (int c = 0; c < 4; c++) rows[c] = (const typename T::Item *)k(c, j / 4);
        for (int64_t h = 0; h < (ALONE ? 1 : sides); h++) {
            ahead[h].ask(j / 4);
            score_four<T, N>(rows, quads, q + h * ldq, s + h * lds + place(0, j));
            for (int c = 0; c < 4; c++) rows[c] += side;
        }
    }
}

// Adds n keys (a multiple of four), weighted by p, to C vectors of N rows of O: at most `items` items of each row of V, from
// item `from` on.
template <class T, int N, int C>
__attribute__((noinline)) void weigh(const KeyRows &v, int n, int64_t from, int64_t items, const typename T::Item *p, float *o,
                                     int64_t ldo, const Ahead &ahead) {
    vf x[N][C];
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) x[r][c] = load(o + r * ldo + c * W);
    // (Inlined by force: else the accumulators would live in memory.)
    auto keys = [&](int64_t items) __attribute__((always_inline)) {
        for (int j = 0; j < n; j += 4) {
            ahead.ask(j / 4);
            const char *rows[4];
            for (int c = 0; c < 4; c++) rows[c] = v(c, j / 4);
#pragma GCC unroll 1
            for (int i = 0; i < 4; i += T::PAIR) {
                vf y[C];
                T::template values<C>(rows + i, from, items, y);
#pragma GCC unroll 8
                for (int r = 0; r < N; r++) {
                    vf w = T::weight(p + place<typename T::Item>(r, 0) + j * PACK + i);
#pragma GCC unroll 4
                    for (int c = 0; c < C; c++) x[r][c] = T::dot(x[r][c], w, y[c]);
                }
            }
        }
    };
    if (items >= C * W) keys(C * W);
    else keys(items);
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(o + r * ldo + c * W, x[r][c]);
}

// Splits n into the counts that the products are compiled for, MOST, MOST / 2, .. 1, and calls f(from, count) for each.
template <int MOST, class F> inline void by_counts(int n, F f) {
    int i = 0;
    if constexpr (MOST > 1)
        for (; i + MOST <= n; i += MOST) f(i, std::integral_constant<int, MOST>());
    if constexpr (MOST > 2) {
        if (i < n) by_counts<MOST / 2>(n - i, [&](int at, auto counted) { f(i + at, counted); });
    } else
        for (; i < n; i++) f(i, std::integral_constant<int, 1>());
}

}  // namespace
