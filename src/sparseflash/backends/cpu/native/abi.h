// The C interface: between Python and the entry points (`api.cpp`), and between these and one instruction-set level.
// Plain data only, neither torch nor Python types: one library serves every version of both.
#pragma once
#include <stdint.h>

constexpr int64_t SF_WIDEST = 576;  // largest head dimension of softmax attention; every other op takes up to 256

enum SfDtype : int32_t { SF_F32 = 0, SF_BF16 = 1, SF_F16 = 2 };

// A [B,H,T,D] tensor of any strides, which are counted in elements.
struct SfView {
    void *data;
    int64_t batch, head, row, lane;
};

// A plan tensor [batch, heads, length...], contiguous; batch is B or 1 (shared), heads any divisor of Hq.
struct SfTable {
    const void *data;
    int64_t batch, heads, length;
};

// Rows of K or V stored as records (`records.h`): D items, of which `kept` are stored. Strides of the view are then in bytes.
struct SfRecord {
    int32_t bytes, kept, item, reserved;  // bytes of a record; 0: the view has plain rows
};

struct SfPlan {
    int64_t q_rows, k_rows, tiles, tile, unit;
    int64_t causal, include_self, windowed, left, right, sink, q_offset;
    int64_t spans_size, index_size, bits_size;
    SfTable span_start, span_full, span_count, start, full, count, bits_start;
    SfTable q_order, k_order, q_shift, q_pos, k_pos, k_end, q_seg, k_seg;
    const int32_t *spans, *index, *bits;
    SfTable head_window, head_sink;  // window and sink of each head, or null: [1,H,2] (left, right; -1 unbounded), [1,H,1]
};

struct SfCall {
    int64_t B, Hq, Hkv, Tq, Tk, D, Dv;
    int32_t dtype, out_dtype, grad_dtype, threads;
    float scale, softcap;
    SfView q, k, v, out, dout, dq, dk, dv;
    float *lse;         // [B,Hq,Tq] natural log, written by the forward; stick-breaking: what is left of each stick
    float *norm;        // [2,B,Hq,Tq] top and rest of each row (see softmax.h), or null; read by backward and statistics
    const float *dlse;  // [B,Hq,Tq] or null
    SfTable key_bias;   // float [B|1,H,Tk] or null
    float *dbias;       // gradient of key_bias for each query head, [B,Hq,Tk], or null
    SfPlan plan;
    int64_t Bk;         // batch size of k and v: B, or 1 for a pool of keys that all sequences share
    int32_t over, peak; // statistics: reduced over what (SfOver); peak: the maximum instead of the sum
    float *stat;        // [B,Hq,stat_width]
    int64_t stat_width, entry_width;
    int32_t weights;    // how a score becomes a weight (SfWeights); only SF_SOFTMAX has lse, bias and softcap
    float out_scale;    // factor of the weights, for all but SF_SOFTMAX
    const float *delta; // [B,Hq,Tq]: dout . out of each row; null: the backward computes it
    int64_t dropout_seed;
    uint32_t dropout_bar;  // a weight is dropped if the pair's 32-bit draw is below the bar; 0: no dropout
    float dropout_scale;   // factor of the weights that stay
    int64_t *skipped;   // [B,Hq,2]: counts of key blocks met and of those skipped; null: none is skipped
    float skip_below;   // skip a block whose largest logit lies this far below the largest so far, in every query
    int64_t stat_tile, stat_unit;  // queries and keys of a block. A forward with `stat`, which is zeros, raises it to the
                        // largest weight of each block; statistics with dout, v and delta are of influences (stats.h)
    SfTable alibi;      // float [B|1,Hq,1] or null: ALiBi slopes, times the distance of two positions
    SfView pair;        // [B,Hq,Tq,Tk] or null: a bias added to the logits
    int32_t pair_dtype;
    float *dpair;       // [B,Hq,Tq,Tk] or null: gradient of `pair`, written only where the plan visits a pair
    SfTable distance;   // float [B|1,H,Tq+Tk-1] or null: a bias by distance; entry query - key + Tk - 1 is added
    float *ddistance;   // [B,Hq,Tq+Tk-1] or null: the gradient of `distance` is added to it
    SfRecord k_record, v_record;  // decode only
    SfTable q_number, k_number;   // int32 [1,1,Tq] and [1,1,Tk] or null: token numbers for dropout; null: their indices
    int64_t first_head;           // number of head 0, for dropout
};

// Decoding: one softmax over several plans. The calls differ in their plan alone; results go to those of the first call.
struct SfDecode {
    int64_t size;                      // sizeof this structure at the caller; checked
    const SfCall *calls;
    int64_t plans;
    int32_t dtype;                     // dtype of every call
    const float *sink;                 // [Hq]: the logit of a sink, which has no value; or null
};

enum SfWeights : int32_t { SF_SOFTMAX = 0, SF_SILU = 1, SF_RELU2 = 2 };

enum SfOver : int32_t { SF_OVER_KEY = 0, SF_OVER_ROW = 1, SF_OVER_ENTRY = 2, SF_OVER_DIAGONAL = 3, SF_OVER_BLOCK = 4 };

// Linear attention: B, Hq, T, D, Dv as above; a state is [B,Hq,D,Dv], fp32 and contiguous.
struct SfLinear {
    int64_t size;                      // sizeof this structure at the caller; checked
    int64_t B, Hq, Hkv, T, D, Dv;
    int32_t dtype, threads;
    float scale;
    SfView q, k, v, out, dout, dq, dk, dv;
    const float *rate;                 // [Hq]: decay rate s of exp(-s * distance), or null
    const float *first, *dlast;        // initial state; gradient of the final state; each may be null
    float *last, *dfirst;              // final state (forward); gradient of the initial state (backward)
};

// A learned indexer's choice of topk keys for each query: q is [B,H,Tq,D], k [B,1,Tk,D].
struct SfIndexer {
    int64_t size;                      // sizeof this structure at the caller; checked
    int64_t B, H, Tq, Tk, D, topk;
    int32_t dtype, threads;
    SfView q, k;
    const float *weights;              // [B,Tq,H]
    const int32_t *low, *high;         // [B,Tq]: each query chooses among the keys low .. high - 1
    const uint8_t *keep;               // [B,Tk]: which keys there are; or null
    int32_t *index;                    // [B,Tq,topk]: ascending, -1 where there are no more
    float *scores;                     // [B,Tq,topk], or null
};

// KL loss of a learned indexer against attention (`indexer_loss.h`): q_index [B,H,Tq,D] and k_index [B,1,Tk,D] of the
// indexer, q [B,Hq,Tq,Dm] and k [B,Hkv,Tk,Dm] of the attention; results in fp32.
struct SfIndexerLoss {
    int64_t size;                      // sizeof this structure at the caller; checked
    int64_t B, H, Tq, Tk, D, Hq, Hkv, Dm, n;
    int32_t index_dtype, dtype, threads;
    float index_scale, scale, softcap;
    SfView q_index, k_index, q, k;
    const float *weights, *lse;        // [B,Tq,H], [B,Hq,Tq]
    const int32_t *low, *high;         // [B,Tq]: each query sees the keys low .. high - 1
    const uint8_t *keep;               // [B,Tk]: which keys there are; or null
    const int32_t *index;              // [B,Tq,n]: the keys compared; entries outside low .. high - 1 are ignored. Null: all keys
    float *loss, *dq, *dk, *dw;        // loss [B,Tq]; gradients of its sum: [B,Tq,H,D], [B,Tk,D], [B,Tq,H]
};

// Making a plan's lists (`lists.h`). A cell is one tile of queries of one (batch, head), numbered in the order [B,H,R].

// A boolean mask [B,H,Tq,Tk] of any strides, in bytes; one call reads cells `first` to `first + cells - 1`.
struct SfMask {
    int64_t size;                      // sizeof this structure at the caller; checked
    const uint8_t *data;
    int64_t batch, head, row, lane;
    int64_t B, H, Tq, Tk, tile, unit, first, cells;
    uint8_t *kind;                     // [cells, units]: the tile sees 0 none, 1 some, 2 all of the unit
    int32_t *partial;                  // [cells]: how many units are seen in part (kind 1)
    int32_t *bits;                     // [bits_size, tile, words]: bits of partial units; those of a cell begin at cell * units
    int64_t bits_size;
    int32_t threads;
};

// Units listed for each cell. A call without `index` counts them, a call with it writes them, full ones first.
struct SfUnits {
    int64_t size;
    const void *given;                 // [cells, width]: unit numbers of 4 or 8 bytes (-1: none), or a byte per unit
    int64_t cells, width, tiles, Tq, Tk, tile, unit, q_offset;
    int32_t id_bytes, causal, unique, threads;  // not unique: duplicates are merged and units sorted
    int32_t *full, *count;             // [cells]
    const int64_t *start;              // [cells]
    int32_t *index;
    int64_t index_size;
};

// The transpose of unit lists, from tile -> units to unit -> tiles. Entries of (batch, head) l go to base[l] .. base[l + 1] - 1.
struct SfTranspose {
    int64_t size;
    const int64_t *start, *base;       // [lists, tiles], [lists + 1]
    const int32_t *full, *count;       // [lists, tiles]
    const int32_t *index;
    int64_t lists, tiles, columns, index_size, entries;
    int64_t *to;                       // [lists, columns]: offset of a unit's first entry in `met` and `source`,
    int32_t *listed, *sure;            // how many entries the unit has, how many of them are full
    int32_t *met;                      // [entries]: the tile
    void *source;                      // [entries]: the entry's place in `index`, 8 bytes if wide, else 4
    int32_t wide, threads;
};

// Weights of rows [B,Hq,n,E] on columns [B,Hkv,m,E], summed by tile of rows and unit of columns (`selection.h`).
struct SfMass {
    int64_t size;                      // sizeof this structure at the caller; checked
    int64_t B, Hq, Hkv, n, m, E, tile, unit;
    int32_t dtype, threads, joint, peak;  // joint: exp(score - largest of the tile); peak: the maximum, not the sum
    float scale, softcap;
    SfView rows, columns;
    const int32_t *sees;               // [B,n]: a row sees the columns 0 .. sees - 1,
    const uint8_t *keep;               // [B,m]: if they are real here; null: all are
    const float *level;                // [B,Hq,n]: weights are exp(score - level); or null
    float *out;                        // [B,Hq,ceil(n / tile),ceil(m / unit)]: each row is divided by its sum
};

// The softmax of rows q [B,Hq,n,D] over keys k [B,Hkv,Tk,D], its weights summed by key and by distance.
struct SfProbe {
    int64_t size;
    int64_t B, Hq, Hkv, n, Tk, D, width, before;
    int32_t dtype, threads;
    float scale, softcap;
    SfView q, k;
    const int32_t *sees, *at;          // [B,n]: a row sees the keys 0 .. sees - 1; its position
    const uint8_t *keep;               // [B,Tk], or null
    float *lse, *keys, *distances;     // [B,Hq,n]; [B,Hq,Tk]; [B,Hq,width], entry i: distance at - key = i - before
};

// The indices of the k largest scores of each row, ascending, -1 behind the last.
struct SfBest {
    int64_t size, rows, n, k;
    int32_t threads;
    const float *scores;               // [rows,n]
    const uint8_t *among;              // [rows,n]: which may be chosen; or null
    int32_t *index;                    // [rows,k]
};

// Which entries of each row, largest first, hold a share of its sum; at least one of those that may be chosen.
struct SfHeaviest {
    int64_t size, rows, n;
    int32_t threads;
    const float *mass;                 // [rows,n]: negative and NaN count as 0, infinity as the largest number
    const uint8_t *among;              // [rows,n]: which may be chosen; or null
    const double *share;               // [rows]: from 1 on all that may be chosen
    uint8_t *keep;                     // [rows,n]
};

// Scores of pages of keys for queries [B,Hq,Tq,w]: products with the rows [B,Hkv,n,w] that summarise a page (`pages.h`).
struct SfPages {
    int64_t size, B, Hq, Hkv, Tq, n, w, pages, parts;  // a page has `parts` rows, the last page perhaps fewer
    int64_t sinks, near, k;            // the first `sinks` pages and the last `near` up to the query's own score infinity
    int32_t dtype, threads, share;     // heads of a group: 0 scored apart, 1 by their sum, 2 by their maximum
    SfView rows;
    const float *q;
    const int32_t *last;               // [B,Tq]: the page that holds the query; later pages score -infinity
    const int32_t *rules;              // [heads,2]: a head's own `near`, and whether it may read other pages; or null
    float *scores;                     // [B,heads,Tq,pages], or null
    int32_t *index;                    // [B,heads,Tq,k]: the best pages, ascending, -1 behind the last; or null
};

// y = x W^T, where of each m neighbouring inputs of an output the n weights of largest magnitude are used (`nm.h`).
struct SfNM {
    int64_t size, T, K, O, n, m;       // K is a multiple of m, m is at most 64
    int64_t x_row, w_out, w_in;        // strides, in items; inputs of a token are contiguous
    int32_t threads;
    const float *x, *w;                // [T,K], [O,K]
    float *y;                          // [T,O]
};

// The k-th largest of each prefix of a row, and where each place drops out of the k largest (T: never).
struct SfRunning {
    int64_t size, rows, T, most;       // k is at most `most`, or larger than T (then no prefix has k numbers)
    int32_t threads;
    const float *x;                    // [rows,T]
    const int32_t *k;                  // [rows]
    float *kth;                        // [rows,T]
    int32_t *until;                    // [rows,T]
};

// Runs body(context, task, thread) for every task; each thread takes the next free task.
typedef void (*SfBody)(void *context, int64_t task, int thread);
typedef void (*SfParallel)(int threads, int64_t tasks, SfBody body, void *context);

// The kernels of one instruction-set level. They return 0: done; 1: out of memory; 2: no kernel for this dtype at this level.
struct SfLevel {
    const char *name;
    int (*forward)(const SfCall *call, SfParallel parallel);
    int (*backward)(const SfCall *call, SfParallel parallel);
    int (*stats)(const SfCall *call, SfParallel parallel);
    int (*linear_forward)(const SfLinear *call, SfParallel parallel);
    int (*linear_backward)(const SfLinear *call, SfParallel parallel);
    int (*stick_forward)(const SfCall *call, SfParallel parallel);   // fp32 only: not at a bf16 level. `lse` is what is left
    int (*stick_backward)(const SfCall *call, SfParallel parallel);  // of each stick, `dlse` its gradient
    int (*decode)(const SfDecode *call, SfParallel parallel);
    int (*indexer)(const SfIndexer *call, SfParallel parallel);
    int (*indexer_loss)(const SfIndexerLoss *call, SfParallel parallel);  // fp32 only: not at a bf16 level
    int (*mass)(const SfMass *call, SfParallel parallel);
    int (*probe)(const SfProbe *call, SfParallel parallel);
    int (*best)(const SfBest *call, SfParallel parallel);  // this one and the next three: fp32 only, not at a bf16 level
    int (*heaviest)(const SfHeaviest *call, SfParallel parallel);
    int (*running)(const SfRunning *call, SfParallel parallel);
    int (*nm)(const SfNM *call, SfParallel parallel);
    int (*pages)(const SfPages *call, SfParallel parallel);  // fp32 only: not at a bf16 level
    int (*read_mask)(const SfMask *call, SfParallel parallel);  // list builders, no arithmetic: not at a bf16 level
    int (*list_units)(const SfUnits *call, SfParallel parallel);
    int (*transpose)(const SfTranspose *call, SfParallel parallel);
};

// Scratch memory, 64-byte aligned and uninitialised. Released blocks are reused: fresh pages cost as much as the work.
extern "C" void *sf_acquire(int64_t bytes);
extern "C" void sf_release(void *memory);
