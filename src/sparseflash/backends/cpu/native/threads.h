// The threads of a call: a pool of our own, or those of an OpenMP runtime that the process has loaded anyway.
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

// A pool whose threads outlive a call. One call uses it at a time; a second caller meanwhile runs its tasks alone, which
// on a busy machine is faster and cannot deadlock. A fork copies no threads: the child starts a new pool.
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
        } catch (const std::system_error &) {  // the system grants no more threads: use those that started
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

// GOMP_parallel of an OpenMP runtime that the process has loaded (torch's); null: use the pool. OpenMP threads spin for
// milliseconds after their last work: with threads of our own beside them, every call that follows a torch op would wait
// for a core.
typedef void (*Team)(void (*)(void *), void *, unsigned threads, unsigned flags);
std::atomic<Team> team{nullptr};

// Always asks for the whole team, even for few tasks: OpenMP ends the threads that a smaller team does not need.
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

// The call with its number of threads capped: more than this help nobody, and could exhaust memory or a system limit.
template <class C> C staffed(C call) {
    static const int enough = std::max(64, 4 * (int)std::thread::hardware_concurrency());
    call.threads = std::min<int>(call.threads, enough);
    return call;
}
inline SfDecode staffed(const SfDecode &call) { return call; }  // run_decode caps each of its calls

}  // namespace
