// Products in the dtype of a level: fp32, or bf16 with fp32 sums (`bf16.h`). All that differs between the two is a member of
// Products<BF>; kernels are written once, on top of it.
#pragma once
#include "gemm.h"
#include "rows.h"

namespace {

// A product is C[M][N] (+)= A[M][K] B[K][N]. PAIR items fill 32 bits: B interleaves so many of its rows, [K/PAIR][N][PAIR],
// and transpositions keep the items of a pair together. K is a multiple of GRAIN, M of TILE, N of LANES; packed rows have a
// multiple of PADDED items.
template <bool BF> struct Products;

template <> struct Products<false> {
    typedef float Item;
    static constexpr int32_t DTYPE = SF_F32;
    static constexpr int PAIR = 1, GRAIN = 1, TILE = 1, LANES = W, PADDED = 1;
    static constexpr bool FINE = true;  // accuracy of exp2v: weights stay fp32; bf16 rounds them next

    static void prepare_thread() {}
    // Item (i,k) of A lies at a[i * ai + k * ak]; one of the strides is 1.
    static void multiply(int64_t M, int64_t N, int64_t K, const Item *a, int64_t ai, int64_t ak, const Item *b, int64_t ldb,
                         float *c, int64_t ldc, Into into, Reach rows = NEAR) {
        gemm_f32(M, N, K, a, ai, ak, b, ldb, c, ldc, into, rows);
    }
    // C = A B for rows of A, which may be long.
    static void score(int64_t M, int64_t N, int64_t K, const Item *a, int64_t lda, const Item *b, int64_t ldb, float *c,
                      int64_t ldc, Reach rows = NEAR) {
        gemm_rows_f32(M, N, K, a, lda, b, ldb, c, ldc, rows);
    }
    // A row of n items and zeros up to `whole`; zeros alone for null.
    static void copy(const SfView &v, const char *row, int32_t dtype, int64_t n, Item *to, int64_t whole) {
        if (row) read_row(v, row, dtype, n, to);
        else n = 0;
        if (n < whole) memset(to + n, 0, (whole - n) * sizeof *to);  // skips the call for short rows
    }
    static float value(Item x) { return x; }

    // ---- one query at a time (`few.h`): part: W items of a row from d on, zeros from `end` on; dots: W scores
    static vf part(const Item *row, int64_t d, int64_t end) { return read(row + d, end - d); }
    static vf dots(const Item *x, const Item *const *rows, int64_t D) {  // x is padded with zeros
        vf each[W] = {};
#pragma GCC unroll 16
        for (int i = 0; i < W; i += 4) {
            const Item *r[4] = {rows[i], rows[i + 1], rows[i + 2], rows[i + 3]};
            int64_t d = 0;
            for (; d + W <= D; d += W)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) each[i + j] += load(x + d) * load(r[j] + d);
            if (d < D)
                for (int j = 0; j < 4; j++) each[i + j] += load(x + d) * part(r[j], d, D);
        }
        return sums(each);
    }

    // ---- few queries, many keys (`dots.h`). QUAD: items of 16 bytes. KEYS: rows that stay in the first cache level while all
    // queries read them. SPLIT: keys of a piece, whose scores for 32 rows, and K of four heads, stay in a near cache level
    static constexpr int QUAD = 4, KEYS = 32, SPLIT = 128;

    static vf dot(vf sum, vf x, vf y) { return sum + x * y; }
    static vf read(const Item *p, int64_t n) { return n >= W ? load(p) : load_first(p, most<int64_t>(n, 0)); }
    template <int C> static void values(const char *const *rows, int64_t d, int64_t n, vf *y) {
        const Item *x = (const Item *)rows[0] + d;
#pragma GCC unroll 4
        for (int i = 0; i < C; i++) y[i] = kept(read(x + i * W, n - i * W));
    }
    static void put(Item *to, vf weights) { store(to, weights); }
    static vf weight(const Item *p) { return set1(*p); }
    // Hook for a faster expansion of records: fp32 has none.
    template <class Record, class From, class To> static bool expand(const Record &, int, From, To) { return false; }
};

}  // namespace

#if SF_HAS_BF16
#include "bf16.h"
#endif
