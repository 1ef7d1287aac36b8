// Building a plan's lists from a caller's boolean mask, from units listed for each tile, or from lists to be transposed.
// The result depends on the input alone: neither on the number of threads nor on their order.
#pragma once
#include "scratch.h"

namespace {

inline bool length_ok(int64_t n, int64_t low = 0) { return n >= low && n <= INT32_MAX; }
inline bool product_ok(int64_t a, int64_t b) { return a == 0 || b <= INT64_MAX / 16 / a; }

// ---------------------------------------------------------------- masks

enum MaskKind : uint8_t { EMPTY = 0, PARTIAL = 1, FULL = 2 };

// True if some bit of [lo, hi) is set after XOR with `flip`.
inline bool some_bit(const uint64_t *bits, int64_t lo, int64_t hi, uint64_t flip) {
    for (int64_t at = lo; at < hi;) {
        int64_t end = least(hi, round_down(at, 64) + 64);
        if ((bits[at / 64] ^ flip) & (~0ull >> (64 - (end - at)) << (at % 64))) return true;
        at = end;
    }
    return false;
}

// Reads one tile of queries at a time: byte rows become bit rows; their union and intersection classify each unit.
struct MaskReader {
    const SfMask &c;
    int64_t units, tiles, words;  // 64-bit words of a bit row, plus one; bits past the last key are 0
    Buffer<uint64_t> room;        // per thread: union, intersection, and the bit rows of a tile

    explicit MaskReader(const SfMask &c) : c(c) {
        units = (c.Tk + c.unit - 1) / c.unit;
        tiles = (c.Tq + c.tile - 1) / c.tile;
        words = (round_up(c.Tk, c.unit) + 63) / 64 + 1;
    }
    int64_t desk() const { return (2 + least(c.tile, c.Tq)) * words; }
    bool make() { return product_ok(desk(), c.threads) && room.make(desk() * c.threads); }

    uint64_t word(const uint8_t *row, int64_t at) const {
        int64_t n = least<int64_t>(c.Tk - at, 64);
        if (n <= 0) return 0;
        if (c.lane == 0) return *row ? ~0ull >> (64 - n) : 0;
        uint8_t near[64] = {};
        for (int64_t i = 0; i < n; i++) near[i] = row[(at + i) * c.lane];
        return nonzero64(near);
    }

    // Reads N rows in step: N streams of memory at once; and where keys are not contiguous, rows may be.
    template <int N> void read(const uint8_t *from, uint64_t *any, uint64_t *all, uint64_t *bits) const {
        const int64_t whole = c.lane == 1 ? c.Tk / 64 : 0;
        for (int64_t w = 0; w < words; w++) {
            uint64_t one = any[w], each = all[w];
#pragma GCC unroll 4
            for (int r = 0; r < N; r++) {
                const uint8_t *row = from + r * c.row;
                uint64_t x = w < whole ? nonzero64(row + w * 64) : word(row, w * 64);
                bits[r * words + w] = x;
                one |= x;
                each &= x;
            }
            any[w] = one;
            all[w] = each;
        }
    }

    void operator()(int64_t task, int thread) const {
        const int64_t cell = c.first + task, list = cell / tiles, top = cell % tiles * c.tile;
        const int64_t rows = least(c.tile, c.Tq - top), own = c.row ? rows : 1;  // broadcast rows are read once
        const uint8_t *from = c.data + list / c.H * c.batch + list % c.H * c.head + top * c.row;
        uint64_t *any = room + thread * desk(), *all = any + words, *bits = all + words;
        memset(any, 0, words * sizeof *any);
        memset(all, 0xff, words * sizeof *all);
        int64_t r = 0;
        if (c.lane > 1)
            for (; r + 64 <= own; r += 64) read<64>(from + r * c.row, any, all, bits + r * words);
        for (; r + 4 <= own; r += 4) read<4>(from + r * c.row, any, all, bits + r * words);
        for (; r < own; r++) read<1>(from + r * c.row, any, all, bits + r * words);
        const int64_t size = c.tile * ((c.unit + 31) / 32);
        int32_t *to = c.bits + task * units * size, partial = 0;
        for (int64_t u = 0; u < units; u++) {
            int64_t lo = u * c.unit, hi = least(lo + c.unit, c.Tk);
            uint8_t kind = !some_bit(any, lo, hi, 0) ? EMPTY : !some_bit(all, lo, hi, ~0ull) ? FULL : PARTIAL;
            c.kind[task * units + u] = kind;
            if (kind == PARTIAL) copy(bits, lo, rows, to + partial++ * size);
        }
        c.partial[task] = partial;
    }

    // Copies the bits of a unit as 32-bit words.
    void copy(const uint64_t *bits, int64_t lo, int64_t rows, int32_t *to) const {
        const int64_t n = (c.unit + 31) / 32;
        for (int64_t r = 0; r < rows; r++, to += n) {
            const uint64_t *row = bits + (c.row ? r : 0) * words + lo / 64;
            if (c.unit % 64 == 0) {
                for (int64_t i = 0; i < n / 2; i++) {
                    to[2 * i] = (int32_t)(uint32_t)row[i];
                    to[2 * i + 1] = (int32_t)(uint32_t)(row[i] >> 32);
                }
                continue;
            }
            for (int64_t i = 0; i < n; i++) {
                int64_t at = lo % 64 + 32 * i, left = c.unit - 32 * i;
                uint64_t pair = row[at / 64] >> (at % 64) | (at % 64 ? row[at / 64 + 1] << (64 - at % 64) : 0);
                to[i] = (int32_t)((uint32_t)pair & (left < 32 ? (1u << left) - 1 : ~0u));
            }
        }
        memset(to, 0, (c.tile - rows) * n * sizeof *to);
    }
};

inline int read_mask(const SfMask &c, SfParallel parallel) {
    if (c.B < 0 || c.H < 1 || !length_ok(c.Tq) || !length_ok(c.Tk) || !length_ok(c.tile, 1) || !length_ok(c.unit, 1)) return 3;
    if (c.first < 0 || c.cells < 0 || c.threads < 1) return 3;
    if (c.cells == 0) return 0;
    MaskReader reader(c);
    const int64_t size = (c.unit + 31) / 32;
    if (!product_ok(c.B, c.H) || !product_ok(c.B * c.H, reader.tiles)) return 3;
    if (c.first > c.B * c.H * reader.tiles - c.cells || !c.partial) return 3;
    if (c.Tk > 0 && (!c.data || !c.kind || !c.bits)) return 3;
    if (!product_ok(c.tile, size) || !product_ok(c.tile * size, reader.units)) return 3;
    if (!product_ok(c.tile * size * reader.units, c.cells)) return 3;
    if (c.bits_size < c.cells * reader.units) return 3;
    if (!reader.make()) return 1;
    in_parallel(parallel, c.threads, c.cells, reader);
    return 0;
}

// ---------------------------------------------------------------- units listed for each tile

// A set of numbers that is drained in ascending order; each bit of `busy` marks a word that is not empty.
struct BitSet {
    uint64_t *word, *busy;

    void add(int64_t x) {
        word[x / 64] |= 1ull << (x % 64);
        busy[x / 4096] |= 1ull << (x / 64 % 64);
    }
    template <class F> void drain(int64_t most, F f) {
        for (int64_t b = 0; b * 4096 < most; b++)
            for (; busy[b]; busy[b] &= busy[b] - 1) {
                int64_t w = b * 64 + __builtin_ctzll(busy[b]);
                for (; word[w]; word[w] &= word[w] - 1) f((int32_t)(w * 64 + __builtin_ctzll(word[w])));
            }
    }
};

struct UnitLister {
    const SfUnits &c;
    int64_t columns, words;
    Buffer<uint64_t> sets;   // per thread: a BitSet
    Buffer<int32_t> found;   // per thread: full units, partial units
    Buffer<int32_t> failed;  // per thread: whether a cell was invalid

    explicit UnitLister(const SfUnits &c) : c(c) {
        columns = (c.Tk + c.unit - 1) / c.unit;
        words = columns / 64 + 1;
    }
    int64_t desk() const { return words + words / 64 + 1; }
    bool make() {
        if (!product_ok(desk(), c.threads) || !product_ok(2 * c.width + 2, c.threads)) return false;
        if (!sets.make(desk() * c.threads) || !found.make((2 * c.width + 2) * c.threads) || !failed.make(c.threads)) return false;
        memset(sets.p, 0, desk() * c.threads * sizeof *sets.p);
        memset(failed.p, 0, c.threads * sizeof *failed.p);
        return true;
    }

    // Lists the units of one cell. Example: tile 64, unit 16, causal, tile 1: oldest 64, newest 127, reach 65, so units 0 .. 3
    // are full (sure 4), 4 .. 7 partial (seen 8), later ones invisible.
    template <class Id> void list(int64_t cell, int thread) const {
        const Id *given = (const Id *)c.given + cell * c.width;
        const int64_t top = cell % c.tiles * c.tile, oldest = top + c.q_offset;
        const int64_t newest = least(top + c.tile, c.Tq) - 1 + c.q_offset;
        const int64_t reach = c.causal ? most<int64_t>(least(oldest + 1, c.Tk), 0) : c.Tk;
        const int64_t sure = reach / c.unit;  // units below `sure` are full, units from `seen` on are invisible
        const int64_t seen = c.causal ? newest < 0 ? 0 : least(newest / c.unit + 1, columns) : columns;
        int64_t full = 0, partial = 0;
        int32_t *first = found + thread * (2 * c.width + 2), *second = first + c.width + 1;
        auto take = [&](int64_t id) {  // branch-free: a unit that is not counted is overwritten by the next
            first[full] = second[partial] = (int32_t)id;
            full += id < sure;
            partial += (id >= sure) & (id < seen);
        };
        if (sizeof(Id) == 1) {
            for (int64_t id = 0; id < seen; id++) if (given[id]) take(id);
        } else if (c.unique) {
            bool wrong = false;
            for (int64_t i = 0; i < c.width; i++) {
                int64_t id = given[i];
                wrong |= (id < -1) | (id >= columns);
                take(id < 0 ? columns : id);
            }
            if (wrong) return (void)(failed[thread] = 1);
        } else {
            BitSet set = {sets + thread * desk(), sets + thread * desk() + words};
            for (int64_t i = 0; i < c.width; i++) {
                int64_t id = given[i];
                if (id < -1 || id >= columns) failed[thread] = 1;
                else if (id >= 0 && id < seen) set.add(id);
            }
            set.drain(seen, take);
        }
        if (!c.index) {
            c.full[cell] = (int32_t)full;
            c.count[cell] = (int32_t)(full + partial);
            return;
        }
        const int64_t at = c.start[cell];
        if (c.full[cell] != full || c.count[cell] != full + partial || at < 0 || at > c.index_size - full - partial)
            return (void)(failed[thread] = 1);
        memcpy(c.index + at, first, full * sizeof *first);
        memcpy(c.index + at + full, second, partial * sizeof *second);
    }

    void operator()(int64_t task, int thread) const {
        const int64_t end = least((task + 1) * CELLS, c.cells);
        for (int64_t cell = task * CELLS; cell < end; cell++) {
            if (c.id_bytes == 1) list<uint8_t>(cell, thread);
            else if (c.id_bytes == 4) list<int32_t>(cell, thread);
            else list<int64_t>(cell, thread);
        }
    }
    static constexpr int64_t CELLS = 16;  // per task
};

inline int list_units(const SfUnits &c, SfParallel parallel) {
    if (!length_ok(c.Tq) || !length_ok(c.Tk) || !length_ok(c.tile, 1) || !length_ok(c.unit, 1) || !length_ok(c.width)) return 3;
    if (c.q_offset < -((int64_t)1 << 40) || c.q_offset > (int64_t)1 << 40) return 3;
    if (c.id_bytes != 1 && c.id_bytes != 4 && c.id_bytes != 8) return 3;
    if (c.cells < 0 || c.tiles != (c.Tq + c.tile - 1) / c.tile || c.threads < 1 || c.index_size < 0) return 3;
    if (c.cells == 0) return 0;
    if (c.tiles < 1 || c.cells % c.tiles || !product_ok(c.cells, c.width)) return 3;
    if (!c.full || !c.count || (c.width && !c.given) || (c.index && !c.start)) return 3;
    UnitLister lister(c);
    if (c.id_bytes == 1 && c.width != lister.columns) return 3;
    if (!lister.make()) return 1;
    in_parallel(parallel, c.threads, (c.cells + lister.CELLS - 1) / lister.CELLS, lister);
    for (int32_t t = 0; t < c.threads; t++) if (lister.failed[t]) return 3;
    return 0;
}

// ---------------------------------------------------------------- transposed lists

// Transposes one (batch, head) at a time: a counting sort by unit that keeps the order of tiles, full entries first.
struct Transposer {
    const SfTranspose &c;
    Buffer<int64_t> cursors;  // per thread: where the next full and the next partial entry of each unit goes
    Buffer<int32_t> failed;   // per thread: whether a list was invalid

    explicit Transposer(const SfTranspose &c) : c(c) {}
    bool make() {
        if (!product_ok(2 * c.columns, c.threads)) return false;
        if (!cursors.make(2 * c.columns * c.threads) || !failed.make(c.threads)) return false;
        memset(failed.p, 0, c.threads * sizeof *failed.p);
        return true;
    }

    // Calls f(tile, place in `index`, unit, partial?) for every entry; false if a list is out of bounds.
    template <class F> bool walk(int64_t list, F f) const {
        for (int64_t r = 0, cell = list * c.tiles; r < c.tiles; r++, cell++) {
            const int64_t at = c.start[cell], full = c.full[cell], count = c.count[cell];
            if (full < 0 || full > count || (count && (at < 0 || at > c.index_size - count))) return false;
            for (int64_t i = 0; i < count; i++) {
                const int64_t unit = c.index[at + i];
                if (unit < 0 || unit >= c.columns) return false;
                f(r, at + i, unit, i >= full);
            }
        }
        return true;
    }

    template <class Source> bool transpose(int64_t list, int thread) const {
        int64_t *next = cursors + thread * 2 * c.columns, *begin = c.to + list * c.columns;
        int64_t total = 0, at = c.base[list];
        memset(next, 0, 2 * c.columns * sizeof *next);
        if (!walk(list, [&](int64_t, int64_t, int64_t unit, bool partial) { next[2 * unit + partial]++; total++; })) return false;
        if (at < 0 || total != c.base[list + 1] - at || c.base[list + 1] > c.entries) return false;
        for (int64_t u = 0; u < c.columns; u++) {
            const int64_t full = next[2 * u], partial = next[2 * u + 1];
            begin[u] = next[2 * u] = at;
            next[2 * u + 1] = at + full;
            at += full + partial;
            c.sure[list * c.columns + u] = (int32_t)full;
            c.listed[list * c.columns + u] = (int32_t)(full + partial);
        }
        return walk(list, [&](int64_t r, int64_t place, int64_t unit, bool partial) {
            int64_t n = next[2 * unit + partial]++;
            c.met[n] = (int32_t)r;
            ((Source *)c.source)[n] = (Source)place;
        });
    }
    void operator()(int64_t list, int thread) const {
        if (!(c.wide ? transpose<int64_t>(list, thread) : transpose<int32_t>(list, thread))) failed[thread] = 1;
    }
};

inline int transpose(const SfTranspose &c, SfParallel parallel) {
    if (c.lists < 0 || !length_ok(c.tiles) || !length_ok(c.columns) || c.threads < 1) return 3;
    if (c.index_size < 0 || c.entries < 0 || (!c.wide && c.index_size > INT32_MAX)) return 3;
    if (!product_ok(c.lists, c.tiles) || !product_ok(c.lists, c.columns) || !product_ok(c.entries, 1)) return 3;
    if (c.lists == 0) return 0;
    if (!c.base || (c.tiles && (!c.start || !c.full || !c.count)) || (c.index_size && !c.index)) return 3;
    if ((c.columns && (!c.to || !c.listed || !c.sure)) || (c.entries && (!c.met || !c.source))) return 3;
    Transposer transposer(c);
    if (!transposer.make()) return 1;
    in_parallel(parallel, c.threads, c.lists, transposer);
    for (int32_t t = 0; t < c.threads; t++) if (transposer.failed[t]) return 3;
    return 0;
}

}  // namespace
