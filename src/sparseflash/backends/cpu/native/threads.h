// The threads of a call: a pool of our own, or those of the OpenMP runtime that the process has anyway.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#include "abi.h"

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

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
                relax();
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
            relax();
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

// A call as it runs here: more threads than these help nobody, and could exhaust memory, or what the system allows.
template <class C> C staffed(C call) {
    static const int enough = std::max(64, 4 * (int)std::thread::hardware_concurrency());
    call.threads = std::min<int>(call.threads, enough);
    return call;
}
inline SfDecode staffed(const SfDecode &call) { return call; }  // its calls are, each

}  // namespace
