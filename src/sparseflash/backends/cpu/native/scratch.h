// Scratch memory of a call and of its threads; running tasks on the threads.
#pragma once
#include <new>
#include "plan.h"
#include "products.h"

namespace {

// True if the call adds a bias per (query, key) pair (bias.h).
inline bool has_pairs(const SfCall &c) { return c.alibi.data || c.distance.data || c.pair.data; }

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

// One T for every thread of a call.
template <class T> struct Rooms {
    Buffer<char> room;
    int made = 0;

    template <class F> bool make(int threads, F fill) {
        bool ok = room.make(threads * (int64_t)sizeof(T));
        for (; ok && made < threads; made++) ok = fill(*new (&(*this)[made]) T());
        return ok;
    }
    ~Rooms() { while (made > 0) (*this)[--made].~T(); }
    T &operator[](int thread) { return ((T *)room.p)[thread]; }
};

template <class F> inline void in_parallel(SfParallel parallel, int threads, int64_t tasks, F &f) {
    parallel(threads, tasks, [](void *x, int64_t task, int thread) { (*(F *)x)(task, thread); }, &f);
}

// State of one query block over all its chunks: query rows in the products' layouts, accumulator O^T, row statistics.
template <bool BF> struct Lanes {
    Buffer<float> ot;
    Buffer<typename Products<BF>::Item> qt, dot, qr, dor;
    float m[BQ], l[BQ], top[BQ], rest2[BQ], delta[BQ];
    uint32_t drawn[2][BQ];  // dropout: the two Philox words of each query

    bool make(const SfCall &c, bool backward) {
        int64_t D = round_up(c.D, 32) * BQ, Dv = round_up(c.Dv, 32) * BQ;
        const bool ok = ot.make(most(D, Dv)) && qt.make(D);
        return ok && (!backward || (dot.make(Dv) && qr.make(D) && dor.make(Dv)));
    }
};

// Scratch for a block of queries and one chunk of keys; the backward holds a second block of queries in `next`.
template <bool BF> struct Scratch : Lanes<BF> {
    typedef typename Products<BF>::Item Item;
    Lanes<BF> next;
    Buffer<float> s, g, spare, pair, peaks;
    Buffer<Item> kc, vc, tc, p, pr, dr;
    uint64_t see[BK];
    float bias[BK], sums[BK];
    uint32_t key_words[2][BK];

    // Weights P and slopes dS of a chunk in the layouts that products read: pairs of keys, and rows of queries. In fp32 both
    // layouts are one, and it replaces the scores in `s` and `g`.
    Item *weights() const { if constexpr (BF) return p.p; else return s.p; }
    Item *weight_rows() const { if constexpr (BF) return pr.p; else return s.p; }
    Item *slopes() const { if constexpr (BF) return p.p; else return g.p; }
    Item *slope_rows() const { if constexpr (BF) return dr.p; else return g.p; }

    bool make(const SfCall &c, bool backward) {
        const int64_t D = round_up(c.D, Products<BF>::PADDED), Dv = round_up(c.Dv, Products<BF>::PADDED);
        const int64_t top = round_up(most(c.D, c.Dv), 32);
        bool ok = Lanes<BF>::make(c, backward) && s.make(BK * BQ) && spare.make(top + BK * top) && kc.make(BK * D) && vc.make(BK * Dv);
        if (c.lse && c.stat) ok = ok && peaks.make((c.Tk + c.stat_unit - 1) / c.stat_unit * BQ);
        if (BF) ok = ok && p.make(BK * BQ) && tc.make(BK * top);
        if (has_pairs(c)) ok = ok && pair.make(BK * BQ);
        if (!backward) return ok;
        ok = ok && g.make(BK * BQ) && (c.plan.tile <= BQ || next.make(c, true));
        return ok && (!BF || (pr.make(BK * BQ) && dr.make(BK * BQ)));
    }
};

// A Scratch for every thread of a call.
template <bool BF> struct Desks : Rooms<Scratch<BF>> {
    bool make(const SfCall &c, bool backward) {
        return Rooms<Scratch<BF>>::make(c.threads, [&](Scratch<BF> &w) { return w.make(c, backward); });
    }
};

}  // namespace
