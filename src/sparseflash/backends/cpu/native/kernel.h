// Flash attention over a plan, forward and backward, for one instruction-set level.
//
// Everything is transposed: S^T = K Q^T has keys as rows and 64 queries as columns, so max, exp and sum are vertical
// and no horizontal reduction appears; O^T = V^T P^T. The backward walks query blocks in the outer loop and adds
// dK, dV into memory private to a task (one head, or a share of its tiles), so five products suffice, nothing is
// locked, and shares are summed in a fixed order: results repeat bit for bit.
#pragma once
#include <math.h>
#include <new>
#include "gemm.h"
#include "plan.h"

namespace {

typedef uint16_t bf;

template <class T> struct Buffer {
    T *p = nullptr;
    Buffer() {}
    Buffer(const Buffer &) = delete;
    ~Buffer() { sf_release(p); }
    bool make(int64_t n) {
        sf_release(p);
        p = (T *)sf_acquire(most<int64_t>(n, 1) * (int64_t)sizeof(T));
        return p != nullptr;
    }
    T *operator+(int64_t i) const { return p + i; }
    T &operator[](int64_t i) const { return p[i]; }
};

template <class F> inline void in_parallel(SfParallel parallel, int threads, int64_t tasks, F &f) {
    parallel(threads, tasks, [](void *x, int64_t task, int thread) { (*(F *)x)(task, thread); }, &f);
}

inline int64_t common_multiple(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) { int64_t t = x % y; x = y; y = t; }
    return a / x * b;
}

// ---------------------------------------------------------------- rows of user tensors

inline int64_t element(int32_t dtype) { return dtype == SF_F32 ? 4 : 2; }
inline const char *row_of(const SfView &v, int64_t b, int64_t h, int64_t t, int32_t dtype) {
    return (const char *)v.data + (b * v.batch + h * v.head + t * v.row) * element(dtype);
}
template <class Read> inline void read_items(const void *src, int64_t lane, int64_t n, float *to, Read read) {
    if (lane == 1) for (int64_t i = 0; i < n; i++) to[i] = read(src, i);
    else for (int64_t i = 0; i < n; i++) to[i] = read(src, i * lane);
}
inline void read_row(const SfView &v, const char *src, int32_t dtype, int64_t n, float *to) {
    if (dtype == SF_F32) read_items(src, v.lane, n, to, [](const void *p, int64_t i) { return ((const float *)p)[i]; });
    else if (dtype == SF_BF16) read_items(src, v.lane, n, to, [](const void *p, int64_t i) { return from_bf16(((const bf *)p)[i]); });
    else if (v.lane == 1) halves((const bf *)src, n, to);
    else read_items(src, v.lane, n, to, [](const void *p, int64_t i) { return from_f16(((const bf *)p)[i]); });
}
// Writes factor * from.
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

// ---------------------------------------------------------------- keys of a head, in row space

// fp32: rows of K and V, in the user's memory where its layout allows, else packed. bf16: rows of K (and V for the
// backward), V^T (forward) or K^T (backward) in blocks [BK keys]: [D][BK]. Lanes and rows are padded with zeros.
struct Keys {
    const float *k, *v;
    const bf *kb, *vb, *vt, *kt;
    int64_t ldk, ldv;
    bool tame;  // no inf or NaN anywhere (known for packed bf16 only): then 0 * x is 0
};

template <bool BF, bool BACKWARD> struct Packed {
    int64_t heads = 1, rows = 0, Dk = 0, Dv = 0;  // packed heads; rows rounded up to BK; padded dimensions
    int64_t batches = 1;                          // 1 where all sequences read the same rows of one pool
    bool copy_k = false, copy_v = false;
    Buffer<float> k, v;
    Buffer<bf> kb, vb, vt, kt;
    Buffer<char> wild;

    // Packed head of a query head: the pair of its KV head and its head of k_order.
    int64_t head(const SfCall &c, int64_t h) const { return h * heads / c.Hq; }

    int make(const SfCall &c, SfParallel parallel) {
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
#if SF_AMX
            copy_k = copy_v = true;
#else
            copy_k = loose || c.k.lane != 1 || c.D % 2;
            copy_v = loose || c.v.lane != 1 || c.Dv % 2;
            if (!copy_k) Dk = c.D;  // contraction length; columns of products are padded where they are stored
#endif
            if (copy_k && !kb.make(n * Dk)) return 1;
            if (BACKWARD && copy_v && !vb.make(n * Dv)) return 1;
            if (!(BACKWARD ? kt.make(n * round_up(c.D, 32)) : vt.make(c.v.data ? n * Dv : 0))) return 1;
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
                const bf *vs = BACKWARD && t >= 0 ? (const bf *)row_of(c.v, b, hkv, t, SF_BF16) : nullptr;
                if (copy_k) copy(ks, c.k.lane, c.D, kb + at * Dk, Dk);
                if (BACKWARD && copy_v) copy(vs, c.v.lane, c.Dv, vb + at * Dv, Dv);
            }
        }
#if SF_HAS_BF16
        if (BF && (BACKWARD || c.v.data)) {
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
            alignas(64) bf line[2][32 * 8], pair[16 * 64 * 8];
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
            x.vb = BACKWARD ? (copy_v ? vb + at * Dv : (const bf *)row_of(c.v, b, hkv, 0, SF_BF16)) : nullptr;
            x.vt = BACKWARD ? nullptr : vt + at * Dv;
            x.kt = BACKWARD ? kt + at * round_up(c.D, 32) : nullptr;
            x.tame = !wild[slot];
        }
        return x;
    }
};

// ---------------------------------------------------------------- scratch of one thread

template <bool BF> struct Scratch {
    Buffer<float> s, g, ot, qt, dot, qr, dor, kc, vc, keep;
    Buffer<bf> qtb, dotb, qrb, dorb, p, pr, dr, kcb, vcb, tc;
    uint64_t see[BK];
    float bias[BK], sums[BK];
    float m[BQ], l[BQ], lse2[BQ], delta[BQ];

    bool make(const SfCall &c, bool backward) {
        int64_t D = round_up(c.D, 32), Dv = round_up(c.Dv, 32), top = most(D, Dv);
        bool ok = s.make(BK * BQ) && ot.make(top * BQ) && keep.make(top + BK * top);
        if (BF) ok = ok && qtb.make(D * BQ) && p.make(BK * BQ) && kcb.make(BK * D) && vcb.make(BK * Dv) && tc.make(BK * top);
        else ok = ok && qt.make(D * BQ) && kc.make(BK * c.D) && vc.make(BK * c.Dv);
        if (!backward) return ok;
        ok = ok && g.make(BK * BQ);
        if (BF) return ok && dotb.make(Dv * BQ) && qrb.make(D * BQ) && dorb.make(Dv * BQ) && pr.make(BK * BQ) && dr.make(BK * BQ);
        return ok && dot.make(Dv * BQ) && qr.make(D * BQ) && dor.make(Dv * BQ);
    }
};

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
    alignas(64) bf line[16 * 256];
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

// ---------------------------------------------------------------- one chunk of keys

// What a chunk's products read, after gathering scattered keys and blanking keys that may not be touched.
struct Operands {
    const float *k, *v;
    const bf *kb, *vb, *t;
    int64_t ldk, ldv;
    bool own_rows;  // gradients go through a scratch tile
};

template <bool BF, bool BACKWARD>
inline Operands operands(const SfCall &c, const Keys &x, const Chunk &k, bool holes, const uint64_t *see,
                         Scratch<BF> &w) {
    Operands o = {};
    o.ldk = x.ldk;
    o.ldv = x.ldv;
    if (!BF) {
        o.k = x.k + k.base * x.ldk;
        o.v = x.v + k.base * x.ldv;
        bool blank = false;
        if (holes && x.v)
            for (int j = k.a; j < k.b && !blank; j++)
                if (!see[j]) {
                    int64_t row = k.gather ? k.gather[j] : k.base + j;
                    blank = !finite_row(x.v + row * x.ldv, c.Dv) || !finite_row(x.k + row * x.ldk, c.D);
                }
        if (k.gather || blank) {
            for (int j = k.a; j < k.b; j++) {
                int64_t row = k.gather ? k.gather[j] : k.base + j;
                bool hide = holes && !see[j];
                if (hide) memset(w.kc + j * c.D, 0, c.D * 4), memset(w.vc + j * c.Dv, 0, c.Dv * 4);
                else {
                    memcpy(w.kc + j * c.D, x.k + row * x.ldk, c.D * 4);
                    if (x.v) memcpy(w.vc + j * c.Dv, x.v + row * x.ldv, c.Dv * 4);
                }
            }
            o.k = w.kc.p; o.ldk = c.D;
            o.v = w.vc.p; o.ldv = c.Dv;
        }
    } else {
#if SF_HAS_BF16
        const int64_t Dk = round_up(c.D, 32), Dv = round_up(c.Dv, 32), Dt = BACKWARD ? Dk : Dv;
        const bf *t = BACKWARD ? x.kt : x.vt;
        o.kb = x.kb + k.base * x.ldk;
        o.vb = BACKWARD ? x.vb + k.base * x.ldv : nullptr;
        o.t = t + k.base * Dt;
        if (k.gather) {
            int64_t nk = least(Dk, x.ldk == c.k.row ? c.D : x.ldk), nv = least(Dv, x.ldv == c.v.row ? c.Dv : x.ldv);
            memset(w.tc.p, 0, BK * Dt * 2);
            for (int j = k.a; j < k.b; j++) {
                if (holes && !see[j]) {
                    memset(w.kcb + j * Dk, 0, Dk * 2);
                    memset(w.vcb + j * Dv, 0, Dv * 2);
                    continue;
                }
                int64_t row = k.gather[j];
                Packed<BF, BACKWARD>::copy(x.kb + row * x.ldk, 1, nk, w.kcb + j * Dk, Dk);
                if (BACKWARD) Packed<BF, BACKWARD>::copy(x.vb + row * x.ldv, 1, nv, w.vcb + j * Dv, Dv);
                const bf *column = t + round_down(row, BK) * Dt + row % BK;
                for (int64_t d = 0; d < Dt; d++) w.tc[d * BK + j] = column[d * BK];
            }
            o.kb = w.kcb.p; o.ldk = Dk;
            o.vb = w.vcb.p; o.ldv = Dv;
            o.t = w.tc.p;
        } else if (!x.tame && (holes || k.a % GRAIN || k.b % GRAIN)) {
            for (int64_t d = 0; d < Dt; d++)
                for (int j = 0; j < BK; j++)
                    w.tc[d * BK + j] = j >= k.a && j < k.b && (!holes || see[j]) ? o.t[d * BK + j] : (bf)0;
            o.t = w.tc.p;
        }
        o.own_rows = k.gather || (GRAIN > 2 && (k.a % GRAIN || k.b % GRAIN));
#endif
    }
    return o;
}

struct Logits {
    float factor;         // what the softmax multiplies scores with (base 2)
    bool bent;            // scores are transformed before: softcap, bias, or a scale that is not positive
    float inner, outer;   // tanh(score * inner) * outer, with a softcap

    explicit Logits(const SfCall &c) {
        bent = c.softcap > 0 || c.key_bias.data || !(c.scale * LOG2E > 0);
        inner = c.softcap > 0 ? c.scale / c.softcap : c.scale * LOG2E;
        outer = c.softcap * LOG2E;
        factor = bent ? 1.f : c.scale * LOG2E;
    }
    void bias(const Rules &r, const float *key_bias, const Chunk &k, float *to) const {
        if (key_bias)
            for (int j = k.a; j < k.b; j++) {
                int64_t t = r.key_token(k.gather ? k.gather[j] : k.base + j);
                to[j] = t < 0 ? 0.f : key_bias[t] * LOG2E;
            }
    }
    void bend(const SfCall &c, const Chunk &k, const float *bias, float *s) const {
        for (int j = k.a; j < k.b; j++)
            for (int i = 0; i < BQ; i += W) {
                vf x = load(s + j * BQ + i) * inner;
                if (c.softcap > 0) x = tanhv(x) * outer;
                if (c.key_bias.data) x += bias[j];
                store(s + j * BQ + i, x);
            }
    }
};

inline void hide(const Chunk &k, const uint64_t *see, float *s, float with) {
    for (int j = k.a; j < k.b; j++) {
        uint64_t m = see[j];
        if (m == ~0ull) continue;
        for (int i = 0; i < BQ; i += W) store(s + j * BQ + i, pick(m >> i, load(s + j * BQ + i), set1(with)));
    }
}
inline void fill_rows(float *s, int from, int to, float with) {
    for (int64_t i = (int64_t)from * BQ; i < (int64_t)to * BQ; i++) s[i] = with;
}


// Running max m and sum l (base 2) take in rows [a,b) of S; S becomes P (fp32 in place, or bf16 pairs in p).
// The accumulator O^T [Dv][64] is rescaled only when some maximum grew.
template <bool BF, int G>
inline void softmax_lanes(int i0, float *s, int a, int b, float factor, float *m, float *l, float *ot, int64_t Dv,
                          [[maybe_unused]] bf *p) {
    vf top[G];
    for (int g = 0; g < G; g++) top[g] = set1(-INF);
    for (int j = a; j < b; j++)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) top[g] = vmax(top[g], load(s + j * BQ + i0 + g * W));
    vf ref[G];
    bool grew = false;
    for (int g = 0; g < G; g++) {
        top[g] = top[g] * factor;
        ref[g] = load(m + i0 + g * W);
        grew |= any_greater(top[g], ref[g]);
    }
    if (grew) {
        vf shrink[G];
        for (int g = 0; g < G; g++) {
            vf now = vmax(ref[g], top[g]);
            vf safe = now == -INF ? set1(0.f) : now;
            // exactly 1 where nothing grew: the polynomial is not, and other queries' keys would show in the last bit
            shrink[g] = now == ref[g] ? set1(1.f) : exp2v<true>(ref[g] - safe);
            ref[g] = now;
            store(m + i0 + g * W, now);
            store(l + i0 + g * W, load(l + i0 + g * W) * shrink[g]);
        }
        for (int64_t d = 0; d < Dv; d++)
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                float *o = ot + d * BQ + i0 + g * W;
                store(o, load(o) * shrink[g]);
            }
    }
    vf total[G];
    for (int g = 0; g < G; g++) {
        ref[g] = ref[g] == -INF ? set1(0.f) : ref[g];
        total[g] = load(l + i0 + g * W);
    }
    if (!BF) {
        for (int j = a; j < b; j++)
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                float *x = s + j * BQ + i0 + g * W;
                vf e = exp2v<true>(load(x) * factor - ref[g]);
                total[g] += e;
                store(x, e);
            }
    } else {
#if SF_HAS_BF16
        for (int j = a; j < b; j += 2)
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                const float *x = s + j * BQ + i0 + g * W;
                vf e = exp2v<false>(load(x) * factor - ref[g]), f = exp2v<false>(load(x + BQ) * factor - ref[g]);
                total[g] += e + f;
                store_pairs(p + j * BQ + 2 * (i0 + g * W), (__m512)e, (__m512)f);
            }
#endif
    }
    for (int g = 0; g < G; g++) store(l + i0 + g * W, total[g]);
}
template <bool BF>
inline void online_softmax(float *s, int a, int b, float factor, float *m, float *l, float *ot, int64_t Dv, int lanes,
                           bf *p) {
    int i = 0;
    for (; i + 4 * W <= lanes; i += 4 * W) softmax_lanes<BF, 4>(i, s, a, b, factor, m, l, ot, Dv, p);
    for (; i < lanes; i += W) softmax_lanes<BF, 1>(i, s, a, b, factor, m, l, ot, Dv, p);
}

// Columns of S that hold queries, as the products need them.
inline int columns(const Queries &q, bool pairs) { return (int)round_up(q.lanes, pairs ? 32 : W); }

// ---------------------------------------------------------------- forward

template <bool BF>
void forward_block(const SfCall &c, const Keys &keys, const Rules &rules, const Logits &logits, int64_t b, int64_t h,
                   int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    uint64_t any_lane = 0;
    for (int i = 0; i < BQ; i++) any_lane |= (uint64_t)(q.token[i] >= 0) << i;
    if (!any_lane) return;
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    int n = columns(q, BF);
    int64_t Dv = BF ? round_up(c.Dv, 32) : c.Dv;
    bool packed = false;
    if (q.real)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            if (!packed) {
                packed = true;
                if (!BF) pack_lanes(c, c.q, b, h, q, q.real, c.D, w.qt.p, w.keep.p);
#if SF_HAS_BF16
                else pack_lanes(c.q, b, h, q, q.real, c.D, w.qtb.p, nullptr);
#endif
                memset(w.ot.p, 0, Dv * BQ * 4);
                for (int i = 0; i < BQ; i++) w.m[i] = -INF, w.l[i] = 0;
            }
            Operands o = operands<BF, false>(c, keys, k, holes, w.see, w);
            int a = k.a, e = k.b;
            if (!BF) {
                gemm_f32(e - a, n, c.D, o.k + a * o.ldk, o.ldk, 1, w.qt.p, BQ, w.s + a * BQ, BQ, false);
            } else {
#if SF_HAS_BF16
                a = (int)round_down(k.a, GRAIN);
                e = (int)round_up(k.b, GRAIN);
                int64_t depth = GRAIN > 2 ? round_up(c.D, 32) : round_up(c.D, 2);
                int from = GRAIN > 2 ? a : k.a, to = GRAIN > 2 ? e : k.b;
                gemm_bf16(to - from, n, depth, o.kb + from * o.ldk, o.ldk, w.qtb.p, BQ, w.s + from * BQ, BQ, false);
#endif
            }
            if (logits.bent) {
                logits.bias(rules, key_bias, k, w.bias);
                logits.bend(c, k, w.bias, w.s.p);
            }
            if (k.partial) hide(k, w.see, w.s.p, -INF);
            if (BF) {
                fill_rows(w.s.p, a, k.a, -INF);
                fill_rows(w.s.p, k.b, e, -INF);
            }
            online_softmax<BF>(w.s.p, a, e, logits.factor, w.m, w.l, w.ot.p, Dv, n, w.p.p);
            if (!BF) gemm_f32(c.Dv, n, e - a, o.v + a * o.ldv, 1, o.ldv, w.s + a * BQ, BQ, w.ot.p, BQ, true);
#if SF_HAS_BF16
            else gemm_bf16(GRAIN > 2 ? Dv : c.Dv, n, e - a, o.t + a, BK, w.p + a * BQ, BQ, w.ot.p, BQ, true);
#endif
        });
    const int64_t ld = round_up(c.Dv, 16);
    if (packed) lanes_to_rows(w.ot.p, c.Dv, w.keep.p);
    for (int i = 0; i < BQ; i++) {
        if (q.token[i] < 0) continue;
        float total = packed && (q.real >> i & 1) ? w.l[i] : 0.f, *out = w.keep + i * ld;
        if (total == 0) memset(out, 0, ld * 4);
        c.lse[(b * c.Hq + h) * c.Tq + q.token[i]] = total == 0 ? -INF : (w.m[i] + log2f(total)) * LN2;
        write_row(c.out, b, h, q.token[i], c.out_dtype, c.Dv, out, total == 0 ? 0.f : 1.f / total);
    }
}

template <bool BF> int forward(const SfCall &c, SfParallel parallel) {
    const SfPlan &p = c.plan;
    Packed<BF, false> packed;
    if (packed.make(c, parallel)) return 1;
    Buffer<char> room;
    int threads = most(c.threads, 1);
    if (!room.make(threads * (int64_t)sizeof(Scratch<BF>))) return 1;
    Scratch<BF> *scratch = (Scratch<BF> *)room.p;
    bool ok = true;
    for (int t = 0; t < threads; t++) {
        new (scratch + t) Scratch<BF>();
        ok = scratch[t].make(c, false) && ok;
    }
    Logits logits(c);
    auto task = [&](int64_t i, int thread) {
        Scratch<BF> &w = scratch[thread];
#if SF_HAS_BF16
        if (BF) prepare_thread();
#endif
        int64_t slot = i / p.tiles, r = p.tiles - 1 - i % p.tiles, b = slot / c.Hq, h = slot % c.Hq;  // long rows first
        Rules rules(c, b, h);
        Keys keys = packed.keys(c, b, h);
        int64_t end = least(p.q_rows, (r + 1) * p.tile);
        for (int64_t row = r * p.tile; row < end; row += BQ)
            forward_block<BF>(c, keys, rules, logits, b, h, r, row, least<int64_t>(BQ, end - row), w);
    };
    if (ok) in_parallel(parallel, threads, c.B * c.Hq * p.tiles, task);
    for (int t = 0; t < threads; t++) scratch[t].~Scratch<BF>();
    return ok ? 0 : 1;
}

// ---------------------------------------------------------------- backward

// Gradients of the keys of one packed head (or of a share of its tiles), fp32 in row space. Blocks of BK rows are
// cleared when first touched, so untouched ones cost nothing.
struct KeyGrads {
    float *k, *v;
    char *touched;
    int64_t ldk, ldv;

    void touch(int64_t row) {
        int64_t block = row / BK;
        if (touched[block]) return;
        touched[block] = 1;
        memset(k + block * BK * ldk, 0, BK * ldk * 4);
        memset(v + block * BK * ldv, 0, BK * ldv * 4);
    }
};

// P and dS of one vector of queries: x is the score (in the softmax's base 2), y the entry of dP.
struct Slopes {
    const SfCall &c;
    const Logits &logits;
    const float *lse2, *delta;
    const uint64_t *see;   // null where all is visible
    const float *bias;
    bool sums;

    template <bool PLAIN, bool FINE>
    inline void one(int j, int i, vf x, vf y, vf &p, vf &ds, vf &total) const {
        p = exp2v<FINE>(x * logits.factor - load(lse2 + i));
        ds = p * (y - load(delta + i));
        if (PLAIN) return;
        uint64_t m = see ? see[j] >> i : ~0ull;
        p = pick(m, p, set1(0.f));
        ds = pick(m, ds, set1(0.f));
        if (sums) total += ds;
        if (c.softcap > 0) {
            float shift = c.key_bias.data ? bias[j] : 0.f;
            if (shift == -INF) return;  // p and ds are 0, and x does not tell the score
            vf t = (x - shift) / logits.outer;
            ds = pick(m, ds * (1.f - t * t), set1(0.f));
        }
    }
    template <bool PLAIN> void rows(const Chunk &k, int n, float *s, float *g, float *sums_) const {
        for (int j = k.a; j < k.b; j++) {
            vf total = {};
#pragma GCC unroll 4
            for (int i = 0; i < n; i += W) {
                vf p, ds;
                one<PLAIN, true>(j, i, load(s + j * BQ + i), load(g + j * BQ + i), p, ds, total);
                store(s + j * BQ + i, p);
                store(g + j * BQ + i, ds);
            }
            if (!PLAIN && sums) sums_[j] = sum(total);
        }
    }
#if SF_HAS_BF16
    template <bool PLAIN>
    void pairs(int a, int e, const Chunk &k, int n, const float *s, const float *g, bf *pr, bf *dr, bf *dp,
               float *sums_) const {
        for (int j = a; j < e; j += 2) {
            vf t0 = {}, t1 = {};
            bool in0 = j >= k.a && j < k.b, in1 = j + 1 >= k.a && j + 1 < k.b;
            for (int i = 0; i < n; i += 32) {
                vf p00, p01, p10, p11, d00, d01, d10, d11;
                const float *x = s + j * BQ + i, *y = g + j * BQ + i;
                if (PLAIN || in0) {
                    one<PLAIN, false>(j, i, load(x), load(y), p00, d00, t0);
                    one<PLAIN, false>(j, i + 16, load(x + 16), load(y + 16), p01, d01, t0);
                } else p00 = p01 = d00 = d01 = set1(0.f);
                if (PLAIN || in1) {
                    one<PLAIN, false>(j + 1, i, load(x + BQ), load(y + BQ), p10, d10, t1);
                    one<PLAIN, false>(j + 1, i + 16, load(x + BQ + 16), load(y + BQ + 16), p11, d11, t1);
                } else p10 = p11 = d10 = d11 = set1(0.f);
                bf *p = pr + j * BQ + i, *d = dr + j * BQ + i, *both = dp + j * BQ + 2 * i;
                _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)p01, (__m512)p00));
                _mm512_storeu_si512(p + BQ, (__m512i)_mm512_cvtne2ps_pbh((__m512)p11, (__m512)p10));
                __m512i even = (__m512i)_mm512_cvtne2ps_pbh((__m512)d01, (__m512)d00);
                __m512i odd = (__m512i)_mm512_cvtne2ps_pbh((__m512)d11, (__m512)d10);
                _mm512_storeu_si512(d, even);
                _mm512_storeu_si512(d + BQ, odd);
                mix_rows(both, even, odd);
            }
            if (!PLAIN && sums) {
                if (in0) sums_[j] = sum(t0);
                if (in1) sums_[j + 1] = sum(t1);
            }
        }
    }
#endif
};

// Adds a scratch tile, whose first row is chunk row `from`, to the rows it stands for.
inline void add_rows(const Chunk &k, int from, const float *tile, float *to, int64_t ld) {
    for (int j = k.a; j < k.b; j++) {
        float *x = to + (k.gather ? k.gather[j] : k.base + j) * ld;
        const float *y = tile + (j - from) * ld;
        for (int64_t d = 0; d < ld; d += W) store(x + d, load(x + d) + load(y + d));
    }
}

template <bool BF>
void backward_block(const SfCall &c, const Keys &keys, const Rules &rules, const Logits &logits, int64_t b, int64_t h,
                    int64_t tile, int64_t row, int64_t rows, Scratch<BF> &w, KeyGrads &grads, float *dbias) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int64_t head = (b * c.Hq + h) * c.Tq;
    const int64_t D = c.D, Dv = c.Dv, Dkn = grads.ldk, Dvn = grads.ldv;
    uint64_t alive = 0;  // rows that saw something in the forward; the others give and take nothing
    for (int i = 0; i < BQ; i++)
        if ((q.real >> i & 1) && c.lse[head + q.token[i]] != -INF) alive |= 1ull << i;
    const float *key_bias = slice<float>(c.key_bias, b, h, c.Hq);
    int n = columns(q, BF);
    bool packed = false;
    if (alive)
        for_each_chunk(c, b, h, tile, [&](const Chunk &given) {
            Chunk k = given;
            bool holes = false;
            if (k.partial && !look(rules, q, k, w.see, holes)) return;
            if (!packed) {
                packed = true;
                float *dout = w.keep.p, *out = w.keep + round_up(Dv, 32);
                for (int i = 0; i < BQ; i++) {
                    w.delta[i] = 0;
                    w.lse2[i] = INF;  // exp2(x - inf) = 0
                    if (!(alive >> i & 1)) continue;
                    int64_t t = q.token[i];
                    read_row(c.dout, row_of(c.dout, b, h, t, c.dtype), c.dtype, Dv, dout);
                    read_row(c.out, row_of(c.out, b, h, t, c.out_dtype), c.out_dtype, Dv, out);
                    float x = 0;
                    for (int64_t d = 0; d < Dv; d++) x += dout[d] * out[d];
                    w.delta[i] = x - (c.dlse ? c.dlse[head + t] : 0.f);
                    w.lse2[i] = c.lse[head + t] * LOG2E;
                }
                if (!BF) {
                    pack_lanes(c, c.q, b, h, q, alive, D, w.qt.p, w.qr.p);
                    pack_lanes(c, c.dout, b, h, q, alive, Dv, w.dot.p, w.dor.p);
                } else {
#if SF_HAS_BF16
                    pack_lanes(c.q, b, h, q, alive, D, w.qtb.p, w.qrb.p);
                    pack_lanes(c.dout, b, h, q, alive, Dv, w.dotb.p, w.dorb.p);
#endif
                }
                memset(w.ot.p, 0, round_up(D, 32) * BQ * 4);
            }
            Operands o = operands<BF, true>(c, keys, k, holes, w.see, w);
            int a = k.a, e = k.b;
            float *s = w.s.p, *g = w.g.p;
            // S^T = K Q^T and dP^T = V dO^T
            if (!BF) {
                gemm_f32(e - a, n, D, o.k + a * o.ldk, o.ldk, 1, w.qt.p, BQ, s + a * BQ, BQ, false);
                gemm_f32(e - a, n, Dv, o.v + a * o.ldv, o.ldv, 1, w.dot.p, BQ, g + a * BQ, BQ, false);
            } else {
#if SF_HAS_BF16
                a = (int)round_down(k.a, GRAIN);
                e = (int)round_up(k.b, GRAIN);
                int from = GRAIN > 2 ? a : k.a, to = GRAIN > 2 ? e : k.b, unit = GRAIN;
                gemm_bf16(to - from, n, round_up(D, unit), o.kb + from * o.ldk, o.ldk, w.qtb.p, BQ, s + from * BQ, BQ, false);
                gemm_bf16(to - from, n, round_up(Dv, unit), o.vb + from * o.ldv, o.ldv, w.dotb.p, BQ, g + from * BQ, BQ, false);
#endif
            }
            if (logits.bent) {
                logits.bias(rules, key_bias, k, w.bias);
                logits.bend(c, k, w.bias, s);
            }
            // P = exp2(S - lse), dS = P (dP - delta); fp32 in place, bf16 in the three layouts the products read
            Slopes slopes = {c, logits, w.lse2, w.delta, k.partial ? w.see : nullptr, w.bias, dbias != nullptr};
            bool plain = !k.partial && !dbias && c.softcap == 0;
            if (!BF) {
                if (plain) slopes.template rows<true>(k, n, s, g, nullptr);
                else slopes.template rows<false>(k, n, s, g, w.sums);
            } else {
#if SF_HAS_BF16
                fill_rows(s, a, k.a, -INF), fill_rows(s, k.b, e, -INF);
                fill_rows(g, a, k.a, 0.f), fill_rows(g, k.b, e, 0.f);
                if (plain) slopes.template pairs<true>(a, e, k, n, s, g, w.pr.p, w.dr.p, w.p.p, nullptr);
                else slopes.template pairs<false>(a, e, k, n, s, g, w.pr.p, w.dr.p, w.p.p, w.sums);
#endif
            }
            if (dbias)
                for (int j = k.a; j < k.b; j++) {
                    int64_t t = rules.key_token(k.gather ? k.gather[j] : k.base + j);
                    if (t >= 0) dbias[t] += w.sums[j];
                }
            if (k.gather) for (int j = k.a; j < k.b; j++) grads.touch(k.gather[j]);
            else grads.touch(k.base);
            float *gk = grads.k + (k.base + k.a) * Dkn, *gv = grads.v + (k.base + k.a) * Dvn;
            // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
            if (!BF) {
                if (k.gather) gk = gv = w.keep.p;
                gemm_f32(e - a, Dvn, n, s + a * BQ, BQ, 1, w.dor.p, Dvn, gv, Dvn, !k.gather);
                if (k.gather) add_rows(k, k.a, gv, grads.v, Dvn);
                gemm_f32(e - a, Dkn, n, g + a * BQ, BQ, 1, w.qr.p, Dkn, gk, Dkn, !k.gather);
                if (k.gather) add_rows(k, k.a, gk, grads.k, Dkn);
                gemm_f32(D, n, e - a, o.k + a * o.ldk, 1, o.ldk, g + a * BQ, BQ, w.ot.p, BQ, true);
            } else {
#if SF_HAS_BF16
                int from = GRAIN > 2 ? a : k.a, to = GRAIN > 2 ? e : k.b;
                if (o.own_rows) {
                    gemm_bf16(to - from, Dvn, n, w.pr + from * BQ, BQ, w.dorb.p, Dvn, w.keep.p, Dvn, false);
                    add_rows(k, from, w.keep.p, grads.v, Dvn);
                    gemm_bf16(to - from, Dkn, n, w.dr + from * BQ, BQ, w.qrb.p, Dkn, w.keep.p, Dkn, false);
                    add_rows(k, from, w.keep.p, grads.k, Dkn);
                } else {
                    gemm_bf16(k.b - k.a, Dvn, n, w.pr + k.a * BQ, BQ, w.dorb.p, Dvn, gv, Dvn, true);
                    gemm_bf16(k.b - k.a, Dkn, n, w.dr + k.a * BQ, BQ, w.qrb.p, Dkn, gk, Dkn, true);
                }
                gemm_bf16(GRAIN > 2 ? Dkn : D, n, e - a, o.t + a, BK, w.p + a * BQ, BQ, w.ot.p, BQ, true);
#endif
            }
        });
    if (packed) lanes_to_rows(w.ot.p, D, w.keep.p);
    for (int i = 0; i < BQ; i++) {
        if (q.token[i] < 0) continue;
        float *dq = w.keep + i * round_up(D, 16);
        if (!packed || !(alive >> i & 1)) memset(dq, 0, D * 4);
        write_row(c.dq, b, h, q.token[i], c.grad_dtype, D, dq, c.scale);
    }
}

// Splits of every head, so that no thread waits long for the last one: the tasks' costs are dealt out greedily.
inline int64_t choose_splits(const SfCall &c, const int64_t *cost, int64_t heads, int64_t tiles) {
    int64_t total = 0, biggest = 0;
    for (int64_t i = 0; i < heads; i++) total += cost[i], biggest = most(biggest, cost[i]);
    int64_t limit = most<int64_t>(1, least<int64_t>(tiles, 4 * (int64_t)c.threads));
    for (int64_t splits = 1; splits < limit; splits *= 2) {
        int64_t load[64] = {}, busiest = 0;
        int threads = least(c.threads, 64);
        for (int64_t i = 0; i < heads * splits; i++) {
            int idle = 0;
            for (int t = 1; t < threads; t++) if (load[t] < load[idle]) idle = t;
            load[idle] += cost[i / splits] / splits;
            busiest = most(busiest, load[idle]);
        }
        if (busiest * threads <= total + total / 12) return splits;
    }
    return limit;
}

template <bool BF> int backward(const SfCall &c, SfParallel parallel) {
    const SfPlan &p = c.plan;
    int threads = most(c.threads, 1);
    Packed<BF, true> packed;
    if (packed.make(c, parallel)) return 1;
    const int64_t heads = packed.heads, group = c.Hq / heads, slots = c.B * heads, pairs = group * p.tiles;
    const int64_t rows = round_up(p.k_rows, BK), blocks = rows / BK;
    const int64_t ldk = round_up(c.D, BF ? 32 : 16), ldv = round_up(c.Dv, BF ? 32 : 16);

    // cost of every (slot, query head of the group, tile): shares of a head are contiguous runs of equal cost
    Buffer<int64_t> cost, sum;
    if (!cost.make(slots * pairs) || !sum.make(slots)) return 1;
    auto weigh = [&](int64_t s, int) {
        sum[s] = 0;
        for (int64_t i = 0; i < pairs; i++) {
            int64_t x = tile_cost(c, s / heads, s % heads * group + i / p.tiles, i % p.tiles);
            sum[s] += x;
            cost[s * pairs + i] = sum[s];  // running total
        }
    };
    in_parallel(parallel, threads, slots, weigh);
    const int64_t splits = choose_splits(c, sum.p, slots, pairs), tasks = slots * splits;
    // A head's gradients are complete when its only task ends; otherwise shares wait and are summed in order.
    const bool direct = splits == 1 && heads == c.Hkv && c.Bk == c.B;
    const int64_t held = direct ? threads : tasks;

    Buffer<float> acc_k, acc_v, bias;
    Buffer<char> touched, room;
    Buffer<int32_t> row_of_token;
    bool ok = acc_k.make(held * rows * ldk) && acc_v.make(held * rows * ldv) && touched.make(held * blocks) &&
              room.make(threads * (int64_t)sizeof(Scratch<BF>)) && (!c.dbias || bias.make(c.B * c.Hq * splits * c.Tk)) &&
              (!p.k_order.data || row_of_token.make(slots * c.Tk));
    if (!ok) return 1;
    Scratch<BF> *scratch = (Scratch<BF> *)room.p;
    for (int t = 0; t < threads; t++) {
        new (scratch + t) Scratch<BF>();
        ok = scratch[t].make(c, true) && ok;
    }
    if (c.dbias) memset(bias.p, 0, c.B * c.Hq * splits * c.Tk * 4);
    Logits logits(c);

    auto invert = [&](int64_t s, int) {
        Rules r(c, s / heads, s % heads * group);
        for (int64_t t = 0; t < c.Tk; t++) row_of_token[s * c.Tk + t] = -1;
        for (int64_t row = 0; row < p.k_rows; row++) {
            int64_t t = r.key_token(row);
            if (t >= 0) row_of_token[s * c.Tk + t] = (int32_t)row;
        }
    };
    if (ok && p.k_order.data) in_parallel(parallel, threads, slots, invert);

    // Writes token t of a KV head: the sum over the sequences of a pool, packed heads and shares, in that order.
    const int64_t of = heads / c.Hkv, sharers = c.Bk == c.B ? 1 : c.B;
    auto write_token = [&](int64_t bk, int64_t hkv, int64_t t, int64_t only, float *x) {
        for (int side = 0; side < 2; side++) {
            int64_t ld = side ? ldv : ldk, n = side ? c.Dv : c.D;
            const Buffer<float> &acc = side ? acc_v : acc_k;
            for (int64_t d = 0; d < ld; d++) x[d] = 0;
            for (int64_t i = 0; i < sharers * of * splits; i++) {
                int64_t b = sharers == 1 ? bk : i / (of * splits);
                int64_t slot = b * heads + hkv * of + i / splits % of, share = only >= 0 ? only : slot * splits + i % splits;
                int64_t row = p.k_order.data ? row_of_token[slot * c.Tk + t] : t;
                if (row < 0 || !touched[share * blocks + row / BK]) continue;
                const float *y = acc + (share * rows + row) * ld;
                for (int64_t d = 0; d < ld; d += W) store(x + d, load(x + d) + load(y + d));
            }
            write_row(side ? c.dv : c.dk, bk, hkv, t, c.grad_dtype, n, x, side ? 1.f : c.scale);
        }
    };

    auto task = [&](int64_t i, int thread) {
        Scratch<BF> &w = scratch[thread];
#if SF_HAS_BF16
        if (BF) prepare_thread();
#endif
        int64_t slot = i / splits, share = i % splits, b = slot / heads, hp = slot % heads, at = direct ? thread : i;
        KeyGrads grads = {acc_k + at * rows * ldk, acc_v + at * rows * ldv, touched + at * blocks, ldk, ldv};
        memset(grads.touched, 0, blocks);
        const int64_t *run = cost + slot * pairs, whole = sum[slot];
        for (int64_t j = 0; j < pairs; j++) {
            int64_t before = j ? run[j - 1] : 0;  // the share that holds the pair's midpoint does it
            int64_t owner = whole ? least(splits - 1, (before + run[j]) * splits / (2 * whole)) : 0;
            if (owner != share) continue;
            int64_t h = hp * group + j / p.tiles, r = j % p.tiles;
            Rules rules(c, b, h);
            Keys keys = packed.keys(c, b, h);
            float *dbias = c.dbias ? bias + ((b * c.Hq + h) * splits + share) * c.Tk : nullptr;
            int64_t end = least(p.q_rows, (r + 1) * p.tile);
            for (int64_t row = r * p.tile; row < end; row += BQ)
                backward_block<BF>(c, keys, rules, logits, b, h, r, row, least<int64_t>(BQ, end - row), w, grads, dbias);
        }
        if (direct)
            for (int64_t t = 0; t < c.Tk; t++) write_token(b, hp, t, thread, w.keep.p);
    };
    if (ok) in_parallel(parallel, threads, tasks, task);

    if (ok && !direct) {
        int64_t per = 256, parts = (c.Tk + per - 1) / per;
        auto reduce = [&](int64_t i, int thread) {
            int64_t part = i % parts, b = i / parts / c.Hkv, hkv = i / parts % c.Hkv;
            for (int64_t t = part * per; t < least(c.Tk, (part + 1) * per); t++)
                write_token(b, hkv, t, -1, scratch[thread].keep.p);
        };
        in_parallel(parallel, threads, c.Bk * c.Hkv * parts, reduce);
    }
    if (ok && c.dbias)
        for (int64_t i = 0; i < c.B * c.Hq; i++)
            for (int64_t t = 0; t < c.Tk; t++) {
                float x = 0;
                for (int64_t s = 0; s < splits; s++) x += bias[(i * splits + s) * c.Tk + t];
                c.dbias[i * c.Tk + t] = x;
            }
    for (int t = 0; t < threads; t++) scratch[t].~Scratch<BF>();
    return ok ? 0 : 1;
}

}  // namespace

#include "stats.h"

#if SF_HAS_BF16
#define SF_RUN(kind, level) \
    extern "C" int sf_##kind##_##level(const SfCall *c, SfParallel p) { return c->dtype == SF_BF16 ? kind<true>(*c, p) : 2; }
#else
#define SF_RUN(kind, level) \
    extern "C" int sf_##kind##_##level(const SfCall *c, SfParallel p) { return kind<false>(*c, p); }
#endif
#define SF_EXPORT(level) SF_RUN(forward, level) SF_RUN(backward, level) SF_RUN(stats, level)
