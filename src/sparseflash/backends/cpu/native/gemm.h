// C[M][N] (+)= A[M][K] B[K][N]: the products of attention, sized for the first-level cache.
#pragma once
#include "vec.h"

namespace {

// What becomes of C: overwritten, or added to; FAR where it lies beyond the nearest cache levels, so that a block
// asks for its share of it before it computes. C is added last: the sum of a long row is one of short sums, so equal
// terms, whose roundings all go one way, do not drift with the length.
enum Into { SET, ADD, ADD_FAR };
// Where the rows of A lie: with FAR a block asks for those of the next block, while its own are at hand.
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

// A[M][K], or with ACROSS its transpose, broadcast; rows of B and C are whole vectors; MR x NV accumulators stay in
// registers. One stride of A is known to be 1: with two unknown ones half the time goes into addresses.
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

// A(i,k) at a[i*ai + k*ak], where one of the strides is 1; N is a multiple of W.
inline void gemm_f32(int64_t M, int64_t N, int64_t K, const float *a, int64_t ai, int64_t ak, const float *b,
                     int64_t ldb, float *c, int64_t ldc, Into into, Reach rows = NEAR) {
    if (ak == 1) strips_f32<false>(M, N, K, a, ai, b, ldb, c, ldc, into, rows);
    else strips_f32<true>(M, N, K, a, ak, b, ldb, c, ldc, into, rows);
}

// C = A B for rows of A. Over more than 256 numbers it is a sum of shorter products, of 128 each: what is rounded is what
// was summed so far, and the part of B stays in the nearest cache.
inline void gemm_rows_f32(int64_t M, int64_t N, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb,
                          float *c, int64_t ldc, Reach rows = NEAR) {
    const int64_t part = K > 256 ? 128 : K;
    for (int64_t k = 0; k < K; k += part)
        gemm_f32(M, N, least(part, K - k), a + k, lda, 1, b + k * ldb, ldb, c, ldc, k ? ADD : SET, rows);
}

#if SF_HAS_BF16

// bf16: A row-major with pairs along K, B as [K/2][N][2]; fp32 accumulators.
#if SF_AMX
#if SF_AMX_EMULATED
}  // namespace
#include "amx_emulated.h"
namespace {
#endif
constexpr int GRAIN = 32;                                    // M, N and K come in multiples of it

struct alignas(64) TileConfig { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; };
inline void prepare_thread() {
    TileConfig t;
    memset(&t, 0, sizeof t);
    t.palette = 1;
    for (int i = 0; i < 8; i++) { t.bytes[i] = 64; t.rows[i] = 16; }
    _tile_loadconfig(&t);
}

inline void gemm_bf16(int64_t M, int64_t N, int64_t K, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb,
                      float *c, int64_t ldc, Into into, Reach = NEAR) {
    int64_t sa = lda * 2, sb = ldb * 4, sc = ldc * 4;        // strides in bytes; ldb counts pairs
    for (int64_t i = 0; i < M; i += 32)
        for (int64_t j = 0; j < N; j += 32) {
            float *p = c + i * ldc + j;
            if (into) {
                _tile_loadd(0, p, sc); _tile_loadd(1, p + 16, sc);
                _tile_loadd(2, p + 16 * ldc, sc); _tile_loadd(3, p + 16 * ldc + 16, sc);
            } else {
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            }
            for (int64_t k = 0; k < K; k += 32) {
                const uint16_t *x = a + i * lda + k, *y = b + (k / 2) * ldb * 2 + j * 2;
                _tile_loadd(4, x, sa); _tile_loadd(5, x + 16 * lda, sa);
                _tile_loadd(6, y, sb); _tile_loadd(7, y + 32, sb);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, p, sc); _tile_stored(1, p + 16, sc);
            _tile_stored(2, p + 16 * ldc, sc); _tile_stored(3, p + 16 * ldc + 16, sc);
        }
}
#else
constexpr int GRAIN = 2;
inline void prepare_thread() {}

template <int MR, int NV>
inline void block_bf16(int64_t K2, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                       int64_t ldc, Into into, Reach rows) {
    __m512 x[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) x[i][j] = _mm512_setzero_ps();
    if (into == ADD_FAR) fetch<MR, NV * 64>(c, ldc);
    if (rows == FAR) fetch_rows<MR>(a + MR * lda, lda, 2 * K2);
    for (int64_t k = 0; k < K2; k++) {
        __m512i y[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) y[j] = _mm512_loadu_si512(b + (k * ldb + j * 16) * 2);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            int32_t pair;
            memcpy(&pair, a + i * lda + 2 * k, 4);
            __m512i s = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) x[i][j] = _mm512_dpbf16_ps(x[i][j], (__m512bh)s, (__m512bh)y[j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
            float *to = c + i * ldc + j * 16;
            _mm512_storeu_ps(to, into ? _mm512_add_ps(x[i][j], _mm512_loadu_ps(to)) : x[i][j]);
        }
}

template <int NV>
inline void strip_bf16(int64_t M, int64_t K2, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                       int64_t ldc, Into into, Reach rows) {
    constexpr int MR = NV == 4 ? 6 : NV == 3 ? 8 : 12;
    int64_t i = 0;
    for (; i + MR <= M; i += MR) block_bf16<MR, NV>(K2, a + i * lda, lda, b, ldb, c + i * ldc, ldc, into, rows);
    if (MR >= 8 && i + 4 <= M) { block_bf16<4, NV>(K2, a + i * lda, lda, b, ldb, c + i * ldc, ldc, into, rows); i += 4; }
    for (; i + 2 <= M; i += 2) block_bf16<2, NV>(K2, a + i * lda, lda, b, ldb, c + i * ldc, ldc, into, rows);
    if (i < M) block_bf16<1, NV>(K2, a + i * lda, lda, b, ldb, c + i * ldc, ldc, into, rows);
}

inline void gemm_bf16(int64_t M, int64_t N, int64_t K, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb,
                      float *c, int64_t ldc, Into into, Reach rows = NEAR) {
    int64_t n = 0, K2 = K / 2;
    for (; n + 64 <= N; n += 64, rows = NEAR) strip_bf16<4>(M, K2, a, lda, b + 2 * n, ldb, c + n, ldc, into, rows);
    if (n + 48 <= N) { strip_bf16<3>(M, K2, a, lda, b + 2 * n, ldb, c + n, ldc, into, rows); n += 48; }
    if (n + 32 <= N) { strip_bf16<2>(M, K2, a, lda, b + 2 * n, ldb, c + n, ldc, into, rows); n += 32; }
    if (n + 16 <= N) strip_bf16<1>(M, K2, a, lda, b + 2 * n, ldb, c + n, ldc, into, rows);
}
#endif
#else
constexpr int GRAIN = 1;
#endif  // SF_HAS_BF16

}  // namespace
