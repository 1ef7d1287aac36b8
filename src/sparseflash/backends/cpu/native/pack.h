// Packing: keys of a head in row space, and the queries of a block with rows as lanes.
#pragma once
#include "scratch.h"

namespace {

inline int64_t common_multiple(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) { int64_t t = x % y; x = y; y = t; }
    return a / x * b;
}

// ---------------------------------------------------------------- keys of a head, in row space

// Rows of K and V of one head: in the user's memory where its layout allows, else packed. With bf16 `t` is V^T (forward, which
// has no rows of V) or K^T (backward), as blocks of BK keys, each [D][BK]. Lanes and rows are padded with zeros. ROWS_ONLY:
// rows of K and V and no `t`, for tiles of few queries. Example, BK 128, padded D 64: item d of key row 300 is
// t[256 * 64 + d * 128 + 44].
template <bool BF> struct Keys {
    typedef typename Products<BF>::Item Item;
    const Item *k, *v, *t;
    int64_t ldk, ldv;
    bool tame;  // t holds no inf or NaN: a weight of 0 then contributes exactly 0
};

constexpr int64_t MANY = 4 * BQ;  // queries from which on keys that lie apart, at most two a query, are copied

template <bool BF, bool BACKWARD> struct Packed {
    typedef Products<BF> P;
    typedef typename P::Item Item;
    int64_t heads = 1, rows = 0, Dk = 0, Dv = 0;  // packed heads; key rows rounded up to BK; padded dimensions
    int64_t batches = 1;                          // 1 where all sequences read the same rows of one pool, else B
    bool copy_k = false, copy_v = false, v_rows = false, columns = false;
    Buffer<Item> k, v, t;
    Buffer<char> wild;

    // Packed head of a query head: one per KV head, or per pair of KV head and head of k_order.
    int64_t head(const SfCall &c, int64_t h) const { return h * heads / c.Hq; }

    int make(const SfCall &c, SfParallel parallel, bool rows_only = false) {
        const SfPlan &p = c.plan;
        heads = p.k_order.data ? common_multiple(c.Hkv, p.k_order.heads) : c.Hkv;
        rows = round_up(p.k_rows, BK);
        batches = c.Bk == 1 && (!p.k_order.data || p.k_order.batch == 1) ? 1 : c.B;
        Dk = round_up(c.D, P::PADDED);
        Dv = round_up(c.Dv, P::PADDED);
        columns = BF && !rows_only && (BACKWARD || c.v.data);
        v_rows = c.v.data && (!BF || BACKWARD || rows_only);
        // AMX tiles need padded rows, bf16 pairs need an even D: both are reasons to copy
        const bool loose = p.k_order.data || c.dtype != P::DTYPE || (P::TILE > 1 && !rows_only);
        // Rows of other heads between those of one (BTHD memory): a block of keys is then in few sets of the first cache, and on
        // as many pages as it has rows. Each block is read for every tile that lists it; one copy costs less where these are many.
        // Not a pool, nor a long cache before a short chunk: of these few rows may be read.
        const bool often = !rows_only && c.Tq >= MANY && p.k_rows <= 2 * c.Tq;
        auto copied = [&](const SfView &x, int64_t D) {
            return loose || x.lane != 1 || (!rows_only && D % P::PAIR) || (often && x.row > D);
        };
        copy_k = copied(c.k, c.D);
        copy_v = v_rows && copied(c.v, c.Dv);
        const int64_t n = batches * heads * rows, blocks = rows / BK;
        if (!copy_k && !copy_v && !columns) return 0;
        if ((copy_k && !k.make(n * Dk)) || (copy_v && !v.make(n * Dv))) return 1;
        if (columns) {
            if (!t.make(n * (BACKWARD ? Dk : Dv)) || !wild.make(batches * heads)) return 1;
            memset(wild.p, 0, batches * heads);
        }
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
        auto token_at = [&](int64_t j) { return row0 + j < c.plan.k_rows ? r.key_token(row0 + j) : -1; };
        auto row_or_null = [&](const SfView &x, int64_t token) {
            return token >= 0 ? row_of(x, b, hkv, token, c.dtype) : nullptr;
        };
        for (int64_t j = 0, at = slot * rows + row0; j < BK; j++, at++) {
            const int64_t token = token_at(j);
            if (copy_k) P::copy(c.k, row_or_null(c.k, token), c.dtype, c.D, k + at * Dk, Dk);
            if (copy_v) P::copy(c.v, row_or_null(c.v, token), c.dtype, c.Dv, v + at * Dv, Dv);
        }
        if constexpr (BF) {
            if (!columns) return;
            bool fine = true;
            const SfView &x = BACKWARD ? c.k : c.v;
            const int64_t D = BACKWARD ? c.D : c.Dv, Dp = BACKWARD ? Dk : Dv;
            Item *block = t + (slot * rows + row0) * Dp;
            // 32 keys at a time: interleave adjacent keys as pairs, then transpose the pairs
            alignas(64) Item line[2][SF_WIDEST], pair[16 * 2 * SF_WIDEST];
            for (int64_t j0 = 0; j0 < BK; j0 += 32) {
                for (int64_t j = 0; j < 32; j += 2) {
                    for (int s = 0; s < 2; s++) {
                        P::copy(x, row_or_null(x, token_at(j0 + j + s)), c.dtype, D, line[s], Dp);
                        fine &= all_finite(line[s], Dp);
                    }
                    for (int64_t d = 0; d < Dp; d += 32)
                        P::mix_rows(pair + (j / 2) * 2 * Dp + 2 * d, P::load(line[0] + d), P::load(line[1] + d));
                }
                for (int64_t d = 0; d < Dp; d += 16) transpose16(pair + 2 * d, Dp, block + d * BK + j0, BK / 2);
            }
            if (!fine) __atomic_store_n(&wild[slot], (char)1, __ATOMIC_RELAXED);
        }
    }

    Keys<BF> keys(const SfCall &c, int64_t b, int64_t h) const {
        int64_t hp = head(c, h), slot = (batches == 1 ? 0 : b) * heads + hp, hkv = hp * c.Hkv / heads, at = slot * rows;
        Keys<BF> x = {};
        x.ldk = copy_k ? Dk : c.k.row;
        x.ldv = copy_v ? Dv : c.v.row;
        x.k = copy_k ? k + at * Dk : (const Item *)row_of(c.k, b, hkv, 0, P::DTYPE);
        if (v_rows) x.v = copy_v ? v + at * Dv : (const Item *)row_of(c.v, b, hkv, 0, P::DTYPE);
        if (columns) x.t = t + at * (BACKWARD ? Dk : Dv);
        x.tame = !columns || !wild[slot];
        return x;
    }
};

// ---------------------------------------------------------------- queries of a block

// Packs the queries (or dO) of a block; lanes whose bit is not in `alive` become zeros. Writes columns [padded D / PAIR][64]
// [PAIR] and, if given, rows as the backward multiplies them: [64 / PAIR][padded D][PAIR].
template <bool BF>
inline void pack_lanes(const SfCall &c, const SfView &v, int64_t b, int64_t h, const Queries &q, uint64_t alive, int64_t D,
                       typename Products<BF>::Item *columns, typename Products<BF>::Item *rows = nullptr) {
    typedef Products<BF> P;
    constexpr int64_t WIDE = 16 * P::PAIR;  // items of 16 lanes
    const int64_t Dp = round_up(D, WIDE);
    alignas(64) typename P::Item own[16 * SF_WIDEST];
    for (int i0 = 0; i0 < BQ; i0 += 16) {
        typename P::Item *line = !BF && rows ? rows + i0 * Dp : own;
        for (int i = 0; i < 16; i++) {
            const bool lives = alive >> (i0 + i) & 1;
            P::copy(v, lives ? row_of(v, b, h, q.token[i0 + i], c.dtype) : nullptr, c.dtype, D, line + i * Dp, Dp);
        }
        for (int64_t d = 0; d < Dp; d += WIDE) transpose16(line + d, Dp / P::PAIR, columns + d * BQ + P::PAIR * i0, BQ);
        if constexpr (BF) {
            for (int i = 0; rows && i < 16; i += 2)
                for (int64_t d = 0; d < Dp; d += WIDE)
                    P::mix_rows(rows + (i0 + i) * Dp + 2 * d, P::load(line + i * Dp + d), P::load(line + (i + 1) * Dp + d));
        }
    }
}

// Transposes a result [D][64] to rows [64][padded D].
inline void lanes_to_rows(const float *columns, int64_t D, float *rows) {
    int64_t Dn = round_up(D, 16);
    for (int64_t d = 0; d < Dn; d += 16)
        for (int i = 0; i < BQ; i += 16) transpose16(columns + d * BQ + i, BQ, rows + i * Dn + d, Dn);
}

}  // namespace
