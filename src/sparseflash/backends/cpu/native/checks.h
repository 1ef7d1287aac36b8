// Checks pointers, shapes and lengths of every call before anything runs; values inside tables are checked where they are used.
#pragma once
#include <algorithm>
#include <initializer_list>
#include "abi.h"

namespace {

// True if memory could hold so many items; then no product of these sizes overflows.
constexpr int64_t MOST_ITEMS = (int64_t)1 << 48;
bool fits(std::initializer_list<int64_t> sizes) {
    int64_t n = 1;
    for (int64_t x : sizes)
        if (x < 0 || __builtin_mul_overflow(n, std::max<int64_t>(x, 1), &n) || n > MOST_ITEMS) return false;
    return true;
}

// True if each pointer is null or aligned to items of so many bytes (2, 4 or 8).
template <class... P> bool whole(uintptr_t bytes, const P *...p) { return ((uintptr_t)p | ...) % bytes == 0; }

bool table_ok(const SfTable &t, const SfCall &c, int64_t heads, int64_t length, uintptr_t bytes = 4) {
    if (!t.data) return true;
    return whole(bytes, t.data) && (t.batch == 1 || t.batch == c.B) && t.heads > 0 && heads % t.heads == 0 &&
           t.length == length && fits({t.batch, t.heads, t.length});
}

// True if the strides of a view stay within MOST_ITEMS of its address.
bool view_ok(const SfView &v, int64_t B, int64_t H, int64_t T, int64_t D) {
    const int64_t axes[][2] = {{B, v.batch}, {H, v.head}, {T, v.row}, {D, v.lane}};
    for (auto &[n, stride] : axes) {
        int64_t reach;
        if (n > 1 && (__builtin_mul_overflow(n - 1, stride, &reach) || reach > MOST_ITEMS || reach < -MOST_ITEMS)) return false;
    }
    return fits({B, H, T, D});
}

enum Kind { FORWARD, BACKWARD, STATS, DECODE, STICK_FORWARD, STICK_BACKWARD };

bool sizes_ok(const SfCall &c) {
    if (c.Bk != c.B && c.Bk != 1) return false;
    if (c.B < 0 || c.Hq < 1 || c.Hkv < 1 || c.Hq % c.Hkv || c.Tq < 0 || c.Tk < 0) return false;
    if (c.D < 1 || c.D > SF_WIDEST || c.Dv < 1 || c.Dv > SF_WIDEST || c.threads < 1) return false;
    if (c.dtype < 0 || c.dtype > 2 || c.out_dtype < 0 || c.out_dtype > 2 || c.grad_dtype < 0 || c.grad_dtype > 2) return false;
    const SfPlan &p = c.plan;
    for (int64_t n : {c.Tq, c.Tk, p.q_rows, p.k_rows, p.tile, p.unit}) if (n > INT32_MAX) return false;  // must fit 32 bits
    return p.q_rows >= 0 && p.k_rows >= 0 && fits({c.B, c.Hq, p.q_rows}) && fits({c.B, c.Hq, p.k_rows});
}

bool plan_ok(const SfCall &c) {
    const SfPlan &p = c.plan;
    if (p.tile < 1 || p.unit < 1 || p.tiles != (p.q_rows + p.tile - 1) / p.tile) return false;
    if (!p.q_order.data && p.q_rows != c.Tq) return false;
    if (!p.k_order.data && p.k_rows != c.Tk) return false;
    if (p.span_start.data && (!p.span_full.data || !p.span_count.data || (p.spans_size && !p.spans))) return false;
    if (p.start.data && (!p.full.data || !p.count.data || (p.index_size && !p.index))) return false;
    if (p.bits_start.data && (!p.start.data || (p.bits_size && !p.bits))) return false;
    if (!whole(4, p.spans, p.index, p.bits) || !fits({p.spans_size, 2}) || !fits({p.index_size})) return false;
    if (p.bits_size && !fits({p.bits_size, p.tile, (p.unit + 31) / 32})) return false;
    for (auto *t : {&p.span_start, &p.start, &p.bits_start}) if (!table_ok(*t, c, c.Hq, p.tiles, 8)) return false;
    for (auto *t : {&p.span_full, &p.span_count, &p.full, &p.count}) if (!table_ok(*t, c, c.Hq, p.tiles)) return false;
    if (!table_ok(p.q_order, c, c.Hq, p.q_rows) || !table_ok(p.k_order, c, c.Hq, p.k_rows)) return false;
    for (auto *t : {&p.q_pos, &p.q_seg}) if (!table_ok(*t, c, c.Hq, c.Tq)) return false;
    for (auto *t : {&p.k_pos, &p.k_end, &p.k_seg}) if (!table_ok(*t, c, c.Hq, c.Tk)) return false;
    if (!table_ok(p.head_window, c, c.Hq, 2) || !table_ok(p.head_sink, c, c.Hq, 1)) return false;
    return table_ok(p.q_shift, c, 1, 1);
}

// True if a record's bytes hold the items that it declares, and its rows are contiguous.
bool record_ok(const SfRecord &r, const SfView &v, int64_t B, int64_t H, int64_t T, int64_t D, int32_t dtype) {
    if (r.bytes < 1 || r.bytes > 1 << 16 || r.kept < 1 || r.kept > D || (r.item != dtype && r.item != 3)) return false;
    const int64_t bits = r.kept < D ? (D + 63) / 64 * 8 : 0, item = r.item == 3 ? 1 : r.item == SF_F32 ? 4 : 2;
    return bits + (r.item == 3 ? 4 : 0) + r.kept * item <= r.bytes && v.lane == 1 && view_ok(v, B, H, T, r.bytes);
}

bool tensors_ok(const SfCall &c) {
    const SfView none = {};
    const bool k_dense = !c.k_record.bytes, v_dense = !c.v_record.bytes;
    if (!k_dense && !record_ok(c.k_record, c.k, c.Bk, c.Hkv, c.Tk, c.D, c.dtype)) return false;
    if (!v_dense && !record_ok(c.v_record, c.v, c.Bk, c.Hkv, c.Tk, c.Dv, c.dtype)) return false;
    const struct { const SfView &x; int64_t D; int32_t dtype; } of_queries[] = {
        {c.q, c.D, c.dtype}, {c.out, c.Dv, c.out_dtype}, {c.dout, c.Dv, c.dtype}, {c.dq, c.D, c.grad_dtype}
    }, of_keys[] = {{k_dense ? c.k : none, c.D, c.dtype}, {v_dense ? c.v : none, c.Dv, c.dtype}, {c.dk, c.D, c.grad_dtype}, {c.dv, c.Dv, c.grad_dtype}};
    auto item = [](int32_t dtype) { return dtype == SF_F32 ? 4 : 2; };
    for (auto &v : of_queries) if (!view_ok(v.x, c.B, c.Hq, c.Tq, v.D) || !whole(item(v.dtype), v.x.data)) return false;
    for (auto &v : of_keys) if (!view_ok(v.x, c.Bk, c.Hkv, c.Tk, v.D) || !whole(item(v.dtype), v.x.data)) return false;
    if (c.pair_dtype < 0 || c.pair_dtype > 2) return false;
    if (!view_ok(c.pair, c.B, c.Hq, c.Tq, c.Tk) || !whole(item(c.pair_dtype), c.pair.data)) return false;
    if (c.alibi.data && c.alibi.heads != c.Hq) return false;
    if (c.dpair && (!c.pair.data || !whole(4, c.dpair) || !fits({c.B, c.Hq, c.Tq, c.Tk}))) return false;
    if (!table_ok(c.distance, c, c.Hq, c.Tq + c.Tk - 1)) return false;
    if (c.ddistance && (!c.distance.data || !whole(4, c.ddistance) || !fits({c.B, c.Hq, c.Tq + c.Tk}))) return false;
    return table_ok(c.alibi, c, c.Hq, 1) && table_ok(c.key_bias, c, c.Hq, c.Tk) && whole(4, c.lse, c.norm, c.dlse, c.dbias, c.stat, c.delta) && whole(8, c.skipped);
}

bool statistics_ok(const SfCall &c) {
    const bool blocks = c.over == SF_OVER_BLOCK;
    if (c.over < SF_OVER_KEY || c.over > SF_OVER_BLOCK || !fits({c.plan.tiles, c.entry_width})) return false;
    if (blocks && (c.stat_tile < 1 || c.stat_tile > INT32_MAX || c.stat_unit < 1 || c.stat_unit > INT32_MAX)) return false;
    const int64_t tiles = blocks ? (c.Tq + c.stat_tile - 1) / c.stat_tile : 0;
    const int64_t units = blocks ? (c.Tk + c.stat_unit - 1) / c.stat_unit : 0;
    const int64_t widths[] = {c.Tk, c.Tq, c.plan.tiles * c.entry_width, c.Tq + c.Tk - 1, tiles * units};
    if (c.stat_width != widths[c.over] || !fits({c.B, c.Hq, c.stat_width})) return false;
    return c.B * c.stat_width == 0 || c.stat;
}

bool ok(const SfCall &c, Kind kind) {
    if (!sizes_ok(c) || !plan_ok(c) || !tensors_ok(c)) return false;
    if (c.weights < SF_SOFTMAX || c.weights > SF_RELU2) return false;
    if (kind != DECODE && (c.k_record.bytes || c.v_record.bytes)) return false;
    const bool backward = kind == BACKWARD || kind == STICK_BACKWARD, softmax = c.weights == SF_SOFTMAX;
    const bool whole_softmax = softmax && (kind == FORWARD || kind == BACKWARD);
    if ((c.dropout_bar || c.alibi.data || c.pair.data || c.distance.data) && !whole_softmax) return false;
    if (c.dropout_bar && !fits({c.B, c.Hq, c.Tk, 2})) return false;
    if (!table_ok(c.q_number, c, 1, c.Tq) || !table_ok(c.k_number, c, 1, c.Tk) || c.first_head < 0) return false;
    if (!softmax && (kind == STATS || kind == DECODE || c.key_bias.data || c.dbias || c.softcap != 0)) return false;
    const bool stick = kind >= STICK_FORWARD, again = kind == STICK_BACKWARD;  // which reads no results of the forward
    if (stick && (!softmax || c.softcap != 0 || c.key_bias.data || c.dbias)) return false;
    if ((stick || !softmax) && (c.D > 256 || c.Dv > 256)) return false;
    const bool some_q = c.B * c.Tq > 0, some_k = c.B * c.Tk > 0;
    const bool given = kind == BACKWARD || kind == STATS;  // the call reads a norm
    if (some_q && (!c.q.data || (softmax && !again && !(given ? c.norm : c.lse)))) return false;
    if (some_q && kind != STATS && (softmax ? !again : !backward) && !c.out.data && !(backward && c.delta)) return false;
    if (some_k && (!c.k.data || (kind != STATS && !c.v.data))) return false;
    if (kind == STATS && c.dout.data && (!c.delta || (some_k && !c.v.data))) return false;  // influences
    if (kind == STATS && !statistics_ok(c)) return false;
    if (kind == FORWARD && c.stat && !(c.over == SF_OVER_BLOCK && softmax && statistics_ok(c))) return false;
    return !backward || ((!some_q || (c.dout.data && c.dq.data)) && (!some_k || (c.dk.data && c.dv.data)));
}

bool ok(const SfDecode &c) {
    if (c.size != (int64_t)sizeof c || !c.calls || !whole(8, c.calls) || !whole(4, c.sink)) return false;
    if (c.plans < 1 || c.plans > 1 << 16) return false;
    for (int64_t i = 0; i < c.plans; i++) {
        const SfCall &own = c.calls[i], &first = c.calls[0];
        if (!ok(own, DECODE) || own.dtype != c.dtype) return false;
        if (own.B != first.B || own.Hq != first.Hq || own.Tq != first.Tq || own.Dv != first.Dv) return false;
    }
    return true;
}

bool ok(const SfLinear &c, Kind kind) {
    const bool backward = kind == BACKWARD;
    if (c.B < 0 || c.Hq < 1 || c.Hkv < 1 || c.Hq % c.Hkv || c.T < 0 || c.T > INT32_MAX) return false;
    if (c.D < 1 || c.D > 256 || c.Dv < 1 || c.Dv > 256 || c.threads < 1 || c.dtype < 0 || c.dtype > 2) return false;
    const struct { const SfView &x; int64_t H, D; } views[] = {
        {c.q, c.Hq, c.D}, {c.k, c.Hkv, c.D}, {c.v, c.Hkv, c.Dv}, {c.out, c.Hq, c.Dv},
        {c.dq, c.Hq, c.D}, {c.dk, c.Hkv, c.D}, {c.dv, c.Hkv, c.Dv}, {c.dout, c.Hq, c.Dv},
    };
    for (auto &v : views) if (!view_ok(v.x, c.B, v.H, c.T, v.D)) return false;
    if (!fits({c.B, c.Hq, c.D, c.Dv})) return false;
    if (c.B == 0) return true;
    if (!(backward ? c.dfirst : c.last)) return false;
    if (c.T == 0) return true;
    if (!c.q.data || !c.k.data || !c.v.data) return false;
    return backward ? c.dout.data && c.dq.data && c.dk.data && c.dv.data : c.out.data != nullptr;
}

bool ok(const SfIndexer &c) {
    if (c.B < 0 || c.H < 1 || c.H > 1024 || c.Tq < 0 || c.Tq > INT32_MAX || c.Tk < 0 || c.Tk > INT32_MAX) return false;
    if (c.D < 1 || c.D > 256 || c.topk < 1 || c.topk > INT32_MAX || c.threads < 1 || c.dtype < 0 || c.dtype > 2) return false;
    if (!view_ok(c.q, c.B, c.H, c.Tq, c.D) || !view_ok(c.k, c.B, 1, c.Tk, c.D)) return false;
    if (!fits({c.B, c.Tq, c.topk})) return false;
    if (c.B * c.Tq == 0) return true;
    return c.q.data && (c.k.data || c.Tk == 0) && c.weights && c.low && c.high && c.index;
}

bool ok(const SfIndexerLoss &c) {
    if (c.B < 0 || c.H < 1 || c.H > 1024 || c.Tq < 0 || c.Tq > INT32_MAX || c.Tk < 0 || c.Tk > INT32_MAX) return false;
    if (c.D < 1 || c.D > 256 || c.Dm < 1 || c.Dm > 256 || c.Hkv < 1 || c.Hq < 1 || c.Hq % c.Hkv) return false;
    if (c.n < 0 || c.n > INT32_MAX || c.threads < 1 || c.dtype < 0 || c.dtype > 2) return false;
    if (c.index_dtype < 0 || c.index_dtype > 2 || !c.loss || !c.dq || !c.dk || !c.dw || !c.low || !c.high) return false;
    if (!view_ok(c.q_index, c.B, c.H, c.Tq, c.D) || !view_ok(c.k_index, c.B, 1, c.Tk, c.D) ||
        !view_ok(c.q, c.B, c.Hq, c.Tq, c.Dm) || !view_ok(c.k, c.B, c.Hkv, c.Tk, c.Dm)) return false;
    if (!fits({c.B, c.Tq, c.n})) return false;
    return c.q_index.data && c.k_index.data && c.q.data && c.k.data && c.weights && c.lse;
}

// Calls of `selection`: pointers, shapes and strides; values are clamped where they are used.
constexpr int64_t MOST_DEEP = 1 << 20;  // items of a row, which may be a group of tokens

bool ok(const SfMass &c) {
    if (c.B < 0 || c.Hq < 1 || c.Hkv < 1 || c.Hq % c.Hkv || c.n < 0 || c.n > INT32_MAX || c.m < 0 || c.m > INT32_MAX) return false;
    if (c.E < 1 || c.E > MOST_DEEP || c.tile < 1 || c.tile > INT32_MAX || c.unit < 1 || c.unit > INT32_MAX) return false;
    if (c.threads < 1 || c.dtype < 0 || c.dtype > 2) return false;
    if (!view_ok(c.rows, c.B, c.Hq, c.n, c.E) || !view_ok(c.columns, c.B, c.Hkv, c.m, c.E)) return false;
    if (!whole(c.dtype == SF_F32 ? 4 : 2, c.rows.data, c.columns.data) || !whole(4, c.sees, c.level, c.out)) return false;
    if (!fits({c.B, c.Hq, (c.n + c.tile - 1) / c.tile, (c.m + c.unit - 1) / c.unit}) || !fits({c.B, c.Hq, c.m, c.E})) return false;
    return c.B * c.n * c.m == 0 || (c.rows.data && c.columns.data && c.sees && c.out);
}
bool ok(const SfProbe &c) {
    if (c.B < 0 || c.Hq < 1 || c.Hkv < 1 || c.Hq % c.Hkv || c.n < 0 || c.n > INT32_MAX || c.Tk < 0 || c.Tk > INT32_MAX) return false;
    if (c.D < 1 || c.D > 256 || c.threads < 1 || c.dtype < 0 || c.dtype > 2) return false;
    if (c.width < 0 || c.width > 1ll << 34 || c.before < 0 || c.before > 1ll << 33) return false;
    if (!view_ok(c.q, c.B, c.Hq, c.n, c.D) || !view_ok(c.k, c.B, c.Hkv, c.Tk, c.D)) return false;
    if (!whole(c.dtype == SF_F32 ? 4 : 2, c.q.data, c.k.data) || !whole(4, c.sees, c.at, c.lse, c.keys, c.distances)) return false;
    if (!fits({c.B, c.Hq, c.width}) || !fits({c.B, c.Hq, c.Tk})) return false;
    if (c.B * c.n && !(c.q.data && c.sees && c.at && c.lse)) return false;
    return c.B * c.Tk == 0 || (c.k.data && c.keys && (c.distances || !c.width));
}
bool ok(const SfBest &c) {
    if (c.rows < 0 || c.n < 0 || c.n > INT32_MAX || c.k < 0 || c.k > c.n || c.threads < 1) return false;
    if (!fits({c.rows, c.n}) || !whole(4, c.scores, c.index)) return false;
    return c.rows * c.k == 0 || (c.scores && c.index);
}
bool ok(const SfHeaviest &c) {
    if (c.rows < 0 || c.n < 0 || c.n > INT32_MAX || c.threads < 1 || !fits({c.rows, c.n})) return false;
    if (!whole(4, c.mass) || !whole(8, c.share)) return false;
    return c.rows * c.n == 0 || (c.mass && c.share && c.keep);
}
bool ok(const SfRunning &c) {
    if (c.rows < 0 || c.T < 0 || c.T >= INT32_MAX || c.most < 1 || c.threads < 1) return false;
    if (!fits({c.rows, c.T}) || !whole(4, c.x, c.k, c.kth, c.until)) return false;
    if (c.rows * c.T == 0) return true;
    if (!c.x || !c.k || !c.kth || !c.until) return false;
    for (int64_t i = 0; i < c.rows; i++) if (c.k[i] < 1 || (c.k[i] > c.most && c.k[i] <= c.T)) return false;
    return true;
}
bool ok(const SfNM &c) {
    for (int64_t n : {c.T, c.K, c.O}) if (n < 0 || n > INT32_MAX) return false;
    for (int64_t stride : {c.x_row, c.w_out, c.w_in}) if (stride < 0 || stride > 1ll << 40) return false;
    if (c.m < 1 || c.m > 64 || c.n < 1 || c.n > c.m || c.K % c.m || c.threads < 1) return false;
    if (!fits({c.T, c.K}) || !fits({c.O, c.K}) || !fits({c.T, c.O}) || !whole(4, c.x, c.w, c.y)) return false;
    return c.T * c.O == 0 || (c.y && (c.K == 0 || (c.x && c.w)));
}
bool ok(const SfPages &c) {
    for (int64_t n : {c.Tq, c.n, c.pages, c.parts, c.sinks, c.near, c.k}) if (n < 0 || n > INT32_MAX) return false;
    if (c.B < 0 || c.Hq < 1 || c.Hkv < 1 || c.Hq % c.Hkv || c.w < 1 || c.w > MOST_DEEP || c.threads < 1) return false;
    if (c.dtype < 0 || c.dtype > 2 || c.share < 0 || c.share > 2) return false;
    if (c.parts < 1 || c.pages != (c.n + c.parts - 1) / c.parts || !view_ok(c.rows, c.B, c.Hkv, c.n, c.w)) return false;
    if (!whole(c.dtype == SF_F32 ? 4 : 2, c.rows.data) || !whole(4, c.q, c.last, c.rules, c.scores, c.index)) return false;
    if (!fits({c.B, c.Hq, c.Tq, c.w}) || !fits({c.B, c.Hq, c.Tq, c.pages}) || !fits({c.B, c.Hq, c.Tq, c.k})) return false;
    return c.B * c.Tq * c.n == 0 || (c.rows.data && c.q && c.last && (c.scores || c.index));
}
// List builders check their calls themselves (`lists.h`).
bool ok(const SfMask &) { return true; }
bool ok(const SfUnits &) { return true; }
bool ok(const SfTranspose &) { return true; }

}  // namespace
