// Bias of (query, key) pairs: ALiBi, -slope * |distance of positions|; a number per distance of tokens; a matrix [B,Hq,Tq,Tk].
#pragma once
#include "dropout.h"

namespace {

// Fills `to` [keys of the chunk][64 queries] with the bias; 0 in lanes without a query.
inline void fill_pairs(const SfCall &c, const Rules &r, const Queries &q, const Chunk &k, int64_t b, int64_t h, float *to) {
    const float *slope = slice<float>(c.alibi, b, h, c.Hq), *by = slice<float>(c.distance, b, h, c.Hq);
    for (int j = k.a; j < k.b; j++) {
        float *row = to + j * BQ;
        const int64_t token = r.key_token(k.gather ? k.gather[j] : k.base + j);
        const int32_t at = saturate((r.k_pos && token >= 0 ? r.k_pos[token] : token) - r.base);
        if (!slope) memset(row, 0, BQ * 4);
        for (int i = 0; slope && i < BQ; i++) {
            const int32_t own = q.pos[i];  // the distance of two 32-bit numbers fits 32 bits without a sign
            const uint32_t far = own > at ? (uint32_t)own - (uint32_t)at : (uint32_t)at - (uint32_t)own;
            row[i] = -*slope * (float)far;
        }
        if (!by || token < 0) continue;
        const float *line = by + c.Tk - 1 - token;
        if (!r.q_order)
            for (int i = 0; i < q.lanes; i++) row[i] += line[q.token[0] + i];
        else
            for (int i = 0; i < q.lanes; i++)
                if (q.real >> i & 1) row[i] += line[q.token[i]];
    }
    if (!c.pair.data) return;
    const bool in_order = !k.gather && !r.k_order;
    const int64_t item = element(c.pair_dtype);
    for (int i = 0; i < q.lanes; i++) {
        if (!(q.real >> i & 1)) continue;
        float line[BK];
        const char *row = row_of(c.pair, b, h, q.token[i], c.pair_dtype);
        if (in_order) read_row(c.pair, row + (k.base + k.a) * c.pair.lane * item, c.pair_dtype, k.b - k.a, line + k.a);
        else
            for (int j = k.a; j < k.b; j++) {
                const int64_t t = r.key_token(k.gather ? k.gather[j] : k.base + j);
                line[j] = 0;
                if (t >= 0) read_row(c.pair, row + t * c.pair.lane * item, c.pair_dtype, 1, line + j);
            }
        for (int j = k.a; j < k.b; j++) to[j * BQ + i] += line[j];
    }
}

}  // namespace
