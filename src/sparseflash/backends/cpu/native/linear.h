// Causal linear attention with a decay per head, in chunks of C tokens. A product masked by the decay inside a chunk,
// a state [D][Dv] between chunks:
//
//   O = (Q K^T * M) V + before * (Q S)      M[i][j] = l^(i-j) for j <= i;  before[i] = l^(i+1)
//   S' = l^n S + (after * K)^T V            after[j] = l^(n-1-j), of the n tokens of the chunk
//
// The gradients are the same sum with other operands: dQ is it of (dO, V, K); dK of (V, dO, Q) and dV of (K, Q, dO) with
// time reversed, which swaps `before` and `after` and transposes M. So one sweep does everything.
//
// A sweep takes some chunks of every head at a time, as many as have their states in the second cache level: what each
// adds to the state, the scan that turns sums into states, outputs. Chunks run side by side, so one head keeps every
// thread busy, and no result depends on how many there are. Sums and states are fp32 for every storage type; powers of l
// come from exponents, never from quotients.
#pragma once
#include <math.h>
#include "gemm.h"
#include "scratch.h"

namespace {

// A user tensor: view, number of heads, dimension.
struct Rows {
    const SfView &view;
    int64_t heads, dim;
    int64_t wide() const { return round_up(dim, 16); }
};

template <bool BACK> struct Sweep {
    const SfLinear &c;
    Rows x, y, z, o;           // o = sum of l^|distance| (x.y) z, over the heads that share one of o
    const float *first;        // state [x.dim][z.dim] at the open end, or null
    int64_t row, lane;         // its strides
    float *last;               // takes the state at the other end, or null
    float z_factor, o_factor;

    static constexpr int64_t STRIP = 32;      // rows of a triangle that share one length
    static constexpr int64_t PART = 16;       // rows of a state that one task scans
    static constexpr int64_t HELD = 1 << 17;  // floats of states at a time, if not one of each head is more

    int64_t X = x.wide(), Z = z.wide();
    int64_t C = most(X, Z) > 64 ? 128 : 64, n = (c.T + C - 1) / C, state = X * Z;
    int64_t blank = STRIP + W, width = 2 * (C + 1) + blank;
    Buffer<float> table = {};  // of each head: l^C .. l^0, zeros, l^0 .. l^C: rows of M and of its transpose

    float power(int64_t h, int64_t i) const { return table[h * width + C - i]; }
    int64_t tokens(int64_t chunk) const { return least(C, c.T - chunk * C); }
    static int64_t shared(const Rows &r, int64_t h, int64_t heads) { return h * r.heads / heads; }

    bool make_table() {
        if (!table.make(c.Hq * width)) return false;
        memset(table.p, 0, c.Hq * width * 4);
        for (int64_t h = 0; h < c.Hq; h++)
            for (int64_t i = 0; i <= C; i++)
                table[h * width + C - i] = table[h * width + C + 1 + blank + i] = (float)exp(-(c.rate ? c.rate[h] : 0.) * (double)i);
        return true;
    }

    // Rows of a chunk as fp32 [C][wide], zeros behind them and below.
    void read(const Rows &r, int64_t b, int64_t h, int64_t chunk, float *to) const {
        const int64_t m = tokens(chunk), wide = r.wide();
        for (int64_t i = 0; i < m; i++) {
            read_row(r.view, row_of(r.view, b, shared(r, h, c.Hq), chunk * C + i, c.dtype), c.dtype, r.dim, to + i * wide);
            if (wide > r.dim) memset(to + i * wide + r.dim, 0, (wide - r.dim) * 4);
        }
        memset(to + m * wide, 0, (C - m) * wide * 4);
    }
    // Rows times what the decay leaves between them and the state they read (or, ADDING, the one they add to).
    template <bool ADDING> void fade(int64_t h, int64_t m, int64_t wide, float factor, float *rows) const {
        for (int64_t i = 0; i < m; i++) {
            float by = power(h, ADDING == BACK ? i + 1 : m - 1 - i) * factor;
            for (int64_t d = 0; d < wide; d += W) store(rows + i * wide + d, load(rows + i * wide + d) * by);
        }
    }
    // A = (X Y^T) * M (BACK: its transpose), in strips of rows up to (from) the diagonal.
    void triangle(int64_t h, int64_t m, const float *xr, const float *yt, float *a) const {
        const float *decay = table + h * width + (BACK ? C + 1 + blank : C);  // of distance 0
        for (int64_t i0 = 0; i0 < m; i0 += STRIP) {
            const int64_t from = BACK ? i0 : 0, to = BACK ? C : i0 + STRIP, end = least(m, i0 + STRIP);
            gemm_f32(end - i0, to - from, X, xr + i0 * X, X, 1, yt + from, C, a + i0 * C + from, C, SET);
            for (int64_t i = i0; i < end; i++)
                for (int64_t j = from; j < to; j += W) {
                    const int64_t apart = i - j;
                    uint64_t seen = BACK ? (apart <= 0 ? ~0ull : ~0ull << apart)
                                         : (apart >= 63 ? ~0ull : apart < 0 ? 0 : (2ull << apart) - 1);
                    float *s = a + i * C + j;
                    store(s, pick(seen, load(s) * load(decay - apart), set1(0.f)));
                }
        }
    }
    void times(int64_t m, const float *a, const float *zr, float *out, Into into) const {
        for (int64_t i = 0; i < m; i += STRIP) {
            const int64_t from = BACK ? i : 0, to = BACK ? m : least(m, i + STRIP);
            gemm_f32(least(STRIP, m - i), Z, to - from, a + i * C + from, C, 1, zr + from * Z, Z, out + i * Z, Z, into);
        }
    }

    int run(SfParallel parallel) {
        const int64_t heads = c.B * c.Hq, most_at_once = most<int64_t>(1, least(n, HELD / (heads * state)));
        const int64_t desk = C * (2 * X + 2 * Z + C);
        Buffer<float> states, carried, desks;
        if (!make_table() || !states.make(heads * most_at_once * state) || !carried.make(heads * state) ||
            !desks.make(c.threads * desk))
            return 1;
        memset(carried.p, 0, heads * state * 4);
        for (int64_t i = 0; first && i < heads * x.dim; i++) {
            const float *from = first + i / x.dim * x.dim * z.dim + i % x.dim * row;
            float *to = carried + i / x.dim * state + i % x.dim * Z;
            for (int64_t e = 0; e < z.dim; e++) to[e] = from[e * lane];
        }
        int64_t low = 0, held = 0;  // chunks at hand
        auto add_up = [&](int64_t i, int thread) {
            const int64_t chunk = low + i % held, b = i / held / c.Hq, h = i / held % c.Hq, m = tokens(chunk);
            float *yr = desks + thread * desk, *zr = yr + C * X;
            read(y, b, h, chunk, yr);
            read(z, b, h, chunk, zr);
            fade<true>(h, m, X, z_factor, yr);
            gemm_f32(X, Z, m, yr, 1, X, zr, Z, states + i * state, Z, SET);
        };
        auto scan = [&](int64_t i, int) {
            const int64_t at = i / (X / PART), part = i % (X / PART) * PART * Z;
            float *now = carried + at * state + part;
            for (int64_t k = 0; k < held; k++) {
                const int64_t local = BACK ? held - 1 - k : k;
                const float keep = power(at % c.Hq, tokens(low + local));
                float *s = states + (at * held + local) * state + part;
                for (int64_t e = 0; e < PART * Z; e += W) {
                    vf before = load(now + e), own = load(s + e);
                    store(s + e, before);
                    store(now + e, before * keep + own);
                }
            }
        };
        auto emit = [&](int64_t i, int thread) {
            const int64_t chunk = low + i % held, b = i / held / o.heads, ho = i / held % o.heads, m = tokens(chunk);
            const int64_t group = c.Hq / o.heads;
            float *xr = desks + thread * desk, *yt = xr + C * X, *zr = yt + C * X, *out = zr + C * Z, *a = out + C * Z;
            for (int64_t h = ho * group; h < (ho + 1) * group; h++) {
                read(y, b, h, chunk, xr);
                for (int64_t t = 0; t < C; t += 16)
                    for (int64_t d = 0; d < X; d += 16) transpose16(xr + t * X + d, X, yt + d * C + t, C);
                read(x, b, h, chunk, xr);
                read(z, b, h, chunk, zr);
                if (z_factor != 1)
                    for (int64_t e = 0; e < m * Z; e += W) store(zr + e, load(zr + e) * z_factor);
                triangle(h, m, xr, yt, a);
                times(m, a, zr, out, h == ho * group ? SET : ADD);
                if (!first && chunk == (BACK ? n - 1 : 0)) continue;  // nothing came before
                fade<false>(h, m, X, 1.f, xr);
                gemm_f32(m, Z, x.dim, xr, X, 1, states + ((b * c.Hq + h) * held + i % held) * state, Z, out, Z, ADD);
            }
            for (int64_t t = 0; t < m; t++) write_row(o.view, b, ho, chunk * C + t, c.dtype, z.dim, out + t * Z, o_factor);
        };
        for (int64_t done = 0; done < n; done += held) {
            held = least(most_at_once, n - done);
            low = BACK ? n - done - held : done;
            in_parallel(parallel, c.threads, heads * held, add_up);
            in_parallel(parallel, c.threads, heads * (X / PART), scan);
            in_parallel(parallel, c.threads, c.B * o.heads * held, emit);
        }
        for (int64_t i = 0; last && i < heads * x.dim; i++)
            memcpy(last + i * z.dim, carried + i / x.dim * state + i % x.dim * Z, z.dim * 4);
        return 0;
    }
};

inline int linear_forward(const SfLinear &c, SfParallel parallel) {
    Rows q = {c.q, c.Hq, c.D}, k = {c.k, c.Hkv, c.D}, v = {c.v, c.Hkv, c.Dv}, out = {c.out, c.Hq, c.Dv};
    return Sweep<false>{c, q, k, v, out, c.first, c.Dv, 1, c.last, 1.f, c.scale}.run(parallel);
}

inline int linear_backward(const SfLinear &c, SfParallel parallel) {
    Rows q = {c.q, c.Hq, c.D}, k = {c.k, c.Hkv, c.D}, v = {c.v, c.Hkv, c.Dv}, g = {c.dout, c.Hq, c.Dv};
    Rows dq = {c.dq, c.Hq, c.D}, dk = {c.dk, c.Hkv, c.D}, dv = {c.dv, c.Hkv, c.Dv};
    int code = Sweep<false>{c, g, v, k, dq, c.first, 1, c.Dv, nullptr, 1.f, c.scale}.run(parallel);
    if (!code) code = Sweep<true>{c, v, g, q, dk, c.dlast, 1, c.Dv, nullptr, c.scale, 1.f}.run(parallel);
    return code ? code : Sweep<true>{c, k, q, g, dv, c.dlast, c.Dv, 1, c.dfirst, c.scale, 1.f}.run(parallel);
}

}  // namespace
