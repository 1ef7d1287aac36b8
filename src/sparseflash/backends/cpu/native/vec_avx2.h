// AVX2 with FMA and F16C: eight lanes, sixteen registers.
#pragma once
#include <immintrin.h>
#define SF_SUMS_LANES 1
#define SF_QUADS 1

namespace {

constexpr int W = 8, COLUMNS = 2, ROWS[] = {0, 12, 6};
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
inline vf floorv(vf x) { return (vf)_mm256_floor_ps((__m256)x); }
inline bool any_greater(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0; }

inline uint64_t sign_bits(__m256i x) { return (uint64_t)(uint32_t)_mm256_movemask_ps((__m256)x); }

template <Compare OP> inline uint64_t lanes(const int32_t *q, int32_t x) {
    constexpr bool negated = OP == LE || OP == GE;  // AVX2 compares for = and > only
    uint64_t bits = 0;
    __m256i y = _mm256_set1_epi32(x);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m256i z = _mm256_loadu_si256((const __m256i *)(q + 8 * i));
        __m256i yes = OP == EQ ? _mm256_cmpeq_epi32(z, y)
                      : OP == GT || OP == LE ? _mm256_cmpgt_epi32(z, y) : _mm256_cmpgt_epi32(y, z);
        bits |= sign_bits(yes) << (8 * i);
    }
    return negated ? ~bits : bits;
}
inline uint64_t lanes_with_bit(const int32_t *words, int bit) {
    uint64_t bits = 0;
    __m128i up = _mm_cvtsi32_si128(31 - bit);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        bits |= sign_bits(_mm256_sll_epi32(_mm256_loadu_si256((const __m256i *)(words + 8 * i)), up)) << (8 * i);
    return bits;
}
inline uint64_t nonzero64(const uint8_t *p) {
    uint64_t bits = 0;
    for (int i = 0; i < 2; i++) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(p + 32 * i));
        bits |= (uint64_t)(uint32_t)~_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_setzero_si256())) << (32 * i);
    }
    return bits;
}
// x where the bit of the lane is set, else y (bits of lanes 0..W-1).
inline vf pick(uint64_t bits, vf x, vf y) {
    __m256i up = _mm256_sllv_epi32(_mm256_set1_epi32((int32_t)bits), _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
    return (vf)_mm256_blendv_ps((__m256)y, (__m256)x, (__m256)up);
}

// Lane i: the sum over the lanes of x[i].
inline vf sums(const vf *x) {
    __m256 a[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) a[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    __m256 low = _mm256_hadd_ps(a[0], a[1]), high = _mm256_hadd_ps(a[2], a[3]);
    return (vf)(_mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31));
}

inline vf quad(const void *p) { return (vf)_mm256_broadcast_ps((const __m128 *)p); }
inline vf sum_quads(vf a, vf b, vf c, vf d) {
    return (vf)_mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
}

inline void halves(const uint16_t *from, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < n; i++) to[i] = from_f16(from[i]);
}
inline void to_halves(const float *from, float factor, int64_t n, uint16_t *to) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i) * factor, _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) to[i] = to_f16(from[i] * factor);
}

inline void transpose8(const float *from, int64_t ld, float *to, int64_t ldt) {
    __m256 r[8], t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // rows i and i + 4 share a register: no 128-bit halves to swap later
        const float *x = from + i * ld, *y = x + 4 * ld;
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), _mm_loadu_ps(y), 1);
        r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + 4)), _mm_loadu_ps(y + 4), 1);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        t[i + 2] = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
        t[i + 3] = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        float *x = to + i * ldt;
        _mm256_storeu_ps(x, _mm256_shuffle_ps(t[i], t[i + 2], 0x44));
        _mm256_storeu_ps(x + ldt, _mm256_shuffle_ps(t[i], t[i + 2], 0xee));
        _mm256_storeu_ps(x + 2 * ldt, _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44));
        _mm256_storeu_ps(x + 3 * ldt, _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee));
    }
}
// to[j][i] = from[i][j] for 16 x 16 items of 32 bits; strides in items.
inline void transpose16(const void *from, int64_t ld, void *to, int64_t ldt) {
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 16; j += 8) transpose8((const float *)from + i * ld + j, ld, (float *)to + j * ldt + i, ldt);
}

}  // namespace
