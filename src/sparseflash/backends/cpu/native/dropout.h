// Dropout: which weights are dropped, by the draw that backends/reference/dropout.py defines. Two words of 32 bits per
// token, then two multiplications per pair, a vector of pairs at a time.
#pragma once
#include "scratch.h"

namespace {

typedef uint32_t vu __attribute__((vector_size(sizeof(vf))));
constexpr uint32_t MIX[] = {0xD2511F53u, 0xCD9E8D57u};

inline vu load(const uint32_t *p) { vu x; memcpy(&x, p, sizeof x); return x; }

// The draw for a block of queries (lanes) and a chunk of keys (rows); or for keys as lanes and one query as row 0.
struct Draw {
    const uint32_t *r, *s;  // words of the lanes' tokens
    const uint32_t *c, *d;  // words of the rows' tokens
    int32_t bar;

    struct Lane { vu r, s; };
    Lane lane(int i) const { return {load(r + i), load(s + i)}; }
    // x, or 0 in lanes whose pair with row j is dropped
    vf left(const Lane &l, int j, vf x) const {
        vu u = (l.r ^ c[j]) * MIX[0];
        u = (u ^ (u >> 16) ^ (l.s ^ d[j])) * MIX[1];
        return (vi)u < bar ? set1(0.f) : x;
    }
};
// No dropout: every weight stays.
struct All {
    struct Lane {};
    Lane lane(int) const { return {}; }
    vf left(const Lane &, int, vf x) const { return x; }
};

// The Philox words of a call's tokens: of keys made once per call, of queries when their block is loaded.
struct Dropout {
    const SfCall &c;
    Buffer<uint32_t> words;  // [B,Hq,Tk,2]

    explicit Dropout(const SfCall &call) : c(call) {}
    bool on() const { return c.dropout_bar != 0; }
    float scale() const { return on() ? c.dropout_scale : 1.f; }

    int make(SfParallel parallel) {
        if (!on()) return 0;
        if (!words.make(c.B * c.Hq * c.Tk * 2)) return 1;
        const int64_t per = 1024, parts = (c.Tk + per - 1) / per;
        auto task = [&](int64_t i, int) {
            const int64_t head = i / parts, end = least(c.Tk, (i % parts + 1) * per);
            uint32_t *to = words + head * c.Tk * 2;
            for (int64_t t0 = i % parts * per; t0 < end; t0 += BQ) {
                int64_t token[BQ];
                uint32_t first[BQ], second[BQ];
                const int n = (int)least<int64_t>(BQ, end - t0);
                for (int j = 0; j < BQ; j++) token[j] = number(c.k_number, t0 + least(j, n - 1));
                make_words(token, head / c.Hq, head % c.Hq, 1, first, second);
                for (int j = 0; j < n; j++) to[2 * (t0 + j)] = first[j], to[2 * (t0 + j) + 1] = second[j];
            }
        };
        in_parallel(parallel, c.threads, c.B * c.Hq * parts, task);
        return 0;
    }
    // The queries' second words are XORed with 2^31. So is then every pair's draw (it is multiplied by an odd number): a signed
    // comparison, which every level has, orders the draws as an unsigned one would.
    void of_queries(const Queries &q, int64_t b, int64_t h, uint32_t *r, uint32_t *s) const {
        int64_t token[BQ];
        for (int i = 0; i < BQ; i++) token[i] = number(c.q_number, q.token[i]);
        make_words(token, b, h, 0, r, s);
        for (int i = 0; i < BQ; i++) s[i] ^= 1u << 31;
    }
    void of_keys(const Rules &rules, const Chunk &k, int64_t b, int64_t h, uint32_t *first, uint32_t *second) const {
        const uint32_t *from = words + (b * c.Hq + h) * c.Tk * 2;
        for (int j = k.a; j < k.b; j++) {
            const int64_t t = most<int64_t>(rules.key_token(k.gather ? k.gather[j] : k.base + j), 0);
            first[j] = from[2 * t], second[j] = from[2 * t + 1];
        }
    }
    int32_t bar() const { return (int32_t)(c.dropout_bar ^ 1u << 31); }
    // The draw of queries with these words and of a chunk, whose words are loaded into `keys`.
    Draw draw(const Rules &rules, const Chunk &k, int64_t b, int64_t h, const uint32_t (*queries)[BQ], uint32_t (*keys)[BK]) const {
        of_keys(rules, k, b, h, keys[0], keys[1]);
        return {queries[0], queries[1], keys[0], keys[1], bar()};
    }

  private:
    // Token number for the draw; an empty lane, token -1, may read any.
    static int64_t number(const SfTable &numbers, int64_t token) {
        return numbers.data ? ((const int32_t *)numbers.data)[most<int64_t>(token, 0)] : token;
    }
    // First two words of Philox4x32-10 for BQ tokens.
    void make_words(const int64_t *token, int64_t b, int64_t h, uint32_t side, uint32_t *first, uint32_t *second) const {
        uint32_t x[4][BQ], key[2] = {(uint32_t)c.dropout_seed, (uint32_t)((uint64_t)c.dropout_seed >> 32)};
        for (int i = 0; i < BQ; i++) x[0][i] = (uint32_t)token[i], x[1][i] = (uint32_t)(c.first_head + h), x[2][i] = (uint32_t)b, x[3][i] = side;
        for (int round = 0; round < 10; round++) {
            for (int i = 0; i < BQ; i++) {
                const uint64_t y = (uint64_t)x[0][i] * MIX[0], z = (uint64_t)x[2][i] * MIX[1];
                x[0][i] = (uint32_t)(z >> 32) ^ x[1][i] ^ key[0];
                x[2][i] = (uint32_t)(y >> 32) ^ x[3][i] ^ key[1];
                x[1][i] = (uint32_t)z;
                x[3][i] = (uint32_t)y;
            }
            key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
        }
        memcpy(first, x[0], sizeof x[0]);
        memcpy(second, x[1], sizeof x[1]);
    }
};

}  // namespace
