// Reading a plan: query rows of a block, chunks of keys that a tile visits, and the visibility formula.
// Every index that comes from a plan table is bounds-checked here before it becomes an address.
#pragma once
#include "abi.h"
#include "vec.h"

namespace {

constexpr int BQ = 64;    // query rows of a block: the lanes of one bit mask
#ifndef SF_BK
#define SF_BK 128
#endif
constexpr int BK = SF_BK;   // key rows of a chunk; chunks lie on a grid of BK rows
constexpr int32_t ANY = -1, NONE = -2;

inline int32_t saturate(int64_t x) { return (int32_t)least<int64_t>(most<int64_t>(x, INT32_MIN), INT32_MAX); }

template <class T> inline const T *slice(const SfTable &t, int64_t b, int64_t h, int64_t heads) {
    if (!t.data) return nullptr;
    return (const T *)t.data + ((t.batch == 1 ? 0 : b) * t.heads + h * t.heads / heads) * t.length;
}

// The plan tables and rule numbers of one (batch, query head).
struct Rules {
    const SfPlan *p;
    const int32_t *q_order, *k_order, *q_pos, *k_pos, *k_end, *q_seg, *k_seg;
    int64_t base;  // subtracted from positions, so that those of all queries fit 32 bits
    int64_t Tq, Tk, left, right, sink;
    bool windowed;

    Rules() {}
    Rules(const SfCall &c, int64_t b, int64_t h) : p(&c.plan), Tq(c.Tq), Tk(c.Tk) {
        q_order = slice<int32_t>(p->q_order, b, h, c.Hq);
        k_order = slice<int32_t>(p->k_order, b, h, c.Hq);
        q_pos = slice<int32_t>(p->q_pos, b, h, c.Hq);
        k_pos = slice<int32_t>(p->k_pos, b, h, c.Hq);
        k_end = slice<int32_t>(p->k_end, b, h, c.Hq);
        q_seg = slice<int32_t>(p->q_seg, b, h, c.Hq);
        k_seg = slice<int32_t>(p->k_seg, b, h, c.Hq);
        const int64_t far = (int64_t)1 << 40;  // larger than the distance of any two positions
        const int32_t *shift = (const int32_t *)p->q_shift.data;
        base = q_pos ? 0 : shift ? shift[p->q_shift.batch == 1 ? 0 : b] : least(most(p->q_offset, -far), far);
        const int32_t *sides = slice<int32_t>(p->head_window, 0, h, c.Hq), *first = slice<int32_t>(p->head_sink, 0, h, c.Hq);
        windowed = p->windowed || sides;
        left = sides ? sides[0] : least(p->left, far);
        right = sides ? sides[1] : least(p->right, far);
        sink = first ? *first : p->sink;
    }
    int64_t key_token(int64_t row) const {
        int64_t t = k_order ? k_order[row] : row;
        return t < Tk ? t : -1;
    }
};

struct Queries {
    int64_t token[BQ];
    int32_t pos[BQ], seg[BQ];
    uint64_t real;        // bit i: lane i holds a real query
    int lanes;            // one past the last real lane
    int64_t row_in_tile;  // of lane 0

    void load(const Rules &r, int64_t row, int64_t rows, int64_t row_in_tile_) {
        real = 0;
        lanes = 0;
        row_in_tile = row_in_tile_;
        for (int i = 0; i < BQ; i++) token[i] = -1, pos[i] = 0, seg[i] = ANY;
        for (int i = 0; i < rows; i++) {
            int64_t t = r.q_order ? r.q_order[row + i] : row + i;
            if (t < 0 || t >= r.Tq) continue;
            token[i] = t;
            pos[i] = r.q_pos ? r.q_pos[t] : (int32_t)t;
            if (r.q_seg) seg[i] = r.q_seg[t];
            if (seg[i] != NONE) { real |= 1ull << i; lanes = i + 1; }
        }
    }
};

// The visibility formula for one key: bit i is set if query i of the block sees it. Bits of partial units come later, in `look`.
inline uint64_t seen_by(const Rules &r, const Queries &q, int64_t token) {
    if (token < 0) return 0;
    const SfPlan &p = *r.p;
    uint64_t see = q.real;
    const int64_t own = r.k_pos ? r.k_pos[token] : token, from = own - r.base;
    const int32_t at = saturate(from);  // saturated positions lie beyond those of all queries
    if (p.causal) see &= p.include_self ? lanes<GE>(q.pos, at) : lanes<GT>(q.pos, at);
    else if (!p.include_self) see &= ~lanes<EQ>(q.pos, at);
    if (r.windowed && own >= r.sink) {
        if (r.left >= 0) see &= lanes<LE>(q.pos, saturate(from + r.left));
        if (r.right >= 0) see &= lanes<GE>(q.pos, saturate(from - r.right));
    }
    if (r.k_end) see &= lanes<LT>(q.pos, saturate(r.k_end[token] - r.base));
    int32_t s = r.k_seg ? r.k_seg[token] : ANY;
    if (s == NONE) return 0;
    if (s != ANY && r.q_seg) see &= lanes<EQ>(q.seg, s) | lanes<EQ>(q.seg, ANY);
    return see;
}

// A chunk: key rows base + [a,b) on the grid of BK rows; or with `gather` b scattered rows (of small units).
struct Chunk {
    int64_t base;
    int a, b;
    bool partial;
    const int32_t *bits;    // bit words [tile][words] of the unit that holds these keys, or null
    int64_t bits_lane;      // lane of key base + 0 in that unit
    const int64_t *gather;
    int64_t entry;          // place of the first key's entry in the tile's lists, spans before units,
    int64_t unit;           // and the keys per entry that follow; 0 for a span
    const int64_t *entries; // gathered chunks: the entry of each key, if NAMED; else null

    int64_t entry_of(int j) const { return entries ? entries[j] : unit ? entry + (bits_lane + j) / unit : entry; }
};

template <class F>
inline void span_chunks(int64_t lo, int64_t hi, bool partial, const int32_t *bits, int64_t entry, int64_t unit, F &f) {
    for (int64_t x = lo; x < hi;) {
        int64_t base = round_down(x, BK), end = least(hi, base + BK);
        Chunk c = {base, (int)(x - base), (int)(end - base), partial, bits, base - lo, nullptr, entry, unit, nullptr};
        f(c);
        x = end;
    }
}

// Range [lo, hi) of the full or of the partial entries of a list, cut to the entries that exist.
struct Entries {
    int64_t lo = 0, hi = 0;
    Entries(int64_t start, int32_t full, int32_t count, bool partial, int64_t size) {
        if (start < 0 || start > size || count <= 0) return;
        full = least(most(full, 0), count);
        lo = start + (partial ? full : 0);
        hi = least<int64_t>(start + (partial ? count : full), size);
    }
};

// Calls f(Chunk) for every key that tile r of (b,h) visits: full entries first, then the partial ones, which need the formula.
// JOINED: adjacent units form one chunk, scattered small ones are gathered; NAMED: also with the entry of each key; APART: a
// chunk never holds two entries. Example: unit 1, BK 128, full units 3, 9 and 100 .. 139: 3 and 9 are gathered into one chunk
// (emitted last); 100 .. 139 is a run of 40 >= SMALL: chunk base 0, [100,128), then chunk base 128, [0,12).
enum Listing { JOINED, NAMED, APART };
template <Listing HOW = JOINED, class F> inline void for_each_chunk(const SfCall &c, int64_t b, int64_t h, int64_t r, F f) {
    const SfPlan &p = c.plan;
    constexpr int SMALL = 16;  // units shorter than this are gathered, unless a run of them is as long
    const int64_t *ss = slice<int64_t>(p.span_start, b, h, c.Hq), *us = slice<int64_t>(p.start, b, h, c.Hq);
    const int32_t *sf = slice<int32_t>(p.span_full, b, h, c.Hq), *sc = slice<int32_t>(p.span_count, b, h, c.Hq);
    const int32_t *uf = slice<int32_t>(p.full, b, h, c.Hq), *uc = slice<int32_t>(p.count, b, h, c.Hq);
    const int64_t *bs = slice<int64_t>(p.bits_start, b, h, c.Hq);
    const int64_t words = (p.unit + 31) / 32, join = (SMALL + p.unit - 1) / p.unit;
    for (int pass = 0; pass < 2; pass++) {
        bool partial = pass == 1;
        if (ss) {
            Entries own(ss[r], sf[r], sc[r], partial, p.spans_size);
            for (int64_t e = own.lo; e < own.hi; e++)
                span_chunks(most<int64_t>(p.spans[2 * e], 0), least<int64_t>(p.spans[2 * e + 1], p.k_rows), partial, nullptr, e - ss[r], 0, f);
        }
        if (us) {
            Entries own(us[r], uf[r], uc[r], partial, p.index_size);
            int64_t rows[BK], names[HOW == NAMED ? BK : 1];
            const int64_t before = (sc ? sc[r] : 0) - us[r];  // place in `index` + before = place in the tile's lists
            int held = 0;
            auto flush = [&] {
                if (!held) return;
                Chunk g = {0, 0, held, partial, nullptr, 0, rows, 0, 0, HOW == NAMED ? names : nullptr};
                f(g);
                held = 0;
            };
            const bool masked = partial && bs;
            for (int64_t e = own.lo; e < own.hi;) {
                if (HOW != APART && !masked && p.unit == 1) {  // fast path: collect single keys up to the next run
                    const int32_t *index = p.index;
                    const int64_t end = own.hi, runs = end - join, k_rows = p.k_rows;
                    int n = held;
                    for (; e < end && n < BK; e++) {
                        int64_t u = index[e];
                        if (e <= runs && index[e + join - 1] == u + join - 1) break;
                        rows[n] = u;
                        if (HOW == NAMED) names[n] = before + e;
                        n += (uint64_t)u < (uint64_t)k_rows;
                    }
                    held = n;
                    if (held == BK) flush();
                    if (e == own.hi) break;
                }
                int64_t u = p.index[e], run = 1;
                if (HOW != APART && !masked && (join == 1 || (e + join <= own.hi && p.index[e + join - 1] == u + join - 1)))
                    while (e + run < own.hi && p.index[e + run] == u + run) run++;
                const int32_t *bits = nullptr;
                if (masked) {
                    int64_t at = e - own.lo, room = p.bits_size - at;
                    if (bs[r] < 0 || bs[r] >= room) { e++; continue; }
                    at += bs[r];
                    bits = p.bits + at * p.tile * words;
                }
                int64_t from = most<int64_t>(u, 0) * p.unit, to = least((u + run) * p.unit, p.k_rows);
                if (u >= 0 && from < to) {
                    if (HOW == APART || to - from >= SMALL || masked) span_chunks(from, to, partial, bits, before + e, p.unit, f);
                    else
                        for (int64_t x = from; x < to; x++) {
                            if (HOW == NAMED) names[held] = before + e + (x - from) / p.unit;
                            rows[held++] = x;
                            if (held == BK) flush();
                        }
                }
                e += run;
            }
            flush();
        }
    }
}

// Visibility of a partial chunk: one bit mask per key. Trims keys that no query sees off both ends of the chunk.
// Returns whether any key remains; `holes`: some key in between is seen by no query.
inline bool look(const Rules &r, const Queries &q, Chunk &c, uint64_t *see, bool &holes) {
    const SfPlan &p = *r.p;
    int first = c.b, last = c.a - 1, count = 0;
    int64_t words = (p.unit + 31) / 32;
    alignas(64) int32_t word[BQ];
    int64_t loaded = -1;
    for (int j = c.a; j < c.b; j++) {
        int64_t row = c.gather ? c.gather[j] : c.base + j;
        uint64_t m = seen_by(r, q, r.key_token(row));
        if (m && c.bits) {
            int64_t lane = c.bits_lane + j;
            if (lane / 32 != loaded) {
                loaded = lane / 32;
                for (int i = 0; i < BQ; i++)
                    word[i] = q.row_in_tile + i < p.tile ? c.bits[(q.row_in_tile + i) * words + loaded] : 0;
            }
            m &= lanes_with_bit(word, (int)(lane % 32));
        }
        see[j] = m;
        if (m) {
            first = least(first, j);
            last = j;
            count++;
        }
    }
    c.a = first;
    c.b = last + 1;
    holes = count != c.b - c.a;
    return count > 0;
}

// Cost of a tile: how many key rows it visits, at most.
inline int64_t tile_cost(const SfCall &c, int64_t b, int64_t h, int64_t r) {
    const SfPlan &p = c.plan;
    const int64_t *ss = slice<int64_t>(p.span_start, b, h, c.Hq);
    const int32_t *sc = slice<int32_t>(p.span_count, b, h, c.Hq), *uc = slice<int32_t>(p.count, b, h, c.Hq);
    int64_t n = uc ? least<int64_t>(most(uc[r], 0), p.k_rows) * least(p.unit, p.k_rows) : 0;
    if (ss) {
        Entries all(ss[r], 0, sc[r], true, p.spans_size);
        for (int64_t e = all.lo; e < all.hi; e++)
            n += most<int64_t>(least<int64_t>(p.spans[2 * e + 1], p.k_rows) - most<int64_t>(p.spans[2 * e], 0), 0);
    }
    return least(n, p.k_rows);
}

}  // namespace
