// Vectors of floats. What all levels share is written here, in vector extensions of GCC and Clang; where a level has better
// instructions, its own vec_*.h has them. Each vec_*.h defines the same few names:
//   W, vf, vi                    lanes of a vector; vectors of floats, of integers
//   COLUMNS, ROWS                register blocks of products: vectors per row, and rows for 1, 2, .. vectors, so that
//                                accumulators and operands stay in registers
//   vmax, vmin                   the second operand where one is NaN, or NaN
//   any_greater                  true if a > b in some lane
//   floorv                       (or fraction and times_power2, where instructions compute them; these need no vmin)
//   lanes<OP>, lanes_with_bit    compare, or test a bit of, 64 integers: one bit each
//   nonzero64                    one bit per byte, of 64, that is not 0
//   pick                         selects lanes by the bits of a mask
//   transpose16                  transposes a 16 x 16 block of 32-bit items
//   halves, to_halves            converts rows of fp16 to fp32 and back
//   sums                         sums W vectors, each across its lanes (if SF_SUMS_LANES)
//   quad, sum_quads              broadcasts 16 bytes to every quad; sums of four vectors over each quad (if SF_QUADS)
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

constexpr float INF = __builtin_inff();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float SMALLEST_UNIT = 1e-30f;  // a smaller scale counts as bent: see softmax.h

template <class T> inline T least(T a, T b) { return a < b ? a : b; }
template <class T> inline T most(T a, T b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t round_down(int64_t x, int64_t to) { return x / to * to; }

// Comparisons of `lanes<OP>`: which of 64 integers satisfy it with x, one bit each.
enum Compare { EQ, LT, LE, GT, GE };

// Storage formats, one number at a time.
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

}  // namespace

#include SF_VECTORS

namespace {

inline vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
inline void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
inline vf set1(float x) { return x - (vf){}; }
inline float sum(vf a) {
    float x[W];
    store(x, a);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}

// x, pinned to a register: compilers like to reload it from memory for every use.
inline vf kept(vf x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__SSE2__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

#if !SF_MASKS
// Loads the first n < W floats, zeros for the rest.
inline vf load_first(const float *p, int64_t n) {
    vf x = {};
    memcpy(&x, p, n * sizeof(float));
    return x;
}
#endif
#if !SF_SUMS_LANES
// Lane i: the sum over the lanes of x[i].
inline vf sums(const vf *x) {
    vf y;
    for (int i = 0; i < W; i++) y[i] = sum(x[i]);
    return y;
}
#endif

#if !SF_QUADS
// The same 16 bytes in every quad of lanes.
inline vf quad(const void *p) {
    vf x;
    for (int i = 0; i < W / 4; i++) memcpy((char *)&x + 16 * i, p, 16);
    return x;
}
// Lane j of quad i: the sum of quad i of the j-th vector.
inline vf sum_quads(vf a, vf b, vf c, vf d) {
    const vf *x[4] = {&a, &b, &c, &d};
    vf y;
    for (int i = 0; i < W; i++) {
        const vf &z = *x[i % 4];
        const int at = i / 4 * 4;
        y[i] = (z[at] + z[at + 2]) + (z[at + 1] + z[at + 3]);
    }
    return y;
}
#endif

#if !SF_SCALES_BY_POWERS
// x = floor(x) + fraction. 2^floor(x) is built in the exponent bits by adding a number whose last bit counts ones; 24 is added
// to the exponent, and the last factor takes it back: so results below the normal range lose bits one by one and end at 0.
inline vf in_range(vf x) { return vmin(set1(104.f), vmax(set1(-151.f), x)); }
inline vf fraction(vf x) { return x - floorv(x); }
inline vf times_power2(vf p, vf x) {
    vf power = (vf)((vi)(floorv(x) + (12582912.f + 127.f + 24.f)) << 23);
    return p * power * 5.9604644775390625e-8f;
}
#endif

// 2^x; -inf gives 0. Minimax polynomials of 2^f on [0,1): relative error 7.5e-8 (fine) and 1.0e-4 (coarse, for
// weights that are rounded to bf16 next, 4e-3; exact at 0 and 1, so that a row with one key keeps its exact lse).
template <bool FINE> inline vf exp2v(vf x) {
    x = in_range(x);
    vf f = fraction(x), p;
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
    return times_power2(p, x);
}

// Natural logarithm of normal positive numbers: log m + e log 2 with m in [sqrt 1/2, sqrt 2); log m = 2 artanh((m - 1) /
// (m + 1)) by its series; the first term left out is 2e-9 of it.
inline vf logv(vf x) {
    constexpr int32_t HALF = 0x3f3504f3;  // sqrt 1/2
    vi bits = (vi)x - HALF;
    vf m = (vf)((bits & 0x7fffff) + HALF), s = (m - 1.f) / (m + 1.f), z = s * s;
    vf series = 2.f * s * (1.f + z * (1 / 3.f + z * (1 / 5.f + z * (1 / 7.f + z * (1 / 9.f)))));
    return series + __builtin_convertvector(bits >> 23, vf) * LN2;
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

}  // namespace
