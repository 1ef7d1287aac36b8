// Reading and writing rows of user tensors, of any storage type and strides.
#pragma once
#include "abi.h"
#include "vec.h"

namespace {

typedef uint16_t bf;

inline int64_t element(int32_t dtype) { return dtype == SF_F32 ? 4 : 2; }
inline const char *row_of(const SfView &v, int64_t b, int64_t h, int64_t t, int32_t dtype) {
    return (const char *)v.data + (b * v.batch + h * v.head + t * v.row) * element(dtype);
}
template <class Read> inline void read_items(const void *src, int64_t lane, int64_t n, float *to, Read read) {
    if (lane == 1) for (int64_t i = 0; i < n; i++) to[i] = read(src, i);
    else for (int64_t i = 0; i < n; i++) to[i] = read(src, i * lane);
}
inline void read_row(const SfView &v, const char *src, int32_t dtype, int64_t n, float *to) {
    if (dtype == SF_F32 && v.lane == 1) memcpy(to, src, n * 4);
    else if (dtype == SF_F32) read_items(src, v.lane, n, to, [](const void *p, int64_t i) { return ((const float *)p)[i]; });
    else if (dtype == SF_BF16) read_items(src, v.lane, n, to, [](const void *p, int64_t i) { return from_bf16(((const bf *)p)[i]); });
    else if (v.lane == 1) halves((const bf *)src, n, to);
    else read_items(src, v.lane, n, to, [](const void *p, int64_t i) { return from_f16(((const bf *)p)[i]); });
}
// Writes factor * from[0 .. n - 1].
template <class Item, class Write>
inline void write_items(Item *dst, int64_t lane, int64_t n, const float *from, float factor, Write write) {
    if (lane == 1) for (int64_t i = 0; i < n; i++) dst[i] = write(from[i] * factor);
    else for (int64_t i = 0; i < n; i++) dst[i * lane] = write(from[i] * factor);
}
inline void write_row(const SfView &v, int64_t b, int64_t h, int64_t t, int32_t dtype, int64_t n, const float *from,
                      float factor) {
    char *dst = (char *)row_of(v, b, h, t, dtype);
    if (dtype == SF_F32) write_items((float *)dst, v.lane, n, from, factor, [](float x) { return x; });
    else if (dtype == SF_BF16) write_items((bf *)dst, v.lane, n, from, factor, to_bf16);
    else if (v.lane == 1) to_halves(from, factor, n, (bf *)dst);
    else write_items((bf *)dst, v.lane, n, from, factor, to_f16);
}
inline bool all_finite(const bf *x, int64_t n) {
    uint32_t odd = 0;
    for (int64_t i = 0; i < n; i++) odd |= (uint32_t)((x[i] & 0x7f80u) == 0x7f80u);
    return !odd;
}
inline bool finite_row(const float *x, int64_t n) {
    float z = 0;
    for (int64_t i = 0; i < n; i++) z += x[i] * 0.f;
    return z == 0;
}

}  // namespace
