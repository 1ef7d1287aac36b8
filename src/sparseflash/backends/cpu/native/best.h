// The indices of the k largest scores of each row; the largest that hold a share of a row's sum; the k-th largest of each prefix.
#pragma once
#include "indexer.h"

namespace {

constexpr int32_t NOBODY = INT32_MIN, NOT_A_NUMBER = INT32_MIN + 1;  // not to be chosen; NaN, below all numbers

// Integers in the order of floats; -0 equals 0, and NaN is below all numbers.
inline vi in_order(vf x) {
    vi bits = (vi)x;
    bits ^= (bits >> 31) & INT32_MAX;
    bits = x == 0.f ? (vi){} : bits;
    return x == x ? bits : (vi){} + NOT_A_NUMBER;
}
inline int32_t in_order(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? NOT_A_NUMBER : x == 0 ? 0 : bits ^ (bits >> 31 & INT32_MAX);
}

// The same for a row of n, in room for a multiple of 64: NOBODY where `among` is 0 and behind the end.
inline void in_order(const float *x, const uint8_t *among, int64_t n, int32_t *order) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vi y = in_order(load(x + i));
        memcpy(order + i, &y, sizeof y);
    }
    for (; i < n; i++) order[i] = in_order(x[i]);
    for (; i < round_up(n, 64); i++) order[i] = NOBODY;
    for (int64_t j = 0; among && j < n; j++) order[j] = among[j] ? order[j] : NOBODY;
}

// The k largest of a row. A sample of 512 estimates a lower bound of the k-th largest; only scores from the bound on are listed.
// If the list turns out shorter than k, all scores are listed.
struct Best {
    static constexpr int64_t SAMPLE = 512;
    Buffer<int32_t> order, score, place;

    bool make(int64_t n) {
        const int64_t room = round_up(n, 64) + 64;
        return order.make(room) && score.make(most(room, SAMPLE + 64)) && place.make(room);
    }
    int64_t list(int64_t n, int32_t least_) {
        int64_t found = 0;
        for (int64_t i = 0; i < n; i += 64)
            for (uint64_t bits = lanes<GE>(order + i, least_); bits; bits &= bits - 1, found++) {
                const int64_t j = i + __builtin_ctzll(bits);
                score[found] = order[j];
                place[found] = (int32_t)j;
            }
        return found;
    }
    void row(const float *x, const uint8_t *among, int64_t n, int64_t k, int32_t *out) {
        in_order(x, among, n, order.p);
        int64_t found = 0;
        if (n >= 4 * SAMPLE && k < n / 4) {
            const int64_t step = n / SAMPLE;
            for (int64_t j = 0; j < SAMPLE; j++) score[j] = order[j * step];
            const int64_t about = k * SAMPLE / n;  // expected number of the k best in the sample; 3 sigma of slack are added
            int64_t slack = 8;
            while (slack * slack < 9 * (about + 1)) slack++;
            found = list(n, most(NOT_A_NUMBER, Indexer<false>::reached_by(score.p, SAMPLE, about + slack)));
        }
        if (found < k) found = list(n, NOT_A_NUMBER);
        const int32_t worst = found > k ? Indexer<false>::reached_by(score.p, found, k) : NOBODY;
        int64_t above = 0, to = 0;
        for (int64_t j = 0; j < found; j++) above += score[j] > worst;
        int64_t ties = k - above;
        for (int64_t j = 0; j < found; j++) {
            const bool tie = score[j] == worst && ties > 0;
            if (!tie && !(score[j] > worst)) continue;
            ties -= tie;
            out[to++] = place[j];
        }
        for (; to < k; to++) out[to] = -1;
    }
};

inline int best(const SfBest &c, SfParallel parallel) {
    Rooms<Best> desks;
    if (!desks.make(c.threads, [&](Best &desk) { return desk.make(c.n); })) return 1;
    auto task = [&](int64_t i, int thread) {
        desks[thread].row(c.scores + i * c.n, c.among ? c.among + i * c.n : nullptr, c.n, c.k, c.index + i * c.k);
    };
    in_parallel(parallel, c.threads, c.rows, task);
    return 0;
}

// The fewest entries of a row, largest first, that hold a share of its sum; of equal ones the earlier. Nothing is sorted: entries
// are summed by the first byte of their ordered bits, whole bins are kept as long as the share is not reached, and the bin that
// reaches it is looked at by the next byte.
struct Heaviest {
    Buffer<int32_t> order, place;

    bool make(int64_t n) { return order.make(round_up(n, 64) + 64) && place.make(round_up(n, 64) + 64); }
    void row(const float *x, const uint8_t *among, int64_t n, double share, uint8_t *keep) {
        for (int64_t j = 0; j < n; j++) keep[j] = share >= 1 && (!among || among[j]);
        in_order(x, among, n, order.p);
        auto mass = [&](int64_t j) { return (double)least(x[j], 3.4028235e38f); };  // infinity as the largest number
        double target = 0, before = 0;
        int64_t left = 0, best = 0;
        for (int64_t j = 0; j < n; j++) {
            if (order[j] > order[best]) best = j;
            if (order[j] <= 0) continue;  // no mass
            target += mass(j);
            place[left++] = (int32_t)j;
        }
        if (n && order[best] > NOBODY) keep[best] = 1;
        if (share >= 1) return;
        target *= share;
        for (int shift = 24; shift >= 0 && before < target; shift -= 8) {
            double sum[256] = {};
            auto bin = [&](int64_t i) { return order[place[i]] >> shift & 255; };
            for (int64_t i = 0; i < left; i++) sum[bin(i)] += mass(place[i]);
            int crossing = 255;
            for (; crossing > 0 && before + sum[crossing] < target; crossing--) before += sum[crossing];
            int64_t in_it = 0;
            for (int64_t i = 0; i < left; i++) {
                const int32_t j = place[i], at = bin(i);
                if (at > crossing) keep[j] = 1;
                if (at == crossing) place[in_it++] = j;
            }
            left = in_it;
        }
        for (int64_t i = 0; i < left && before < target; before += mass(place[i++])) keep[place[i]] = 1;  // equal ones
    }
};

inline int heaviest(const SfHeaviest &c, SfParallel parallel) {
    Rooms<Heaviest> desks;
    if (!desks.make(c.threads, [&](Heaviest &desk) { return desk.make(c.n); })) return 1;
    auto task = [&](int64_t i, int thread) {
        desks[thread].row(c.mass + i * c.n, c.among ? c.among + i * c.n : nullptr, c.n, c.share[i], c.keep + i * c.n);
    };
    in_parallel(parallel, c.threads, c.rows, task);
    return 0;
}

// A min-heap of the k best so far: of equal scores the later one is worse. One 64-bit key holds the ordered score and, below it,
// the complement of the place.
inline int running(const SfRunning &c, SfParallel parallel) {
    struct Heap {
        Buffer<int64_t> held;
    };
    Rooms<Heap> desks;
    if (!desks.make(c.threads, [&](Heap &x) { return x.held.make(most<int64_t>(1, least(c.most, c.T))); })) return 1;
    auto task = [&](int64_t row, int thread) {
        int64_t *heap = desks[thread].held.p, n = 0;
        const int64_t k = c.k[row], room = most<int64_t>(1, least(c.most, c.T));
        const float *x = c.x + row * c.T;
        float *kth = c.kth + row * c.T;
        int32_t *until = c.until + row * c.T;
        auto place = [](int64_t key) { return (int64_t)(uint32_t)~key; };
        for (int64_t t = 0; t < c.T; t++) {
            const int64_t key = (int64_t)((uint64_t)(int64_t)in_order(x[t]) << 32 | (uint32_t)~t);
            until[t] = (int32_t)c.T;
            if (n < k && n < room) {
                int64_t i = n++;
                for (; i && heap[(i - 1) / 2] > key; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
                heap[i] = key;
            } else if (key > heap[0]) {
                until[place(heap[0])] = (int32_t)t;
                int64_t i = 0;
                for (int64_t child; (child = 2 * i + 1) < n; i = child) {
                    if (child + 1 < n && heap[child + 1] < heap[child]) child++;
                    if (heap[child] >= key) break;
                    heap[i] = heap[child];
                }
                heap[i] = key;
            } else {
                until[t] = (int32_t)t;
            }
            kth[t] = n == k ? x[place(heap[0])] : -INF;
        }
    };
    in_parallel(parallel, c.threads, c.rows, task);
    return 0;
}

}  // namespace
