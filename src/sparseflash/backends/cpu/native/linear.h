// Causal linear attention with a decay l per head, in chunks of C tokens: a product masked by the decay inside a chunk,
// a state [D][Dv] carried between chunks:
//
//   O = (Q K^T * M) V + before * (Q S)      M[i][j] = l^(i-j) for j <= i;  before[i] = l^(i+1)
//   S' = l^n S + (after * K)^T V            after[j] = l^(n-1-j), of the n tokens of the chunk
//
// The gradients are the same sum with other operands: for dQ, (dO, V, K); for dK, (V, dO, Q), and for dV, (K, Q, dO), both with
// time reversed, which swaps `before` and `after` and transposes M. So one class, Sweep, computes all of them.
//
// A sweep takes as many chunks of every head at a time as have states that fit the second cache level, in three steps: what
// each chunk adds to the state; a scan that turns these into the states before each chunk; the outputs. The chunks of a step
// run in parallel, so one head keeps every thread busy, and no result depends on their number. Sums and states are fp32 for
// every storage type; powers of l come from exponents, never from quotients.
//
// In bf16 one fp32 factor of each product is rounded, never two: K on its way to the state, the state on its way to an output
// (`before` is applied to Q S, in fp32), and Q K^T * M.
#pragma once
#include <math.h>
#include "pack.h"

namespace {

// A user tensor: view, number of heads, dimension.
struct Rows {
    const SfView &view;
    int64_t heads, dim;
};

template <bool BF, bool BACK> struct Sweep {
    typedef Products<BF> P;
    typedef typename P::Item Item;
    struct Matrix { const Item *p; int64_t ld; };

    const SfLinear &c;
    Rows x, y, z, o;           // o = sum of l^|distance| (x.y) z, summed over the query heads that share a head of o
    const float *first;        // state [x.dim][z.dim] that the sweep begins with, or null
    int64_t row, lane;         // strides of `first`
    float *last;               // receives the state that the sweep ends with, or null
    float z_factor, o_factor;

    static constexpr int64_t PER = P::PAIR, LANES = 16 * PER;  // items in 32 bits; items in a vector of 16 such
    static constexpr int64_t STRIP = 32;      // rows of a triangular product that are cut to one length
    static constexpr int64_t PART = 16;       // state rows per scan task
    static constexpr int64_t HELD = 1 << 17;  // floats of states at a time (at least one state per head)

    int64_t X = round_up(x.dim, LANES), Z = round_up(z.dim, LANES);
    int64_t C = most(X, Z) > 64 ? 128 : 64, n = (c.T + C - 1) / C, state = X * Z;
    int64_t blank = STRIP + W, width = 2 * (C + 1) + blank;
    Buffer<float> table = {};  // per head: l^C .. l^0, zeros, l^0 .. l^C: rows of M, and of its transpose

    float power(int64_t h, int64_t i) const { return table[h * width + C - i]; }
    int64_t tokens(int64_t chunk) const { return least(C, c.T - chunk * C); }
    static int64_t shared(const Rows &r, int64_t h, int64_t heads) { return h * r.heads / heads; }
    // Decay between row i of m and the state that the chunk adds to (after), or reads (before).
    float after(int64_t h, int64_t m, int64_t i) const { return power(h, BACK ? i + 1 : m - 1 - i); }
    float before(int64_t h, int64_t m, int64_t i) const { return power(h, BACK ? m - 1 - i : i + 1); }

    // C (+)= A B; M and K are rounded up to GRAIN: rows and items beyond them are multiplied too.
    static void product(int64_t M, int64_t N, int64_t K, const Item *a, int64_t lda, const Item *b, int64_t ldb, float *c,
                        int64_t ldc, Into into) {
        P::multiply(round_up(M, P::GRAIN), N, round_up(K, P::GRAIN), a, lda, 1, b, ldb, c, ldc, into);
    }

    bool make_table() {
        if (!table.make(c.Hq * width)) return false;
        memset(table.p, 0, c.Hq * width * 4);
        for (int64_t h = 0; h < c.Hq; h++)
            for (int64_t i = 0; i <= C; i++)
                table[h * width + C - i] = table[h * width + C + 1 + blank + i] = (float)exp(-(c.rate ? c.rate[h] : 0.) * (double)i);
        return true;
    }

    // Rows of a chunk: in place if the layout allows, else copied to `desk`, padded with zeros.
    Matrix rows(const Rows &r, int64_t wide, int64_t b, int64_t h, int64_t chunk, Item *desk) const {
        const int64_t m = tokens(chunk);
        auto from = [&](int64_t i) { return row_of(r.view, b, shared(r, h, c.Hq), chunk * C + i, c.dtype); };
        if (c.dtype == P::DTYPE && m == C && r.dim == wide && r.view.lane == 1 && r.view.row % PER == 0)
            return {(const Item *)from(0), r.view.row};
        for (int64_t i = 0; i < m; i++) P::copy(r.view, from(i), c.dtype, r.dim, desk + i * wide, wide);
        memset(desk + m * wide, 0, (C - m) * wide * sizeof(Item));
        return {desk, wide};
    }
    // Transposes [lines][items] to [items][lines], in units of 32 bits.
    static void across(const Item *from, int64_t ld, int64_t lines, int64_t items, Item *to) {
        for (int64_t t = 0; t < lines; t += 16)
            for (int64_t d = 0; d < items; d += 16)
                transpose16(from + (t * ld + d) * PER, ld, to + (d * lines + t) * PER, lines);
    }
    // Interleaves pairs of rows, [C/2][wide][2]; row i is multiplied by factor(i).
    template <class Factor> void pairs(Matrix r, int64_t wide, Item *to, Factor factor) const {
        for (int64_t i = 0; i < C; i += 2)
            for (int64_t d = 0; d < wide; d += 32) {
                const Item *at = r.p + i * r.ld + d;
                P::mix_rows(to + i * wide + 2 * d, factor(P::load(at), i), factor(P::load(at + r.ld), i + 1));
            }
    }
    // Z in the layout of a product's second operand.
    Matrix below(Matrix zr, [[maybe_unused]] Item *desk) const {
        if constexpr (!BF) return zr;
        else {
            pairs(zr, Z, desk, [](auto row, int64_t) { return row; });
            return {desk, Z};
        }
    }
    // A = (X Y^T) * M (BACK: M^T), in strips of rows that end (BACK: begin) at the diagonal. `sums` may be `a` itself.
    void triangle(int64_t h, int64_t m, Matrix xr, const Item *yt, float *sums, Item *a) const {
        const float *decay = table + h * width + (BACK ? C + 1 + blank : C);  // of distance 0
        for (int64_t i0 = 0; i0 < m; i0 += STRIP) {
            const int64_t from = BACK ? i0 : 0, to = BACK ? C : i0 + STRIP, end = least(m, i0 + STRIP);
            product(end - i0, to - from, X, xr.p + i0 * xr.ld, xr.ld, yt + from * PER, C, sums + i0 * C + from, C, SET);
            auto seen = [&](int64_t i, int64_t j) {
                const int64_t apart = i - j;
                uint64_t bits = BACK ? (apart <= 0 ? ~0ull : ~0ull << apart)
                                     : (apart >= 63 ? ~0ull : apart < 0 ? 0 : (2ull << apart) - 1);
                return pick(bits, load(sums + i * C + j) * load(decay - apart) * z_factor, set1(0.f));
            };
            for (int64_t i = i0; i < end; i++)
                for (int64_t j = from; j < to; j += W * PER) {
                    if constexpr (BF) P::store(a + i * C + j, P::narrow(seen(i, j), seen(i, j + W)));
                    else store(a + i * C + j, seen(i, j));
                }
        }
    }
    // out (+)= A Z, for a triangular A.
    void weigh(int64_t m, const Item *a, Matrix zr, float *out, Into into) const {
        for (int64_t i = 0; i < m; i += STRIP) {
            const int64_t from = BACK ? i : 0, to = BACK ? m : least(m, i + STRIP);
            product(least(STRIP, m - i), Z, to - from, a + i * C + from, C, zr.p + from * zr.ld, zr.ld, out + i * Z, Z, into);
        }
    }

    int run(SfParallel parallel) {
        const int64_t heads = c.B * c.Hq, most_at_once = most<int64_t>(1, least(n, HELD / (heads * state)));
        const int64_t desk = C * (2 * X + 2 * Z + C), sheet = C * (Z + most(C, Z));  // items; floats
        Buffer<float> states, carried, sheets;
        Buffer<Item> desks;
        if (!make_table() || !states.make(heads * most_at_once * state) || !carried.make(heads * state) ||
            !desks.make(c.threads * desk) || !sheets.make(c.threads * sheet))
            return 1;
        memset(carried.p, 0, heads * state * 4);
        for (int64_t i = 0; first && i < heads * x.dim; i++) {
            const float *from = first + i / x.dim * x.dim * z.dim + i % x.dim * row;
            float *to = carried + i / x.dim * state + i % x.dim * Z;
            for (int64_t e = 0; e < z.dim; e++) to[e] = from[e * lane];
        }
        int64_t low = 0, held = 0;  // first chunk and number of chunks of this step
        auto add_up = [&](int64_t i, int thread) {
            const int64_t chunk = low + i % held, b = i / held / c.Hq, h = i / held % c.Hq, m = tokens(chunk);
            P::prepare_thread();
            Item *yr = desks + thread * desk, *zr = yr + C * X, *yt = zr + C * Z;
            const Matrix from = rows(y, X, b, h, chunk, yr), other = rows(z, Z, b, h, chunk, zr);
            if constexpr (BF) {
                auto fade = [&](auto row, int64_t t) { return t < m ? P::times(row, after(h, m, t) * z_factor) : row; };
                pairs(from, X, yt, fade);
                across(yt, X, C / 2, X, yr);
                product(X, Z, m, yr, C, below(other, yt + C * X).p, Z, states + i * state, Z, SET);
            } else {
                for (int64_t t = 0; t < m; t++)
                    for (int64_t d = 0; d < X; d += W)
                        store(yt + t * X + d, load(from.p + t * from.ld + d) * (after(h, m, t) * z_factor));
                gemm_f32(X, Z, m, yt, 1, X, other.p, other.ld, states + i * state, Z, SET);
            }
        };
        // Exclusive scan: replaces what each chunk adds by the state before it; bf16: as pairs of rows, in place of the first.
        auto scan = [&](int64_t i, int) {
            const int64_t at = i / (X / PART), part = i % (X / PART) * PART * Z;
            float *now = carried + at * state + part;
            for (int64_t k = 0; k < held; k++) {
                const int64_t local = BACK ? held - 1 - k : k;
                const float keep = power(at % c.Hq, tokens(low + local));
                float *s = states + (at * held + local) * state + part;
                auto step = [&](int64_t e) {
                    vf old = load(now + e);
                    store(now + e, old * keep + load(s + e));
                    return old;
                };
                for (int64_t r = 0; r < PART; r += PER)
                    for (int64_t e = r * Z; e < (r + 1) * Z; e += W) {
                        const vf one = step(e);
                        if constexpr (BF) P::store_pairs((Item *)(s + e), one, step(e + Z));
                        else store(s + e, one);
                    }
            }
        };
        auto emit = [&](int64_t i, int thread) {
            const int64_t chunk = low + i % held, b = i / held / o.heads, ho = i / held % o.heads, m = tokens(chunk);
            const int64_t group = c.Hq / o.heads;
            const bool alone = !first && chunk == (BACK ? n - 1 : 0);  // the state before is 0
            Item *xr = desks + thread * desk, *yt = xr + C * X, *zr = yt + C * X, *zp = zr + C * Z, *a = zp + C * Z;
            float *out = sheets + thread * sheet, *sums = out + C * Z;
            P::prepare_thread();
            for (int64_t h = ho * group; h < (ho + 1) * group; h++) {
                const Matrix other = rows(y, X, b, h, chunk, xr);
                across(other.p, other.ld / PER, C, X / PER, yt);
                const Matrix own = rows(x, X, b, h, chunk, xr);
                Into into = h == ho * group ? SET : ADD;
                if (!alone) {
                    const Item *held_state = (const Item *)(states + ((b * c.Hq + h) * held + i % held) * state);
                    product(m, Z, X, own.p, own.ld, held_state, PER * Z, sums, Z, SET);
                    for (int64_t t = 0; t < m; t++)
                        for (int64_t e = t * Z; e < (t + 1) * Z; e += W)
                            store(out + e, load(sums + e) * before(h, m, t) + (into ? load(out + e) : set1(0.f)));
                    into = ADD;
                }
                triangle(h, m, own, yt, sums, a);
                weigh(m, a, below(rows(z, Z, b, h, chunk, zr), zp), out, into);
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

template <bool BF> int run_linear_forward(const SfLinear &c, SfParallel parallel) {
    Rows q = {c.q, c.Hq, c.D}, k = {c.k, c.Hkv, c.D}, v = {c.v, c.Hkv, c.Dv}, out = {c.out, c.Hq, c.Dv};
    return Sweep<BF, false>{c, q, k, v, out, c.first, c.Dv, 1, c.last, 1.f, c.scale}.run(parallel);
}

template <bool BF> int run_linear_backward(const SfLinear &c, SfParallel parallel) {
    Rows q = {c.q, c.Hq, c.D}, k = {c.k, c.Hkv, c.D}, v = {c.v, c.Hkv, c.Dv}, g = {c.dout, c.Hq, c.Dv};
    Rows dq = {c.dq, c.Hq, c.D}, dk = {c.dk, c.Hkv, c.D}, dv = {c.dv, c.Hkv, c.Dv};
    int code = Sweep<BF, false>{c, g, v, k, dq, c.first, 1, c.Dv, nullptr, 1.f, c.scale}.run(parallel);
    if (!code) code = Sweep<BF, true>{c, v, g, q, dk, c.dlast, 1, c.Dv, nullptr, c.scale, 1.f}.run(parallel);
    return code ? code : Sweep<BF, true>{c, k, q, g, dv, c.dlast, c.Dv, 1, c.dfirst, c.scale, 1.f}.run(parallel);
}

}  // namespace
