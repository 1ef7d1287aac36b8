// bf16 products with fp32 sums: dot products of pairs (AVX-512 BF16), or tiles (AMX). A has rows, with pairs along K; B is
// [K/2][N][2].
#pragma once
#include "records.h"

namespace {

#if SF_AMX
#if SF_AMX_EMULATED
}  // namespace
#include "amx_emulated.h"
namespace {
#endif
constexpr int K_OF_BF16 = 32, M_OF_BF16 = 32;  // K and M are multiples of these

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
constexpr int K_OF_BF16 = 2, M_OF_BF16 = 1;
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

template <> struct Products<true> {
    typedef bf Item;
    static constexpr int32_t DTYPE = SF_BF16;
    static constexpr int PAIR = 2, GRAIN = K_OF_BF16, TILE = M_OF_BF16, LANES = 32, PADDED = 32;
    static constexpr bool FINE = false;

    static void prepare_thread() { ::prepare_thread(); }
    static void multiply(int64_t M, int64_t N, int64_t K, const Item *a, int64_t ai, int64_t, const Item *b, int64_t ldb,
                         float *c, int64_t ldc, Into into, Reach rows = NEAR) {
        gemm_bf16(M, N, K, a, ai, b, ldb, c, ldc, into, rows);
    }
    static void score(int64_t M, int64_t N, int64_t K, const Item *a, int64_t lda, const Item *b, int64_t ldb, float *c,
                      int64_t ldc, Reach rows = NEAR) {
        gemm_bf16(M, N, K, a, lda, b, ldb, c, ldc, SET, rows);
    }
    static void copy(const SfView &v, const char *row, int32_t, int64_t n, Item *to, int64_t whole) {
        int64_t i = 0;
        if (row && v.lane == 1) { memcpy(to, row, n * 2); i = n; }
        else if (row) for (; i < n; i++) to[i] = ((const Item *)row)[i * v.lane];
        if (i < whole) memset(to + i, 0, (whole - i) * 2);
    }
    static float value(Item x) { return from_bf16(x); }

    // ---- fp32 to bf16: narrow: 32 items of a row; store_pairs: two rows interleaved as pairs [W][2]
    static __m512i narrow(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
    static void store(Item *to, __m512i x) { _mm512_storeu_si512(to, x); }
    static void store_pairs(Item *to, vf even, vf odd) {
        alignas(64) static const uint16_t mix[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        store(to, _mm512_permutexvar_epi16(_mm512_load_si512(mix), narrow(even, odd)));
    }
    // Interleaves two rows of 32 bf16 as pairs [32][2].
    static void mix_rows(Item *to, __m512i even, __m512i odd) {
        alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        alignas(64) static const uint16_t high[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
        store(to, _mm512_permutex2var_epi16(even, _mm512_load_si512(low), odd));
        store(to + 32, _mm512_permutex2var_epi16(even, _mm512_load_si512(high), odd));
    }
    static __m512i load(const Item *p) { return _mm512_loadu_si512(p); }
    static __m512i times(__m512i row, float factor) {
        auto half = [&](__m256i x) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16) * factor; };
        return narrow(half(_mm512_castsi512_si256(row)), half(_mm512_extracti64x4_epi64(row, 1)));
    }

    static vf part(const Item *row, int64_t d, int64_t end) {
        __mmask16 m = d + 16 <= end ? 0xffff : (__mmask16)((1u << (end - d)) - 1);
        return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row + d)), 16);
    }
    static vf dots(const Item *x, const Item *const *rows, int64_t D) {
        vf each[W] = {};
#pragma GCC unroll 16
        for (int i = 0; i < W; i += 4) {
            const Item *r[4] = {rows[i], rows[i + 1], rows[i + 2], rows[i + 3]};
            for (int64_t d = 0; d < D; d += 32) {
                __mmask32 m = d + 32 <= D ? ~0u : (1u << (D - d)) - 1;
                const vf y = (vf)load(x + d);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) each[i + j] = dot(each[i + j], (vf)_mm512_maskz_loadu_epi16(m, r[j] + d), y);
            }
        }
        return sums(each);
    }

    static constexpr int QUAD = 8, KEYS = 64, SPLIT = 256;

    static vf dot(vf sum, vf x, vf y) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }
    static __m512i read(const Item *p, int64_t n) {
        if (n >= 32) return load(p);
        return _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
    }
    template <int C> static void values(const char *const *rows, int64_t d, int64_t n, vf *y) {
        const Item *a = (const Item *)rows[0] + d, *b = (const Item *)rows[1] + d;
#pragma GCC unroll 2
        for (int i = 0; i < C; i += 2) {
            alignas(64) vf both[2];
            mix_rows((Item *)both, read(a + i * W, n - i * W), read(b + i * W, n - i * W));
            y[i] = kept(both[0]);
            y[i + 1] = kept(both[1]);
        }
    }
    static void put(Item *to, vf weights) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)weights)); }
    static vf weight(const Item *p) { int32_t x; memcpy(&x, p, 4); return (vf)_mm512_set1_epi32(x); }

    // Stores the first n of 16 items.
    static void put_items(Item *to, int64_t n, vf x) {
        if (n >= 16) put(to, x);
        else _mm256_mask_storeu_epi16(to, (__mmask16)((1u << n) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
    // Expands records of bf16 items 32 at a time, on processors with AVX-512 VBMI2.
    template <class Record, class From, class To> static bool expand(const Record &rows, int n, From from, To to) {
        if (rows.record.item != SF_BF16 || !__builtin_cpu_supports("avx512vbmi2")) return false;
        expand_wide(rows, n, from, to);
        return true;
    }
    template <class Record, class From, class To>
    __attribute__((noinline, target("avx512vbmi2"))) static void expand_wide(const Record &rows, int n, From from, To to) {
        const SfRecord &record = rows.record;
        const int64_t bits = record_bits(record, rows.D);
        for (int i = 0; i < n; i++) {
            const char *row = from(i);
            Item *out = (Item *)to(i);
            if (!row) {
                memset(out, 0, rows.whole * sizeof *out);
                continue;
            }
            const char *items = row + bits;
            int64_t left = record.kept, d = 0;
            const int64_t plain = bits && rows.D % 64 == 0 && is_plain(row, record, bits, rows.end) ? rows.D : 0;
            for (; d < plain; d += 64) {  // as in `expand_as`
                uint64_t word;
                memcpy(&word, row + d / 8, 8);
                const char *second = items + 2 * __builtin_popcount((uint32_t)word);
                _mm512_storeu_si512(out + d, _mm512_maskz_expand_epi16((__mmask32)word, _mm512_loadu_si512(items)));
                _mm512_storeu_si512(out + d + 32,
                                    _mm512_maskz_expand_epi16((__mmask32)(word >> 32), _mm512_loadu_si512(second)));
                items += 2 * __builtin_popcountll(word);
            }
            for (; d < rows.D; d += 32) {
                uint32_t word = ~0u;
                if (bits) memcpy(&word, row + d / 8, 4);
                const int64_t end = rows.D - d;
                if (end < 32) word &= (1u << end) - 1;
                const __mmask32 some = _bzhi_u32(~0u, (uint32_t)least<int64_t>(left, 32));
                const __m512i x = _mm512_maskz_expand_epi16(word, _mm512_maskz_loadu_epi16(some, items));
                if (end >= 32) _mm512_storeu_si512(out + d, x);
                else _mm512_mask_storeu_epi16(out + d, (1u << end) - 1, x);
                const int64_t count = __builtin_popcount(word);
                items += 2 * count;
                left = most<int64_t>(left - count, 0);
            }
            if (rows.whole > rows.D) memset(out + rows.D, 0, (rows.whole - rows.D) * sizeof *out);
        }
    }
};

}  // namespace
