// AArch64: four lanes, 32 registers. fp32 arithmetic and conversions of fp16 need nothing newer than ARMv8.0.
#pragma once
#include <arm_neon.h>
#define SF_QUADS 1

namespace {

constexpr int W = 4, COLUMNS = 4, ROWS[] = {0, 12, 8, 6, 5};  // fewer rows than 32 registers allow: broadcasts take registers too
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

inline vf vmax(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline vf vmin(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
inline vf floorv(vf x) { return (vf)vrndmq_f32((float32x4_t)x); }
inline bool any_greater(vf a, vf b) { return vmaxvq_u32(vcgtq_f32((float32x4_t)a, (float32x4_t)b)) != 0; }

// Packs 64 bytes, each 0xff or 0, into 64 bits, by pairwise additions.
inline uint64_t bits_of_bytes(const uint8x16_t *x) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
    uint8x16_t low = vpaddq_u8(vandq_u8(x[0], bit), vandq_u8(x[1], bit));
    uint8x16_t sum = vpaddq_u8(low, vpaddq_u8(vandq_u8(x[2], bit), vandq_u8(x[3], bit)));
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sum, sum)), 0);
}
// Bit i is set if `yes` holds for q[i]: comparison masks are narrowed to bytes, and these packed to bits.
template <class Yes> inline uint64_t bits_of_64(const int32_t *q, Yes yes) {
    uint8x16_t part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int32_t *x = q + 16 * i;
        uint16x8_t low = vcombine_u16(vmovn_u32(yes(vld1q_s32(x))), vmovn_u32(yes(vld1q_s32(x + 4))));
        uint16x8_t high = vcombine_u16(vmovn_u32(yes(vld1q_s32(x + 8))), vmovn_u32(yes(vld1q_s32(x + 12))));
        part[i] = vcombine_u8(vmovn_u16(low), vmovn_u16(high));
    }
    return bits_of_bytes(part);
}
template <Compare OP> inline uint64_t lanes(const int32_t *q, int32_t x) {
    const int32x4_t y = vdupq_n_s32(x);
    return bits_of_64(q, [y](int32x4_t z) {
        return OP == EQ ? vceqq_s32(z, y) : OP == LT ? vcltq_s32(z, y) : OP == LE ? vcleq_s32(z, y)
               : OP == GT ? vcgtq_s32(z, y) : vcgeq_s32(z, y);
    });
}
inline uint64_t lanes_with_bit(const int32_t *words, int bit) {
    const int32x4_t y = vdupq_n_s32((int32_t)(1u << bit));
    return bits_of_64(words, [y](int32x4_t z) { return vtstq_s32(z, y); });
}
inline uint64_t nonzero64(const uint8_t *p) {
    uint8x16_t part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        uint8x16_t x = vld1q_u8(p + 16 * i);
        part[i] = vtstq_u8(x, x);
    }
    return bits_of_bytes(part);
}
// x where the bit of the lane is set, else y (bits of lanes 0..W-1).
inline vf pick(uint64_t bits, vf x, vf y) {
    static const uint32_t bit[4] = {1, 2, 4, 8};
    return (vf)vbslq_f32(vtstq_u32(vdupq_n_u32((uint32_t)bits), vld1q_u32(bit)), (float32x4_t)x, (float32x4_t)y);
}

inline vf quad(const void *p) { return (vf)vld1q_f32((const float *)p); }
inline vf sum_quads(vf a, vf b, vf c, vf d) {
    float32x4_t ab = vpaddq_f32((float32x4_t)a, (float32x4_t)b), cd = vpaddq_f32((float32x4_t)c, (float32x4_t)d);
    return (vf)vpaddq_f32(ab, cd);
}

inline void halves(const uint16_t *from, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
    for (; i < n; i++) to[i] = from_f16(from[i]);
}
inline void to_halves(const float *from, float factor, int64_t n, uint16_t *to) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vmulq_n_f32(vld1q_f32(from + i), factor))));
    for (; i < n; i++) to[i] = to_f16(from[i] * factor);
}

inline void transpose4(const float *from, int64_t ld, float *to, int64_t ldt) {
    float32x4_t a = vld1q_f32(from), b = vld1q_f32(from + ld), c = vld1q_f32(from + 2 * ld), d = vld1q_f32(from + 3 * ld);
    float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    vst1q_f32(to, vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)));
    vst1q_f32(to + ldt, vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1)));
    vst1q_f32(to + 2 * ldt, vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)));
    vst1q_f32(to + 3 * ldt, vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1)));
}
// to[j][i] = from[i][j] for 16 x 16 items of 32 bits; strides in items.
inline void transpose16(const void *from, int64_t ld, void *to, int64_t ldt) {
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 16; j += 4) transpose4((const float *)from + i * ld + j, ld, (float *)to + j * ldt + i, ldt);
}

}  // namespace
