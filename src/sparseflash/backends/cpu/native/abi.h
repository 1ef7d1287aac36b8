// The C interface between Python and the kernels, and between the entry points and one instruction-set level.
// Plain data only: no torch, no Python, so one library serves every version of both.
#pragma once
#include <stdint.h>

constexpr int64_t SF_WIDEST = 576;  // head dimensions of softmax attention; 256 of what is none

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

// Rows of K or V as records (`records.h`), D items of which `kept` are stored; strides of the view are then in bytes.
struct SfRecord {
    int32_t bytes, kept, item, reserved;  // bytes 0: the view has plain rows
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
    float *lse;         // [B,Hq,Tq] natural log, written by the forward; what is left of the stick
    float *norm;        // [2,B,Hq,Tq] tops and rests (see softmax.h), or null; read by the backward and statistics
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
    const float *delta; // [B,Hq,Tq]: dout . out of a row, or null: the backward computes it
    int64_t dropout_seed;
    uint32_t dropout_bar;  // weights are left out whose number of 32 bits is below; 0: none
    float dropout_scale;   // factor of the others
    int64_t *skipped;   // [B,Hq,2]: blocks of keys, and those that added nothing; or null, and all add
    float skip_below;   // where for every query their largest logit is so much less than the largest before
    int64_t stat_tile, stat_unit;  // queries and keys of a block. A forward with `stat`, which is zeros, raises it to the
                        // largest weight of each block; statistics with dout, v and delta are of influences
    SfTable alibi;      // float [B|1,Hq,1] or null: slopes, of distances between positions
    SfView pair;        // [B,Hq,Tq,Tk] or null: added to the logits
    int32_t pair_dtype;
    float *dpair;       // [B,Hq,Tq,Tk] or null: the gradient of the pairs that are visited
    SfTable distance;   // float [B|1,H,Tq+Tk-1] or null: added to pairs, place query - key + Tk - 1
    float *ddistance;   // [B,Hq,Tq+Tk-1] or null: to it its gradient is added
    SfRecord k_record, v_record;  // for decoding
};

// Decoding over several plans in one softmax, which the calls differ by; results are those of the first.
struct SfDecode {
    int64_t size;                      // of this structure, as the caller knows it
    const SfCall *calls;
    int64_t plans;
    int32_t dtype;                     // that of the calls
    const float *sink;                 // [Hq]: a logit without a value, or null
};

enum SfWeights : int32_t { SF_SOFTMAX = 0, SF_SILU = 1, SF_RELU2 = 2 };

enum SfOver : int32_t { SF_OVER_KEY = 0, SF_OVER_ROW = 1, SF_OVER_ENTRY = 2, SF_OVER_DIAGONAL = 3, SF_OVER_BLOCK = 4 };

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

// How far an indexer is from the attention: of the indexer q_index [B,H,Tq,D] and k_index [B,1,Tk,D], of the attention
// q [B,Hq,Tq,Dm] and k [B,Hkv,Tk,Dm]; results in fp32.
struct SfIndexerLoss {
    int64_t size;                      // of this structure, as the caller knows it
    int64_t B, H, Tq, Tk, D, Hq, Hkv, Dm, n;
    int32_t index_dtype, dtype, threads;
    float index_scale, scale, softcap;
    SfView q_index, k_index, q, k;
    const float *weights, *lse;        // [B,Tq,H], [B,Hq,Tq]
    const int32_t *low, *high;         // [B,Tq]: each query sees the keys low .. high - 1
    const uint8_t *keep;               // [B,Tk]: which keys there are; or null
    const int32_t *index;              // [B,Tq,n]: of those, what is compared; anything else counts nothing. Or null: all
    float *loss, *dq, *dk, *dw;        // [B,Tq]; gradients of its sum: [B,Tq,H,D], [B,Tk,D], [B,Tq,H]
};

// Making lists (`lists.h`). A cell is a tile of queries of one (batch, head), numbered in the order [B,H,R].

// A boolean mask [B,H,Tq,Tk], any strides, in bytes; cells `first` to `first + cells - 1` of it are read.
struct SfMask {
    int64_t size;                      // of this structure, as the caller knows it
    const uint8_t *data;
    int64_t batch, head, row, lane;
    int64_t B, H, Tq, Tk, tile, unit, first, cells;
    uint8_t *kind;                     // [cells, units]: 0 nothing is seen, 1 some, 2 all
    int32_t *partial;                  // [cells]: how many units see some
    int32_t *bits;                     // [bits_size, tile, words]: theirs, those of a cell from cell * units on
    int64_t bits_size;
    int32_t threads;
};

// Units named for each cell. Without `index` they are counted, with it they are written, full ones first.
struct SfUnits {
    int64_t size;
    const void *given;                 // [cells, width]: unit numbers of 4 or 8 bytes (-1: none), or a byte for every unit
    int64_t cells, width, tiles, Tq, Tk, tile, unit, q_offset;
    int32_t id_bytes, causal, unique, threads;  // not unique: named twice is once, and they are sorted
    int32_t *full, *count;             // [cells]
    const int64_t *start;              // [cells]
    int32_t *index;
    int64_t index_size;
};

// The transpose of lists of units: entries of (batch, head) l are written at base[l] to base[l + 1] - 1.
struct SfTranspose {
    int64_t size;
    const int64_t *start, *base;       // [lists, tiles], [lists + 1]
    const int32_t *full, *count;       // [lists, tiles]
    const int32_t *index;
    int64_t lists, tiles, columns, index_size, entries;
    int64_t *to;                       // [lists, columns]: where the entries of a unit begin,
    int32_t *listed, *sure;            // how many there are, how many of them are full
    int32_t *met;                      // [entries]: tile
    void *source;                      // [entries]: place in `index`, of 8 bytes if wide, else of 4
    int32_t wide, threads;
};

// Weights of rows [B,Hq,n,E] against columns [B,Hkv,m,E], by tiles of rows and units of columns (`selection.h`).
struct SfMass {
    int64_t size;                      // of this structure, as the caller knows it
    int64_t B, Hq, Hkv, n, m, E, tile, unit;
    int32_t dtype, threads, joint, peak;  // joint: relative to the largest of the tile; peak: the largest, not the sum
    float scale, softcap;
    SfView rows, columns;
    const int32_t *sees;               // [B,n]: a row sees the columns 0 .. sees - 1,
    const uint8_t *keep;               // [B,m]: of which there are these; or null: all
    const float *level;                // [B,Hq,n]: weights are exp(score - level); or null
    float *out;                        // [B,Hq,ceil(n / tile),ceil(m / unit)]: rows of sum 1
};

// The softmax of rows q [B,Hq,n,D] over keys k [B,Hkv,Tk,D], by key and by distance.
struct SfProbe {
    int64_t size;
    int64_t B, Hq, Hkv, n, Tk, D, width, before;
    int32_t dtype, threads;
    float scale, softcap;
    SfView q, k;
    const int32_t *sees, *at;          // [B,n]: a row sees the keys 0 .. sees - 1, and stands at this position
    const uint8_t *keep;               // [B,Tk], or null
    float *lse, *keys, *distances;     // [B,Hq,n]; [B,Hq,Tk]; [B,Hq,width], place i of which is at - key = i - before
};

// The places of the k best of each row, ascending, -1 behind the last.
struct SfBest {
    int64_t size, rows, n, k;
    int32_t threads;
    const float *scores;               // [rows,n]
    const uint8_t *among;              // [rows,n], or null
    int32_t *index;                    // [rows,k]
};

// What queries [B,Hq,Tq,w] say of pages, by rows [B,Hkv,n,w] that were kept of them (`pages.h`).
struct SfPages {
    int64_t size, B, Hq, Hkv, Tq, n, w, pages, parts;  // a page has `parts` rows, the last perhaps fewer
    int64_t sinks, near, k;            // first pages, and those back from a query's own, that score infinity
    int32_t dtype, threads, share;     // of a group of heads: 0 each by itself, 1 the sum, 2 the largest
    SfView rows;
    const float *q;
    const int32_t *last;               // [B,Tq]: the page that a query lies in; later ones score -infinity
    const int32_t *rules;              // [heads,2]: `near` of its own, and whether other pages may be read; or null
    float *scores;                     // [B,heads,Tq,pages], or null
    int32_t *index;                    // [B,heads,Tq,k]: the best, ascending, -1 where there are no more; or null
};

// The k-th best of each prefix, and where each place is not among the k best any more (T: never).
struct SfRunning {
    int64_t size, rows, T, most;       // no k is larger than `most`, or it counts as one beyond T
    int32_t threads;
    const float *x;                    // [rows,T]
    const int32_t *k;                  // [rows]
    float *kth;                        // [rows,T]
    int32_t *until;                    // [rows,T]
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
    int (*linear_forward)(const SfLinear *call, SfParallel parallel);
    int (*linear_backward)(const SfLinear *call, SfParallel parallel);
    int (*stick_forward)(const SfCall *call, SfParallel parallel);   // fp32 arithmetic: not at a bf16 level. `lse` is what
    int (*stick_backward)(const SfCall *call, SfParallel parallel);  // is left of the stick, `dlse` its gradient
    int (*decode)(const SfDecode *call, SfParallel parallel);
    int (*indexer)(const SfIndexer *call, SfParallel parallel);
    int (*indexer_loss)(const SfIndexerLoss *call, SfParallel parallel);  // fp32 arithmetic: not at a bf16 level
    int (*mass)(const SfMass *call, SfParallel parallel);
    int (*probe)(const SfProbe *call, SfParallel parallel);
    int (*best)(const SfBest *call, SfParallel parallel);  // these two: not at a bf16 level
    int (*running)(const SfRunning *call, SfParallel parallel);
    int (*pages)(const SfPages *call, SfParallel parallel);  // fp32 arithmetic: not at a bf16 level
    int (*read_mask)(const SfMask *call, SfParallel parallel);  // lists: not at a bf16 level
    int (*list_units)(const SfUnits *call, SfParallel parallel);
    int (*transpose)(const SfTranspose *call, SfParallel parallel);
};

// Scratch memory, 64-byte aligned and uninitialised; kept between calls, since fresh pages cost as much as the work.
extern "C" void *sf_acquire(int64_t bytes);
extern "C" void sf_release(void *memory);
