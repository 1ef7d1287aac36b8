// What the products read: keys of a head in row space, and the queries of a block with rows as lanes.
#pragma once
#include "scratch.h"

namespace {

#if SF_HAS_BF16
// Two rows of fp32 to bf16: as pairs along rows [64][2], or each on its own.
inline void store_pairs(bf *to, __m512 even, __m512 odd) {
    alignas(64) static const uint16_t mix[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(mix), both));
}
// Two rows of 32 bf16 as pairs along rows [32][2].
inline void mix_rows(bf *to, __m512i even, __m512i odd) {
    alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    alignas(64) static const uint16_t high[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                  24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, _mm512_load_si512(low), odd));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(even, _mm512_load_si512(high), odd));
}
#endif

inline int64_t common_multiple(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) { int64_t t = x % y; x = y; y = t; }
    return a / x * b;
}

// ---------------------------------------------------------------- keys of a head, in row space

// fp32: rows of K and V, in the user's memory where its layout allows, else packed. bf16: rows of K (and V for the
// backward), V^T (forward) or K^T (backward) in blocks [BK keys]: [D][BK]. Lanes and rows are padded with zeros.
// ROWS_ONLY: rows of both and no more, for tiles of few queries.
struct Keys {
    const float *k, *v;
    const bf *kb, *vb, *vt, *kt;
    int64_t ldk, ldv;
    bool tame;  // no inf or NaN anywhere (known for packed bf16 only): then 0 * x is 0
};

#if SF_AMX
constexpr bool WHOLE_TILES = true;  // of padded rows
#else
constexpr bool WHOLE_TILES = false;
#endif

template <bool BF, bool BACKWARD> struct Packed {
    int64_t heads = 1, rows = 0, Dk = 0, Dv = 0;  // packed heads; rows rounded up to BK; padded dimensions
    int64_t batches = 1;                          // 1 where all sequences read the same rows of one pool
    bool copy_k = false, copy_v = false, v_rows = false, columns = false;
    Buffer<float> k, v;
    Buffer<bf> kb, vb, vt, kt;
    Buffer<char> wild;

    // Packed head of a query head: the pair of its KV head and its head of k_order.
    int64_t head(const SfCall &c, int64_t h) const { return h * heads / c.Hq; }

    int make(const SfCall &c, SfParallel parallel, bool rows_only = false) {
        const SfPlan &p = c.plan;
        heads = p.k_order.data ? common_multiple(c.Hkv, p.k_order.heads) : c.Hkv;
        rows = round_up(p.k_rows, BK);
        batches = c.Bk == 1 && (!p.k_order.data || p.k_order.batch == 1) ? 1 : c.B;
        int64_t n = batches * heads * rows;
        bool loose = p.k_order.data || c.dtype != (BF ? SF_BF16 : SF_F32);
        if (!BF) {
            Dk = c.D;
            Dv = c.Dv;
            copy_k = loose || c.k.lane != 1;
            copy_v = c.v.data && (loose || c.v.lane != 1);
            if (!copy_k && !copy_v) return 0;
            if ((copy_k && !k.make(n * Dk)) || (copy_v && !v.make(n * Dv))) return 1;
        } else {
            Dk = round_up(c.D, 32);
            Dv = round_up(c.Dv, 32);
            columns = !rows_only && (BACKWARD || c.v.data);
            v_rows = c.v.data && (BACKWARD || rows_only);
            bool tiles = WHOLE_TILES && !rows_only;
            copy_k = loose || tiles || c.k.lane != 1 || (!rows_only && c.D % 2);
            copy_v = v_rows && (loose || tiles || c.v.lane != 1 || (!rows_only && c.Dv % 2));
            if (!copy_k && !copy_v && !columns) return 0;
            if (copy_k && !kb.make(n * Dk)) return 1;
            if (copy_v && !vb.make(n * Dv)) return 1;
            if (columns && !(BACKWARD ? kt.make(n * Dk) : vt.make(n * Dv))) return 1;
            if (!wild.make(batches * heads)) return 1;
            memset(wild.p, 0, batches * heads);
        }
        int64_t blocks = rows / BK;
        auto task = [&](int64_t i, int) {
            int64_t block = i % blocks, slot = i / blocks;
            fill(c, slot / heads, slot % heads, slot, block * BK);
        };
        in_parallel(parallel, c.threads, batches * heads * blocks, task);
        return 0;
    }

    void fill(const SfCall &c, int64_t b, int64_t hp, int64_t slot, int64_t row0) {
        int64_t hq = hp * (c.Hq / heads), hkv = hp * c.Hkv / heads;
        Rules r(c, b, hq);
        for (int64_t j = 0; j < BK; j++) {
            int64_t row = row0 + j, at = slot * rows + row;
            int64_t t = row < c.plan.k_rows ? r.key_token(row) : -1;
            if (!BF) {
                if (copy_k) {
                    if (t >= 0) read_row(c.k, row_of(c.k, b, hkv, t, c.dtype), c.dtype, Dk, k + at * Dk);
                    else memset(k + at * Dk, 0, Dk * 4);
                }
                if (copy_v) {
                    if (t >= 0) read_row(c.v, row_of(c.v, b, hkv, t, c.dtype), c.dtype, Dv, v + at * Dv);
                    else memset(v + at * Dv, 0, Dv * 4);
                }
            } else {
                const bf *ks = t >= 0 ? (const bf *)row_of(c.k, b, hkv, t, SF_BF16) : nullptr;
                const bf *vs = v_rows && t >= 0 ? (const bf *)row_of(c.v, b, hkv, t, SF_BF16) : nullptr;
                if (copy_k) copy(ks, c.k.lane, c.D, kb + at * Dk, Dk);
                if (copy_v) copy(vs, c.v.lane, c.Dv, vb + at * Dv, Dv);
            }
        }
#if SF_HAS_BF16
        if (BF && columns) {
            bool fine = true;
            const SfView &x = BACKWARD ? c.k : c.v;
            int64_t D = BACKWARD ? c.D : c.Dv, Dp = round_up(D, 32);
            bf *block = (BACKWARD ? kt + 0 : vt + 0) + (slot * rows + row0) * Dp;
            const bf *src[BK];
            for (int64_t j = 0; j < BK; j++) {
                int64_t t = row0 + j < c.plan.k_rows ? r.key_token(row0 + j) : -1;
                src[j] = t >= 0 ? (const bf *)row_of(x, b, hkv, t, SF_BF16) : nullptr;
            }
            // 32 keys at a time: neighbours as pairs, then the pairs transposed
            alignas(64) bf line[2][SF_WIDEST], pair[16 * 2 * SF_WIDEST];
            for (int64_t j0 = 0; j0 < BK; j0 += 32) {
                for (int64_t j = 0; j < 32; j += 2) {
                    for (int s = 0; s < 2; s++) {
                        copy(src[j0 + j + s], x.lane, D, line[s], Dp);
                        fine &= all_finite(line[s], Dp);
                    }
                    for (int64_t d = 0; d < Dp; d += 32)
                        mix_rows(pair + (j / 2) * 2 * Dp + 2 * d, _mm512_load_si512(line[0] + d), _mm512_load_si512(line[1] + d));
                }
                for (int64_t d = 0; d < Dp; d += 16) transpose16(pair + 2 * d, Dp, block + d * BK + j0, BK / 2);
            }
            if (!fine) __atomic_store_n(&wild[slot], (char)1, __ATOMIC_RELAXED);
        }
#endif
    }

    static void copy(const bf *src, int64_t lane, int64_t n, bf *to, int64_t padded) {
        int64_t i = 0;
        if (src && lane == 1) { memcpy(to, src, n * 2); i = n; }
        else if (src) for (; i < n; i++) to[i] = src[i * lane];
        memset(to + i, 0, (padded - i) * 2);
    }

    Keys keys(const SfCall &c, int64_t b, int64_t h) const {
        int64_t hp = head(c, h), slot = (batches == 1 ? 0 : b) * heads + hp, hkv = hp * c.Hkv / heads, at = slot * rows;
        Keys x = {};
        x.ldk = copy_k ? Dk : c.k.row;
        x.ldv = copy_v ? Dv : c.v.row;
        if (!BF) {
            x.k = copy_k ? k + at * Dk : (const float *)row_of(c.k, b, hkv, 0, SF_F32);
            x.v = !c.v.data ? nullptr : copy_v ? v + at * Dv : (const float *)row_of(c.v, b, hkv, 0, SF_F32);
        } else {
            x.kb = copy_k ? kb + at * Dk : (const bf *)row_of(c.k, b, hkv, 0, SF_BF16);
            x.vb = v_rows ? (copy_v ? vb + at * Dv : (const bf *)row_of(c.v, b, hkv, 0, SF_BF16)) : nullptr;
            x.vt = columns && !BACKWARD ? vt + at * Dv : nullptr;
            x.kt = columns && BACKWARD ? kt + at * Dk : nullptr;
            x.tame = !columns || !wild[slot];
        }
        return x;
    }
};

// ---------------------------------------------------------------- queries of a block

// Query-side operands of a block; lanes whose bit is not in `alive` read as zero. fp32: rows [64][padded D], and
// transposed [padded D][64].
inline void pack_lanes(const SfCall &c, const SfView &v, int64_t b, int64_t h, const Queries &q, uint64_t alive,
                       int64_t D, float *columns, float *rows) {
    int64_t Dn = round_up(D, 16);
    for (int i = 0; i < BQ; i++) {
        float *x = rows + i * Dn;
        int64_t n = alive >> i & 1 ? D : 0;
        if (n) read_row(v, row_of(v, b, h, q.token[i], c.dtype), c.dtype, D, x);
        memset(x + n, 0, (Dn - n) * 4);
    }
    for (int64_t d = 0; d < Dn; d += 16)
        for (int i = 0; i < BQ; i += 16) transpose16(rows + i * Dn + d, Dn, columns + d * BQ + i, BQ);
}
#if SF_HAS_BF16
// bf16: columns [D/2][64][2] (pairs along D) and, for the backward, rows [32][padded D][2] (pairs along queries).
inline void pack_lanes(const SfView &v, int64_t b, int64_t h, const Queries &q, uint64_t alive, int64_t D, bf *columns,
                       bf *rows) {
    int64_t Dp = round_up(D, 32);
    alignas(64) bf line[16 * SF_WIDEST];
    for (int i0 = 0; i0 < BQ; i0 += 16) {
        for (int i = 0; i < 16; i++) {
            const bf *x = alive >> (i0 + i) & 1 ? (const bf *)row_of(v, b, h, q.token[i0 + i], SF_BF16) : nullptr;
            Packed<true, true>::copy(x, v.lane, D, line + i * Dp, Dp);
        }
        for (int64_t d = 0; d < Dp; d += 32) transpose16(line + d, Dp / 2, columns + d * BQ + 2 * i0, BQ);
        if (!rows) continue;
        for (int i = 0; i < 16; i += 2)
            for (int64_t d = 0; d < Dp; d += 32)
                mix_rows(rows + ((i0 + i) / 2) * Dp * 2 + 2 * d, _mm512_load_si512(line + i * Dp + d),
                         _mm512_load_si512(line + (i + 1) * Dp + d));
    }
}
#endif

// A transposed result [D][64] as rows [64][padded D].
inline void lanes_to_rows(const float *columns, int64_t D, float *rows) {
    int64_t Dn = round_up(D, 16);
    for (int64_t d = 0; d < Dn; d += 16)
        for (int i = 0; i < BQ; i += 16) transpose16(columns + d * BQ + i, BQ, rows + i * Dn + d, Dn);
}

}  // namespace
