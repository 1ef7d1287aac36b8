// One chunk of keys: the rows its products read, with scattered keys gathered and keys that may not be touched blanked.
#pragma once
#include "gemm.h"
#include "pack.h"

namespace {

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
        o.t = t ? t + k.base * Dt : nullptr;  // statistics have no V
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
                if (!t) continue;
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

}  // namespace
