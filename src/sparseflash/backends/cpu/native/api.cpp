// Entry points: a thread pool, checks of every pointer and length, and the choice of a level.
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <initializer_list>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#include "abi.h"
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#define SF_PUBLIC extern "C" __attribute__((visibility("default")))

#define SF_DECLARE(level)                                          \
    extern "C" int sf_forward_##level(const SfCall *, SfParallel);  \
    extern "C" int sf_backward_##level(const SfCall *, SfParallel); \
    extern "C" int sf_stats_##level(const SfCall *, SfParallel);    \
    extern "C" int sf_decode_##level(const SfDecode *, SfParallel); \
    extern "C" int sf_indexer_##level(const SfIndexer *, SfParallel); \
    extern "C" int sf_indexer_loss_##level(const SfIndexerLoss *, SfParallel); \
    extern "C" int sf_linear_forward_##level(const SfLinear *, SfParallel);  \
    extern "C" int sf_linear_backward_##level(const SfLinear *, SfParallel); \
    extern "C" int sf_stick_forward_##level(const SfCall *, SfParallel);     \
    extern "C" int sf_stick_backward_##level(const SfCall *, SfParallel);    \
    extern "C" int sf_mass_##level(const SfMass *, SfParallel);              \
    extern "C" int sf_probe_##level(const SfProbe *, SfParallel);            \
    extern "C" int sf_best_##level(const SfBest *, SfParallel);              \
    extern "C" int sf_running_##level(const SfRunning *, SfParallel);        \
    extern "C" int sf_pages_##level(const SfPages *, SfParallel);            \
    extern "C" int sf_read_mask_##level(const SfMask *, SfParallel);         \
    extern "C" int sf_list_units_##level(const SfUnits *, SfParallel);       \
    extern "C" int sf_transpose_##level(const SfTranspose *, SfParallel);
#define SF_LEVEL(level)                                                        \
    {#level, sf_forward_##level, sf_backward_##level, sf_stats_##level, sf_linear_forward_##level, \
     sf_linear_backward_##level, sf_stick_forward_##level, sf_stick_backward_##level, sf_decode_##level, \
     sf_indexer_##level, sf_indexer_loss_##level, sf_mass_##level, sf_probe_##level, sf_best_##level, \
     sf_running_##level, sf_pages_##level, sf_read_mask_##level, sf_list_units_##level, sf_transpose_##level},
SF_DECLARE(portable)
SF_DECLARE(avx2)
SF_DECLARE(neon)
SF_DECLARE(avx512)
SF_DECLARE(avx512bf16)
SF_DECLARE(amx)

namespace {

const SfLevel LEVELS[] = {
#if SF_WITH_PORTABLE
    SF_LEVEL(portable)
#endif
#if SF_WITH_AVX2
    SF_LEVEL(avx2)
#endif
#if SF_WITH_NEON
    SF_LEVEL(neon)
#endif
#if SF_WITH_AVX512
    SF_LEVEL(avx512)
#endif
#if SF_WITH_AVX512BF16
    SF_LEVEL(avx512bf16)
#endif
#if SF_WITH_AMX
    SF_LEVEL(amx)
#endif
};
constexpr int N_LEVELS = sizeof LEVELS / sizeof LEVELS[0];

// Threads that outlive a call. One call uses them at a time; a second caller meanwhile runs its tasks alone, which
// on a busy machine is the faster choice and cannot deadlock. A fork copies no threads: the child starts a pool anew.
class Pool {
    std::mutex turn, gate;
    std::condition_variable wake, done;
    std::vector<std::thread> workers;
    std::atomic<int64_t> next{0};
    std::atomic<uint64_t> round{0};
    std::atomic<int> busy{0};
    int64_t tasks = 0;
    int wanted = 0;
    SfBody body = nullptr;
    void *context = nullptr;

    void share(int thread) {
        for (int64_t i; (i = next.fetch_add(1)) < tasks;) body(context, i, thread);
    }
    void live(int thread) {
        for (uint64_t seen = 0;;) {
            for (int spin = 0; spin < 2000 && round.load(std::memory_order_acquire) == seen; spin++)
#if defined(__x86_64__) || defined(__i386__)
                __builtin_ia32_pause();
#else
                std::this_thread::yield();
#endif
            {
                std::unique_lock<std::mutex> hold(gate);
                wake.wait(hold, [&] { return round.load() != seen; });
                seen = round.load();
                if (thread >= wanted) continue;
            }
            share(thread);
            if (busy.fetch_sub(1) == 1) {
                std::lock_guard<std::mutex> hold(gate);
                done.notify_all();
            }
        }
    }

  public:
    bool run(int threads, int64_t n, SfBody what, void *with) {
        std::unique_lock<std::mutex> mine(turn, std::try_to_lock);
        if (!mine.owns_lock()) return false;
        try {
            while ((int)workers.size() < threads - 1) {
                int thread = (int)workers.size() + 1;
                workers.emplace_back([this, thread] { live(thread); });
            }
        } catch (const std::system_error &) {  // no more threads to be had: use those there are
        }
        if ((int)workers.size() < threads - 1) threads = (int)workers.size() + 1;
        {
            std::lock_guard<std::mutex> hold(gate);
            tasks = n;
            body = what;
            context = with;
            wanted = threads;
            next = 0;
            busy = threads - 1;
            round.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        share(0);
        for (int spin = 0; spin < 2000 && busy.load(std::memory_order_acquire); spin++)
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#else
            std::this_thread::yield();
#endif
        std::unique_lock<std::mutex> hold(gate);
        done.wait(hold, [&] { return busy.load() == 0; });
        return true;
    }
};

std::atomic<Pool *> current{nullptr};

Pool *pool() {
    Pool *p = current.load(std::memory_order_acquire);
    if (p) return p;
    Pool *fresh = new Pool();  // never destroyed: its threads may outlive static destructors
    if (current.compare_exchange_strong(p, fresh)) return fresh;
    delete fresh;
    return p;
}

// The threads of an OpenMP runtime that the process has anyway, by its entry point GOMP_parallel. They keep a core busy
// for milliseconds after their last work, waiting for more: with threads of our own next to them, every call after an op
// of torch would wait for a core. Null: the pool.
typedef void (*Team)(void (*)(void *), void *, unsigned threads, unsigned flags);
std::atomic<Team> team{nullptr};

// A whole team is asked for even where few have work: OpenMP ends threads that a smaller team does without.
bool run_by_team(Team lent, int threads, int64_t tasks, SfBody body, void *context) {
    static std::mutex turn;
    std::unique_lock<std::mutex> mine(turn, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    struct Work {
        const int64_t tasks;
        const SfBody body;
        void *const context;
        std::atomic<int> threads{0};
        std::atomic<int64_t> next{0};
    } work{tasks, body, context};
    lent([](void *x) {
        Work &w = *(Work *)x;
        const int thread = w.threads.fetch_add(1);
        for (int64_t i; (i = w.next.fetch_add(1)) < w.tasks;) w.body(w.context, i, thread);
    }, &work, (unsigned)threads, 0);
    return true;
}

void parallel(int threads, int64_t tasks, SfBody body, void *context) {
    if (threads > 1 && tasks > 1) {
        Team lent = team.load(std::memory_order_acquire);
        if (lent ? run_by_team(lent, threads, tasks, body, context)
                 : pool()->run((int)std::min<int64_t>(threads, tasks), tasks, body, context)) return;
    }
    for (int64_t i = 0; i < tasks; i++) body(context, i, 0);
}

// Whether memory could hold so many items; where it could, no product of these sizes overflows.
constexpr int64_t MOST_ITEMS = (int64_t)1 << 48;
bool fits(std::initializer_list<int64_t> sizes) {
    int64_t n = 1;
    for (int64_t x : sizes)
        if (x < 0 || __builtin_mul_overflow(n, std::max<int64_t>(x, 1), &n) || n > MOST_ITEMS) return false;
    return true;
}

// Null, or at a whole item of 2, 4 or 8 bytes, each of them.
template <class... P> bool whole(uintptr_t bytes, const P *...p) { return ((uintptr_t)p | ...) % bytes == 0; }

bool table_ok(const SfTable &t, const SfCall &c, int64_t heads, int64_t length, uintptr_t bytes = 4) {
    if (!t.data) return true;
    return whole(bytes, t.data) && (t.batch == 1 || t.batch == c.B) && t.heads > 0 && heads % t.heads == 0 &&
           t.length == length && fits({t.batch, t.heads, t.length});
}

// Null, or a tensor whose items lie within reach of each other.
bool view_ok(const SfView &v, int64_t B, int64_t H, int64_t T, int64_t D) {
    const int64_t axes[][2] = {{B, v.batch}, {H, v.head}, {T, v.row}, {D, v.lane}};
    for (auto &[n, stride] : axes) {
        int64_t reach;
        if (n > 1 && (__builtin_mul_overflow(n - 1, stride, &reach) || reach > MOST_ITEMS || reach < -MOST_ITEMS)) return false;
    }
    return fits({B, H, T, D});
}

// A call as it runs here: more threads than these help nobody, and could exhaust memory, or what the system allows.
template <class C> C staffed(C call) {
    static const int enough = std::max(64, 4 * (int)std::thread::hardware_concurrency());
    call.threads = std::min<int>(call.threads, enough);
    return call;
}

// Pointers, shapes and table lengths; values inside the tables are checked where they are used.
enum Kind { FORWARD, BACKWARD, STATS, DECODE, STICK_FORWARD, STICK_BACKWARD };

bool sizes_ok(const SfCall &c) {
    if (c.Bk != c.B && c.Bk != 1) return false;
    if (c.B < 0 || c.Hq < 1 || c.Hkv < 1 || c.Hq % c.Hkv || c.Tq < 0 || c.Tk < 0) return false;
    if (c.D < 1 || c.D > SF_WIDEST || c.Dv < 1 || c.Dv > SF_WIDEST || c.threads < 1) return false;
    if (c.dtype < 0 || c.dtype > 2 || c.out_dtype < 0 || c.out_dtype > 2 || c.grad_dtype < 0 || c.grad_dtype > 2) return false;
    const SfPlan &p = c.plan;
    for (int64_t n : {c.Tq, c.Tk, p.q_rows, p.k_rows, p.tile, p.unit}) if (n > INT32_MAX) return false;  // 32 bits each
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

// A record holds what it says, and its rows are whole.
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

bool call_ok(const SfCall &c, Kind kind) {
    if (!sizes_ok(c) || !plan_ok(c) || !tensors_ok(c)) return false;
    if (c.weights < SF_SOFTMAX || c.weights > SF_RELU2) return false;
    if (kind != DECODE && (c.k_record.bytes || c.v_record.bytes)) return false;
    const bool backward = kind == BACKWARD || kind == STICK_BACKWARD, softmax = c.weights == SF_SOFTMAX;
    const bool whole_softmax = softmax && (kind == FORWARD || kind == BACKWARD);
    if ((c.dropout_bar || c.alibi.data || c.pair.data || c.distance.data) && !whole_softmax) return false;
    if (c.dropout_bar && !fits({c.B, c.Hq, c.Tk, 2})) return false;
    if (!softmax && (kind == STATS || kind == DECODE || c.key_bias.data || c.dbias || c.softcap != 0)) return false;
    const bool stick = kind >= STICK_FORWARD, again = kind == STICK_BACKWARD;  // which reads no results of the forward
    if (stick && (!softmax || c.softcap != 0 || c.key_bias.data || c.dbias)) return false;
    if ((stick || !softmax) && (c.D > 256 || c.Dv > 256)) return false;
    const bool some_q = c.B * c.Tq > 0, some_k = c.B * c.Tk > 0;
    const bool given = kind == BACKWARD || kind == STATS;  // a normaliser
    if (some_q && (!c.q.data || (softmax && !again && !(given ? c.norm : c.lse)))) return false;
    if (some_q && kind != STATS && (softmax ? !again : !backward) && !c.out.data && !(backward && c.delta)) return false;
    if (some_k && (!c.k.data || (kind != STATS && !c.v.data))) return false;
    if (kind == STATS && c.dout.data && (!c.delta || (some_k && !c.v.data))) return false;  // influences
    if (kind == STATS && !statistics_ok(c)) return false;
    if (kind == FORWARD && c.stat && !(c.over == SF_OVER_BLOCK && softmax && statistics_ok(c))) return false;
    return !backward || ((!some_q || (c.dout.data && c.dq.data)) && (!some_k || (c.dk.data && c.dv.data)));
}

int run(const SfCall *call, int level, Kind kind) {
    if (!call || level < 0 || level >= N_LEVELS || !call_ok(*call, kind)) return 3;
    if (call->B == 0) return 0;
    const SfLevel &l = LEVELS[level];
    SfCall own = staffed(*call);
    if (own.Bk == 1) own.k.batch = own.v.batch = 0;  // every sequence reads the pool
    try {
        auto entry = kind == FORWARD ? l.forward : kind == BACKWARD ? l.backward : kind == STATS ? l.stats
                     : kind == STICK_FORWARD ? l.stick_forward : l.stick_backward;
        return entry(&own, parallel);
    } catch (...) {
        return 4;
    }
}

int run_decode(const SfDecode *given, int level) {
    if (!given || level < 0 || level >= N_LEVELS || given->size != (int64_t)sizeof *given) return 3;
    if (!given->calls || !whole(8, given->calls) || !whole(4, given->sink)) return 3;
    if (given->plans < 1 || given->plans > 1 << 16) return 3;
    try {
        std::vector<SfCall> calls(given->calls, given->calls + given->plans);
        const SfCall &first = calls[0];
        for (SfCall &c : calls) {
            if (!call_ok(c, DECODE) || c.dtype != given->dtype) return 3;
            const int64_t sizes[][2] = {{c.B, first.B}, {c.Hq, first.Hq}, {c.Tq, first.Tq}, {c.Dv, first.Dv}};
            for (auto &x : sizes) if (x[0] != x[1]) return 3;
            c = staffed(c);
            if (c.Bk == 1) c.k.batch = c.v.batch = 0;  // every sequence reads the pool
        }
        if (first.B == 0) return 0;
        SfDecode own = *given;
        own.calls = calls.data();
        return LEVELS[level].decode(&own, parallel);
    } catch (...) {
        return 4;
    }
}

bool linear_ok(const SfLinear &c, bool backward) {
    if (c.size != (int64_t)sizeof c) return false;
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

int run_linear(const SfLinear *call, int level, bool backward) {
    if (!call || level < 0 || level >= N_LEVELS || !linear_ok(*call, backward)) return 3;
    if (call->B == 0) return 0;
    try {
        const SfLinear own = staffed(*call);
        return (backward ? LEVELS[level].linear_backward : LEVELS[level].linear_forward)(&own, parallel);
    } catch (...) {
        return 4;
    }
}

bool indexer_ok(const SfIndexer &c) {
    if (c.size != (int64_t)sizeof c) return false;
    if (c.B < 0 || c.H < 1 || c.H > 1024 || c.Tq < 0 || c.Tq > INT32_MAX || c.Tk < 0 || c.Tk > INT32_MAX) return false;
    if (c.D < 1 || c.D > 256 || c.topk < 1 || c.topk > INT32_MAX || c.threads < 1 || c.dtype < 0 || c.dtype > 2) return false;
    if (!view_ok(c.q, c.B, c.H, c.Tq, c.D) || !view_ok(c.k, c.B, 1, c.Tk, c.D)) return false;
    if (!fits({c.B, c.Tq, c.topk})) return false;
    if (c.B * c.Tq == 0) return true;
    return c.q.data && (c.k.data || c.Tk == 0) && c.weights && c.low && c.high && c.index;
}

int run_indexer(const SfIndexer *call, int level) {
    if (!call || level < 0 || level >= N_LEVELS || !indexer_ok(*call)) return 3;
    if (call->B * call->Tq == 0) return 0;
    try {
        const SfIndexer own = staffed(*call);
        return LEVELS[level].indexer(&own, parallel);
    } catch (...) {
        return 4;
    }
}

bool indexer_loss_ok(const SfIndexerLoss &c) {
    if (c.size != (int64_t)sizeof c) return false;
    if (c.B < 0 || c.H < 1 || c.H > 1024 || c.Tq < 0 || c.Tq > INT32_MAX || c.Tk < 0 || c.Tk > INT32_MAX) return false;
    if (c.D < 1 || c.D > 256 || c.Dm < 1 || c.Dm > 256 || c.Hkv < 1 || c.Hq < 1 || c.Hq % c.Hkv) return false;
    if (c.n < 0 || c.n > INT32_MAX || c.threads < 1 || c.dtype < 0 || c.dtype > 2) return false;
    if (c.index_dtype < 0 || c.index_dtype > 2 || !c.loss || !c.dq || !c.dk || !c.dw || !c.low || !c.high) return false;
    if (!view_ok(c.q_index, c.B, c.H, c.Tq, c.D) || !view_ok(c.k_index, c.B, 1, c.Tk, c.D) ||
        !view_ok(c.q, c.B, c.Hq, c.Tq, c.Dm) || !view_ok(c.k, c.B, c.Hkv, c.Tk, c.Dm)) return false;
    if (!fits({c.B, c.Tq, c.n})) return false;
    return c.q_index.data && c.k_index.data && c.q.data && c.k.data && c.weights && c.lse;
}

int run_indexer_loss(const SfIndexerLoss *call, int level) {
    if (!call || level < 0 || level >= N_LEVELS || !indexer_loss_ok(*call)) return 3;
    if (call->B == 0 || call->Tq == 0 || call->Tk == 0) return 0;
    try {
        const SfIndexerLoss own = staffed(*call);
        return LEVELS[level].indexer_loss(&own, parallel);
    } catch (...) {
        return 4;
    }
}

// What selections estimate and pick: pointers, shapes and strides; values are kept within reach where they are used.
constexpr int64_t MOST_DEEP = 1 << 20;  // numbers in a row of groups

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
bool ok(const SfRunning &c) {
    if (c.rows < 0 || c.T < 0 || c.T >= INT32_MAX || c.most < 1 || c.threads < 1) return false;
    if (!fits({c.rows, c.T}) || !whole(4, c.x, c.k, c.kth, c.until)) return false;
    if (c.rows * c.T == 0) return true;
    if (!c.x || !c.k || !c.kth || !c.until) return false;
    for (int64_t i = 0; i < c.rows; i++) if (c.k[i] < 1 || (c.k[i] > c.most && c.k[i] <= c.T)) return false;
    return true;
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
bool nothing(const SfMass &c) { return c.B * c.n * c.m == 0; }
bool nothing(const SfProbe &c) { return c.B * c.n * c.Tk == 0; }
bool nothing(const SfBest &c) { return c.rows * c.k == 0; }
bool nothing(const SfRunning &c) { return c.rows * c.T == 0; }
bool nothing(const SfPages &c) { return c.B * c.Tq * c.n == 0; }

template <class C> int run_selection(const C *call, int level, int (*SfLevel::*entry)(const C *, SfParallel)) {
    if (!call || level < 0 || level >= N_LEVELS || call->size != (int64_t)sizeof *call || !ok(*call)) return 3;
    if (nothing(*call)) return 0;
    try {
        const C own = staffed(*call);
        return (LEVELS[level].*entry)(&own, parallel);
    } catch (...) {
        return 4;
    }
}

// Lists, whose pointers, lengths and values `lists.h` checks.
template <class C> int run_lists(const C *call, int level, int (*SfLevel::*entry)(const C *, SfParallel)) {
    if (!call || level < 0 || level >= N_LEVELS || call->size != (int64_t)sizeof *call) return 3;
    try {
        const C own = staffed(*call);
        return (LEVELS[level].*entry)(&own, parallel);
    } catch (...) {
        return 4;
    }
}

// Released blocks wait here for the next call, up to KEPT bytes.
struct Block { void *memory; int64_t bytes; };
#if defined(__SANITIZE_ADDRESS__)  // blocks of their own size, so that one step too far is seen
constexpr int64_t KEPT = 0, PAGE = 64;
#else
constexpr int64_t KEPT = 256 << 20, PAGE = 4096;
#endif
constexpr int64_t HEADER = 64;
struct Shelf {
    std::mutex gate;
    std::vector<Block> blocks;
    int64_t held = 0;
};
Shelf &shelf() {
    static Shelf *s = new Shelf();
    return *s;
}
std::atomic<bool> poison{false};

void *handed_out(void *block, int64_t bytes) {
    void *p = (char *)block + HEADER;
    if (poison.load(std::memory_order_relaxed)) memset(p, 0xff, (size_t)bytes);  // NaN in every format
    return p;
}

#if defined(__unix__) || defined(__APPLE__)
// Around a fork: the shelf is at rest, and the child forgets the threads, which it does not have.
struct AtFork {
    AtFork() {
        pthread_atfork([] { shelf().gate.lock(); }, [] { shelf().gate.unlock(); },
                       [] { shelf().gate.unlock(); current.store(nullptr); team.store(nullptr); });
    }
} at_fork;
#endif

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
#define SF_EXACT_BLOCKS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SF_EXACT_BLOCKS 1
#endif
#endif

#if SF_EXACT_BLOCKS
// Under the sanitizer every block ends where it was asked to end, and is handed out once.
extern "C" void *sf_acquire(int64_t bytes) {
    void *p = nullptr;
    if (bytes < 0 || bytes > MOST_ITEMS || posix_memalign(&p, 64, (size_t)(bytes + HEADER))) return nullptr;
    return handed_out(p, bytes);
}
extern "C" void sf_release(void *memory) {
    if (memory) free((char *)memory - HEADER);
}
#else
extern "C" void *sf_acquire(int64_t bytes) {
    if (bytes < 0 || bytes > MOST_ITEMS) return nullptr;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    Shelf &s = shelf();
    std::unique_lock<std::mutex> mine(s.gate, std::try_to_lock);  // not worth waiting for
    if (mine.owns_lock()) {
        size_t best = s.blocks.size();
        for (size_t i = 0; i < s.blocks.size(); i++)
            if (s.blocks[i].bytes >= bytes && s.blocks[i].bytes <= 2 * bytes + 65536 &&
                (best == s.blocks.size() || s.blocks[i].bytes < s.blocks[best].bytes)) best = i;
        if (best < s.blocks.size()) {
            Block b = s.blocks[best];
            s.blocks[best] = s.blocks.back();
            s.blocks.pop_back();
            s.held -= b.bytes;
            mine.unlock();
            return handed_out(b.memory, bytes);
        }
    }
    void *p = aligned_alloc(64, (size_t)(bytes + HEADER));
    if (!p) return nullptr;
    *(int64_t *)p = bytes;
    return handed_out(p, bytes);
}

extern "C" void sf_release(void *memory) {
    if (!memory) return;
    void *p = (char *)memory - HEADER;
    int64_t bytes = *(int64_t *)p;
    Shelf &s = shelf();
    std::unique_lock<std::mutex> mine(s.gate, std::try_to_lock);
    if (mine.owns_lock() && s.held + bytes <= KEPT && s.blocks.size() < 256) {
        try {
            s.blocks.push_back({p, bytes});
            s.held += bytes;
            return;
        } catch (const std::bad_alloc &) {
        }
    }
    if (mine.owns_lock()) mine.unlock();
    free(p);
}
#endif

SF_PUBLIC int64_t sf_call_size() { return (int64_t)sizeof(SfCall); }
SF_PUBLIC int sf_levels() { return N_LEVELS; }
SF_PUBLIC const char *sf_level_name(int level) { return level >= 0 && level < N_LEVELS ? LEVELS[level].name : ""; }
SF_PUBLIC int sf_forward(const SfCall *call, int level) { return run(call, level, FORWARD); }
SF_PUBLIC int sf_backward(const SfCall *call, int level) { return run(call, level, BACKWARD); }
SF_PUBLIC int sf_stats(const SfCall *call, int level) { return run(call, level, STATS); }
SF_PUBLIC int sf_stick_forward(const SfCall *call, int level) { return run(call, level, STICK_FORWARD); }
SF_PUBLIC int sf_stick_backward(const SfCall *call, int level) { return run(call, level, STICK_BACKWARD); }
SF_PUBLIC int sf_linear_forward(const SfLinear *call, int level) { return run_linear(call, level, false); }
SF_PUBLIC int sf_linear_backward(const SfLinear *call, int level) { return run_linear(call, level, true); }
SF_PUBLIC int sf_indexer(const SfIndexer *call, int level) { return run_indexer(call, level); }
SF_PUBLIC int sf_indexer_loss(const SfIndexerLoss *call, int level) { return run_indexer_loss(call, level); }
SF_PUBLIC int sf_mass(const SfMass *call, int level) { return run_selection(call, level, &SfLevel::mass); }
SF_PUBLIC int sf_probe(const SfProbe *call, int level) { return run_selection(call, level, &SfLevel::probe); }
SF_PUBLIC int sf_best(const SfBest *call, int level) { return run_selection(call, level, &SfLevel::best); }
SF_PUBLIC int sf_running(const SfRunning *call, int level) { return run_selection(call, level, &SfLevel::running); }
SF_PUBLIC int sf_pages(const SfPages *call, int level) { return run_selection(call, level, &SfLevel::pages); }
SF_PUBLIC int sf_decode(const SfDecode *call, int level) { return run_decode(call, level); }
SF_PUBLIC int sf_read_mask(const SfMask *call, int level) { return run_lists(call, level, &SfLevel::read_mask); }
SF_PUBLIC int sf_list_units(const SfUnits *call, int level) { return run_lists(call, level, &SfLevel::list_units); }
SF_PUBLIC int sf_transpose(const SfTranspose *call, int level) { return run_lists(call, level, &SfLevel::transpose); }

// Takes an OpenMP runtime's GOMP_parallel, whose threads then run all tasks; null gives them back to the pool.
SF_PUBLIC void sf_borrow_threads(void *gomp_parallel) {
#if !defined(__SANITIZE_THREAD__)  // which does not see the locks of a library that it did not compile
    team.store((Team)gomp_parallel, std::memory_order_release);
#else
    (void)gomp_parallel;
#endif
}

// Reads memory and does nothing else, eight places a thread in turn, which is as fast as memory goes: what benchmarks
// compare with. Returns a sum, so that nobody can leave the reading out.
SF_PUBLIC uint64_t sf_read(const void *data, int64_t bytes, int threads) {
    constexpr int64_t PLACES = 8, AHEAD = 512, EACH = 64 * 8192;  // bytes; of one place in one task
    struct Reading {
        const char *data;
        std::atomic<uint64_t> sum{0};
    } all{(const char *)data};
    if (!data || threads < 1) return 0;
    auto read = [](void *context, int64_t task, int) {
        typedef uint64_t Line __attribute__((vector_size(64)));
        Reading &r = *(Reading *)context;
        const char *from = r.data + task * PLACES * EACH;
        Line sum[PLACES] = {}, x;
        for (int64_t i = 0; i < EACH; i += 64)
#pragma GCC unroll 8
            for (int64_t j = 0; j < PLACES; j++) {
                __builtin_prefetch(from + j * EACH + i + AHEAD, 0, 2);
                memcpy(&x, from + j * EACH + i, 64);
                sum[j] += x;
            }
        uint64_t total = 0;
        for (const Line &s : sum)
            for (int i = 0; i < 8; i++) total += s[i];
        r.sum += total;
    };
    const int64_t tasks = bytes / (PLACES * EACH);
    parallel(threads, tasks, read, &all);
    for (int64_t i = tasks * PLACES * EACH; i < bytes; i++) all.sum += ((const unsigned char *)data)[i];
    return all.sum;
}

// For tests: scratch is handed out full of NaN, so that reading it before writing shows.
SF_PUBLIC void sf_poison(int on) { poison.store(on != 0); }

// Asks the kernel for the AMX tile state; 0 when granted.
SF_PUBLIC int sf_request_amx() {
#if defined(__linux__) && defined(__x86_64__)
    return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);
#else
    return -1;
#endif
}
