// Records: rows of K and V in fewer bytes. Either the largest items of a row and bits that say where they belong, or 8-bit
// integers and a scale, or both. Layout: bits (one per item, in words of 64; if items are dropped), scale (of int8), items.
#pragma once
#include "rows.h"

namespace {

constexpr int32_t SF_I8 = 3;  // dtype of the items of a record, beside those of SfDtype

inline int64_t item_bytes(int32_t item) { return item == SF_I8 ? 1 : element(item); }
inline int64_t record_bits(const SfRecord &r, int64_t D) { return r.kept < D ? (D + 63) / 64 * 8 : 0; }
inline int64_t record_bytes(const SfRecord &r, int64_t D) {
    return record_bits(r, D) + (r.item == SF_I8 ? 4 : 0) + r.kept * item_bytes(r.item);
}
// Bytes of the element that strides of K or V count: 1 for records.
inline int64_t stride_bytes(const SfRecord &r, int32_t dtype) { return r.bytes ? 1 : element(dtype); }

inline float read_item(const char *p, int32_t item, float scale) {
    uint16_t half;
    if (item == SF_I8) return (float)*(const int8_t *)p * scale;
    if (item == SF_F32) { float x; memcpy(&x, p, 4); return x; }
    memcpy(&half, p, 2);
    return item == SF_BF16 ? from_bf16(half) : from_f16(half);
}

#if SF_MASKS
// Loads 16 items, of which `some` are wanted; the others are zeros, and not read.
template <int32_t ITEM> inline __m512 read_items(const char *p, __mmask16 some, float scale, bool halves) {
    if (ITEM == SF_F32) return _mm512_maskz_loadu_ps(some, p);
    if (ITEM == SF_I8) {
        const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, p))) * scale;
        return halves ? _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)) : x;
    }
    const __m256i half = _mm256_maskz_loadu_epi16(some, p);
    return ITEM == SF_F16 ? _mm512_cvtph_ps(half) : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
template <class P> inline void put_items(typename P::Item *to, int64_t n, __m512 x) {
    if constexpr (P::PAIR > 1) P::put_items(to, n, (vf)x);
    else if (n >= 16) _mm512_storeu_ps(to, x);
    else _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), x);
}
#endif

// Whether a record may be read without looking at every item: it has no more bits than items, and 64 bytes behind its last
// item belong to the tensor too, which ends at `end`.
inline bool is_plain(const char *row, const SfRecord &r, int64_t bits, uintptr_t end) {
    int64_t count = bits ? 0 : r.kept;
    for (int64_t i = 0; i < bits; i += 8) {
        uint64_t word;
        memcpy(&word, row + i, 8);
        count += __builtin_popcountll(word);
    }
    return count <= r.kept && (int64_t)(end - (uintptr_t)row) >= r.bytes + 64;
}

// Expands a record to D items, and zeros up to `whole`. Bits beyond D, or beyond the stored items, are ignored.
template <class P, int32_t ITEM>
inline void expand_as(const char *row, const SfRecord &r, uintptr_t end, bool halves, int64_t D, typename P::Item *to,
                      int64_t whole) {
    const int64_t bits = record_bits(r, D), size = item_bytes(ITEM);
    const char *items = row + bits;
    float scale = 1;
    if (ITEM == SF_I8) memcpy(&scale, items, 4), items += 4;
    int64_t left = r.kept, d = 0;
#if SF_MASKS
    const int64_t plain = D % 64 == 0 && is_plain(row, r, bits, end) ? D : 0;
    for (; d < plain; d += 64) {  // the places of all four parts are known at once, and nothing has to be masked
        uint64_t word = ~0ull;
        if (bits) memcpy(&word, row + d / 8, 8);
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += 16) {
            const int64_t before = i ? __builtin_popcountll(word << (64 - i)) : 0;
            const __m512 x = read_items<ITEM>(items + before * size, (__mmask16)~0, scale, halves);
            uint16_t mine;  // (Read again: to shift a mask costs as much as to expand.)
            if (bits) memcpy(&mine, row + (d + i) / 8, 2);
            put_items<P>(to + d + i, 16, bits ? _mm512_maskz_expand_ps(mine, x) : x);
        }
        items += __builtin_popcountll(word) * size;
    }
#endif
    for (; d < D; d += 64) {
        uint64_t word = ~0ull;
        if (bits) memcpy(&word, row + d / 8, 8);
        const int64_t some = least<int64_t>(64, D - d);
        if (some < 64) word &= (1ull << some) - 1;
#if SF_MASKS
        for (int64_t i = 0; i < some; i += 16, word >>= 16) {
            // (No branch on `left`: it would be mispredicted half of the time.)
            const __mmask16 mine = (__mmask16)word, there = (__mmask16)_bzhi_u32(0xffff, (uint32_t)least<int64_t>(left, 16));
            put_items<P>(to + d + i, some - i, _mm512_maskz_expand_ps(mine, read_items<ITEM>(items, there, scale, halves)));
            const int64_t n = __builtin_popcount(mine);
            items += n * size;
            left = most<int64_t>(left - n, 0);
        }
#else
        memset(to + d, 0, some * sizeof *to);
        for (; word && left > 0; word &= word - 1, left--, items += size) {
            const float x = read_item(items, ITEM, scale);
            to[d + __builtin_ctzll(word)] = ITEM == SF_I8 && halves ? from_f16(to_f16(x)) : x;
        }
#endif
    }
    if (whole > D) memset(to + D, 0, (whole - D) * sizeof *to);
}

// Expands n records: `from(i)` is the address of record i (null: zeros), `to(i)` that of its row.
struct RecordRows {
    SfRecord record;
    uintptr_t end;  // address behind the tensor that the records belong to
    bool halves;  // rows are fp16: integer * scale is then rounded to fp16
    int64_t D, whole;

    template <class P, int32_t ITEM, class From, class To> void expand_all(int n, From from, To to) const {
        for (int i = 0; i < n; i++)
            if (const char *row = from(i)) expand_as<P, ITEM>(row, record, end, halves, D, to(i), whole);
            else memset(to(i), 0, whole * sizeof(typename P::Item));
    }
    template <class P, class From, class To> void expand(int n, From from, To to) const {
        if (P::expand(*this, n, from, to)) return;
        if (record.item == SF_F32) expand_all<P, SF_F32>(n, from, to);
        else if (record.item == SF_BF16) expand_all<P, SF_BF16>(n, from, to);
        else if (record.item == SF_F16) expand_all<P, SF_F16>(n, from, to);
        else expand_all<P, SF_I8>(n, from, to);
    }
};

}  // namespace
