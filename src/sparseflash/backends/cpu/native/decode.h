// Decode: few queries over many keys, bound by the memory bandwidth of K and V. Each row is read once, in place, and multiplied
// with all query rows that see it (the heads of a group, and all sequences over a shared prefix).
//
// The lists of all sequences and heads are cut into pieces of SPLIT keys (`pieces.h`). GROUP pieces of a list form one part,
// which has a softmax (m, l, O) of its own; the parts of a list are merged in order. One work list holds all parts, and every
// thread takes an equal share of it however the lengths differ. The result depends neither on the number of threads nor on
// which thread computed what.
//
// The transposed products of the forward would leave most lanes idle with so few rows: `dots.h` has others.
#pragma once
#include "pieces.h"
#include "softmax.h"

namespace {

constexpr int GROUP = PART / SPLIT;   // pieces per part
constexpr int BUNDLE = 2048 / SPLIT;  // pieces * sides of a task, or a few more: each piece prefetches the next of its task
constexpr int AHEAD = 64;             // prefetch distance in keys

// Rows of K or V as the products read them: each row whole quads of contiguous items. Other rows are first copied to `own`.
template <class T> struct RowsRead {
    typedef typename T::Item Item;
    Buffer<Item> own;
    const char *copies[T::KEYS];  // the rows in `own`
    SfView view;
    SfRecord record;
    uintptr_t end;  // address behind the tensor, if it holds records
    int32_t dtype;
    int64_t D, ld, sides, lines;  // items per head; padded with zeros; heads per row; cache lines per row
    bool in_place;

    bool make(const SfCall &c, const SfView &v, const SfRecord &r, int64_t D_, int64_t sides_, int64_t whole, bool ends) {
        view = v;
        record = r;
        end = (uintptr_t)v.data + r.bytes;
        for (auto [n, stride] : {std::pair(c.Bk, v.batch), std::pair(c.Hkv, v.head), std::pair(c.Tk, v.row)})
            end += most<int64_t>((n - 1) * stride, 0);
        dtype = c.dtype;
        D = D_;
        sides = sides_;
        ld = round_up(D, whole);
        lines = v.lane == 1 ? (sides * D * element(dtype) + 63) / 64 : 0;
        if (record.bytes) lines = (record.bytes + 63) / 64;
        in_place = !record.bytes && v.lane == 1 && dtype == T::DTYPE && (ends || D == ld);
        if (in_place) return true;
        if (!own.make(T::KEYS * sides * ld)) return false;
        for (int j = 0; j < T::KEYS; j++) copies[j] = (const char *)(own + j * sides * ld);
        return true;
    }
    // Offset, in items, from a side (KV head) to the next.
    int64_t side() const { return in_place ? D : ld; }
    // Addresses of `n` rows from place `j` of a piece on.
    KeyRows get(const KeyRows &rows, int j, int n) const {
        const KeyRows from = rows.from(j);
        if (in_place) return from;
        auto place = [&](int i) { return own + ((i & 3) * (T::KEYS / 4) + (i >> 2)) * sides * ld; };
        if (record.bytes) expand(from, rows.quarter - j / 4, n, place);
        else
            for (int i = 0; i < n; i++)
                for (int64_t side = 0; side < sides; side++) {
                    const char *row = from(i & 3, i >> 2);
                    Item *to = place(i) + side * ld;
                    if (row == PieceKeys::nothing()) memset(to, 0, ld * sizeof *to);
                    else T::copy(view, row + side * D * element(dtype), dtype, D, to, ld);
                }
        return {copies, T::KEYS / 4};
    }
    // Expands records to rows; `fours` rows are left of each quarter. Prefetches the records of the next call.
    template <class Place> void expand(const KeyRows &from, int64_t fours, int n, Place place) const {
        const RecordRows records = {record, end, dtype == SF_F16, D, ld};
        records.template expand<T>(n, [&](int i) __attribute__((always_inline)) {
            const int64_t next = (i >> 2) + T::KEYS / 4;
            if (next < fours)
                for (int64_t x = 0; x < lines; x++) __builtin_prefetch(from(i & 3, next) + 64 * x);
            const char *row = from(i & 3, i >> 2);
            return row == PieceKeys::nothing() ? nullptr : row;
        }, place);
    }
};

template <class T> struct DecodeScratch {
    typedef typename T::Item Item;
    PieceKeys piece[GROUP + 1];  // ring: the current piece and the next ones
    RowsRead<T> k, v;
    Buffer<Item> q;       // packs of queries: [chunk of D][query][quad]
    Buffer<float> s;      // scores, then weights
    Buffer<Item> line;
    int64_t packed = -1;  // number of the list whose query rows are all in q

    bool make(const SfCall &c, const Packs &packs) {
        const int64_t wide = round_up(c.D, T::QUAD);
        return q.make(ROWS_AT_ONCE * wide) && s.make(ROWS_AT_ONCE * SPLIT) &&
               line.make(wide) && k.make(c, c.k, c.k_record, c.D, packs.sides, T::QUAD, false) &&
               v.make(c, c.v, c.v_record, c.Dv, packs.sides, STRIP, true);
    }
};

// Online softmax of one pack: its x with n keys become weights in place; m and l take them in, and `shrink` is the factor that
// O of earlier keys still needs.
template <class T> inline void softmax_pack(float *s, int n, float factor, float *m, float *l, float *shrink) {
    typedef typename T::Item Item;
    vf top = set1(-INF), total = {}, safe;
    for (int j = 0; j < n * PACK; j += W) top = vmax(top, load(s + j));
    for (int i = 0; i < PACK; i++) {
        const float *t = (const float *)&top + 4 * i, peak = most(most(most(t[0], t[1]), most(t[2], t[3])), m[i]);
        shrink[i] = peak == m[i] ? 1.f : exp2f((m[i] - peak) * factor);
        m[i] = peak;
        for (int j = 0; j < 4; j++) safe[4 * i + j] = peak == -INF ? 0.f : peak;
    }
    for (int j = 0; j < n * PACK; j += W) {
        vf e = exp2v<T::FINE>((load(s + j) - safe) * factor);
        total += e;
        T::put((Item *)s + j, e);
    }
    for (int i = 0; i < PACK; i++)
        l[i] = l[i] * shrink[i] + ((total[4 * i] + total[4 * i + 1]) + (total[4 * i + 2] + total[4 * i + 3]));
}

// Results of all parts: O, m and l of each row.
struct Parts {
    Buffer<float> o, m, l;
    int64_t rows, ld;  // rows per part; floats per row of O

    bool make(const SfCall &c, const Packs &packs, int64_t parts) {
        rows = packs.rows();
        ld = round_up(c.Dv, STRIP);
        return o.make(parts * rows * ld) && m.make(parts * rows) && l.make(parts * rows);
    }
    void clear(int64_t part) const {
        memset(o + part * rows * ld, 0, rows * ld * sizeof(float));
        for (int64_t i = part * rows; i < (part + 1) * rows; i++) m[i] = -INF, l[i] = 0;
    }
    // Merges another part (or a sink: a logit without a value, o null) into m, l and O of a row.
    static void take_in(float factor, float &m, float &l, float *sum, int64_t ld, float other_m, float other_l, const float *o) {
        if (other_l == 0) return;
        const float top = most(m, other_m), own = m == top ? 1.f : exp2f((m - top) * factor);
        const float weight = other_m == top ? 1.f : exp2f((other_m - top) * factor);
        l = l * own + other_l * weight;
        m = top;
        for (int64_t d = 0; d < ld; d += W) store(sum + d, load(sum + d) * own + (o ? load(o + d) * weight : vf{}));
    }
};

// The query of row i of a side.
struct Row {
    int64_t lane, head, sequence;
    Row(const Packs &packs, const List &list, const Queries &q, int64_t side, int64_t i)
        : lane(i % q.lanes), head(list.h + side * packs.heads + i / q.lanes % packs.heads),
          sequence(list.b + i / q.lanes / packs.heads) {}
};

// Packs `some` query rows of every side, from row `first` on, into w.q.
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
                if (i + r < some && q.real >> row.lane & 1) {
                    const char *from = row_of(c.q, row.sequence, row.head, q.token[row.lane], c.dtype);
                    T::copy(c.q, from, c.dtype, c.D, w.line.p, wide);
                } else memset(w.line.p, 0, wide * sizeof(Item));
                for (int64_t d = 0; d < wide; d += T::QUAD) memcpy(pack + d * PACK + r * T::QUAD, w.line + d, 16);
            }
}

// Prefetch target for place j of n: AHEAD places on, in the same matrix, or in the one that is read next, if any.
struct Next {
    KeyRows rows;
    int lines;
    Next(const KeyRows &now, int64_t lines_now, int n, const KeyRows &then, int64_t lines_then, int then_n, int j) {
        j += AHEAD;
        const bool same = j < n;
        rows = same ? now.from(j) : then.from(j - n);
        lines = (int)(same ? lines_now : j - n < then_n ? lines_then : 0);
    }
};

// Computes the scores of all packs of queries with the keys of a piece, into w.s.
template <class T> void score_keys(int64_t sides, int count, const PieceKeys &x, bool asks, DecodeScratch<T> &w) {
    const int64_t wide = w.k.ld;
    const int turns = most(count / PACKS, 1);  // products per group of keys that prefetch
    for (int j = 0; j < x.padded; j += T::KEYS) {
        const int keys = least(T::KEYS, x.padded - j);
        const Next next(x.rows(x.k), w.k.lines, x.padded, x.rows(x.v), w.v.lines, x.padded, j);
        const KeyRows k = w.k.get(x.rows(x.k), j, keys);
        by_counts<PACKS>(count, [&](int r, auto counted) {
            Ahead ahead[MOST_SIDES];
            const int turn = r / PACKS, lines = asks && turn < turns && r % PACKS == 0 ? next.lines : 0;
            for (int side = 0; side < sides; side++)
                ahead[side] = Ahead(next.rows, lines, turn * (int)sides + side, turns * (int)sides);
            constexpr int N = decltype(counted)::value;
            (sides == 1 ? scores<T, N, true> : scores<T, N, false>)(
                k, keys, sides, w.k.side(), wide / T::QUAD, w.q + r * PACK * wide, count * PACK * wide,
                w.s + place(r * PACK, j), count * PACK * SPLIT, ahead);
        });
    }
}

// Turns scores into x of logits; -inf for a padding key, and for a key that the row does not see.
inline void hide_keys(const SfCall &c, const Packs &packs, const List &list, const Logits &logits, const PieceKeys &x,
                      int64_t side, int64_t first, int some, float *s) {
    for (int i = 0; i < some && (logits.bent || !x.all); i++) {
        const Row row(packs, list, x.q, side, first + i);
        if (logits.bent) {
            const float *bias = slice<float>(c.key_bias, row.sequence, row.head, c.Hq);
            for (int j = 0; j < x.padded; j++) {
                float &y = s[place(i, j)];
                y *= logits.inner;
                if (c.softcap > 0) y = tanhv(set1(y))[0] * logits.outer;
                if (bias && x.order(j) < x.n) y += bias[x.token[x.order(j)]];
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

// Adds the weighted keys of piece x to O of all rows; rows of O of two sides are `lds` floats apart. y: the next piece.
template <class T>
void weigh_keys(int64_t sides, int some, int count, const PieceKeys &x, const PieceKeys &y, bool asks, int64_t Dv, float *o,
                int64_t lds, int64_t ldo, DecodeScratch<T> &w) {
    typedef typename T::Item Item;
    constexpr int NARROW = DEEP == 8 ? COLUMNS / 2 : COLUMNS;
    const int64_t width = (some >= 8 ? NARROW : COLUMNS) * W;
    const int turns = most(some / DEEP, 1), strips = (int)((Dv + width - 1) / width);  // turns: products that prefetch
    for (int j = 0; j < x.padded; j += T::KEYS) {
        const int keys = least(T::KEYS, x.padded - j);
        const Next next(x.rows(x.v), w.v.lines, x.padded, y.rows(y.k), w.k.lines, y.padded, j);
        const KeyRows v = w.v.get(x.rows(x.v), j, keys);
        for (int side = 0; side < sides; side++)
            by_counts<DEEP>(some, [&](int r, auto counted) {
                constexpr int N = decltype(counted)::value, C = N == 8 ? NARROW : COLUMNS;
                const int turn = r / DEEP, lines = asks && turn < turns && r % DEEP == 0 ? next.lines : 0;
                for (int64_t d = 0, share = (side * turns + turn) * strips; d < Dv; d += C * W, share++) {
                    const Ahead ahead(next.rows, lines, (int)share, (int)sides * turns * strips);
                    const Item *p = (const Item *)w.s.p + place<Item>(side * count * PACK + r, j);
                    weigh<T, N, C>(v, keys, side * w.v.side() + d, w.v.in_place ? Dv - d : C * W, p,
                                   o + side * lds + r * ldo + d, ldo, ahead);
                }
            });
    }
}

// Adds piece x to a part, and prefetches the keys of the next piece, y.
template <class T>
void decode_piece(const SfCall &c, const Packs &packs, const Logits &logits, const PieceKeys &x, const PieceKeys &y,
                  int64_t part, const Parts &parts, DecodeScratch<T> &w) {
    if (!x.n) return;
    const List &list = x.list;
    const Queries &q = x.q;
    const int64_t rows = packs.members * packs.heads * q.lanes;  // rows per side
    for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        const int some = (int)least<int64_t>(ROWS_AT_ONCE, rows - first), count = (some + PACK - 1) / PACK;
        if (w.packed != x.at || rows > ROWS_AT_ONCE) pack_queries(c, packs, list, q, first, some, w);
        w.packed = x.at;
        score_keys<T>(packs.sides, count, x, first == 0, w);
        for (int64_t side = 0; side < packs.sides; side++) {
            float *s = w.s + side * count * PACK * SPLIT;
            hide_keys(c, packs, list, logits, x, side, first, some, s);
            for (int i = 0; i < some; i += PACK) {
                const int64_t row = part * parts.rows + side * rows + first + i;
                const int real = least(PACK, some - i);
                float m[PACK], l[PACK] = {}, shrink[PACK];
                for (int r = 0; r < PACK; r++) m[r] = r < real ? parts.m[row + r] : -INF;
                for (int r = 0; r < real; r++) l[r] = parts.l[row + r];
                softmax_pack<T>(s + i * SPLIT, x.padded, logits.factor, m, l, shrink);
                for (int r = 0; r < real; r++) {
                    float *o = parts.o + (row + r) * parts.ld;
                    for (int64_t d = 0; shrink[r] != 1 && d < parts.ld; d += W) store(o + d, load(o + d) * shrink[r]);
                    parts.m[row + r] = m[r];
                    parts.l[row + r] = l[r];
                }
            }
        }
        float *o = parts.o + (part * parts.rows + first) * parts.ld;
        weigh_keys<T>(packs.sides, some, count, x, y, first == 0, c.Dv, o, rows * parts.ld, parts.ld, w);
    }
}

// The work list of one plan: pieces in groups (one group per part). `first[g]` is the first piece of group g, `base[i]` the
// first group of list i, `bundle[t]` the first group of task t.
struct Work {
    const SfCall &c;
    Packs packs;
    Logits logits;
    Buffer<Piece> piece;
    Buffer<int64_t> first, base, bundle;
    int64_t groups = 0, bundles = 0;
    Parts parts;

    explicit Work(const SfCall &c) : c(c), packs(c), logits(c) {}
    bool make() {
        const int64_t lists = packs.lists(c);
        int64_t pieces = 0;
        for (int64_t i = 0; i < lists; i++) {
            int64_t n = 0;
            for_each_piece(c, packs, i, [&](const Piece &) { n++; });
            pieces += n;
            groups += (n + GROUP - 1) / GROUP;
        }
        if (!piece.make(pieces) || !first.make(groups + 1) || !base.make(lists + 1) || !bundle.make(groups + 1) ||
            !parts.make(c, packs, groups))
            return false;
        int64_t at = 0, group = 0;
        for (int64_t i = 0; i < lists; i++) {
            int64_t n = 0;
            base[i] = group;
            for_each_piece(c, packs, i, [&](const Piece &x) {
                if (n++ % GROUP == 0) {
                    if (!bundles || (at - first[bundle[bundles - 1]]) * packs.sides >= BUNDLE) bundle[bundles++] = group;
                    first[group++] = at;
                }
                piece[at++] = x;
            });
        }
        first[groups] = at;
        base[lists] = bundle[bundles] = groups;
        return true;
    }
    // Runs task t. Pieces are looked up a group ahead: the more TLB misses are served at once, the less each costs.
    template <class T> void run(int64_t t, DecodeScratch<T> &w) const {
        const int64_t from = first[bundle[t]], to = first[bundle[t + 1]];
        auto at = [&](int64_t n) -> PieceKeys & { return w.piece[(n - from) % (GROUP + 1)]; };
        int64_t group = bundle[t] - 1;
        at(from).find(c, packs, piece[from]);
        for (int64_t n = from, found = from + 1; n < to; n++) {
            PieceKeys &x = at(n), &y = at(n + 1);
            if (n + 1 == found)
                for (; found <= n + GROUP && found < to; found++) at(found).find(c, packs, piece[found]);
            if (n == first[group + 1]) parts.clear(++group);
            decode_piece<T>(c, packs, logits, x, n + 1 < to ? y : x, group, parts, w);
        }
    }
    // Calls f(token, m, l, o) for each part's result of each query of a head, always in the same order.
    template <class F> void for_each_part(int64_t b, int64_t h, F f) const {
        const int64_t own = packs.sides * packs.heads, slot = b / packs.members * packs.packs + h / own;
        Queries q;
        for (int64_t i = slot * c.plan.tiles * packs.blocks; i < (slot + 1) * c.plan.tiles * packs.blocks; i++) {
            const List list(c, packs, i);
            q.load(Rules(c, list.b, list.h), list.row, list.rows, 0);
            for (int lane = 0; lane < q.lanes; lane++) {
                if (!(q.real >> lane & 1)) continue;
                const int64_t row = packs.row(b % packs.members, h % own, lane, q.lanes);
                for (int64_t x = base[i] * parts.rows + row; x < base[i + 1] * parts.rows; x += parts.rows)
                    f(q.token[lane], parts.m[x], parts.l[x], parts.o + x * parts.ld);
            }
        }
    }
};

// Merges all parts of a head's queries and its sink, and writes out and lse.
inline void merge_parts(const SfCall &c, const Work *const *work, int64_t plans, const float *sink, int64_t b, int64_t h,
                        float *sum) {
    const int64_t ld = work[0]->parts.ld;
    const Logits &logits = work[0]->logits;
    float *m = sum + c.Tq * ld, *l = m + c.Tq;
    memset(sum, 0, c.Tq * (ld + 2) * sizeof(float));
    for (int64_t t = 0; t < c.Tq; t++) m[t] = -INF;
    // A sink is a key with x = sink / unit, rounded; its sum exp(sink - unit * x) makes up for the rounding.
    const float sink_top = sink ? (float)((double)sink[h] / logits.unit) : 0.f;
    const float sink_sum = sink ? (float)exp((double)sink[h] - (double)sink_top * logits.unit) : 0.f;
    for (int64_t n = 0; n < plans; n++)
        work[n]->for_each_part(b, h, [&](int64_t t, float other_m, float other_l, const float *o) {
            Parts::take_in(logits.factor, m[t], l[t], sum + t * ld, ld, other_m, other_l, o);
        });
    for (int64_t t = 0; t < c.Tq; t++) {
        if (sink && sink[h] > -INF) Parts::take_in(logits.factor, m[t], l[t], sum + t * ld, ld, sink_top, sink_sum, nullptr);
        logits.finish(c, (b * c.Hq + h) * c.Tq + t, m[t], l[t]);
        write_row(c.out, b, h, t, c.out_dtype, c.Dv, sum + t * ld, l[t] == 0 ? 0.f : 1.f / l[t]);
    }
}

// A DecodeScratch for every thread and plan of a call.
template <class T> struct DecodeDesks {
    Buffer<char> room;
    int64_t made = 0;

    bool make(const Work *const *work, int64_t plans, int threads) {
        bool ok = room.make(plans * threads * (int64_t)sizeof(DecodeScratch<T>));
        for (; ok && made < plans * threads; made++)
            ok = (new (&(*this)[made]) DecodeScratch<T>())->make(work[made % plans]->c, work[made % plans]->packs);
        return ok;
    }
    ~DecodeDesks() { while (made > 0) (*this)[--made].~DecodeScratch<T>(); }
    DecodeScratch<T> &operator[](int64_t i) { return ((DecodeScratch<T> *)room.p)[i]; }
};

template <class T> int decode_as(const SfDecode &d, SfParallel parallel) {
    const SfCall &c = d.calls[0];
    const int threads = most(c.threads, 1);
    Buffer<char> room;
    Buffer<Work *> work;
    Buffer<int64_t> tasks;  // prefix sums: tasks before those of each plan
    Buffer<float> sums;
    DecodeDesks<T> desks;
    int64_t made = 0;
    const int64_t each = c.Tq * (round_up(c.Dv, STRIP) + 2);
    bool ok = room.make(d.plans * (int64_t)sizeof(Work)) && work.make(d.plans) && tasks.make(d.plans + 1) &&
              sums.make(threads * each);
    if (ok) tasks[0] = 0;
    for (; ok && made < d.plans; made++) {
        work[made] = new (room + made * (int64_t)sizeof(Work)) Work(d.calls[made]);
        ok = work[made]->make();
        tasks[made + 1] = tasks[made] + work[made]->bundles;
    }
    if (ok && (ok = desks.make(work.p, d.plans, threads))) {
        auto run = [&](int64_t i, int thread) {
            int64_t n = 0;
            while (i >= tasks[n + 1]) n++;
            work[n]->run(i - tasks[n], desks[thread * d.plans + n]);
        };
        auto merge = [&](int64_t i, int thread) {
            merge_parts(c, work.p, d.plans, d.sink, i / c.Hq, i % c.Hq, sums + thread * each);
        };
        in_parallel(parallel, threads, tasks[d.plans], run);
        in_parallel(parallel, threads, c.B * c.Hq, merge);
    }
    while (made > 0) work[--made]->~Work();
    return ok ? 0 : 1;
}

template <bool BF> int decode(const SfDecode &d, SfParallel parallel) { return decode_as<Products<BF>>(d, parallel); }

}  // namespace
