// C[M][N] (+)= A[M][K] B[K][N] in fp32: the products of attention, whose operands fit the first-level cache.
#pragma once
#include "vec.h"

namespace {

// Whether a product overwrites C or adds to it; ADD_FAR: C lies beyond the nearest cache levels, so a block prefetches its
// share of C before it computes. C is added last: a long sum is one of short sums, so equal terms, whose roundings all go
// one way, do not drift with the length.
enum Into { SET, ADD, ADD_FAR };
// Where the rows of A lie: with FAR a block prefetches the next block's rows while it multiplies its own.
enum Reach { NEAR, FAR };

template <int ROWS, int BYTES> inline void fetch(const float *c, int64_t ldc) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int x = 0; x < BYTES; x += 64) __builtin_prefetch((const char *)(c + i * ldc) + x, 1);
}
template <int ROWS, class T> inline void fetch_rows(const T *a, int64_t lda, int64_t items) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
        for (int64_t x = 0; x < items; x += 64 / (int64_t)sizeof(T)) __builtin_prefetch(a + i * lda + x);
}

// One register block: MR x NV accumulators. A, [M][K] or with ACROSS [K][M], is broadcast; rows of B and C are whole
// vectors. One stride of A is 1 at compile time: with two unknown strides, half the time goes into addresses.
template <bool ACROSS, int MR, int NV>
inline void block_f32(int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                      Into into, Reach rows) {
    vf x[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) x[i][j] = (vf){};
    if (into == ADD_FAR) fetch<MR, NV * W * 4>(c, ldc);
    if (!ACROSS && rows == FAR) fetch_rows<MR>(a + MR * lda, lda, K);
    for (int64_t k = 0; k < K; k++) {
        vf y[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) y[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            vf s = set1(ACROSS ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) x[i][j] += s * y[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
            float *to = c + i * ldc + j * W;
            store(to, into ? x[i][j] + load(to) : x[i][j]);
        }
}

template <bool ACROSS, int NV>
inline void strip_f32(int64_t M, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                      int64_t ldc, Into into, Reach rows) {
    constexpr int MR = ROWS[NV];
    const int64_t ai = ACROSS ? 1 : lda;
    int64_t i = 0;
    for (; i + MR <= M; i += MR) block_f32<ACROSS, MR, NV>(K, a + i * ai, lda, b, ldb, c + i * ldc, ldc, into, rows);
    if (MR >= 8 && i + 4 <= M) { block_f32<ACROSS, 4, NV>(K, a + i * ai, lda, b, ldb, c + i * ldc, ldc, into, rows); i += 4; }
    for (; i + 2 <= M; i += 2) block_f32<ACROSS, 2, NV>(K, a + i * ai, lda, b, ldb, c + i * ldc, ldc, into, rows);
    if (i < M) block_f32<ACROSS, 1, NV>(K, a + i * ai, lda, b, ldb, c + i * ldc, ldc, into, rows);
}
template <bool ACROSS>
inline void strips_f32(int64_t M, int64_t N, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb,
                       float *c, int64_t ldc, Into into, Reach rows) {
    constexpr int NV = COLUMNS;
    int64_t n = 0;
    for (; n + NV * W <= N; n += NV * W, rows = NEAR)
        strip_f32<ACROSS, NV>(M, K, a, lda, b + n, ldb, c + n, ldc, into, rows);
    if constexpr (NV > 2) {
        if (n + 3 * W <= N) { strip_f32<ACROSS, 3>(M, K, a, lda, b + n, ldb, c + n, ldc, into, rows); n += 3 * W; }
        if (n + 2 * W <= N) { strip_f32<ACROSS, 2>(M, K, a, lda, b + n, ldb, c + n, ldc, into, rows); n += 2 * W; }
    }
    if (n + W <= N) strip_f32<ACROSS, 1>(M, K, a, lda, b + n, ldb, c + n, ldc, into, rows);
}

// A(i,k) lies at a[i*ai + k*ak]; one of the two strides is 1. N is a multiple of W.
inline void gemm_f32(int64_t M, int64_t N, int64_t K, const float *a, int64_t ai, int64_t ak, const float *b,
                     int64_t ldb, float *c, int64_t ldc, Into into, Reach rows = NEAR) {
    if (ak == 1) strips_f32<false>(M, N, K, a, ai, b, ldb, c, ldc, into, rows);
    else strips_f32<true>(M, N, K, a, ak, b, ldb, c, ldc, into, rows);
}

// C = A B for rows of A. If K > 256, sums partial products over 128 items each: a rounding error is then relative to the sum so
// far, and the part of B stays in the nearest cache.
inline void gemm_rows_f32(int64_t M, int64_t N, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb,
                          float *c, int64_t ldc, Reach rows = NEAR) {
    const int64_t part = K > 256 ? 128 : K;
    for (int64_t k = 0; k < K; k += part)
        gemm_f32(M, N, least(part, K - k), a + k, lda, 1, b + k * ldb, ldb, c, ldc, k ? ADD : SET, rows);
}

}  // namespace
