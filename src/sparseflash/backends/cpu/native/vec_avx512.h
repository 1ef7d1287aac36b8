// AVX-512: sixteen lanes, 32 registers, masks in integer registers.
#pragma once
#include <immintrin.h>
#define SF_SCALES_BY_POWERS 1
#define SF_MASKS 1
#define SF_SUMS_LANES 1
#define SF_QUADS 1

namespace {

constexpr int W = 16, COLUMNS = 4, ROWS[] = {0, 12, 12, 8, 6};
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline bool any_greater(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0; }

inline vf in_range(vf x) { return x; }
inline vf fraction(vf x) { return (vf)_mm512_reduce_ps((__m512)x, 0x09); }
inline vf times_power2(vf p, vf x) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)x); }

template <Compare OP> inline uint64_t lanes(const int32_t *q, int32_t x) {
    constexpr int how = OP == EQ ? _MM_CMPINT_EQ : OP == LT ? _MM_CMPINT_LT : OP == LE ? _MM_CMPINT_LE
                        : OP == GT ? _MM_CMPINT_NLE : _MM_CMPINT_NLT;
    uint64_t bits = 0;
    __m512i y = _mm512_set1_epi32(x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        bits |= (uint64_t)_mm512_cmp_epi32_mask(_mm512_loadu_si512(q + 16 * i), y, how) << (16 * i);
    return bits;
}
inline uint64_t lanes_with_bit(const int32_t *words, int bit) {
    uint64_t bits = 0;
    __m512i y = _mm512_set1_epi32((int32_t)(1u << bit));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        bits |= (uint64_t)_mm512_test_epi32_mask(_mm512_loadu_si512(words + 16 * i), y) << (16 * i);
    return bits;
}
inline uint64_t nonzero64(const uint8_t *p) {
    __m512i x = _mm512_loadu_si512(p);
    return (uint64_t)_mm512_test_epi8_mask(x, x);
}
// x where the bit of the lane is set, else y (bits of lanes 0..W-1).
inline vf pick(uint64_t bits, vf x, vf y) { return (vf)_mm512_mask_mov_ps((__m512)y, (__mmask16)bits, (__m512)x); }

// Loads the first n < W floats, zeros for the rest.
inline vf load_first(const float *p, int64_t n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }

// Lane i: the sum over the lanes of x[i]. Each step adds the halves of two vectors, as a transposition would move them.
inline vf sums(const vf *x) {
    __m512 t[8], u[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
        t[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        u[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    auto add = [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); };
    return (vf)add(add(u[0], u[1]), add(u[2], u[3]));
}

inline vf quad(const void *p) { return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps((const float *)p)); }
inline vf sum_quads(vf a, vf b, vf c, vf d) {
    auto halve = [](vf x, vf y) {
        return _mm512_unpacklo_ps((__m512)x, (__m512)y) + _mm512_unpackhi_ps((__m512)x, (__m512)y);
    };
    __m512d ab = (__m512d)halve(a, b), cd = (__m512d)halve(c, d);
    return (vf)((__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd));
}

inline void halves(const uint16_t *from, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
    for (; i < n; i++) to[i] = from_f16(from[i]);
}
inline void to_halves(const float *from, float factor, int64_t n, uint16_t *to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(to + i),
                            _mm512_cvtps_ph(_mm512_loadu_ps(from + i) * factor, _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) to[i] = to_f16(from[i] * factor);
}

// to[j][i] = from[i][j] for 16 x 16 items of 32 bits; strides in items.
inline void transpose16(const void *from, int64_t ld, void *to, int64_t ldt) {
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
}

}  // namespace
