// Stick-breaking attention: each key takes the share sigmoid(z) of what newer keys left of a stick of length 1.
//
//   P_ij = b_ij prod over newer t of (1 - b_it)      b = sigmoid(z), z = scale q.k      O = P V      rem = prod (1 - b)
//
// Newer means a later key row. Chunks are visited newest first, and with keys as rows of S^T the product runs down the chunk
// in registers, one vector of queries at a time: no scan, no logarithm, nothing to overflow, relative errors only. Once
// nothing is left of any stick of a block (0 in fp32), older chunks would add exact zeros and are not visited.
#pragma once
#include "drive.h"

namespace {

// The chunks of a tile sorted by key row (heapsort): lists hold spans and units apart, the product needs one order.
struct Ordered {
    Buffer<Chunk> list;
    int64_t n = 0;

    bool make(const SfCall &c, int64_t b, int64_t h, int64_t tile) {
        int64_t size = 0;
        for_each_chunk<APART>(c, b, h, tile, [&](const Chunk &) { size++; });
        if (!list.make(size)) return false;
        for_each_chunk<APART>(c, b, h, tile, [&](const Chunk &k) { list[n++] = k; });
        for (int64_t i = n / 2; i--;) sink(i, n);
        for (int64_t i = n; i-- > 1;) {
            swap(0, i);
            sink(0, i);
        }
        return true;
    }

  private:
    int64_t row(int64_t i) const { return list[i].base + list[i].a; }
    void swap(int64_t i, int64_t j) { Chunk k = list[i]; list[i] = list[j]; list[j] = k; }
    void sink(int64_t i, int64_t size) {  // sifts down in a max-heap by row
        for (int64_t j; (j = 2 * i + 1) < size; i = j) {
            j += j + 1 < size && row(j + 1) > row(j);
            if (row(i) >= row(j)) return;
            swap(i, j);
        }
    }
};

// b and 1 - b for z in base 2, each to full relative precision: exponentials of negative numbers only.
inline void shares(vf z, vf &taken, vf &left) {
    vf e = exp2v<true>(-vmax(z, -z));
    vf large = 1.f / (1.f + e), small = e * large;
    taken = z >= 0.f ? large : small;
    left = z >= 0.f ? small : large;
}

// Goes over rows [a,b) of S, newest first: S becomes P, the sticks m shrink, and `share` (or null) receives b.
template <int G>
inline void break_lanes(int i0, const Chunk &k, const uint64_t *see, float factor, float *s, float *m, float *share) {
    vf stick[G];
    for (int g = 0; g < G; g++) stick[g] = load(m + i0 + g * W);
    for (int j = k.b; j-- > k.a;)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            const int64_t at = j * BQ + i0 + g * W;
            vf taken, left;
            shares(load(s + at) * factor, taken, left);
            if (see) {
                taken = pick(see[j] >> (i0 + g * W), taken, set1(0.f));
                left = pick(see[j] >> (i0 + g * W), left, set1(1.f));
            }
            store(s + at, taken * stick[g]);
            if (share) store(share + at, taken);
            stick[g] = stick[g] * left;
        }
    for (int g = 0; g < G; g++) store(m + i0 + g * W, stick[g]);
}
inline void break_sticks(const Chunk &k, const uint64_t *see, int lanes, float factor, float *s, float *m, float *share) {
    int i = 0;
    for (; i + 4 * W <= lanes; i += 4 * W) break_lanes<4>(i, k, see, factor, s, m, share);
    for (; i < lanes; i += W) break_lanes<1>(i, k, see, factor, s, m, share);
}

// Turns dP into dZ, oldest first: T = P (dP - drem), dZ = T - b C, with C the running sum of T (carried in `c`).
inline void slope_sticks(const Chunk &k, int lanes, const float *p, const float *share, const float *drem, float *g,
                         float *c) {
    for (int i = 0; i < lanes; i += W) {
        vf sum = load(c + i), r = load(drem + i);
        for (int j = k.a; j < k.b; j++) {
            vf t = load(p + j * BQ + i) * (load(g + j * BQ + i) - r);
            sum += t;
            store(g + j * BQ + i, t - load(share + j * BQ + i) * sum);
        }
        store(c + i, sum);
    }
}

// Sets the sticks to 1 for real queries, 0 for empty lanes.
inline void whole(const Queries &q, float *m) { for (int i = 0; i < BQ; i++) m[i] = q.real >> i & 1 ? 1.f : 0.f; }
inline bool used_up(const float *m) {
    for (int i = 0; i < BQ; i++) if (m[i] != 0) return false;
    return true;
}

inline bool stick_forward_block(const SfCall &c, const Keys<false> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile,
                                int64_t row, int64_t rows, Scratch<false> &w) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int n = columns<false>(q);
    Ordered chunks;
    if (q.real && !chunks.make(c, b, h, tile)) return false;
    bool packed = false;
    whole(q, w.m);
    for (int64_t x = chunks.n; x-- > 0 && !used_up(w.m);) {
        Chunk k = chunks.list[x];
        bool holes = false;
        if (k.partial && !look(rules, q, k, w.see, holes)) continue;
        if (!packed) {
            packed = true;
            pack_lanes<false>(c, c.q, b, h, q, q.real, c.D, w.qt.p);
            memset(w.ot.p, 0, c.Dv * BQ * 4);
        }
        const Operands<false> o = operands<false, false>(c, keys, k, holes, w.see, w);
        float *s = w.s + k.a * BQ;
        gemm_f32(k.b - k.a, n, c.D, o.k + k.a * o.ldk, o.ldk, 1, w.qt.p, BQ, s, BQ, SET);
        break_sticks(k, k.partial ? w.see : nullptr, n, c.scale * LOG2E, w.s.p, w.m, nullptr);
        gemm_f32(c.Dv, n, k.b - k.a, o.v + k.a * o.ldv, 1, o.ldv, s, BQ, w.ot.p, BQ, ADD);
    }
    const int64_t ld = round_up(c.Dv, 16);
    if (packed) lanes_to_rows(w.ot.p, c.Dv, w.spare.p);
    for (int i = 0; i < BQ; i++) {
        if (q.token[i] < 0) continue;
        const bool real = q.real >> i & 1;
        float *out = w.spare + i * ld;
        if (!packed || !real) memset(out, 0, ld * 4);
        c.lse[(b * c.Hq + h) * c.Tq + q.token[i]] = real ? w.m[i] : 1.f;
        write_row(c.out, b, h, q.token[i], c.out_dtype, c.Dv, out, 1.f);
    }
    return true;
}

// Sticks are broken newest key first, gradients are summed oldest first. So a first pass computes the scores alone, and saves
// what is left before each chunk (64 numbers each); a second pass goes back and computes the rest. Recovering the sticks from
// the end by division would fail: most are 0 there.
inline bool stick_backward_block(const SfCall &c, const Keys<false> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile,
                                 int64_t row, int64_t rows, Scratch<false> &w, KeyGrads &grads) {
    Queries q;
    q.load(rules, row, rows, row - tile * c.plan.tile);
    const int n = columns<false>(q);
    const float factor = c.scale * LOG2E;
    Ordered chunks;
    Buffer<float> left, share;
    if (q.real && (!chunks.make(c, b, h, tile) || !left.make(chunks.n * BQ) || !share.make(BK * BQ))) return false;
    if (q.real) {
        pack_lanes<false>(c, c.q, b, h, q, q.real, c.D, w.qt.p, w.qr.p);
        pack_lanes<false>(c, c.dout, b, h, q, q.real, c.Dv, w.dot.p, w.dor.p);
        memset(w.ot.p, 0, round_up(c.D, 32) * BQ * 4);
    }
    whole(q, w.m);
    int64_t x = chunks.n;
    while (x > 0 && !used_up(w.m)) {
        Chunk k = chunks.list[--x];
        bool holes = false;
        memcpy(left + x * BQ, w.m, BQ * 4);
        if (k.partial && !look(rules, q, k, w.see, holes)) continue;
        const Operands<false> o = operands<false, false>(c, keys, k, holes, w.see, w);
        gemm_f32(k.b - k.a, n, c.D, o.k + k.a * o.ldk, o.ldk, 1, w.qt.p, BQ, w.s + k.a * BQ, BQ, SET);
        break_sticks(k, k.partial ? w.see : nullptr, n, factor, w.s.p, w.m, nullptr);
    }
    for (int i = 0; i < BQ; i++) {
        w.l[i] = 0;
        w.delta[i] = c.dlse && (q.real >> i & 1) ? c.dlse[(b * c.Hq + h) * c.Tq + q.token[i]] : 0.f;
    }
    for (; x < chunks.n; x++) {
        Chunk k = chunks.list[x];
        bool holes = false;
        if (k.partial && !look(rules, q, k, w.see, holes)) continue;
        const Operands<false> o = operands<false, true>(c, keys, k, holes, w.see, w);
        const Steps<false> all(k, n, nullptr);
        scores<false>(c, o, all, w, w);
        break_sticks(k, k.partial ? w.see : nullptr, n, factor, w.s.p, left + x * BQ, share.p);
        slope_sticks(k, n, w.s.p, share.p, w.delta, w.g.p, w.l);
        add_products<false>(c, k, o, all, n, w, w, grads);
    }
    if (q.real) lanes_to_rows(w.ot.p, c.D, w.spare.p);
    for (int i = 0; i < BQ; i++) {
        if (q.token[i] < 0) continue;
        float *dq = w.spare + i * round_up(c.D, 16);
        if (!(q.real >> i & 1)) memset(dq, 0, c.D * 4);
        write_row(c.dq, b, h, q.token[i], c.grad_dtype, c.D, dq, c.scale);
    }
    return true;
}

// Blocks run on several threads; if one of them gets no memory, the call fails.
inline int stick_forward(const SfCall &c, SfParallel parallel) {
    char failed = 0;
    auto block = [&](const Keys<false> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<false> &w) {
        if (!stick_forward_block(c, keys, rules, b, h, tile, row, rows, w)) __atomic_store_n(&failed, (char)1, __ATOMIC_RELAXED);
    };
    int code = forward_over<false>(c, parallel, block);
    return code ? code : failed;
}
inline int stick_backward(const SfCall &c, SfParallel parallel) {
    char failed = 0;
    auto block = [&](const Keys<false> &keys, const Rules &rules, int64_t b, int64_t h, int64_t tile, int64_t row, int64_t rows,
                     Scratch<false> &w, KeyGrads &grads, const BiasGrads &) {
        if (!stick_backward_block(c, keys, rules, b, h, tile, row, rows, w, grads))
            __atomic_store_n(&failed, (char)1, __ATOMIC_RELAXED);
    };
    int code = backward_over<false>(c, parallel, block);
    return code ? code : failed;
}

}  // namespace
