// Drivers of a whole forward or backward: tasks for the threads, and the order in which dK and dV are summed.
//
// A backward task adds dK and dV into memory of its own (of one head, or of a share of a head's tiles). So nothing is
// locked, shares are summed in a fixed order, and results repeat bit for bit.
#pragma once
#include "backward.h"

namespace {

// Runs `block` for every query block of every head. rows_only: `block` reads rows of K and V, never the transposed ones.
template <bool BF, class Block> int forward_over(const SfCall &c, SfParallel parallel, Block block, bool rows_only = false) {
    const SfPlan &p = c.plan;
    Packed<BF, false> packed;
    if (packed.make(c, parallel, rows_only)) return 1;
    Desks<BF> scratch;
    if (!scratch.make(c, false)) return 1;
    const int64_t per = most<int64_t>(BQ / p.tile, 1), runs = (p.tiles + per - 1) / per;  // tiles per task; tasks per head
    auto task = [&](int64_t i, int thread) {
        Scratch<BF> &w = scratch[thread];
        Products<BF>::prepare_thread();
        int64_t slot = i / runs, b = slot / c.Hq, h = slot % c.Hq, last = p.tiles - i % runs * per;  // long rows first
        Rules rules(c, b, h);
        const Keys<BF> keys = packed.keys(c, b, h);
        for (int64_t r = most<int64_t>(last - per, 0); r < last; r++) {
            int64_t end = least(p.q_rows, (r + 1) * p.tile);
            for (int64_t row = r * p.tile; row < end; row += BQ)
                block(keys, rules, b, h, r, row, least<int64_t>(BQ, end - row), w);
        }
    };
    in_parallel(parallel, c.threads, c.B * c.Hq * runs, task);
    return 0;
}

// Number of shares per head that balances the threads: simulates handing tasks greedily to the least loaded thread.
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

// Gradients of the biases, [B,Hq,splits,length]: each share adds into its own slice; slices are summed in order.
class BiasShares {
    Buffer<float> key, distance;
    int64_t keys = 0, distances = 0;

    static void add(const float *from, int64_t rows, int64_t splits, int64_t length, bool over, float *to) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t t = 0; t < length; t++) {
                float x = 0;
                for (int64_t s = 0; s < splits; s++) x += from[(i * splits + s) * length + t];
                to[i * length + t] = over ? x : to[i * length + t] + x;
            }
    }

  public:
    bool make(const SfCall &c, int64_t splits) {
        keys = c.dbias ? c.Tk : 0, distances = c.ddistance ? c.Tq + c.Tk - 1 : 0;
        const int64_t rows = c.B * c.Hq * splits;
        if ((keys && !key.make(rows * keys)) || (distances && !distance.make(rows * distances))) return false;
        if (keys) memset(key.p, 0, rows * keys * 4);
        if (distances) memset(distance.p, 0, rows * distances * 4);
        return true;
    }
    BiasGrads of(int64_t i) { return {keys ? key + i * keys : nullptr, distances ? distance + i * distances : nullptr}; }
    void sum(const SfCall &c, int64_t splits) const {
        if (keys) add(key.p, c.B * c.Hq, splits, keys, true, c.dbias);
        if (distances) add(distance.p, c.B * c.Hq, splits, distances, false, c.ddistance);
    }
};

// Runs `block` for the query blocks of every head, PER at a time, and sums the shares of dK, dV and bias gradients.
// A task is (slot, share): slot = (b, packed KV head), pair j = (query head of its group, tile), in that order. Example: pairs
// of cost 4, 4, 8 have their midpoints at 2, 6, 12 of 16; of 2 shares the first owns pairs 0 and 1, the second pair 2.
template <bool BF, int PER = 1, class Block> int backward_over(const SfCall &c, SfParallel parallel, Block block, bool rows_only = false) {
    const SfPlan &p = c.plan;
    int threads = most(c.threads, 1);
    Packed<BF, true> packed;
    if (packed.make(c, parallel, rows_only)) return 1;
    const int64_t heads = packed.heads, group = c.Hq / heads, slots = c.B * heads, pairs = group * p.tiles;
    const int64_t rows = round_up(p.k_rows, BK), blocks = rows / BK;
    const int64_t ldk = round_up(c.D, 16 * Products<BF>::PAIR), ldv = round_up(c.Dv, 16 * Products<BF>::PAIR);

    // cumulative cost over the pairs of each slot; a share is a contiguous run of pairs of about equal cost
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
    // With one share per head, its task writes dK and dV at once; otherwise shares are kept and summed in order.
    const bool direct = splits == 1 && heads == c.Hkv && c.Bk == c.B;
    const int64_t held = direct ? threads : tasks;

    Buffer<float> acc_k, acc_v;
    BiasShares shares;
    Buffer<char> touched;
    Desks<BF> scratch;
    Buffer<int32_t> row_of_token;
    bool ok = acc_k.make(held * rows * ldk) && acc_v.make(held * rows * ldv) && touched.make(held * blocks) &&
              scratch.make(c, true) && shares.make(c, splits) &&
              (!p.k_order.data || row_of_token.make(slots * c.Tk));
    if (!ok) return 1;

    auto invert = [&](int64_t s, int) {
        Rules r(c, s / heads, s % heads * group);
        for (int64_t t = 0; t < c.Tk; t++) row_of_token[s * c.Tk + t] = -1;
        for (int64_t row = 0; row < p.k_rows; row++) {
            int64_t t = r.key_token(row);
            if (t >= 0) row_of_token[s * c.Tk + t] = (int32_t)row;
        }
    };
    if (p.k_order.data) in_parallel(parallel, threads, slots, invert);

    // Writes dK and dV of token t of a KV head: summed over sequences (of a shared pool), packed heads and shares, in that order.
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
        Products<BF>::prepare_thread();
        int64_t slot = i / splits, share = i % splits, b = slot / heads, hp = slot % heads, at = direct ? thread : i;
        KeyGrads grads = {acc_k + at * rows * ldk, acc_v + at * rows * ldv, touched + at * blocks, ldk, ldv};
        memset(grads.touched, 0, blocks);
        const int64_t *run = cost + slot * pairs, whole = sum[slot];
        for (int64_t j = 0; j < pairs; j++) {
            int64_t before = j ? run[j - 1] : 0;  // cost before the pair; the pair's midpoint decides which share owns it
            int64_t owner = whole ? least(splits - 1, (before + run[j]) * splits / (2 * whole)) : 0;
            if (owner != share) continue;
            int64_t h = hp * group + j / p.tiles, r = j % p.tiles;
            Rules rules(c, b, h);
            const Keys<BF> keys = packed.keys(c, b, h);
            const BiasGrads biases = shares.of((b * c.Hq + h) * splits + share);
            int64_t end = least(p.q_rows, (r + 1) * p.tile);
            for (int64_t row = r * p.tile; row < end; row += PER * BQ)
                block(keys, rules, b, h, r, row, least<int64_t>(PER * BQ, end - row), w, grads, biases);
        }
        if (direct)
            for (int64_t t = 0; t < c.Tk; t++) write_token(b, hp, t, thread, w.spare.p);
    };
    in_parallel(parallel, threads, tasks, task);

    if (!direct) {
        int64_t per = 256, parts = (c.Tk + per - 1) / per;
        auto reduce = [&](int64_t i, int thread) {
            int64_t part = i % parts, b = i / parts / c.Hkv, hkv = i / parts % c.Hkv;
            for (int64_t t = part * per; t < least(c.Tk, (part + 1) * per); t++)
                write_token(b, hkv, t, -1, scratch[thread].spare.p);
        };
        in_parallel(parallel, threads, c.Bk * c.Hkv * parts, reduce);
    }
    shares.sum(c, splits);
    return 0;
}

}  // namespace
