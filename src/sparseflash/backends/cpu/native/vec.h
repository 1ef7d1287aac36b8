// Vectors of floats: GCC/Clang vector extensions everywhere, intrinsics where AVX-512 says it better.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && !defined(SF_PORTABLE)
#define SF_AVX512 1
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

constexpr float INF = __builtin_inff();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

template <class T> inline T least(T a, T b) { return a < b ? a : b; }
template <class T> inline T most(T a, T b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t round_down(int64_t x, int64_t to) { return x / to * to; }

inline vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
inline void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
inline vf set1(float x) { return x - (vf){}; }
inline vf vmax(vf a, vf b) {
#if SF_AVX512
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
inline bool any_greater(vf a, vf b) {
#if SF_AVX512
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    vi m = a > b;
    int32_t r = 0;
    for (int i = 0; i < W; i++) r |= m[i];
    return r != 0;
#endif
}
inline float sum(vf a) {
#if SF_AVX512
    return _mm512_reduce_add_ps((__m512)a);
#else
    float r = 0;
    for (int i = 0; i < W; i++) r += a[i];
    return r;
#endif
}

// 2^x; -inf gives 0. Minimax polynomials of 2^f on [0,1): relative error 7.5e-8 (fine) and 1.0e-4 (coarse, for
// weights that are rounded to bf16 next, 4e-3; exact at 0 and 1, so that a row with one key keeps its exact lse).
template <bool FINE> inline vf exp2v(vf x) {
#if SF_AVX512
    vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);
#else
    x = x < -140.f ? set1(-140.f) : x;
    vi n = __builtin_convertvector(x, vi);                  // towards zero
    vf t = __builtin_convertvector(n, vf);
    n += t > x;                                             // comparisons are 0 / -1: floor
    t = __builtin_convertvector(n, vf);
    vf f = x - t;
#endif
    vf p;
    if (FINE) {
        p = set1(1.877576675e-03f);
        p = p * f + 8.989340091e-03f;
        p = p * f + 5.582631805e-02f;
        p = p * f + 2.401536170e-01f;
        p = p * f + 6.931530732e-01f;
        p = p * f + 9.999999251e-01f;
    } else {
        p = set1(7.826800644e-02f);
        p = p * f + 2.263076752e-01f;
        p = p * f + 6.954243183e-01f;
        p = p * f + 1.f;
    }
#if SF_AVX512
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    // two factors, so that results below the normal range flush gradually instead of wrapping
    vi half = n / 2, rest = n - half;
    vf a = (vf)((half + 127) << 23), b = (vf)((rest + 127) << 23);
    vf r = p * a * b;
    return x > -140.f ? r : (x != x ? x : set1(0.f));
#endif
}

// tanh by its odd series near 0 and by exp2 elsewhere: absolute error below 2e-7.
inline vf tanhv(vf x) {
    vf small = x * x;
    vf series = x * (1.f + small * (-0.333333333f + small * (0.133333333f + small * (-0.053968254f + small * 0.021869489f))));
    vf bounded = x > 15.f ? set1(15.f) : (x < -15.f ? set1(-15.f) : x);
    vf e = exp2v<true>(bounded * (2.f * LOG2E));
    vf far = 1.f - 2.f / (e + 1.f);
    return small < 0.06f ? series : far;
}

// Which of 64 integers compare so with x: one bit each.
enum Compare { EQ, LT, LE, GT, GE };
template <Compare OP> inline uint64_t lanes(const int32_t *q, int32_t x) {
    uint64_t bits = 0;
#if SF_AVX512
    constexpr int how = OP == EQ ? _MM_CMPINT_EQ : OP == LT ? _MM_CMPINT_LT : OP == LE ? _MM_CMPINT_LE
                        : OP == GT ? _MM_CMPINT_NLE : _MM_CMPINT_NLT;
    __m512i y = _mm512_set1_epi32(x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        bits |= (uint64_t)_mm512_cmp_epi32_mask(_mm512_loadu_si512(q + 16 * i), y, how) << (16 * i);
#else
    for (int i = 0; i < 64; i++) {
        bool yes = OP == EQ ? q[i] == x : OP == LT ? q[i] < x : OP == LE ? q[i] <= x : OP == GT ? q[i] > x : q[i] >= x;
        bits |= (uint64_t)yes << i;
    }
#endif
    return bits;
}
inline uint64_t lanes_with_bit(const int32_t *words, int bit) {
    uint64_t bits = 0;
#if SF_AVX512
    __m512i y = _mm512_set1_epi32((int32_t)(1u << bit));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        bits |= (uint64_t)_mm512_test_epi32_mask(_mm512_loadu_si512(words + 16 * i), y) << (16 * i);
#else
    for (int i = 0; i < 64; i++) bits |= (uint64_t)(((uint32_t)words[i] >> bit) & 1u) << i;
#endif
    return bits;
}
// x where the bit of the lane is set, else y (bits of lanes 0..W-1).
inline vf pick(uint64_t bits, vf x, vf y) {
#if SF_AVX512
    return (vf)_mm512_mask_mov_ps((__m512)y, (__mmask16)bits, (__m512)x);
#else
    vf r;
    for (int i = 0; i < W; i++) r[i] = (bits >> i) & 1 ? x[i] : y[i];
    return r;
#endif
}

// Storage formats.
inline float from_bf16(uint16_t x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
inline uint16_t to_bf16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
inline float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, part = h & 1023u, u;
    if (exponent == 31) u = sign | 0x7f800000u | (part << 13);
    else if (exponent) u = sign | ((exponent + 112u) << 23) | (part << 13);
    else { float f = (float)part * 5.9604644775390625e-8f; memcpy(&u, &f, 4); u |= sign; }
    float f; memcpy(&f, &u, 4); return f;
}
inline uint16_t to_f16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7e00u;
    if (u >= 0x477ff000u) return sign | 0x7c00u;            // rounds to infinity
    if (u < 0x38800000u) {                                   // subnormal: let the adder round
        float g; memcpy(&g, &u, 4); g += 0.5f; memcpy(&u, &g, 4);
        return sign | (uint16_t)(u - 0x3f000000u);
    }
    u += 0xc8000fffu + ((u >> 13) & 1u);
    return sign | (uint16_t)(u >> 13);
}

// to[j][i] = from[i][j] for 16 x 16 items of 32 bits; strides in items.
inline void transpose16(const void *from, int64_t ld, void *to, int64_t ldt) {
#if SF_AVX512
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps((const float *)from + i * ld);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)t[4 * i], b = (__m512d)t[4 * i + 1], c = (__m512d)t[4 * i + 2], d = (__m512d)t[4 * i + 3];
        r[4 * i] = (__m512)_mm512_unpacklo_pd(a, c);
        r[4 * i + 1] = (__m512)_mm512_unpackhi_pd(a, c);
        r[4 * i + 2] = (__m512)_mm512_unpacklo_pd(b, d);
        r[4 * i + 3] = (__m512)_mm512_unpackhi_pd(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
        __m512 c = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88), d = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
        float *x = (float *)to + i * ldt;
        _mm512_storeu_ps(x, _mm512_shuffle_f32x4(a, c, 0x88));
        _mm512_storeu_ps(x + 4 * ldt, _mm512_shuffle_f32x4(b, d, 0x88));
        _mm512_storeu_ps(x + 8 * ldt, _mm512_shuffle_f32x4(a, c, 0xdd));
        _mm512_storeu_ps(x + 12 * ldt, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) memcpy((char *)to + (j * ldt + i) * 4, (const char *)from + (i * ld + j) * 4, 4);
#endif
}

}  // namespace
