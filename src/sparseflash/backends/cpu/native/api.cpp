// Entry points: pick the instruction-set level, and guard every call.
#include <string.h>
#include <vector>
#include "checks.h"
#include "shelf.h"
#include "threads.h"
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
    extern "C" int sf_heaviest_##level(const SfHeaviest *, SfParallel);      \
    extern "C" int sf_running_##level(const SfRunning *, SfParallel);        \
    extern "C" int sf_nm_##level(const SfNM *, SfParallel);                  \
    extern "C" int sf_pages_##level(const SfPages *, SfParallel);            \
    extern "C" int sf_read_mask_##level(const SfMask *, SfParallel);         \
    extern "C" int sf_list_units_##level(const SfUnits *, SfParallel);       \
    extern "C" int sf_transpose_##level(const SfTranspose *, SfParallel);
#define SF_LEVEL(level)                                                        \
    {#level, sf_forward_##level, sf_backward_##level, sf_stats_##level, sf_linear_forward_##level, \
     sf_linear_backward_##level, sf_stick_forward_##level, sf_stick_backward_##level, sf_decode_##level, \
     sf_indexer_##level, sf_indexer_loss_##level, sf_mass_##level, sf_probe_##level, sf_best_##level, sf_heaviest_##level, \
     sf_running_##level, sf_nm_##level, sf_pages_##level, sf_read_mask_##level, sf_list_units_##level, sf_transpose_##level},
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

// True if a valid call has nothing to do.
bool nothing(const SfCall &c) { return c.B == 0; }
bool nothing(const SfDecode &c) { return c.calls[0].B == 0; }
bool nothing(const SfLinear &c) { return c.B == 0; }
bool nothing(const SfIndexer &c) { return c.B * c.Tq == 0; }
bool nothing(const SfIndexerLoss &c) { return c.B == 0 || c.Tq == 0 || c.Tk == 0; }
bool nothing(const SfMass &c) { return c.B * c.n * c.m == 0; }
bool nothing(const SfProbe &c) { return c.B * c.n * c.Tk == 0; }
bool nothing(const SfBest &c) { return c.rows * c.k == 0; }
bool nothing(const SfHeaviest &c) { return c.rows * c.n == 0; }
bool nothing(const SfRunning &c) { return c.rows * c.T == 0; }
bool nothing(const SfNM &c) { return c.T * c.O == 0; }
bool nothing(const SfPages &c) { return c.B * c.Tq * c.n == 0; }

template <class C> bool nothing(const C &) { return false; }  // list builders return early themselves

// Runs a checked call. Returns 3 if the call is invalid, 4 if an exception is thrown, else the level's code.
template <class C, class Check, class Go> int guarded(const C *call, int level, Check right, Go go) {
    if (!call || level < 0 || level >= N_LEVELS) return 3;
    try {
        if (!right(*call)) return 3;
        return nothing(*call) ? 0 : go(LEVELS[level], staffed(*call));
    } catch (...) {
        return 4;
    }
}

template <class C> using Entry = int (*SfLevel::*)(const C *, SfParallel);

int run(const SfCall *call, int level, Kind kind, Entry<SfCall> entry) {
    return guarded(call, level, [=](const SfCall &c) { return ok(c, kind); }, [=](const SfLevel &l, SfCall own) {
        if (own.Bk == 1) own.k.batch = own.v.batch = 0;  // every sequence reads the pool
        return (l.*entry)(&own, parallel);
    });
}

int run_decode(const SfDecode *given, int level) {
    return guarded(given, level, [](const SfDecode &c) { return ok(c); }, [](const SfLevel &l, SfDecode own) {
        std::vector<SfCall> calls(own.calls, own.calls + own.plans);
        for (SfCall &c : calls) {
            c = staffed(c);
            if (c.Bk == 1) c.k.batch = c.v.batch = 0;
        }
        own.calls = calls.data();
        return l.decode(&own, parallel);
    });
}

// Runs a call whose structure begins with its own size.
template <class C, class... Side> int run(const C *call, int level, Entry<C> entry, Side... side) {
    return guarded(call, level, [=](const C &c) { return c.size == (int64_t)sizeof c && ok(c, side...); },
                   [=](const SfLevel &l, const C &own) { return (l.*entry)(&own, parallel); });
}

#if defined(__unix__) || defined(__APPLE__)
// Around a fork: the shelf's lock is held, and the child drops the thread pool and team, whose threads it does not have.
struct AtFork {
    AtFork() {
        pthread_atfork([] { shelf().gate.lock(); }, [] { shelf().gate.unlock(); },
                       [] { shelf().gate.unlock(); current.store(nullptr); team.store(nullptr); });
    }
} at_fork;
#endif

}  // namespace

SF_PUBLIC int64_t sf_call_size() { return (int64_t)sizeof(SfCall); }
SF_PUBLIC int sf_levels() { return N_LEVELS; }
SF_PUBLIC const char *sf_level_name(int level) { return level >= 0 && level < N_LEVELS ? LEVELS[level].name : ""; }
SF_PUBLIC int sf_forward(const SfCall *call, int level) { return run(call, level, FORWARD, &SfLevel::forward); }
SF_PUBLIC int sf_backward(const SfCall *call, int level) { return run(call, level, BACKWARD, &SfLevel::backward); }
SF_PUBLIC int sf_stats(const SfCall *call, int level) { return run(call, level, STATS, &SfLevel::stats); }
SF_PUBLIC int sf_stick_forward(const SfCall *call, int level) { return run(call, level, STICK_FORWARD, &SfLevel::stick_forward); }
SF_PUBLIC int sf_stick_backward(const SfCall *call, int level) { return run(call, level, STICK_BACKWARD, &SfLevel::stick_backward); }
SF_PUBLIC int sf_decode(const SfDecode *call, int level) { return run_decode(call, level); }

#define SF_ENTRY(name, call, ...) \
    SF_PUBLIC int sf_##name(const call *c, int level) { return run(c, level, &SfLevel::name, ##__VA_ARGS__); }
SF_ENTRY(linear_forward, SfLinear, FORWARD)
SF_ENTRY(linear_backward, SfLinear, BACKWARD)
SF_ENTRY(indexer, SfIndexer)
SF_ENTRY(indexer_loss, SfIndexerLoss)
SF_ENTRY(mass, SfMass)
SF_ENTRY(probe, SfProbe)
SF_ENTRY(best, SfBest)
SF_ENTRY(heaviest, SfHeaviest)
SF_ENTRY(running, SfRunning)
SF_ENTRY(nm, SfNM)
SF_ENTRY(pages, SfPages)
SF_ENTRY(read_mask, SfMask)
SF_ENTRY(list_units, SfUnits)
SF_ENTRY(transpose, SfTranspose)

// Runs all tasks from now on through an OpenMP runtime's GOMP_parallel; null goes back to the pool.
SF_PUBLIC void sf_borrow_threads(void *gomp_parallel) {
#if !defined(__SANITIZE_THREAD__)  // it does not see the locks of a library that it did not compile
    team.store((Team)gomp_parallel, std::memory_order_release);
#else
    (void)gomp_parallel;
#endif
}

// Measures memory bandwidth: reads memory as fast as it goes, eight streams per thread, for benchmarks to compare with.
// Returns a sum, so that no compiler can drop the reads.
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

// For tests: fills scratch with NaN when it is handed out, so that a read before a write shows.
SF_PUBLIC void sf_poison(int on) { poison.store(on != 0); }

// Asks the kernel for the AMX tile state; 0 when granted.
SF_PUBLIC int sf_request_amx() {
#if defined(__linux__) && defined(__x86_64__)
    return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);
#else
    return -1;
#endif
}
