// The work list of decode: key lists cut into pieces of SPLIT keys, and the query rows that are computed together over each.
#pragma once
#include "dots.h"
#include "scratch.h"

namespace {

constexpr int PART = 1024;          // keys of a part: a run of a list with a softmax (m, l, O) of its own
constexpr int ROWS_AT_ONCE = 128;   // query rows whose scores of one piece are held
constexpr int MOST_SIDES = 32;      // KV heads ("sides") that are read together, at most
constexpr int ZEROS = 8192;         // bytes of the row of zeros that stands for an absent key, over all sides
constexpr int64_t PAGE = 4096;
constexpr int64_t REACH = 4 << 20;  // bytes that the TLBs of common processors cover, roughly

// Entries lo .. hi - 1 of a tile's spans or units: full ones up to `full`, which need no test, then partial ones.
struct Listed {
    int64_t lo = 0, full = 0, hi = 0;
    Listed() {}
    Listed(const int64_t *start, const int32_t *full_, const int32_t *count, int64_t r, int64_t size) {
        if (!start) return;
        Entries sure(start[r], full_[r], count[r], false, size), rest(start[r], full_[r], count[r], true, size);
        lo = sure.hi > sure.lo ? sure.lo : rest.lo;
        full = rest.lo;
        hi = rest.hi;
    }
};

// Up to SPLIT keys of a list, beginning at key `skip` of entry `entry`; of its units, or of its spans.
struct Piece {
    int64_t list, entry, skip;
    bool units;
};

// Which query rows share one pass over a list: the query heads of one KV head, or of several KV heads that are adjacent in
// memory (pages, [B,T,H,D]), if all plan tables are the same for them; of one sequence, or of all sequences that share keys
// and plan; at most 64 queries of a tile. Rows are ordered side (KV head), sequence, head, query. Example: Hq 8, Hkv 2, Tq 1,
// shared tables, no sides joined: packs 2, heads 4; head 5 is row 1 of list 1 of its sequence.
struct Packs {
    int64_t packs, sides, heads, sequences, members, blocks, lanes;  // heads: query heads per side
    bool far;  // K and V take more than REACH bytes: find their pages ahead

    explicit Packs(const SfCall &c) {
        const SfPlan &p = c.plan;
        int64_t each = 1;
        bool one = c.Bk == 1 && (!p.q_shift.data || p.q_shift.batch == 1);
        const SfTable *tables[] = {&p.span_start, &p.span_full, &p.span_count, &p.start, &p.full, &p.count,
                                   &p.bits_start, &p.q_order, &p.k_order, &p.q_pos, &p.k_pos, &p.k_end,
                                   &p.q_seg, &p.k_seg, &p.head_window, &p.head_sink};
        for (const SfTable *t : tables)
            if (t->data) {
                each = common_multiple(each, t->heads);
                one = one && t->batch == 1;
            }
        packs = common_multiple(each, c.Hkv);
        heads = c.Hq / packs;
        members = one ? c.B : 1;
        sequences = c.B / members;
        blocks = (least(p.tile, p.q_rows) + BQ - 1) / BQ;
        lanes = least<int64_t>(BQ, least(p.tile, p.q_rows));
        sides = together(c, packs / each);
        packs /= sides;
        far = c.Bk * c.Hkv * c.Tk * (c.D + c.Dv) * element(c.dtype) > REACH;
    }
    // Number of KV heads, of `alike` with the same tables, to read together: as many as are adjacent in memory and fit the
    // scores and the row of zeros, and leave enough parts for all threads.
    int64_t together(const SfCall &c, int64_t alike) const {
        if (c.k_record.bytes || c.v_record.bytes || packs != c.Hkv || c.k.head != c.D || c.v.head != c.Dv || c.k.lane != 1 || c.v.lane != 1) return 1;
        const int64_t rows = round_up(most<int64_t>(members * heads * lanes, 1), PACK);
        const int64_t bytes = most(c.D, c.Dv) * element(c.dtype);
        const int64_t keys = c.Tk / (c.Bk == 1 ? most<int64_t>(sequences, 1) : 1);  // of a sequence, about
        const int64_t parts = sequences * packs * c.plan.tiles * blocks * most<int64_t>(keys / PART, 1);
        int64_t best = 1;
        for (int64_t n = 2; n <= least<int64_t>(MOST_SIDES, alike); n++)
            if (alike % n == 0 && n * rows <= ROWS_AT_ONCE && n * bytes <= ZEROS &&
                (c.threads == 1 || parts / n >= 4 * c.threads))
                best = n;
        return best;
    }
    int64_t rows() const { return sides * members * heads * lanes; }
    // The row of a query (lane) of a query head of the list, for one of the sequences.
    int64_t row(int64_t member, int64_t head, int64_t lane, int64_t lanes) const {
        return ((head / heads * members + member) * heads + head % heads) * lanes + lane;
    }
    int64_t lists(const SfCall &c) const { return sequences * packs * c.plan.tiles * blocks; }
};

// One list of the call, found from its number.
struct List {
    int64_t b, h, tile, row, rows;  // first sequence, first head, tile, first query row and how many

    List() {}
    List(const SfCall &c, const Packs &packs, int64_t i) {
        int64_t block = i % packs.blocks, slot = i / packs.blocks / c.plan.tiles;
        tile = i / packs.blocks % c.plan.tiles;
        b = slot / packs.packs;
        h = slot % packs.packs * packs.sides * packs.heads;
        row = tile * c.plan.tile + block * BQ;
        rows = most<int64_t>(0, least<int64_t>(BQ, least(c.plan.q_rows, (tile + 1) * c.plan.tile) - row));
    }
    Listed spans(const SfCall &c) const {
        const SfPlan &p = c.plan;
        return Listed(slice<int64_t>(p.span_start, b, h, c.Hq), slice<int32_t>(p.span_full, b, h, c.Hq),
                      slice<int32_t>(p.span_count, b, h, c.Hq), tile, p.spans_size);
    }
    Listed units(const SfCall &c) const {
        const SfPlan &p = c.plan;
        return Listed(slice<int64_t>(p.start, b, h, c.Hq), slice<int32_t>(p.full, b, h, c.Hq),
                      slice<int32_t>(p.count, b, h, c.Hq), tile, p.index_size);
    }
};

inline int64_t span_lo(const SfPlan &p, int64_t e) { return most<int64_t>(p.spans[2 * e], 0); }
inline int64_t span_hi(const SfPlan &p, int64_t e) { return least<int64_t>(p.spans[2 * e + 1], p.k_rows); }

// Key rows of a unit: capped by all key rows, however long the plan says that a unit is.
inline int64_t unit_rows(const SfPlan &p) { return least(p.unit, p.k_rows); }

// Calls f(Piece) for the pieces of a list, in order.
template <class F> inline void for_each_piece(const SfCall &c, const Packs &packs, int64_t i, F f) {
    const SfPlan &p = c.plan;
    List list(c, packs, i);
    if (!list.rows) return;
    Listed spans = list.spans(c), units = list.units(c);
    int64_t room = 0;  // keys the piece at hand still takes
    for (int64_t e = spans.lo; e < spans.hi; e++) {
        int64_t n = span_hi(p, e) - span_lo(p, e);
        for (int64_t at = room; at < n; at += SPLIT) f(Piece{i, e, at, false});
        if (n > room) room = (SPLIT - (n - room) % SPLIT) % SPLIT;
        else if (n > 0) room -= n;
    }
    const int64_t each = unit_rows(p), lanes = (units.hi - units.lo) * each;
    for (int64_t at = 0; at < lanes; at += SPLIT) f(Piece{i, units.lo + at / each, at % each, true});
}

// The keys of a piece that some query sees, as addresses, and its queries.
struct PieceKeys {
    int64_t at = -1;                     // number of the list at hand, for which the fields below hold
    List list;
    Listed spans, units;
    Queries q;
    Rules rules;
    const char *keys, *values;           // addresses of K and V of token 0
    alignas(64) const char *k[SPLIT], *v[SPLIT];
    int32_t token[SPLIT];
    uint64_t see[SPLIT];                 // which queries see each key; unset while `all`
    int n, padded = 0;                   // keys; keys and the zero rows that fill up the last vector
    bool all;                            // every query sees every key
    bool run;                            // each key is the one behind the last, as nearly always

    static const char *nothing() {
        alignas(64) static const char zeros[ZEROS] = {};
        return zeros;
    }
    KeyRows rows(const char *const *of) const { return {of, padded >> 2}; }

    // Index of the key that is read at place j: the four quarters are interleaved (see KeyRows).
    int order(int j) const { return (j & 3) * (padded >> 2) + (j >> 2); }

    void find(const SfCall &c, const Packs &packs, const Piece &piece) {
        const SfPlan &p = c.plan;
        if (at != piece.list) open(c, packs, piece.list);
        n = 0;
        all = run = true;
        const Listed &entries = piece.units ? units : spans;
        int64_t left = SPLIT, skip = piece.skip;
        for (int64_t e = piece.entry; e < entries.hi && left > 0; e++, skip = 0) {
            int64_t lo = piece.units ? p.index[e] * (int64_t)p.unit : span_lo(p, e);
            int64_t size = piece.units ? unit_rows(p) : most<int64_t>(0, span_hi(p, e) - lo);
            int64_t from = lo + skip, to = least(lo + size, from + left);
            left -= most<int64_t>(0, to - from);
            if (lo < 0) continue;
            to = least(to, p.k_rows);
            if (e < entries.full && !rules.k_order) take_all(from, least(to, c.Tk));
            else if (e < entries.full)
                for (; from < to; from++) take(rules.key_token(from), q.real);
            else
                take_seen(c, piece.units, e - entries.full, lo, from, to);
        }
        padded = (int)round_up(n, W);
        const int64_t kr = c.k.row * stride_bytes(c.k_record, c.dtype), vr = c.v.row * stride_bytes(c.v_record, c.dtype);
        auto addresses = [&](const char *of, int64_t stride, const char **to) {
            const char *from = of + (n ? token[0] * stride : 0);
            if (run) for (int j = 0; j < n; j++) to[j] = from + j * stride;
            else for (int j = 0; j < n; j++) to[j] = of + token[j] * stride;
        };
        addresses(keys, kr, k);
        addresses(values, vr, v);
        for (int j = n; j < padded; j++) k[j] = v[j] = nothing();
        const int64_t k_bytes = c.k_record.bytes ? c.k_record.bytes : packs.sides * c.D * element(c.dtype);
        const int64_t v_bytes = c.v_record.bytes ? c.v_record.bytes : packs.sides * c.Dv * element(c.dtype);
        if (packs.far) look_up(k_bytes, v_bytes, run && n && most(kr, vr) <= PAGE);
    }

  private:
    // Prefetches one line of each 4 KiB page that the rows touch, all pages at once and ahead of use. A TLB miss takes hundreds
    // of cycles, but several are served at a time; a prefetch that misses the TLB amid products would stall all that follows.
    // (Inlined by force, as `Ahead::ask` is.)
    __attribute__((always_inline)) void look_up(int64_t k_bytes, int64_t v_bytes, bool whole) const {
        uintptr_t k_seen = 0, v_seen = 0;
        auto touch = [](const char *from, const char *to, uintptr_t &seen) __attribute__((always_inline)) {
            const uintptr_t first = (uintptr_t)from, last = ((uintptr_t)to - 1) / PAGE;
            for (uintptr_t page = first / PAGE; page <= last; page++)
                if (page != seen) __builtin_prefetch((const char *)most(first, page * PAGE)), seen = page;
        };
        if (whole) {  // every page between the first row and the last
            touch(k[0], k[n - 1] + k_bytes, k_seen);
            touch(v[0], v[n - 1] + v_bytes, v_seen);
            return;
        }
        for (int j = 0; j < n; j++) {
            touch(k[j], k[j] + k_bytes, k_seen);
            touch(v[j], v[j] + v_bytes, v_seen);
        }
    }
    void open(const SfCall &c, const Packs &packs, int64_t number) {
        at = number;
        list = List(c, packs, number);
        spans = list.spans(c);
        units = list.units(c);
        rules = Rules(c, list.b, list.h);
        q.load(rules, list.row, list.rows, list.row - list.tile * c.plan.tile);
        const int64_t head = list.h * c.Hkv / c.Hq;
        auto first = [&](const SfView &v, const SfRecord &r) {
            return (const char *)v.data + (list.b * v.batch + head * v.head) * stride_bytes(r, c.dtype);
        };
        keys = first(c.k, c.k_record);
        values = first(c.v, c.v_record);
    }
    void take(int64_t t, uint64_t by) {
        if (t < 0) return;
        if (all && by != q.real) {
            for (int j = 0; j < n; j++) see[j] = q.real;
            all = false;
        }
        if (!all) see[n] = by;
        run = run && (!n || token[n - 1] + 1 == t);
        token[n++] = (int32_t)t;
    }
    void take_all(int64_t from, int64_t to) {
        const int some = (int)most<int64_t>(0, to - from);
        run = run && (!n || !some || token[n - 1] + 1 == from);
        for (int j = 0; j < some; j++) token[n + j] = (int32_t)from + j;
        if (!all)
            for (int j = 0; j < some; j++) see[n + j] = q.real;
        n += some;
    }
    // Takes rows [from, to) of partial entry `e`, which begins at row `lo`, if any query sees them.
    void take_seen(const SfCall &c, bool units, int64_t e, int64_t lo, int64_t from, int64_t to) {
        const SfPlan &p = c.plan;
        const int64_t words = (p.unit + 31) / 32;
        const int64_t *start = units ? slice<int64_t>(p.bits_start, list.b, list.h, c.Hq) : nullptr;
        const int32_t *bits = nullptr;
        if (start) {
            const int64_t at = start[list.tile];
            if (at < 0 || at >= p.bits_size - e) return;
            bits = p.bits + (at + e) * p.tile * words;
        }
        for (int64_t x = from; x < to; x++) {
            const int64_t t = rules.key_token(x);
            uint64_t by = seen_by(rules, q, t);
            for (uint64_t rest = bits ? by : 0; rest; rest &= rest - 1) {
                int i = __builtin_ctzll(rest);
                int32_t word = bits[(q.row_in_tile + i) * words + (x - lo) / 32];
                if (!((uint32_t)word >> ((x - lo) % 32) & 1u)) by &= ~(1ull << i);
            }
            if (by) take(t, by);
        }
    }
};

}  // namespace
