/* A step as attention reads it: decoding sequences, and chunks of prompts. The layout of the structs is repeated in
 * decode_kernel.py and prompt_kernel.py. */
#pragma once
#include <stdint.h>

#include "tiles.h"

#define PIECE_TOKENS 512 /* the most that a piece has */

typedef struct { int64_t position, slot, length; } Run;
typedef struct { int64_t row, first_run, num_runs, first_piece, num_pieces; } Sequence;
typedef struct { int64_t sequence, begin, end; } Piece; /* positions [begin, end) of a sequence */

typedef struct {
    const Run *runs;
    const Sequence *sequences;
    const Piece *pieces;
    float *attended; /* [pieces, heads, head_dim]: weighted sums of values, for the merge */
    float *sums;     /* [pieces, heads, 2]: the largest score, and the sum of exp(score - largest) */
    int64_t num_sequences, num_pieces;
    int64_t heads, kv_heads, head_dim; /* head_dim is a multiple of LANES */
    int64_t kv_head_stride, slot_stride; /* of keys and values alike; all strides are in elements */
    int64_t bfloat16; /* whether all tensors are, or float32 */
    int64_t num_threads;
} Step;

/* Called by every thread of a team; returns when all rows are written.
 *
 * query [tokens, heads, head_dim] with the strides given, keys and values [kv_heads, slots, head_dim] of one layer;
 * output [tokens, heads, head_dim], contiguous: only the sequences' rows are written. */
void attend_in_team(const Step *step, const void *query, int64_t token_stride, int64_t head_stride, const void *keys,
                    const void *values, void *output, float scaling);

typedef struct { int64_t row, start, first_run; } Chunk; /* `start` is the position of its first query */
typedef struct { int64_t chunk, begin, end; } Share;     /* queries [begin, end) of a chunk: what a thread takes */

typedef struct {
    const Run *runs;
    const Chunk *chunks;
    const Share *shares;
    int64_t num_shares, heads, kv_heads, head_dim; /* head_dim is a multiple of 32 */
    int64_t kv_head_stride, slot_stride;           /* of keys and values alike; all strides are in elements */
    int64_t window;                                /* a query sees so many positions up to its own */
    int64_t num_threads;
} Prompts;

#if TILES
/* The same for chunks of prompts, in bfloat16. */
void prompts_in_team(const Prompts *prompts, const uint16_t *query, int64_t token_stride, int64_t head_stride,
                     const uint16_t *keys, const uint16_t *values, uint16_t *output, float scaling);
#endif
