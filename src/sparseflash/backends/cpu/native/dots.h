// Products of few rows with many keys, which are read where they lie.
//
// Scores: a vector is W / 4 quads of 32 bits. Each quad belongs to one query; four items of a key (eight of bf16) go to
// all of them. So a key is read once for a pack of W / 4 queries, and what is left to add up is four lanes, not W:
// four keys become one vector, quad i of it the scores of query i.
// Weighted sums: lanes along the head dimension.
#pragma once
#include <type_traits>
#include "pack.h"
#include "records.h"

namespace {

constexpr int PACK = W / 4;         // queries of a vector of scores
constexpr int PACKS = COLUMNS;      // of them at a time, with four accumulators each
constexpr int STRIP = COLUMNS * W;  // a row of O is whole strips
constexpr int DEEP = COLUMNS == 4 ? 8 : 4;  // rows of a weighted sum: the more, the fewer columns are in registers
constexpr int SPLIT = Products<SF_HAS_BF16>::SPLIT;  // keys of a piece

// Addresses of rows of K or V. Four rows go together, a quarter of them apart: memory is faster where several places are
// read in turn.
struct KeyRows {
    const char *const *row;
    int64_t quarter;

    // Row c of the i-th four.
    const char *operator()(int64_t c, int64_t i) const { return row[c * quarter + i]; }
    KeyRows from(int64_t j) const { return {row + j / 4, quarter}; }
};

// Memory that is asked for before its turn, along with the keys that a product is at: four rows with every four keys. A
// share of their lines, for one of several products that go over the same keys, so that they are asked for evenly. Into the
// second cache level: the first takes few at a time, and the core waits.
struct Ahead {
    KeyRows rows;
    int from[4], to[4];  // lines

    Ahead() {}
    Ahead(const KeyRows &rows, int lines, int share, int shares) : rows(rows) {
        for (int i = 0; i < 4; i++) {
            from[i] = most(4 * lines * share / shares - i * lines, 0);
            to[i] = least(4 * lines * (share + 1) / shares - i * lines, lines);
        }
    }
    // (Inlined by force: GCC takes a function that only prefetches for one that does nothing.)
    __attribute__((always_inline)) void ask(int64_t i) const {
        for (int c = 0; c < 4; c++)
            for (int x = from[c]; x < to[c]; x++) __builtin_prefetch(rows(c, i) + 64 * x, 0, 2);
    }
};

// Where the score of row i for the j-th key of a piece lies: quads of keys, those of a pack side by side. Weights take the
// place of the scores of their pack.
template <class Item = float> constexpr int64_t place(int64_t i, int64_t j) {
    return i / PACK * PACK * SPLIT * (sizeof(float) / sizeof(Item)) + (j & ~(int64_t)3) * PACK + i % PACK * 4 + (j & 3);
}

// (The kernels are functions of their own: inside of others, addresses run out of registers.)

// Scores of N packs of queries with four keys: `quads` quads of their rows.
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

// The same with n keys (a multiple of four), for each of the heads that lie `side` items apart in a row; their queries and
// scores are `ldq` items and `lds` floats apart.
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

// C vectors of N rows of O take in n keys (a multiple of four), weighted by p: of their rows at most `items` items, from
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

// Calls f(from, count) with the counts that the products take at a time.
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
