// Causal linear attention with a decay per head, in chunks of C tokens. A product masked by the decay inside a chunk,
// a state [D][Dv] between chunks:
//
//   O = (Q K^T * M) V + before * (Q S)      M[i][j] = l^(i-j) for j <= i;  before[i] = l^(i+1)
//   S' = l^n S + (after * K)^T V            after[j] = l^(n-1-j), of the n tokens of the chunk
//
// Three passes: what each chunk adds to the state; the scan that turns sums into states, in place; outputs. The
// first and the last run over all chunks at once, so a single head keeps every thread busy, and no result depends on
// how many there are. Sums and states are fp32 for every storage type; powers of l come from exponents, never from
// quotients.
#pragma once
#include <math.h>
#include "gemm.h"
#include "scratch.h"

namespace {

// Sizes, the powers of every head, and products with a triangle of a chunk.
struct Chunks {
    const SfLinear &c;
    int64_t D, Dv, C, n;  // padded dimensions; tokens of a chunk; chunks
    int64_t state;        // floats of one state
    Buffer<float> table;  // of each head: l^C .. l^1 l^0 and zeros, so that a row of M is read in order

    static constexpr int64_t STRIP = 32;  // rows of a triangle that share one length
    static constexpr int64_t PART = 16;   // rows of a state that one task scans

    explicit Chunks(const SfLinear &call) : c(call) {
        D = round_up(c.D, 16);
        Dv = round_up(c.Dv, 16);
        C = most(D, Dv) > 64 ? 128 : 64;  // the states of a sequence take no more than its values, up to D = 128
        n = (c.T + C - 1) / C;
        state = D * Dv;
    }
    int64_t width() const { return C + 1 + STRIP + W; }
    bool make() {
        if (!table.make(c.Hq * width())) return false;
        for (int64_t h = 0; h < c.Hq; h++)
            for (int64_t i = 0; i < width(); i++)
                table[h * width() + i] = i > C ? 0.f : (float)exp(-(c.rate ? (double)c.rate[h] : 0.) * (double)(C - i));
        return true;
    }
    float power(int64_t h, int64_t i) const { return table[h * width() + C - i]; }
    int64_t tokens(int64_t chunk) const { return least(C, c.T - chunk * C); }

    // Rows of a chunk as fp32 [C][padded], zeros behind them and below.
    void read(const SfView &v, int64_t b, int64_t h, int64_t chunk, int64_t d, float *to) const {
        int64_t dp = round_up(d, 16), m = tokens(chunk);
        for (int64_t i = 0; i < m; i++) {
            read_row(v, row_of(v, b, h, chunk * C + i, c.dtype), c.dtype, d, to + i * dp);
            memset(to + i * dp + d, 0, (dp - d) * 4);
        }
        memset(to + m * dp, 0, (C - m) * dp * 4);
    }
    static void transpose(const float *rows, int64_t m, int64_t d, float *to) {
        for (int64_t i = 0; i < m; i += 16)
            for (int64_t j = 0; j < d; j += 16) transpose16(rows + i * d + j, d, to + j * m + i, m);
    }
    static void multiply(float *rows, int64_t d, int64_t i, float by) {
        for (int64_t x = 0; x < d; x += W) store(rows + i * d + x, load(rows + i * d + x) * by);
    }
    void multiply_before(int64_t h, int64_t m, int64_t d, float *rows) const {
        for (int64_t i = 0; i < m; i++) multiply(rows, d, i, power(h, i + 1));
    }
    void multiply_after(int64_t h, int64_t m, int64_t d, float *rows) const {
        for (int64_t i = 0; i < m; i++) multiply(rows, d, i, power(h, m - 1 - i));
    }

    // A = (X Y^T) * M for rows X [C][d] and columns Y^T [d][C]; in each strip up to its end.
    void triangle(int64_t h, int64_t m, int64_t d, const float *x, const float *yt, float *a) const {
        const float *falling = table + h * width();
        for (int64_t i0 = 0; i0 < m; i0 += STRIP) {
            int64_t rows = least(STRIP, m - i0), end = i0 + STRIP;
            gemm_f32(rows, end, d, x + i0 * d, d, 1, yt, C, a + i0 * C, C, SET);
            for (int64_t i = i0; i < i0 + rows; i++)
                for (int64_t j = 0; j < end; j += W) {
                    uint64_t past = i - j >= 63 ? ~0ull : i < j ? 0 : (2ull << (i - j)) - 1;
                    float *y = a + i * C + j;
                    store(y, pick(past, load(y) * load(falling + C - i + j), set1(0.f)));
                }
        }
    }
    // O (+)= A Y and O += A^T Y, for rows Y [C][d].
    void times(int64_t m, int64_t d, const float *a, const float *y, float *o, Into into) const {
        for (int64_t i = 0; i < m; i += STRIP)
            gemm_f32(least(STRIP, m - i), d, least(m, i + STRIP), a + i * C, C, 1, y, d, o + i * d, d, into);
    }
    void times_across(int64_t m, int64_t d, const float *a, const float *y, float *o) const {
        for (int64_t j = 0; j < m; j += STRIP)
            gemm_f32(least(STRIP, m - j), d, m - j, a + j * C + j, 1, C, y + j * d, d, o + j * d, d, ADD);
    }
    // X^T Y of a chunk: what it adds to a state.
    void sum(int64_t m, const float *x, const float *y, float *to) const {
        gemm_f32(D, Dv, m, x, 1, D, y, Dv, to, Dv, SET);
    }

    // Turns the sums of all chunks of a head into the states before each (BACK: after each, from the last chunk on),
    // PART rows of them. `first` [D][Dv] is the state at the open end, `last` takes the one at the other; or null.
    template <bool BACK>
    void scan(int64_t h, float *sums, int64_t row, const float *first, float *last, float *now) const {
        const int64_t rows = least(PART, c.D - row);
        memset(now, 0, PART * Dv * 4);
        for (int64_t d = 0; first && d < rows; d++) memcpy(now + d * Dv, first + (row + d) * c.Dv, c.Dv * 4);
        for (int64_t i = 0; i < n; i++) {
            int64_t chunk = BACK ? n - 1 - i : i;
            float keep = power(h, tokens(chunk)), *x = sums + chunk * state + row * Dv;
            for (int64_t e = 0; e < PART * Dv; e += W) {
                vf s = load(now + e), own = load(x + e);
                store(x + e, s);
                store(now + e, s * keep + own);
            }
        }
        for (int64_t d = 0; last && d < rows; d++) memcpy(last + (row + d) * c.Dv, now + d * Dv, c.Dv * 4);
    }
    // A state the other way round, [Dv][D].
    void turn(const float *s, float *to) const {
        for (int64_t d = 0; d < D; d += 16)
            for (int64_t e = 0; e < Dv; e += 16) transpose16(s + d * Dv + e, Dv, to + e * D + d, D);
    }
};

// Arrays of floats for each thread.
struct Desk {
    Buffer<float> room;
    int64_t size = 0;
    bool make(int threads, int64_t floats) { return room.make(threads * (size = round_up(floats, 16))); }
    float *take(int thread) const { return room + thread * size; }
};

// Floats of the states that are held at a time (but those of one KV head at least): they stay in a cache.
constexpr int64_t HELD = 4 << 20;

inline int linear_forward(const SfLinear &c, SfParallel parallel) {
    Chunks k(c);
    const int64_t heads = c.B * c.Hq, C = k.C, Dn = k.D, Dv = k.Dv, n = k.n, parts = Dn / k.PART;
    const int64_t per = least(heads, most<int64_t>(1, HELD / most<int64_t>(1, n * k.state)));
    Buffer<float> states;
    Desk desk;
    if (!k.make() || !states.make(per * n * k.state) || !desk.make(c.threads, C * (2 * Dn + 2 * Dv + C)))
        return 1;
    int64_t base = 0;
    auto add_up = [&](int64_t i, int thread) {
        int64_t chunk = i % n, b = (base + i / n) / c.Hq, h = (base + i / n) % c.Hq, hkv = h * c.Hkv / c.Hq, m = k.tokens(chunk);
        float *keys = desk.take(thread), *values = keys + C * Dn;
        k.read(c.k, b, hkv, chunk, c.D, keys);
        k.read(c.v, b, hkv, chunk, c.Dv, values);
        k.multiply_after(h, m, Dn, keys);
        k.sum(m, keys, values, states + i * k.state);
    };
    auto carry = [&](int64_t i, int thread) {
        int64_t at = base + i / parts, row = i % parts * k.PART, place = at * c.D * c.Dv;
        float *sums = states + i / parts * n * k.state;
        k.scan<false>(at % c.Hq, sums, row, c.first ? c.first + place : nullptr, c.last + place, desk.take(thread));
    };
    auto emit = [&](int64_t i, int thread) {
        int64_t chunk = i % n, b = (base + i / n) / c.Hq, h = (base + i / n) % c.Hq, hkv = h * c.Hkv / c.Hq, m = k.tokens(chunk);
        float *queries = desk.take(thread), *columns = queries + C * Dn, *values = columns + C * Dn;
        float *out = values + C * Dv, *scores = out + C * Dv;
        k.read(c.k, b, hkv, chunk, c.D, queries);
        k.transpose(queries, C, Dn, columns);
        k.read(c.q, b, h, chunk, c.D, queries);
        k.read(c.v, b, hkv, chunk, c.Dv, values);
        const bool past = chunk || c.first;
        if (past) {
            gemm_f32(m, Dv, c.D, queries, Dn, 1, states + i * k.state, Dv, out, Dv, SET);
            k.multiply_before(h, m, Dv, out);
        }
        k.triangle(h, m, Dn, queries, columns, scores);
        k.times(m, Dv, scores, values, out, past ? ADD : SET);
        for (int64_t t = 0; t < m; t++)
            write_row(c.out, b, h, chunk * C + t, c.dtype, c.Dv, out + t * Dv, c.scale);
    };
    for (; base < heads; base += per) {
        int64_t own = least(per, heads - base);
        in_parallel(parallel, c.threads, own * n, add_up);
        in_parallel(parallel, c.threads, own * parts, carry);
        in_parallel(parallel, c.threads, own * n, emit);
    }
    return 0;
}

// dQ = W K + before * (dO S^T)    dK = W^T Q + after * (V G^T)    dV = A^T dO + after * (K G)
//
// with A as above, W = (dO V^T) * M, S the states before and G the gradients of the states after each chunk:
// G' = l^n G + (before * Q)^T dO, from the last chunk to the first. The scale is in dO.
inline int linear_backward(const SfLinear &c, SfParallel parallel) {
    Chunks k(c);
    const int64_t group = c.Hq / c.Hkv, slots = c.B * c.Hkv, C = k.C, Dn = k.D, Dv = k.Dv, n = k.n;
    const int64_t parts = Dn / k.PART, top = most(Dn, Dv);
    const int64_t per = least(slots, most<int64_t>(1, HELD / most<int64_t>(1, 2 * group * n * k.state)));
    Buffer<float> states, slopes;
    Desk desk;
    if (!k.make() || !states.make(per * group * n * k.state) || !slopes.make(per * group * n * k.state) ||
        !desk.make(c.threads, C * (10 * top + 2 * C) + Dn * Dv))
        return 1;
    int64_t base = 0;  // first of the KV heads at hand
    auto add_up = [&](int64_t i, int thread) {
        int64_t at = base * group + i / n, chunk = i % n, b = at / c.Hq, h = at % c.Hq, hkv = h / group, m = k.tokens(chunk);
        float *x = desk.take(thread), *y = x + C * top;
        k.read(c.k, b, hkv, chunk, c.D, x);
        k.read(c.v, b, hkv, chunk, c.Dv, y);
        k.multiply_after(h, m, Dn, x);
        k.sum(m, x, y, states + i * k.state);
        k.read(c.q, b, h, chunk, c.D, x);
        k.read(c.dout, b, h, chunk, c.Dv, y);
        for (int64_t t = 0; t < m; t++) k.multiply(x, Dn, t, k.power(h, t + 1) * c.scale);
        k.sum(m, x, y, slopes + i * k.state);
    };
    auto carry = [&](int64_t i, int thread) {
        int64_t local = i / parts * n * k.state, at = base * group + i / parts, row = i % parts * k.PART;
        int64_t h = at % c.Hq, place = at * c.D * c.Dv;
        float *now = desk.take(thread);
        k.scan<false>(h, states + local, row, c.first ? c.first + place : nullptr, nullptr, now);
        k.scan<true>(h, slopes + local, row, c.dlast ? c.dlast + place : nullptr, c.dfirst + place, now);
    };
    auto emit = [&](int64_t i, int thread) {
        int64_t slot = base + i / n, chunk = i % n, b = slot / c.Hkv, hkv = slot % c.Hkv, m = k.tokens(chunk);
        float *at = desk.take(thread);
        auto next = [&](int64_t floats) { float *x = at; at += floats; return x; };
        float *q = next(C * top), *keys = next(C * top), *v = next(C * top), *g = next(C * top);
        float *kt = next(C * top), *vt = next(C * top), *weighed = next(C * top);
        float *dq = next(C * top), *dk = next(C * top), *dv = next(C * top);
        float *a = next(C * C), *w = next(C * C), *turned = next(Dn * Dv);
        k.read(c.k, b, hkv, chunk, c.D, keys);
        k.read(c.v, b, hkv, chunk, c.Dv, v);
        k.transpose(keys, C, Dn, kt);
        k.transpose(v, C, Dv, vt);
        memset(dk, 0, C * Dn * 4);
        memset(dv, 0, C * Dv * 4);
        for (int64_t r = 0; r < group; r++) {
            int64_t h = hkv * group + r, place = ((i / n * group + r) * n + chunk) * k.state;
            const float *s = states + place, *slope = slopes + place;
            k.read(c.q, b, h, chunk, c.D, q);
            k.read(c.dout, b, h, chunk, c.Dv, g);
            for (int64_t t = 0; t < m; t++) k.multiply(g, Dv, t, c.scale);
            k.triangle(h, m, Dn, q, kt, a);
            k.triangle(h, m, Dv, g, vt, w);
            const bool past = chunk || c.first, future = chunk < n - 1 || c.dlast;
            if (past) {
                k.turn(s, turned);
                gemm_f32(m, Dn, c.Dv, g, Dv, 1, turned, Dn, dq, Dn, SET);
                k.multiply_before(h, m, Dn, dq);
            }
            k.times(m, Dn, w, keys, dq, past ? ADD : SET);
            k.times_across(m, Dn, w, q, dk);
            k.times_across(m, Dv, a, g, dv);
            if (future) {
                memcpy(weighed, v, m * Dv * 4);
                k.multiply_after(h, m, Dv, weighed);
                k.turn(slope, turned);
                gemm_f32(m, Dn, c.Dv, weighed, Dv, 1, turned, Dn, dk, Dn, ADD);
                memcpy(weighed, keys, m * Dn * 4);
                k.multiply_after(h, m, Dn, weighed);
                gemm_f32(m, Dv, c.D, weighed, Dn, 1, slope, Dv, dv, Dv, ADD);
            }
            for (int64_t t = 0; t < m; t++) write_row(c.dq, b, h, chunk * C + t, c.dtype, c.D, dq + t * Dn, 1.f);
        }
        for (int64_t t = 0; t < m; t++) {
            write_row(c.dk, b, hkv, chunk * C + t, c.dtype, c.D, dk + t * Dn, 1.f);
            write_row(c.dv, b, hkv, chunk * C + t, c.dtype, c.Dv, dv + t * Dv, 1.f);
        }
    };
    for (; base < slots; base += per) {
        int64_t own = least(per, slots - base);
        in_parallel(parallel, c.threads, own * group * n, add_up);
        in_parallel(parallel, c.threads, own * group * parts, carry);
        in_parallel(parallel, c.threads, own * n, emit);
    }
    return 0;
}

}  // namespace
