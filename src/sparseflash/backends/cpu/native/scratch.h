// Memory of a call and of its threads, and running tasks on them.
#pragma once
#include <new>
#include "plan.h"
#include "rows.h"

namespace {

// Whether logits of pairs have a bias (bias.h).
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

// One of something for every thread of a call.
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

// What a block of queries holds while it goes over its chunks: its rows in the layouts of the products, sums, statistics.
template <bool BF> struct Lanes {
    Buffer<float> ot, qt, dot, qr, dor;
    Buffer<bf> qtb, dotb, qrb, dorb;
    float m[BQ], l[BQ], top[BQ], rest2[BQ], delta[BQ];
    uint32_t drawn[2][BQ];  // words of the queries, for dropout

    bool make(const SfCall &c, bool backward) {
        int64_t D = round_up(c.D, 32) * BQ, Dv = round_up(c.Dv, 32) * BQ;
        bool ok = ot.make(most(D, Dv)) && (BF ? qtb.make(D) : qt.make(D));
        if (!backward) return ok;
        return ok && (BF ? dotb.make(Dv) && qrb.make(D) && dorb.make(Dv) : dot.make(Dv) && qr.make(D) && dor.make(Dv));
    }
};

// Room for a block of queries and for one chunk of keys; in the backward `next` is a second block's.
template <bool BF> struct Scratch : Lanes<BF> {
    Lanes<BF> next;
    Buffer<float> s, g, kc, vc, spare, pair, peaks;
    Buffer<bf> p, pr, dr, kcb, vcb, tc;
    uint64_t see[BK];
    float bias[BK], sums[BK];
    uint32_t key_words[2][BK];

    bool make(const SfCall &c, bool backward) {
        int64_t D = round_up(c.D, 32), Dv = round_up(c.Dv, 32), top = most(D, Dv);
        bool ok = Lanes<BF>::make(c, backward) && s.make(BK * BQ) && spare.make(top + BK * top);
        if (c.lse && c.stat) ok = ok && peaks.make((c.Tk + c.stat_unit - 1) / c.stat_unit * BQ);
        if (BF) ok = ok && p.make(BK * BQ) && kcb.make(BK * D) && vcb.make(BK * Dv) && tc.make(BK * top);
        else ok = ok && kc.make(BK * c.D) && vc.make(BK * c.Dv);
        if (has_pairs(c)) ok = ok && pair.make(BK * BQ);
        if (!backward) return ok;
        ok = ok && g.make(BK * BQ) && (c.plan.tile <= BQ || next.make(c, true));
        return ok && (!BF || (pr.make(BK * BQ) && dr.make(BK * BQ)));
    }
};

// A Scratch for every thread of a call.
template <bool BF> struct Desks {
    Buffer<char> room;
    int made = 0;

    bool make(const SfCall &c, bool backward) {
        int threads = most(c.threads, 1);
        bool ok = room.make(threads * (int64_t)sizeof(Scratch<BF>));
        for (; ok && made < threads; made++) ok = (new (&(*this)[made]) Scratch<BF>())->make(c, backward);
        return ok;
    }
    ~Desks() { while (made > 0) (*this)[--made].~Scratch<BF>(); }
    Scratch<BF> &operator[](int thread) { return ((Scratch<BF> *)room.p)[thread]; }
};

}  // namespace
