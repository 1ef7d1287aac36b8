// Few queries over many keys, bound by the memory that holds K and V: each is read once, where it lies, and multiplied
// by all query rows that see it (the heads of a group, and all sequences over a shared prefix).
//
// The lists of all sequences and heads are cut into pieces of SPLIT keys: one work list, of which every thread takes an
// equal share however the lengths differ. A piece is a softmax of its own, (m, l, O); pieces of a list are merged in
// order. So neither the number of threads nor who did what can show in the result.
//
// Here rows are queries and lanes run along D: S = Q K^T is one dot product a number, summed across lanes W at a time,
// and O = P V reads whole rows of V. With so few rows the transposed form of the forward would idle most lanes.
#pragma once
#include "dots.h"
#include "softmax.h"

namespace {

constexpr int ROWS_AT_ONCE = 32;  // query rows whose scores of a piece are held
constexpr int KEYS_AT_ONCE = 32;  // rows of V that stay in the first cache level while all queries read them

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

// Which rows go together. A list belongs to a pack of query heads (one KV head, one head of every table of the plan) and
// to one sequence, or to all where they share the keys and the plan; 64 queries of a tile at most.
struct Packs {
    int64_t packs, heads, sequences, members, blocks, lanes;

    explicit Packs(const SfCall &c) {
        const SfPlan &p = c.plan;
        int64_t each = c.Hkv;
        bool one = c.Bk == 1 && (!p.q_shift.data || p.q_shift.batch == 1);
        const SfTable *tables[] = {&p.span_start, &p.span_full, &p.span_count, &p.start, &p.full, &p.count,
                                   &p.bits_start, &p.q_order, &p.k_order, &p.q_pos, &p.k_pos, &p.k_end,
                                   &p.q_seg, &p.k_seg, &p.head_window, &p.head_sink};
        for (const SfTable *t : tables)
            if (t->data) {
                each = common_multiple(each, t->heads);
                one = one && t->batch == 1;
            }
        packs = each;
        heads = c.Hq / packs;
        members = one ? c.B : 1;
        sequences = c.B / members;
        blocks = (least(p.tile, p.q_rows) + BQ - 1) / BQ;
        lanes = least<int64_t>(BQ, least(p.tile, p.q_rows));
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
        h = slot % packs.packs * packs.heads;
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

// The keys of a piece that some query sees, and who sees them.
template <class Item> struct PieceKeys {
    const Item *rows[2 * (SPLIT + W) + AHEAD];  // of K, of V, and where those of the next piece may be
    const Item *v[SPLIT];
    int64_t token[SPLIT];
    uint64_t see[SPLIT];
    int n;
    bool all;  // every query sees every key

    void find(const SfCall &c, const Rules &rules, const Queries &q, const List &list, const Piece &piece) {
        const SfPlan &p = c.plan;
        const int64_t hkv = list.h * c.Hkv / c.Hq, words = (p.unit + 31) / 32;
        const Item *keys = (const Item *)row_of(c.k, list.b, hkv, 0, c.dtype);
        const Item *values = (const Item *)row_of(c.v, list.b, hkv, 0, c.dtype);
        n = 0;
        all = true;
        auto take = [&](int64_t row, uint64_t by) {
            int64_t t = rules.key_token(row);
            if (t < 0 || !by) return;
            all = all && by == q.real;
            token[n] = t;
            see[n] = by;
            rows[n] = keys + t * c.k.row;
            v[n++] = values + t * c.v.row;
        };
        Listed entries = piece.units ? list.units(c) : list.spans(c);
        const int64_t *bits_start = piece.units ? slice<int64_t>(p.bits_start, list.b, list.h, c.Hq) : nullptr;
        int64_t left = SPLIT, skip = piece.skip;
        for (int64_t e = piece.entry; e < entries.hi && left > 0; e++, skip = 0) {
            int64_t lo = piece.units ? p.index[e] * (int64_t)p.unit : span_lo(p, e);
            int64_t size = piece.units ? p.unit : most<int64_t>(0, span_hi(p, e) - lo);
            int64_t from = lo + skip, to = least(lo + size, from + left);
            left -= most<int64_t>(0, to - from);
            if (lo < 0) continue;
            to = least(to, p.k_rows);
            if (e < entries.full && q.real) {
                for (int64_t x = from; x < to; x++) {
                    const int64_t t = rules.key_token(x);
                    if (t < 0) continue;
                    token[n] = t;
                    see[n] = q.real;
                    rows[n] = keys + t * c.k.row;
                    v[n++] = values + t * c.v.row;
                }
                continue;
            }
            const int32_t *bits = nullptr;
            if (bits_start) {
                int64_t at = bits_start[list.tile] + e - entries.full;
                if (bits_start[list.tile] < 0 || at >= p.bits_size) continue;
                bits = p.bits + at * p.tile * words;
            }
            for (int64_t x = from; x < to; x++) {
                uint64_t by = seen_by(rules, q, rules.key_token(x));
                for (uint64_t rest = bits ? by : 0; rest; rest &= rest - 1) {
                    int i = __builtin_ctzll(rest);
                    int32_t word = bits[(q.row_in_tile + i) * words + (x - lo) / 32];
                    if (!((uint32_t)word >> ((x - lo) % 32) & 1u)) by &= ~(1ull << i);
                }
                take(x, by);
            }
        }
    }
};

template <class T> struct DecodeScratch {
    typedef typename T::Item Item;
    typedef typename T::Operand Operand;
    PieceKeys<Item> seen;
    Buffer<Operand> q, p;
    Buffer<float> s, line;
    Buffer<Item> own_k, own_v;  // rows whose lanes do not lie side by side

    bool make(const SfCall &c) {
        bool ok = q.make(ROWS_AT_ONCE * round_up(c.D, T::STEP)) && p.make(ROWS_AT_ONCE * SPLIT) &&
                  s.make(ROWS_AT_ONCE * SPLIT) && line.make(round_up(c.D, T::STEP));
        if (c.k.lane != 1) ok = ok && own_k.make(SPLIT * c.D);
        if (c.v.lane != 1) ok = ok && own_v.make(SPLIT * c.Dv);
        return ok;
    }
};

template <class Item> inline void side_by_side(const Item **rows, int n, int64_t lane, int64_t D, Item *own) {
    for (int j = 0; j < n; j++, own += D) {
        for (int64_t d = 0; d < D; d++) own[d] = rows[j][d * lane];
        rows[j] = own;
    }
}

// Scores of a row to weights; returns max (base 2) and sum.
inline void softmax_row(float *s, int n, float factor, float &m, float &l) {
    vf top = set1(-INF), total = {};
    for (int j = 0; j < n; j += W) top = vmax(top, load(s + j));
    float peak = -INF;
    for (int i = 0; i < W; i++) peak = most((float)top[i], peak);
    m = peak * factor;
    float safe = peak == -INF ? 0.f : m;
    for (int j = 0; j < n; j += W) {
        vf e = exp2v<true>(load(s + j) * factor - safe);
        total += e;
        store(s + j, e);
    }
    l = sum(total);
}

// Where the results of pieces wait: O, m and l of each row.
struct Parts {
    Buffer<float> o, m, l;
    int64_t rows, ld;  // of a piece; of a row of O

    bool make(const SfCall &c, const Packs &packs, int64_t pieces) {
        rows = packs.members * packs.heads * packs.lanes;
        ld = round_up(c.Dv, STRIP);
        return o.make(pieces * rows * ld) && m.make(pieces * rows) && l.make(pieces * rows);
    }
};

template <class T>
void decode_piece(const SfCall &c, const Packs &packs, const Logits &logits, const Piece &piece, int64_t at,
                  DecodeScratch<T> &w, Parts &parts) {
    typedef typename T::Item Item;
    static const Item nothing[256] = {};
    List list(c, packs, piece.list);
    Rules rules(c, list.b, list.h);
    Queries q;
    q.load(rules, list.row, list.rows, list.row - list.tile * c.plan.tile);
    const int64_t rows = packs.members * packs.heads * q.lanes, ldq = round_up(c.D, T::STEP), ldo = parts.ld;
    float *m = parts.m + at * parts.rows, *l = parts.l + at * parts.rows;
    PieceKeys<Item> &x = w.seen;
    x.find(c, rules, q, list, piece);
    if (!x.n) {
        for (int64_t i = 0; i < rows; i++) m[i] = -INF, l[i] = 0;
        return;
    }
    const int n = (int)round_up(x.n, W);
    if (c.k.lane != 1) side_by_side(x.rows, x.n, c.k.lane, c.D, w.own_k.p);
    if (c.v.lane != 1) side_by_side(x.v, x.n, c.v.lane, c.Dv, w.own_v.p);
    const Item **k = x.rows, **v = k + n, *last = k[x.n - 1];
    for (int j = x.n; j < n; j++) k[j] = nothing;
    for (int j = 0; j < n; j++) v[j] = j < x.n ? x.v[j] : nothing;
    for (int j = 0; j < AHEAD; j++) v[n + j] = last + (j + 1) * c.k.row;  // a guess, never read
    for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        const int some = (int)least<int64_t>(ROWS_AT_ONCE, rows - first);
        // row = (sequence, head, query)
        auto lane = [&](int i) { return (first + i) % q.lanes; };
        auto head = [&](int i) { return list.h + (first + i) / q.lanes % packs.heads; };
        auto sequence = [&](int i) { return list.b + (first + i) / q.lanes / packs.heads; };
        for (int i = 0; i < some; i++) {
            bool real = q.real >> lane(i) & 1;
            if (real) read_row(c.q, row_of(c.q, sequence(i), head(i), q.token[lane(i)], c.dtype), c.dtype, c.D, w.line.p);
            memset(w.line + (real ? c.D : 0), 0, (ldq - (real ? c.D : 0)) * 4);
            T::operand(w.line.p, ldq, w.q + i * ldq);
        }
        for (int j = 0; j < n; j += W) {
            in_rows(some, [&](int r, auto count) {
                constexpr int ROWS = decltype(count)::value;
                for (int i = j; i < j + W; i += W / ROWS)
                    if (first + r == 0) scores<T, ROWS, true>(k + i, c.D, w.q.p, ldq, w.s.p + i);
                    else scores<T, ROWS, false>(k + i, c.D, w.q + r * ldq, ldq, w.s + r * SPLIT + i);
            });
        }
        for (int i = 0; i < some; i++) {
            float *s = w.s + i * SPLIT;
            if (logits.bent) {
                const float *bias = slice<float>(c.key_bias, sequence(i), head(i), c.Hq);
                for (int j = 0; j < n; j += W) {
                    vf y = load(s + j) * logits.inner;
                    store(s + j, c.softcap > 0 ? tanhv(y) * logits.outer : y);
                }
                if (bias)
                    for (int j = 0; j < x.n; j++) s[j] += bias[x.token[j]] * LOG2E;
            }
            if (!x.all)
                for (int j = 0; j < x.n; j++)
                    if (!(x.see[j] >> lane(i) & 1)) s[j] = -INF;
            for (int j = x.n; j < n; j++) s[j] = -INF;
            softmax_row(s, n, logits.factor, m[first + i], l[first + i]);
            T::operand(s, n, w.p + i * SPLIT);
        }
        float *o = parts.o + (at * parts.rows + first) * ldo;
        memset(o, 0, some * ldo * 4);
        for (int j = 0; j < n; j += KEYS_AT_ONCE) {
            const int keys = least(KEYS_AT_ONCE, n - j);
            for (int64_t d = 0; d < c.Dv; d += STRIP)
                in_rows(some, [&](int r, auto count) {
                    constexpr int ROWS = decltype(count)::value;
                    const auto *p = w.p + r * SPLIT + j;
                    float *to = o + r * ldo + d;
                    if (first + r == 0) weigh<T, ROWS, true>(v + j, keys, d, c.Dv - d, p, to, ldo);
                    else weigh<T, ROWS, false>(v + j, keys, d, c.Dv - d, p, to, ldo);
                });
        }
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
        for (int64_t head = 0; head < packs.heads; head++)
            for (int lane = 0; lane < list.rows; lane++) {
                if (q.token[lane] < 0) continue;
                const int64_t b = list.b + member, h = list.h + head;
                const int64_t row = (member * packs.heads + head) * q.lanes + lane;
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
        ok = scratch[t].make(c) && ok;
    }
    Logits logits(c);
    auto piece = [&](int64_t i, int thread) { decode_piece<T>(c, packs, logits, work[i], i, scratch[thread], parts); };
    auto merge = [&](int64_t i, int) { merge_pieces(c, packs, i, base[i], base[i + 1], parts); };
    if (ok) in_parallel(parallel, threads, pieces, piece);
    if (ok) in_parallel(parallel, threads, lists, merge);
    for (int t = 0; t < threads; t++) scratch[t].~DecodeScratch<T>();
    return ok ? 0 : 1;
}

template <bool BF> int decode(const SfCall &c, SfParallel parallel) {
#if SF_HAS_BF16
    return decode_as<InBf16>(c, parallel);
#else
    return c.dtype == SF_F32    ? decode_as<InFp32<F32>>(c, parallel)
           : c.dtype == SF_BF16 ? decode_as<InFp32<Bf16>>(c, parallel)
                                : decode_as<InFp32<F16>>(c, parallel);
#endif
}

}  // namespace
