// The C interface between Python and the kernels, and between the entry points and one instruction-set level.
// Plain data only: no torch, no Python, so one library serves every version of both.
#pragma once
#include <stdint.h>

enum SfDtype : int32_t { SF_F32 = 0, SF_BF16 = 1, SF_F16 = 2 };

// A [B,H,T,D] tensor; strides in elements.
struct SfView {
    void *data;
    int64_t batch, head, row, lane;
};

// A plan tensor [batch, heads, length...], contiguous; batch is B or 1, heads any divisor of Hq.
struct SfTable {
    const void *data;
    int64_t batch, heads, length;
};

struct SfPlan {
    int64_t q_rows, k_rows, tiles, tile, unit;
    int64_t causal, include_self, windowed, left, right, sink, q_offset;
    int64_t spans_size, index_size, bits_size;
    SfTable span_start, span_full, span_count, start, full, count, bits_start;
    SfTable q_order, k_order, q_shift, q_pos, k_pos, k_end, q_seg, k_seg;
    const int32_t *spans, *index, *bits;
    SfTable head_window, head_sink;  // [1,H,2] (left, right; -1 unbounded) and [1,H,1]: rules per head, or null
};

struct SfCall {
    int64_t B, Hq, Hkv, Tq, Tk, D, Dv;
    int32_t dtype, out_dtype, grad_dtype, threads;
    float scale, softcap;
    SfView q, k, v, out, dout, dq, dk, dv;
    float *lse;         // [B,Hq,Tq] natural log; written by the forward, read by the backward
    const float *dlse;  // [B,Hq,Tq] or null
    SfTable key_bias;   // float [B|1,H,Tk] or null
    float *dbias;       // [B,Hq,Tk] or null
    SfPlan plan;
    int64_t Bk;         // batch size of k and v: B, or 1 for a pool that all sequences share
    int32_t over, peak; // statistics: what over (SfOver), and whether the largest instead of the sum
    float *stat;        // [B,Hq,stat_width]
    int64_t stat_width, entry_width;
    int32_t weights;    // what a score becomes (SfWeights); other than a softmax: no lse, bias or softcap
    float out_scale;    // factor of the weights that are no softmax
};

enum SfWeights : int32_t { SF_SOFTMAX = 0, SF_SILU = 1, SF_RELU2 = 2 };

enum SfOver : int32_t { SF_OVER_KEY = 0, SF_OVER_ROW = 1, SF_OVER_ENTRY = 2, SF_OVER_DIAGONAL = 3 };

// Linear attention: B, Hq, T, D, Dv as above; a state is [B,Hq,D,Dv], fp32 and contiguous.
struct SfLinear {
    int64_t size;                      // of this structure, as the caller knows it
    int64_t B, Hq, Hkv, T, D, Dv;
    int32_t dtype, threads;
    float scale;
    SfView q, k, v, out, dout, dq, dk, dv;
    const float *rate;                 // [Hq]: s in exp(-s * distance), or null
    const float *first, *dlast;        // initial state, gradient of the final one; or null
    float *last, *dfirst;              // final state (forward), gradient of the initial one (backward)
};

// A learned indexer's choice of keys: q is [B,H,Tq,D], k [B,1,Tk,D].
struct SfIndexer {
    int64_t size;                      // of this structure, as the caller knows it
    int64_t B, H, Tq, Tk, D, topk;
    int32_t dtype, threads;
    SfView q, k;
    const float *weights;              // [B,Tq,H]
    const int32_t *low, *high;         // [B,Tq]: each query chooses among the keys low .. high - 1
    const uint8_t *keep;               // [B,Tk]: which keys there are; or null
    int32_t *index;                    // [B,Tq,topk]: ascending, -1 where there are no more
    float *scores;                     // [B,Tq,topk], or null
};

// Runs body(context, task, thread) for every task; threads share the tasks first come, first served.
typedef void (*SfBody)(void *context, int64_t task, int thread);
typedef void (*SfParallel)(int threads, int64_t tasks, SfBody body, void *context);

// What one instruction-set level offers. 0: done; 1: out of memory; 2: dtype not for this level.
struct SfLevel {
    const char *name;
    int (*forward)(const SfCall *call, SfParallel parallel);
    int (*backward)(const SfCall *call, SfParallel parallel);
    int (*stats)(const SfCall *call, SfParallel parallel);
    int (*linear_forward)(const SfLinear *call, SfParallel parallel);  // fp32 arithmetic: not at a bf16 level
    int (*linear_backward)(const SfLinear *call, SfParallel parallel);
    int (*stick_forward)(const SfCall *call, SfParallel parallel);     // `lse` is what is left of the stick, `dlse` its
    int (*stick_backward)(const SfCall *call, SfParallel parallel);    // gradient; no softcap, no bias
    int (*decode)(const SfCall *call, SfParallel parallel);
    int (*indexer)(const SfIndexer *call, SfParallel parallel);
};

// Scratch memory, 64-byte aligned and uninitialised; kept between calls, since fresh pages cost as much as the work.
extern "C" void *sf_acquire(int64_t bytes);
extern "C" void sf_release(void *memory);
