// Operands of one chunk of keys: scattered keys are gathered, keys that must not be read are replaced by zeros.
#pragma once
#include "pack.h"

namespace {

// Rows of a chunk rounded outwards: [a, e) to GRAIN for sums over keys, [from, to) to TILE for keys as rows of a product.
template <bool BF> struct Edges {
    int a, e, from, to;
    explicit Edges(const Chunk &k)
        : a((int)round_down(k.a, Products<BF>::GRAIN)), e((int)round_up(k.b, Products<BF>::GRAIN)),
          from((int)round_down(k.a, Products<BF>::TILE)), to((int)round_up(k.b, Products<BF>::TILE)) {}
};

// Operands of a chunk's products, after gathering and blanking. Of the transposed matrix, V^T (forward) or K^T (backward),
// item d of key j lies at t[d * t_row + j * t_key].
template <bool BF> struct Operands {
    typedef typename Products<BF>::Item Item;
    const Item *k, *v, *t;
    int64_t ldk, ldv, t_row, t_key;
    bool own_rows;  // dK and dV go through a scratch tile, since the rows are gathered or share an AMX tile
};

template <bool BF, bool BACKWARD>
inline Operands<BF> operands(const SfCall &c, const Keys<BF> &x, const Chunk &k, bool holes, const uint64_t *see,
                             Scratch<BF> &w) {
    typedef Products<BF> P;
    typedef typename P::Item Item;
    Operands<BF> o = {};
    o.ldk = x.ldk;
    o.ldv = x.ldv;
    o.k = x.k + k.base * x.ldk;
    o.own_rows = k.gather;
    if constexpr (!BF) {
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
        o.t = BACKWARD ? o.k : o.v;
        o.t_row = 1;
        o.t_key = BACKWARD ? o.ldk : o.ldv;
    } else {
        const int64_t Dk = round_up(c.D, P::PADDED), Dv = round_up(c.Dv, P::PADDED), Dt = BACKWARD ? Dk : Dv;
        o.v = BACKWARD ? x.v + k.base * x.ldv : nullptr;
        o.t = x.t ? x.t + k.base * Dt : nullptr;  // statistics have no V
        o.t_row = BK;
        o.t_key = 1;
        if (k.gather) {
            int64_t nk = least(Dk, x.ldk == c.k.row ? c.D : x.ldk), nv = least(Dv, x.ldv == c.v.row ? c.Dv : x.ldv);
            const SfView side_by_side = {nullptr, 0, 0, 0, 1};
            memset(w.tc.p, 0, BK * Dt * 2);
            for (int j = k.a; j < k.b; j++) {
                if (holes && !see[j]) {
                    memset(w.kc + j * Dk, 0, Dk * 2);
                    memset(w.vc + j * Dv, 0, Dv * 2);
                    continue;
                }
                int64_t row = k.gather[j];
                P::copy(side_by_side, (const char *)(x.k + row * x.ldk), c.dtype, nk, w.kc + j * Dk, Dk);
                if (BACKWARD) P::copy(side_by_side, (const char *)(x.v + row * x.ldv), c.dtype, nv, w.vc + j * Dv, Dv);
                if (!x.t) continue;
                const Item *column = x.t + round_down(row, BK) * Dt + row % BK;
                for (int64_t d = 0; d < Dt; d++) w.tc[d * BK + j] = column[d * BK];
            }
            o.k = w.kc.p; o.ldk = Dk;
            o.v = w.vc.p; o.ldv = Dv;
            o.t = w.tc.p;
        } else if (!x.tame && (holes || k.a % P::GRAIN || k.b % P::GRAIN)) {
            for (int64_t d = 0; d < Dt; d++)
                for (int j = 0; j < BK; j++)
                    w.tc[d * BK + j] = j >= k.a && j < k.b && (!holes || see[j]) ? o.t[d * BK + j] : (Item)0;
            o.t = w.tc.p;
        }
        o.own_rows |= k.a % P::TILE || k.b % P::TILE;
    }
    return o;
}

}  // namespace
