// Few queries over many keys, bound by the memory that holds K and V: each is read once, where it lies, and multiplied
// by all query rows that see it (the heads of a group, and all sequences over a shared prefix).
//
// The lists of all sequences and heads are cut into pieces of SPLIT keys: one work list, of which every thread
// takes an equal share however the lengths differ. A piece is a softmax of its own, (m, l, O); pieces of a list are merged
// in order. So neither the number of threads nor who did what can show in the result.
//
// With so few rows the transposed form of the forward would idle most lanes: `dots.h` has another.
#pragma once
#include "dots.h"
#include "softmax.h"

namespace {

constexpr int BUNDLE = 8;         // pieces of a task: each asks for the memory of the next
constexpr int ROWS_AT_ONCE = 32;  // query rows whose scores of a piece are held
constexpr int MOST_SIDES = 4;     // KV heads that are read together
constexpr int AHEAD = 64;         // so many keys before their turn memory is asked for
constexpr int ZEROS = 1024;       // bytes of a row that is none, of all sides

// ---------------------------------------------------------------- the work list

// Entries of a tile's spans (or units): the first `full - lo` need no test.
struct Listed {
    int64_t lo = 0, full = 0, hi = 0;
    Listed(const int64_t *start, const int32_t *full_, const int32_t *count, int64_t r, int64_t size) {
        if (!start) return;
        Entries sure(start[r], full_[r], count[r], false, size), rest(start[r], full_[r], count[r], true, size);
        lo = sure.hi > sure.lo ? sure.lo : rest.lo;
        full = rest.lo;
        hi = rest.hi;
    }
};

// Up to SPLIT keys of a list: from key `skip` of entry `entry` on.
struct Piece {
    int64_t list, entry, skip;
    bool units;
};

// Which rows go together. A list belongs to the query heads of one KV head, or of several that lie side by side in memory
// (pages, [B,T,H,D]), as far as all tables of the plan are the same for them; and to one sequence, or to all where they
// share the keys and the plan; 64 queries of a tile at most. Its rows are in the order side, sequence, head, query.
struct Packs {
    int64_t packs, sides, heads, sequences, members, blocks, lanes;  // heads: of one side

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
        // as many sides as the scores, and a row of zeros, have room for
        const int64_t rows = round_up(most<int64_t>(members * heads * lanes, 1), PACK);
        const int64_t bytes = most(c.D, c.Dv) * element(c.dtype);
        sides = 1;
        if (packs == c.Hkv && c.k.head == c.D && c.v.head == c.Dv && c.k.lane == 1 && c.v.lane == 1)
            while (sides < MOST_SIDES && packs % (2 * sides * each) == 0 && 2 * sides * rows <= ROWS_AT_ONCE &&
                   2 * sides * bytes <= ZEROS)
                sides *= 2;
        packs /= sides;
    }
    int64_t rows() const { return sides * members * heads * lanes; }
    // The row of a query head of the list, for one of the sequences.
    int64_t row(int64_t member, int64_t head, int64_t lane, int64_t lanes) const {
        return ((head / heads * members + member) * heads + head % heads) * lanes + lane;
    }
    int64_t lists(const SfCall &c) const { return sequences * packs * c.plan.tiles * blocks; }
};

// One list of the call, found from its number.
struct List {
    int64_t b, h, tile, row, rows;  // first sequence, first head, tile, first query row and how many

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
    int64_t lanes = (units.hi - units.lo) * p.unit;
    for (int64_t at = 0; at < lanes; at += SPLIT) f(Piece{i, units.lo + at / p.unit, at % p.unit, true});
}

// ---------------------------------------------------------------- one piece

// A piece: its queries, and the keys that some of them see.
struct PieceKeys {
    int64_t at = -1;                  // number of the list
    Queries q;
    const char *k[SPLIT], *v[SPLIT];  // rows, in the order of reading: key order(j) at j
    int64_t token[SPLIT];
    uint64_t see[SPLIT];              // who sees them, unless everyone does
    int n, padded = 0;                // keys; with the zeros that fill up the last vectors
    bool all;                         // every query sees every key

    // Four keys that go together are a quarter apart: memory is faster where several places are read in turn.
    int order(int j) const { return (j & 3) * (padded >> 2) + (j >> 2); }
    static const char *nothing() {
        alignas(64) static const char zeros[ZEROS] = {};
        return zeros;
    }

    PieceKeys() {
        for (int j = 0; j < SPLIT; j++) k[j] = v[j] = nothing();
    }
    void find(const SfCall &c, const Packs &packs, const Piece &piece) {
        const SfPlan &p = c.plan;
        const List list(c, packs, piece.list);
        const Rules rules(c, list.b, list.h);
        if (at != piece.list) q.load(rules, list.row, list.rows, list.row - list.tile * p.tile);
        at = piece.list;
        n = 0;
        all = true;
        Listed entries = piece.units ? list.units(c) : list.spans(c);
        int64_t left = SPLIT, skip = piece.skip;
        for (int64_t e = piece.entry; e < entries.hi && left > 0; e++, skip = 0) {
            int64_t lo = piece.units ? p.index[e] * (int64_t)p.unit : span_lo(p, e);
            int64_t size = piece.units ? p.unit : most<int64_t>(0, span_hi(p, e) - lo);
            int64_t from = lo + skip, to = least(lo + size, from + left);
            left -= most<int64_t>(0, to - from);
            if (lo < 0) continue;
            to = least(to, p.k_rows);
            if (e < entries.full && !rules.k_order)
                for (to = least(to, c.Tk); from < to; from++) take(from, q.real);
            else if (e < entries.full)
                for (; from < to; from++) take(rules.key_token(from), q.real);
            else
                take_seen(c, list, rules, piece.units, e - entries.full, lo, from, to);
        }
        const int64_t head = list.h * c.Hkv / c.Hq, size = element(c.dtype), kr = c.k.row * size, vr = c.v.row * size;
        const char *keys = row_of(c.k, list.b, head, 0, c.dtype), *values = row_of(c.v, list.b, head, 0, c.dtype);
        padded = (int)round_up(n, W);
        for (int j = 0; j < padded; j++) {
            const int i = order(j);
            k[j] = i < n ? keys + token[i] * kr : nothing();
            v[j] = i < n ? values + token[i] * vr : nothing();
        }
    }

  private:
    void take(int64_t t, uint64_t by) {
        if (t < 0) return;
        see[n] = by;
        token[n++] = t;
    }
    // Of the partial entry `e`, which begins at row `lo`: the rows [from, to).
    void take_seen(const SfCall &c, const List &list, const Rules &rules, bool units, int64_t e, int64_t lo, int64_t from,
                   int64_t to) {
        const SfPlan &p = c.plan;
        const int64_t words = (p.unit + 31) / 32;
        const int64_t *start = units ? slice<int64_t>(p.bits_start, list.b, list.h, c.Hq) : nullptr;
        const int32_t *bits = nullptr;
        if (start) {
            int64_t at = start[list.tile] + e;
            if (start[list.tile] < 0 || at >= p.bits_size) return;
            bits = p.bits + at * p.tile * words;
        }
        for (int64_t x = from; x < to; x++) {
            const int64_t t = rules.key_token(x);
            uint64_t by = seen_by(rules, q, t);
            for (uint64_t rest = bits ? by : 0; rest; rest &= rest - 1) {
                int i = __builtin_ctzll(rest);
                int32_t word = bits[(q.row_in_tile + i) * words + (x - lo) / 32];
                if (!((uint32_t)word >> ((x - lo) % 32) & 1u)) by &= ~(1ull << i);
            }
            if (!by) continue;
            all = all && by == q.real;
            take(t, by);
        }
    }
};

// Rows of K or V as the products read them: whole quads of their items side by side. Others are copied first.
template <class T> struct RowsRead {
    typedef typename T::Item Item;
    Buffer<Item> own;
    SfView view;
    int32_t dtype;
    int64_t D, ld, lines;  // items of a row; with zeros; cache lines of all sides
    bool in_place;

    bool make(const SfView &v, int32_t dtype_, int64_t D_, int64_t sides, int64_t whole, int64_t rows, bool ends) {
        view = v;
        dtype = dtype_;
        D = D_;
        ld = round_up(D, whole);
        lines = v.lane == 1 ? (sides * D * element(dtype) + 63) / 64 : 0;
        in_place = v.lane == 1 && dtype == T::DTYPE && (ends || D == ld);
        return in_place || own.make(rows * ld);
    }
    // The item of a row, as `get` gives it, with which a side begins.
    int64_t from(int64_t side) const { return in_place ? side * D : 0; }
    // `n` rows of a side; `as` has room for their addresses.
    const Item *const *get(const char *const *rows, int n, int64_t side, const Item **as) const {
        if (in_place) return (const Item *const *)rows;
        for (int j = 0; j < n; j++) {
            Item *to = own + j * ld;
            if (rows[j] == PieceKeys::nothing()) memset(to, 0, ld * sizeof *to);
            else T::copy(view, rows[j] + side * D * element(dtype), dtype, D, to, ld);
            as[j] = to;
        }
        return as;
    }
};

template <class T> struct DecodeScratch {
    typedef typename T::Item Item;
    PieceKeys piece[2];   // the one at hand, and the next
    RowsRead<T> k, v;
    Buffer<Item> q, p;    // as packs: [chunk][query][quad]; quads of weights
    Buffer<float> s;
    Buffer<Item> line;
    int64_t packed = -1;  // the list whose rows are all in q

    bool make(const SfCall &c, const Packs &packs) {
        const int64_t wide = round_up(c.D, T::QUAD);
        return q.make(ROWS_AT_ONCE * wide) && p.make(ROWS_AT_ONCE * SPLIT) && s.make(ROWS_AT_ONCE * SPLIT) &&
               line.make(wide) && k.make(c.k, c.dtype, c.D, packs.sides, T::QUAD, T::KEYS, false) &&
               v.make(c.v, c.dtype, c.Dv, packs.sides, STRIP, T::KEYS, true);
    }
};

// The scores of a pack with n keys become weights; max (base 2) and sum of each query.
template <class T> inline void softmax_pack(const float *s, int n, float factor, typename T::Item *p, float *m, float *l) {
    vf top = set1(-INF), total = {}, safe;
    for (int j = 0; j < n * PACK; j += W) top = vmax(top, load(s + j));
    for (int i = 0; i < PACK; i++) {
        float peak = most(most((float)top[4 * i], (float)top[4 * i + 1]), most((float)top[4 * i + 2], (float)top[4 * i + 3]));
        m[i] = peak * factor;
        for (int j = 0; j < 4; j++) safe[4 * i + j] = peak == -INF ? 0.f : m[i];
    }
    for (int j = 0; j < n * PACK; j += W) {
        vf e = exp2v<T::FINE>(load(s + j) * factor - safe);
        total += e;
        T::put(p + j, e);
    }
    for (int i = 0; i < PACK; i++) l[i] = (total[4 * i] + total[4 * i + 1]) + (total[4 * i + 2] + total[4 * i + 3]);
}

// Where the results of pieces wait: O, m and l of each row.
struct Parts {
    Buffer<float> o, m, l;
    int64_t rows, ld;  // of a piece; of a row of O

    bool make(const SfCall &c, const Packs &packs, int64_t pieces) {
        rows = packs.rows();
        ld = round_up(c.Dv, STRIP);
        return o.make(pieces * rows * ld) && m.make(pieces * rows) && l.make(pieces * rows);
    }
};

// Which query a row of a side is.
struct Row {
    int64_t lane, head, sequence;
    Row(const Packs &packs, const List &list, const Queries &q, int64_t side, int64_t i)
        : lane(i % q.lanes), head(list.h + side * packs.heads + i / q.lanes % packs.heads),
          sequence(list.b + i / q.lanes / packs.heads) {}
};

// `some` rows of every side, from `first` on.
template <class T>
void pack_queries(const SfCall &c, const Packs &packs, const List &list, const Queries &q, int64_t first, int some,
                  DecodeScratch<T> &w) {
    typedef typename T::Item Item;
    const int64_t wide = w.k.ld;
    Item *pack = w.q.p;
    for (int64_t side = 0; side < packs.sides; side++)
        for (int i = 0; i < some; i += PACK, pack += PACK * wide)
            for (int r = 0; r < PACK; r++) {
                const Row row(packs, list, q, side, first + i + r);
                if (i + r < some && q.real >> row.lane & 1)
                    T::copy(c.q, row_of(c.q, row.sequence, row.head, q.token[row.lane], c.dtype), c.dtype, c.D, w.line.p, wide);
                else memset(w.line.p, 0, wide * sizeof(Item));
                for (int64_t d = 0; d < wide; d += T::QUAD) memcpy(pack + d * PACK + r * T::QUAD, w.line + d, 16);
            }
}

// What is asked for at the j-th key: rows of the same matrix, or of the one that is read next, if any.
struct Next {
    const char *const *rows;
    int64_t lines;
    Next(const char *const *now, int64_t lines_now, int n, const char *const *then, int64_t lines_then, int then_n, int j) {
        j += AHEAD;
        const bool same = j < n;
        rows = same ? now + j : then + (j - n);
        lines = same ? lines_now : j - n < then_n ? lines_then : 0;
    }
};

// Scores of all packs.
template <class T> void score_keys(int64_t sides, int count, const PieceKeys &x, bool asks, DecodeScratch<T> &w) {
    const typename T::Item *copies[T::KEYS];
    const int64_t wide = w.k.ld, shares = sides * most(count / PACKS, 1);
    for (int j = 0; j < x.padded; j += T::KEYS) {
        const Next next(x.k, w.k.lines, x.padded, x.v, w.v.lines, x.padded, j);
        for (int64_t side = 0, share = 0; side < sides; side++) {
            const int keys = least(T::KEYS, x.padded - j);
            const auto *k = w.k.get(x.k + j, keys, side, copies);
            by_counts<PACKS>(count, [&](int r, auto counted) {
                const Ahead ahead(next.rows, asks && share < shares ? next.lines : 0, share, shares);
                const int64_t pack = side * count + r;
                scores<T, decltype(counted)::value>(k, keys, w.k.from(side), wide / T::QUAD, w.q + pack * PACK * wide,
                                                    w.s + place(pack * PACK, j), ahead);
                share++;
            });
        }
    }
}

// Scores become logits, -inf for a key that the row does not see or that is none.
inline void hide_keys(const SfCall &c, const Packs &packs, const List &list, const Logits &logits, const PieceKeys &x,
                      int64_t side, int64_t first, int some, float *s) {
    for (int i = 0; i < some; i++) {
        const Row row(packs, list, x.q, side, first + i);
        if (logits.bent) {
            const float *bias = slice<float>(c.key_bias, row.sequence, row.head, c.Hq);
            for (int j = 0; j < x.padded; j++) {
                float &y = s[place(i, j)];
                y *= logits.inner;
                if (c.softcap > 0) y = tanhv(set1(y))[0] * logits.outer;
                if (bias && x.order(j) < x.n) y += bias[x.token[x.order(j)]] * LOG2E;
            }
        }
        if (!x.all)
            for (int j = 0; j < x.padded; j++)
                if (x.order(j) < x.n && !(x.see[x.order(j)] >> row.lane & 1)) s[place(i, j)] = -INF;
    }
    for (int j = 0; x.n < x.padded && j < x.padded; j++)
        if (x.order(j) >= x.n)
            for (int i = 0; i < (some + PACK - 1) / PACK * PACK; i++) s[place(i, j)] = -INF;
}

// O of all rows. Those of the sides are `lds` floats apart; y is the next piece.
template <class T>
void weigh_keys(int64_t sides, int some, int count, const PieceKeys &x, const PieceKeys &y, bool asks, int64_t Dv, float *o,
                int64_t lds, int64_t ldo, DecodeScratch<T> &w) {
    const typename T::Item *copies[T::KEYS];
    const int64_t width = (some >= 8 && DEEP == 8 ? COLUMNS / 2 : COLUMNS) * W;
    const int64_t shares = sides * ((Dv + width - 1) / width) * most(some / DEEP, 1);
    for (int64_t side = 0; side < sides; side++) memset(o + side * lds, 0, some * ldo * 4);
    for (int j = 0; j < x.padded; j += T::KEYS) {
        const Next next(x.v, w.v.lines, x.padded, y.k, w.k.lines, y.padded, j);
        for (int64_t side = 0, share = 0; side < sides; side++) {
            const int keys = least(T::KEYS, x.padded - j);
            const auto *v = w.v.get(x.v + j, keys, side, copies);
            by_counts<DEEP>(some, [&](int r, auto counted) {
                constexpr int N = decltype(counted)::value, C = N == 8 ? COLUMNS / 2 : COLUMNS;
                for (int64_t d = 0; d < Dv; d += C * W) {
                    const Ahead ahead(next.rows, asks && share < shares ? next.lines : 0, share, shares);
                    weigh<T, N, C>(v, keys, w.v.from(side) + d, w.v.in_place ? Dv - d : C * W,
                                   w.p + place(side * count * PACK + r, j), o + side * lds + r * ldo + d, ldo, ahead);
                    share++;
                }
            });
        }
    }
}

// Computes piece `at`, whose keys are x; meanwhile those of the next one, y, are asked for.
template <class T>
void decode_piece(const SfCall &c, const Packs &packs, const Logits &logits, const PieceKeys &x, const PieceKeys &y,
                  int64_t at, DecodeScratch<T> &w, Parts &parts) {
    typedef typename T::Item Item;
    const List list(c, packs, x.at);
    const Queries &q = x.q;
    const int64_t rows = packs.members * packs.heads * q.lanes;  // of a side
    float *m = parts.m + at * parts.rows, *l = parts.l + at * parts.rows;
    if (!x.n) {
        for (int64_t i = 0; i < packs.sides * rows; i++) m[i] = -INF, l[i] = 0;
        return;
    }
    for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        const int some = (int)least<int64_t>(ROWS_AT_ONCE, rows - first), count = (some + PACK - 1) / PACK;
        if (w.packed != x.at || rows > ROWS_AT_ONCE) pack_queries(c, packs, list, q, first, some, w);
        w.packed = x.at;
        score_keys<T>(packs.sides, count, x, first == 0, w);
        for (int64_t side = 0; side < packs.sides; side++) {
            float *s = w.s + side * count * PACK * SPLIT;
            Item *p = w.p + side * count * PACK * SPLIT;
            hide_keys(c, packs, list, logits, x, side, first, some, s);
            for (int i = 0; i < some; i += PACK) {
                float peak[PACK], total[PACK];
                softmax_pack<T>(s + i * SPLIT, x.padded, logits.factor, p + i * SPLIT, peak, total);
                for (int r = 0; r < least(PACK, some - i); r++) {
                    m[side * rows + first + i + r] = peak[r];
                    l[side * rows + first + i + r] = total[r];
                }
            }
        }
        float *o = parts.o + (at * parts.rows + first) * parts.ld;
        weigh_keys<T>(packs.sides, some, count, x, y, first == 0, c.Dv, o, rows * parts.ld, parts.ld, w);
    }
}

// The pieces [from, to) of a list become rows of the result, always in this order.
inline void merge_pieces(const SfCall &c, const Packs &packs, int64_t i, int64_t from, int64_t to, const Parts &parts) {
    List list(c, packs, i);
    if (!list.rows) return;
    Rules rules(c, list.b, list.h);
    Queries q;
    q.load(rules, list.row, list.rows, 0);
    alignas(64) float sum[256 + STRIP];
    for (int64_t member = 0; member < packs.members; member++)
        for (int64_t head = 0; head < packs.sides * packs.heads; head++)
            for (int lane = 0; lane < list.rows; lane++) {
                if (q.token[lane] < 0) continue;
                const int64_t b = list.b + member, h = list.h + head;
                const int64_t row = packs.row(member, head, lane, q.lanes);
                float m = -INF, l = 0;
                memset(sum, 0, parts.ld * 4);
                if (q.real >> lane & 1) {
                    for (int64_t x = from; x < to; x++) m = most(parts.m[x * parts.rows + row], m);
                    for (int64_t x = from; x < to; x++) {
                        float own = parts.m[x * parts.rows + row], weight = own == m ? 1.f : exp2f(own - m);
                        if (parts.l[x * parts.rows + row] == 0) continue;  // saw nothing: O was not written
                        l += weight * parts.l[x * parts.rows + row];
                        const float *o = parts.o + (x * parts.rows + row) * parts.ld;
                        for (int64_t d = 0; d < parts.ld; d += W) store(sum + d, load(sum + d) + weight * load(o + d));
                    }
                }
                c.lse[(b * c.Hq + h) * c.Tq + q.token[lane]] = l == 0 ? -INF : (m + log2f(l)) * LN2;
                write_row(c.out, b, h, q.token[lane], c.out_dtype, c.Dv, sum, l == 0 ? 0.f : 1.f / l);
            }
}

template <class T> int decode_as(const SfCall &c, SfParallel parallel) {
    Packs packs(c);
    const int64_t lists = packs.lists(c);
    Buffer<int64_t> base;  // the first piece of each list
    if (!base.make(lists + 1)) return 1;
    int64_t pieces = 0;
    for (int64_t i = 0; i < lists; i++) {
        base[i] = pieces;
        for_each_piece(c, packs, i, [&](const Piece &) { pieces++; });
    }
    base[lists] = pieces;
    const int threads = most(c.threads, 1);
    Buffer<Piece> work;
    Buffer<char> room;
    Parts parts;
    if (!work.make(pieces) || !parts.make(c, packs, pieces) || !room.make(threads * (int64_t)sizeof(DecodeScratch<T>)))
        return 1;
    Piece *next = work.p;
    for (int64_t i = 0; i < lists; i++) for_each_piece(c, packs, i, [&](const Piece &x) { *next++ = x; });
    DecodeScratch<T> *scratch = (DecodeScratch<T> *)room.p;
    bool ok = true;
    for (int t = 0; t < threads; t++) {
        new (scratch + t) DecodeScratch<T>();
        ok = scratch[t].make(c, packs) && ok;
    }
    Logits logits(c);
    auto bundle = [&](int64_t i, int thread) {
        DecodeScratch<T> &w = scratch[thread];
        const int64_t from = i * BUNDLE, to = least(from + BUNDLE, pieces);
        w.piece[0].find(c, packs, work[from]);
        for (int64_t n = from; n < to; n++) {
            PieceKeys &x = w.piece[(n - from) & 1], &y = w.piece[(n - from + 1) & 1];
            if (n + 1 < to) y.find(c, packs, work[n + 1]);
            decode_piece<T>(c, packs, logits, x, n + 1 < to ? y : x, n, w, parts);
        }
    };
    auto merge = [&](int64_t i, int) { merge_pieces(c, packs, i, base[i], base[i + 1], parts); };
    if (ok) in_parallel(parallel, threads, (pieces + BUNDLE - 1) / BUNDLE, bundle);
    if (ok) in_parallel(parallel, threads, lists, merge);
    for (int t = 0; t < threads; t++) scratch[t].~DecodeScratch<T>();
    return ok ? 0 : 1;
}

template <bool BF> int decode(const SfCall &c, SfParallel parallel) {
#if SF_HAS_BF16
    return decode_as<InBf16>(c, parallel);
#else
    return decode_as<InFp32>(c, parallel);
#endif
}

}  // namespace
