// Portable: no intrinsics, only what the compiler vectorises; as many lanes as its target has.
#pragma once

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, COLUMNS = 4, ROWS[] = {0, 12, 12, 8, 6};
#elif defined(__AVX__)
constexpr int W = 8, COLUMNS = 2, ROWS[] = {0, 12, 6};
#else
constexpr int W = 4, COLUMNS = 2, ROWS[] = {0, 8, 4};  // sixteen registers, of which a product needs one as a temporary
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vf floorv(vf x) {  // for numbers that fit an int32
    vf towards_zero = __builtin_convertvector(__builtin_convertvector(x, vi), vf);
    return towards_zero > x ? towards_zero - 1.f : (x == x ? towards_zero : x);
}
inline bool any_greater(vf a, vf b) {
    vi m = a > b;
    int32_t r = 0;
    for (int i = 0; i < W; i++) r |= m[i];
    return r != 0;
}

template <Compare OP> inline uint64_t lanes(const int32_t *q, int32_t x) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++) {
        bool yes = OP == EQ ? q[i] == x : OP == LT ? q[i] < x : OP == LE ? q[i] <= x : OP == GT ? q[i] > x : q[i] >= x;
        bits |= (uint64_t)yes << i;
    }
    return bits;
}
inline uint64_t lanes_with_bit(const int32_t *words, int bit) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++) bits |= (uint64_t)(((uint32_t)words[i] >> bit) & 1u) << i;
    return bits;
}
inline uint64_t nonzero64(const uint8_t *p) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++) bits |= (uint64_t)(p[i] != 0) << i;
    return bits;
}
// x where the bit of the lane is set, else y (bits of lanes 0..W-1).
inline vf pick(uint64_t bits, vf x, vf y) {
    static const int32_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    vi own;
    memcpy(&own, bit, sizeof own);
    return ((own & (int32_t)bits) != 0) ? x : y;
}

inline void halves(const uint16_t *from, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i++) to[i] = from_f16(from[i]);
}
inline void to_halves(const float *from, float factor, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) to[i] = to_f16(from[i] * factor);
}

// to[j][i] = from[i][j] for 16 x 16 items of 32 bits; strides in items.
inline void transpose16(const void *from, int64_t ld, void *to, int64_t ldt) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) memcpy((char *)to + (j * ldt + i) * 4, (const char *)from + (i * ld + j) * 4, 4);
}

}  // namespace
