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
constexpr int STRIP = COLUMNS * W;  // a row of O is whole strips
constexpr int DEEP = COLUMNS == 4 ? 8 : 4;  // rows of a weighted sum: the more, the fewer columns are in registers
constexpr int SPLIT = 256;          // keys of a piece

// In which items the products are done.
struct InFp32 {
    typedef float Item;
    static constexpr int DTYPE = SF_F32, QUAD = 4, PAIR = 1;  // items of a quad; keys of a weighted sum that go together
    static constexpr bool FINE = true;
    static constexpr int KEYS = 32;  // rows that stay in the first cache level while all queries read them

    static void copy(const SfView &x, const char *row, int32_t dtype, int64_t n, Item *to, int64_t whole) {
        read_row(x, row, dtype, n, to);
        memset(to + n, 0, (whole - n) * sizeof *to);
    }
    static vf dot(vf sum, vf x, vf y) { return sum + x * y; }
    static vf read(const Item *p, int64_t n) { return n >= W ? load(p) : load_first(p, most<int64_t>(n, 0)); }
    template <int C> static void values(const Item *const *rows, int64_t d, int64_t n, vf *y) {
#pragma GCC unroll 4
        for (int i = 0; i < C; i++) y[i] = kept(read(rows[0] + d + i * W, n - i * W));
    }
    static void put(Item *to, vf weights) { store(to, weights); }
    static vf weight(const Item *p) { return set1(*p); }
};

#if SF_HAS_BF16
struct InBf16 {
    typedef bf Item;
    static constexpr int DTYPE = SF_BF16, QUAD = 8, PAIR = 2;
    static constexpr bool FINE = false;
    static constexpr int KEYS = 64;

    static void copy(const SfView &x, const char *row, int32_t, int64_t n, Item *to, int64_t whole) {
        for (int64_t i = 0; i < n; i++) to[i] = ((const bf *)row)[i * x.lane];
        memset(to + n, 0, (whole - n) * sizeof *to);
    }
    static vf dot(vf sum, vf x, vf y) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }
    static __m512i read(const Item *p, int64_t n) {
        if (n >= 32) return _mm512_loadu_si512(p);
        return _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
    }
    template <int C> static void values(const Item *const *rows, int64_t d, int64_t n, vf *y) {
#pragma GCC unroll 2
        for (int i = 0; i < C; i += 2) {
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

// Memory that is asked for before its turn, along with the keys that a product is at: four rows with every four keys. A
// share of them, for one of several products that go over the same keys: what comes too thick makes loads wait. Into the
// second cache level, for the first is busy.
struct Ahead {
    const char *const *rows;
    int64_t from[4], to[4];  // lines

    Ahead(const char *const *rows, int64_t lines, int64_t share, int64_t shares) : rows(rows) {
        for (int i = 0; i < 4; i++) {
            from[i] = most<int64_t>(4 * lines * share / shares - i * lines, 0);
            to[i] = least(4 * lines * (share + 1) / shares - i * lines, lines);
        }
    }
    void ask(int j) const {
        for (int i = 0; i < 4; i++)
            for (int64_t x = from[i]; x < to[i]; x++) __builtin_prefetch(rows[j + i] + 64 * x, 0, 2);
    }
};

// Where the score of row i for the j-th key of a piece lies: quads of keys, those of a pack side by side.
constexpr int64_t place(int64_t i, int64_t j) {
    return i / PACK * PACK * SPLIT + (j & ~(int64_t)3) * PACK + i % PACK * 4 + (j & 3);
}

// (The kernels are functions of their own: inside of others, addresses run out of registers.)

// Scores of N packs of queries with n keys (a multiple of four): `quads` quads, from item `from` of the rows on.
template <class T, int N>
__attribute__((noinline)) void scores(const typename T::Item *const *k, int n, int64_t from, int64_t quads,
                                      const typename T::Item *q, float *s, const Ahead &ahead) {
    const int64_t ldq = quads * T::QUAD * PACK;
    for (int j = 0; j < n; j += 4) {
        ahead.ask(j);
        const typename T::Item *rows[4] = {k[j] + from, k[j + 1] + from, k[j + 2] + from, k[j + 3] + from};
        vf x[N][4] = {};
        for (int64_t i = 0; i < quads; i++) {
            vf y[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) y[c] = kept(quad(rows[c] + i * T::QUAD));
#pragma GCC unroll 4
            for (int p = 0; p < N; p++) {
                vf z = kept(load((const float *)(q + p * ldq + i * T::QUAD * PACK)));
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) x[p][c] = T::dot(x[p][c], y[c], z);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < N; p++) store(s + place(p * PACK, j), sum_quads(x[p][0], x[p][1], x[p][2], x[p][3]));
    }
}

// C vectors of N rows of O take in n keys (a multiple of four), weighted by p: of their rows at most `items` items, from
// item `from` on.
template <class T, int N, int C>
__attribute__((noinline)) void weigh(const typename T::Item *const *v, int n, int64_t from, int64_t items,
                                     const typename T::Item *p, float *o, int64_t ldo, const Ahead &ahead) {
    vf x[N][C];
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) x[r][c] = load(o + r * ldo + c * W);
    // (Inlined by force: else the accumulators would live in memory.)
    auto keys = [&](int64_t items) __attribute__((always_inline)) {
        for (int j = 0; j < n; j += 4) {
            ahead.ask(j);
#pragma GCC unroll 1
            for (int i = 0; i < 4; i += T::PAIR) {
                vf y[C];
                T::template values<C>(v + j + i, from, items, y);
#pragma GCC unroll 8
                for (int r = 0; r < N; r++) {
                    vf w = T::weight(p + place(r, 0) + j * PACK + i);
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
