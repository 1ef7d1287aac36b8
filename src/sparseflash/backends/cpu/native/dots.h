// Products of few rows with many keys, which are read where they lie.
//
// Scores: a vector is W / 4 quads of 32 bits. Each quad belongs to one query; four items of a key (eight of bf16) go to
// all of them. So a key is read once for a pack of W / 4 queries, and what is left to add up is four lanes, not W:
// four keys become one vector, quad i of it the scores of query i.
// Weighted sums: lanes along the head dimension.
#pragma once
#include <type_traits>
#include "gemm.h"
#include "pack.h"

namespace {

constexpr int PACK = W / 4;         // queries of a vector of scores
constexpr int PACKS = COLUMNS;      // of them at a time, with four accumulators each
constexpr int STRIP = COLUMNS * W;  // lanes of O in registers

// In which items the products are done.
struct InFp32 {
    typedef float Item;
    static constexpr int DTYPE = SF_F32, QUAD = 4, PAIR = 1;  // items of a quad; keys of a weighted sum that go together
    static constexpr bool FINE = true;

    static void copy(const SfView &x, const char *row, int32_t dtype, int64_t n, Item *to, int64_t whole) {
        read_row(x, row, dtype, n, to);
        memset(to + n, 0, (whole - n) * sizeof *to);
    }
    static vf dot(vf sum, vf x, vf y) { return sum + x * y; }
    static vf read(const Item *p, int64_t n) { return n >= W ? load(p) : load_first(p, most<int64_t>(n, 0)); }
    static void values(const Item *const *rows, int64_t d, int64_t n, vf *y) {
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i++) y[i] = kept(read(rows[0] + d + i * W, n - i * W));
    }
    static void put(Item *to, vf weights) { store(to, weights); }
    static vf weight(const Item *p) { return set1(*p); }
};

#if SF_HAS_BF16
struct InBf16 {
    typedef bf Item;
    static constexpr int DTYPE = SF_BF16, QUAD = 8, PAIR = 2;
    static constexpr bool FINE = false;

    static void copy(const SfView &x, const char *row, int32_t, int64_t n, Item *to, int64_t whole) {
        for (int64_t i = 0; i < n; i++) to[i] = ((const bf *)row)[i * x.lane];
        memset(to + n, 0, (whole - n) * sizeof *to);
    }
    static vf dot(vf sum, vf x, vf y) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }
    static __m512i read(const Item *p, int64_t n) {
        if (n >= 32) return _mm512_loadu_si512(p);
        return _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
    }
    static void values(const Item *const *rows, int64_t d, int64_t n, vf *y) {
#pragma GCC unroll 2
        for (int i = 0; i < COLUMNS; i += 2) {
            alignas(64) vf both[2];
            mix_rows((bf *)both, read(rows[0] + d + i * W, n - i * W), read(rows[1] + d + i * W, n - i * W));
            y[i] = kept(both[0]);
            y[i + 1] = kept(both[1]);
        }
    }
    static void put(Item *to, vf weights) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)weights)); }
    static vf weight(const Item *p) { int32_t x; memcpy(&x, p, 4); return (vf)_mm512_set1_epi32(x); }
};
#endif

// Asks for some lines of a row before their turn: from the line `first` on every `step`-th. Into the second cache level,
// for the first is busy.
template <class Item> inline void ask(const Item *row, int64_t first, int64_t lines, int64_t step) {
    for (int64_t i = first; i < lines; i += step) __builtin_prefetch((const char *)row + 64 * i, 0, 2);
}

// Scores of N packs of queries with four keys, of `quads` quads each: one vector a pack.
template <class T, int N>
inline void scores(const typename T::Item *const *k, int64_t quads, const typename T::Item *q, int64_t ldq, float *s,
                   int64_t lds) {
    vf x[N][4] = {};
    for (int64_t i = 0; i < quads; i++) {
        vf y[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) y[j] = kept(quad(k[j] + i * T::QUAD));
#pragma GCC unroll 4
        for (int p = 0; p < N; p++) {
            vf z = kept(load((const float *)(q + p * ldq + i * T::QUAD * PACK)));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) x[p][j] = T::dot(x[p][j], y[j], z);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < N; p++) store(s + p * lds, sum_quads(x[p][0], x[p][1], x[p][2], x[p][3]));
}

// A strip of N rows of O takes in n keys (a multiple of four), weighted; p[r] are the weights of row r, quads of them
// PACK quads apart. `next` are n rows that are asked for, every `step`-th line of them from `first` on.
template <class T, int N>
inline void weigh(const typename T::Item *const *v, int n, int64_t d, int64_t items, const typename T::Item *const *p,
                  float *o, int64_t ldo, const typename T::Item *const *next, int64_t first, int64_t lines, int64_t step) {
    vf x[N][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i++) x[r][i] = load(o + r * ldo + i * W);
    // (Inlined by force: else the accumulators would live in memory.)
    auto keys = [&](int64_t items) __attribute__((always_inline)) {
        for (int j = 0; j < n; j += 4) {
            for (int i = 0; i < 4; i++) ask(next[j + i], first, lines, step);
#pragma GCC unroll 1
            for (int i = 0; i < 4; i += T::PAIR) {
                vf y[COLUMNS];
                T::values(v + j + i, d, items, y);
#pragma GCC unroll 4
                for (int r = 0; r < N; r++) {
                    vf w = T::weight(p[r] + j * PACK + i);
#pragma GCC unroll 4
                    for (int c = 0; c < COLUMNS; c++) x[r][c] = T::dot(x[r][c], w, y[c]);
                }
            }
        }
    };
    if (items >= STRIP) keys(STRIP);
    else keys(items);
#pragma GCC unroll 4
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i++) store(o + r * ldo + i * W, x[r][i]);
}

// Calls f(from, count) with the counts that the products take at a time.
template <int MOST, class F> inline void by_counts(int n, F f) {
    int i = 0;
    if constexpr (MOST >= 4)
        for (; i + 4 <= n; i += 4) f(i, std::integral_constant<int, 4>());
    for (; i + 2 <= n; i += 2) f(i, std::integral_constant<int, 2>());
    if (i < n) f(i, std::integral_constant<int, 1>());
}

}  // namespace
