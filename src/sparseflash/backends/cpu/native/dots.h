// Products of few rows with many keys, read where they lie and as they are stored: lanes run along D.
#pragma once
#include <type_traits>
#include "gemm.h"
#include "pack.h"

namespace {

constexpr int SPLIT = 256;          // keys whose scores a row holds
constexpr int AHEAD = 64;           // rows that are asked for before they are needed
constexpr int STRIP = COLUMNS * W;  // lanes of O in registers

// W items of storage as floats, or the first n with zeros behind.
struct F32 {
    typedef float Item;
    static vf read(const Item *p) { return load(p); }
};
struct Bf16 {
    typedef uint16_t Item;
    static vf read(const Item *p) {
        typedef uint16_t vh __attribute__((vector_size(W * 2)));
        vh x;
        memcpy(&x, p, sizeof x);
        return (vf)(__builtin_convertvector(x, vi) << 16);
    }
};
struct F16 {
    typedef uint16_t Item;
    static vf read(const Item *p) {
        float x[W];
        halves(p, W, x);
        return load(x);
    }
};

// How they are multiplied. `operand` converts the other factor (whole vectors of it).
template <class Storage> struct InFp32 {
    typedef typename Storage::Item Item;
    typedef float Operand;
    static constexpr int STEP = W, PAIR = 1;  // items of a dot product, and keys of a weighted sum, that go together

    static vf read(const Item *p, int64_t n) {
        if (n >= W) return Storage::read(p);
        Item x[W] = {};
        for (int64_t i = 0; i < n; i++) x[i] = p[i];
        return Storage::read(x);
    }
    static void operand(const float *from, int64_t n, Operand *to) { memcpy(to, from, n * sizeof *to); }
    static vf key(const Item *p, int64_t n) { return read(p, n); }
    static vf query(const Operand *p) { return load(p); }
    static vf dot(vf x, vf key, vf query) { return x + key * query; }
    static void values(const Item *const *rows, int64_t d, int64_t n, vf *y) {
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i++) y[i] = read(rows[0] + d + i * W, n - i * W);
    }
    static vf weight(const Operand *p) { return set1(*p); }
};

#if SF_HAS_BF16
struct InBf16 {
    typedef bf Item, Operand;
    static constexpr int STEP = 32, PAIR = 2;

    static __m512i read(const Item *p, int64_t n) {
        if (n >= 32) return _mm512_loadu_si512(p);
        return _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
    }
    static void operand(const float *from, int64_t n, Operand *to) {
        for (int64_t i = 0; i < n; i += W)
            _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
    }
    static vf key(const Item *p, int64_t n) { return (vf)read(p, n); }
    static vf query(const Operand *p) { return (vf)_mm512_loadu_si512(p); }
    static vf dot(vf x, vf key, vf query) { return (vf)_mm512_dpbf16_ps((__m512)x, (__m512bh)key, (__m512bh)query); }
    static void values(const Item *const *rows, int64_t d, int64_t n, vf *y) {
#pragma GCC unroll 2
        for (int i = 0; i < COLUMNS; i += 2)
            mix_rows((bf *)(y + i), read(rows[0] + d + i * W, n - i * W), read(rows[1] + d + i * W, n - i * W));
    }
    static vf weight(const Operand *p) { int32_t x; memcpy(&x, p, 4); return (vf)_mm512_set1_epi32(x); }
};
#endif

// (The lambdas below are inlined by force: else the accumulators that they share would live in memory.)

// Asks for the line that x[i] lies in, AHEAD rows before its turn. Into the second cache level: the first is busy.
template <class Item> inline void ask(const Item *const *x, int64_t i) { __builtin_prefetch(x[AHEAD] + i, 0, 2); }

// Scores of ROWS queries with W / ROWS keys: s[row][key]. Key after key, so that memory is read from one end to the
// other, and with it, if ASK, what is AHEAD.
template <class T, int ROWS, bool ASK>
inline void scores(const typename T::Item *const *k, int64_t D, const typename T::Operand *q, int64_t ldq, float *s) {
    constexpr int KEYS = W / ROWS;
    vf x[W];
    auto key = [&](int j) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) x[r * KEYS + j] = (vf){};
        auto step = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
            if (ASK) ask(k + j, d);
            vf y = T::key(k[j] + d, n);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) x[r * KEYS + j] = T::dot(x[r * KEYS + j], y, T::query(q + r * ldq + d));
        };
        int64_t d = 0;
        for (; d + T::STEP <= D; d += T::STEP) step(d, T::STEP);
        if (d < D) step(d, D - d);
    };
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; j++) key(j);
    float total[W];
    store(total, sums(x));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) memcpy(s + r * SPLIT, total + r * KEYS, KEYS * 4);
}

// A strip of ROWS rows of O takes in n keys, weighted.
template <class T, int ROWS, bool ASK>
inline void weigh(const typename T::Item *const *v, int n, int64_t d, int64_t items, const typename T::Operand *p,
                  float *o, int64_t ldo) {
    constexpr int64_t LINE = 64 / sizeof(typename T::Item);
    vf x[ROWS][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i++) x[r][i] = load(o + r * ldo + i * W);
    auto keys = [&](int64_t items) __attribute__((always_inline)) {
        for (int j = 0; j < n; j += T::PAIR) {
            if (ASK)
#pragma GCC unroll 2
                for (int i = 0; i < T::PAIR; i++)
#pragma GCC unroll 4
                    for (int64_t at = 0; at < items; at += LINE) ask(v + j + i, d + at);
            vf y[COLUMNS];
            T::values(v + j, d, items, y);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                vf w = T::weight(p + r * SPLIT + j);
#pragma GCC unroll 4
                for (int i = 0; i < COLUMNS; i++) x[r][i] = T::dot(x[r][i], w, y[i]);
            }
        }
    };
    if (items >= STRIP) keys(STRIP);
    else keys(items);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i++) store(o + r * ldo + i * W, x[r][i]);
}

// Calls f with the numbers of rows that the products take at a time.
template <class F> inline void in_rows(int rows, F f) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>());
    if (rows - r >= 2) { f(r, std::integral_constant<int, 2>()); r += 2; }
    if (r < rows) f(r, std::integral_constant<int, 1>());
}

}  // namespace
