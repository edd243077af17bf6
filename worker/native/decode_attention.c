/* Attention of decoding queries over the block pool on a CPU: one call a layer for all sequences of a step.
 *
 * A sequence's keys are cut into pieces of positions. A piece and one key head are one item of work, which a thread
 * does alone: it reads the piece's keys and values once, for all query heads that share them. Then the pieces of each
 * sequence are merged by their shares of the softmax's sum. Scores, weights and sums are float32.
 *
 * Knows no torch. The layout of the structs is repeated in attention_native.py.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#define ACCUMULATORS 16 /* of 32 registers */
#define MOST_QUERIES 4
#else
#define LANES 8
#define ACCUMULATORS 8 /* of 16 registers */
#define MOST_QUERIES 2
#endif

#define TILE 64       /* tokens whose keys and values stay in the nearest cache while all queries see them */
#define AHEAD 32      /* tokens between what is asked of memory and what is used */
#define CACHE_LINE 64 /* bytes */

#define INLINE static inline __attribute__((always_inline)) /* dtype and number of queries become constants */

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

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

INLINE Floats load(const void *tensor, int64_t index, int bf16) {
    Floats floats;
    if (bf16) {
        Halves halves;
        memcpy(&halves, (const uint16_t *)tensor + index, sizeof halves);
#if defined(__AVX512F__) /* one instruction, which compilers don't find in __builtin_convertvector */
        Words words = (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
        Words words = (Words)_mm256_cvtepu16_epi32((__m128i)halves);
#else
        Words words = __builtin_convertvector(halves, Words);
#endif
        floats = (Floats)(words << 16);
    } else {
        memcpy(&floats, (const float *)tensor + index, sizeof floats);
    }
    return floats;
}

INLINE float load_one(const void *tensor, int64_t index, int bf16) {
    if (!bf16) return ((const float *)tensor)[index];
    uint32_t word = (uint32_t)((const uint16_t *)tensor)[index] << 16;
    float one;
    memcpy(&one, &word, sizeof one);
    return one;
}

/* bfloat16 is rounded to nearest, ties to even, as torch does. */
INLINE void store_one(void *tensor, int64_t index, float one, int bf16) {
    if (!bf16) {
        ((float *)tensor)[index] = one;
        return;
    }
    uint32_t word;
    memcpy(&word, &one, sizeof word);
    uint16_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    ((uint16_t *)tensor)[index] = one == one ? rounded : 0x7fc0;
}

INLINE Floats choose(Ints which, Floats yes, Floats no) { return (Floats)((which & (Ints)yes) | (~which & (Ints)no)); }

INLINE Floats larger(Floats one, Floats other) { return choose(one > other, one, other); }

#if LANES == 16
#define SWAP_8(x) __builtin_shuffle(x, (Ints){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7})
#define SWAP_4(x) __builtin_shuffle(x, (Ints){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11})
#define SWAP_2(x) __builtin_shuffle(x, (Ints){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13})
#define SWAP_1(x) __builtin_shuffle(x, (Ints){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14})
#define LOW_ONES(x, y) __builtin_shuffle(x, y, (Ints){0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29})
#define HIGH_ONES(x, y) __builtin_shuffle(x, y, (Ints){2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31})
#define LOW_TWOS(x, y) __builtin_shuffle(x, y, (Ints){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29})
#define HIGH_TWOS(x, y) __builtin_shuffle(x, y, (Ints){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31})
#else
#define SWAP_4(x) __builtin_shuffle(x, (Ints){4, 5, 6, 7, 0, 1, 2, 3})
#define SWAP_2(x) __builtin_shuffle(x, (Ints){2, 3, 0, 1, 6, 7, 4, 5})
#define SWAP_1(x) __builtin_shuffle(x, (Ints){1, 0, 3, 2, 5, 4, 7, 6})
#define LOW_ONES(x, y) __builtin_shuffle(x, y, (Ints){0, 8, 1, 9, 4, 12, 5, 13})
#define HIGH_ONES(x, y) __builtin_shuffle(x, y, (Ints){2, 10, 3, 11, 6, 14, 7, 15})
#define LOW_TWOS(x, y) __builtin_shuffle(x, y, (Ints){0, 1, 8, 9, 4, 5, 12, 13})
#define HIGH_TWOS(x, y) __builtin_shuffle(x, y, (Ints){2, 3, 10, 11, 6, 7, 14, 15})
#endif

INLINE float largest_lane(Floats x) {
#if LANES == 16
    x = larger(x, SWAP_8(x));
#endif
    x = larger(x, SWAP_4(x));
    x = larger(x, SWAP_2(x));
    return larger(x, SWAP_1(x))[0];
}

INLINE float sum_lanes(Floats x) {
#if LANES == 16
    x += SWAP_8(x);
#endif
    x += SWAP_4(x);
    x += SWAP_2(x);
    return (x + SWAP_1(x))[0];
}

/* Four sums at once, in half the instructions that they would take one by one. */
INLINE void sum_lanes_of_four(const Floats x[4], float sums[4]) {
    Floats first = LOW_ONES(x[0], x[1]) + HIGH_ONES(x[0], x[1]);
    Floats second = LOW_ONES(x[2], x[3]) + HIGH_ONES(x[2], x[3]);
    Floats all = LOW_TWOS(first, second) + HIGH_TWOS(first, second);
#if LANES == 16
    all += SWAP_8(all);
#endif
    all += SWAP_4(all);
    memcpy(sums, &all, 4 * sizeof(float));
}

/* exp of numbers that are not positive, to about one unit in the last place: 2^n * exp(r), |r| <= ln(2) / 2, exp(r) by
 * its series. What would be denormal is 0. */
INLINE Floats exp_of(Floats x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves no bits for a fraction */
    Floats n = (x * 1.44269504f + round) - round;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return choose(x < -87.0f, (Floats){0}, e * (Floats)power);
}

/* scores[query][token] = queries[query] . keys[token], for `count` tokens; -inf up to a whole number of vectors. */
INLINE void score(const float *queries, const void *keys, int64_t first, int64_t stride, int64_t count, int64_t dim,
                  float scores[][TILE], int bf16, int num_queries) {
    const char *bytes = keys;
    const int64_t width = bf16 ? 2 : 4;
    for (int64_t token = 0; token < count; token += 4) {
        Floats sums[MOST_QUERIES][4] = {0};
        int64_t at[4];
        for (int i = 0; i < 4; i++) {
            at[i] = first + (token + i < count ? token + i : count - 1) * stride;
            for (int64_t line = 0; line < dim * width; line += CACHE_LINE)
                __builtin_prefetch(bytes + (at[i] + AHEAD * stride) * width + line);
        }
        for (int64_t d = 0; d < dim; d += LANES) {
            Floats parts[4];
            for (int i = 0; i < 4; i++) parts[i] = load(keys, at[i] + d, bf16);
            for (int q = 0; q < num_queries; q++) {
                Floats query = load(queries, q * dim + d, 0);
                for (int i = 0; i < 4; i++) sums[q][i] += query * parts[i];
            }
        }
        for (int q = 0; q < num_queries; q++) sum_lanes_of_four(sums[q], &scores[q][token]);
    }
    for (int q = 0; q < num_queries; q++)
        for (int64_t token = count; token % LANES; token++) scores[q][token] = -INFINITY;
}

/* Make weights of scores; say by how much what was summed up before has to shrink. */
INLINE float weigh(float scores[TILE], int64_t count, float sums[2]) {
    Floats most = load(scores, 0, 0);
    for (int64_t token = LANES; token < count; token += LANES) most = larger(load(scores, token, 0), most);
    float before = sums[0], largest = largest_lane(most);
    if (before > largest) largest = before;
    Floats total = {0};
    for (int64_t token = 0; token < count; token += LANES) {
        Floats weights = exp_of(load(scores, token, 0) - largest);
        memcpy(scores + token, &weights, sizeof weights);
        total += weights;
    }
    float shrink = expf(before - largest);
    sums[0] = largest;
    sums[1] = sums[1] * shrink + sum_lanes(total);
    return shrink;
}

/* attended[query] = attended[query] * shrink[query] + sum over tokens of weight * value, in `vectors` vectors from
 * element `d` on, all of which stay in registers. */
INLINE void add_columns(const void *values, int64_t first, int64_t stride, int64_t count, int64_t dim, int64_t d,
                        float weights[][TILE], const float *shrink, float *attended, int bf16, int num_queries,
                        int vectors) {
    const char *bytes = values;
    const int64_t width = bf16 ? 2 : 4;
    Floats sums[MOST_QUERIES][ACCUMULATORS];
    for (int q = 0; q < num_queries; q++)
        for (int v = 0; v < vectors; v++) sums[q][v] = load(attended, q * dim + d + v * LANES, 0) * shrink[q];
    for (int64_t token = 0; token < count; token++) {
        int64_t at = first + token * stride + d;
        for (int64_t line = 0; line < vectors * LANES * width; line += CACHE_LINE)
            __builtin_prefetch(bytes + (at + AHEAD * stride) * width + line);
        for (int v = 0; v < vectors; v++) {
            Floats part = load(values, at + v * LANES, bf16);
            for (int q = 0; q < num_queries; q++) sums[q][v] += weights[q][token] * part;
        }
    }
    for (int q = 0; q < num_queries; q++)
        for (int v = 0; v < vectors; v++) memcpy(attended + q * dim + d + v * LANES, &sums[q][v], sizeof(Floats));
}

/* Attend to `count` <= TILE neighbouring tokens with `num_queries` neighbouring heads. */
INLINE void attend_tile(const Step *step, const float *queries, const void *keys, const void *values, int64_t first,
                        int64_t count, float *attended, float *sums, int bf16, int num_queries) {
    const int64_t dim = step->head_dim, stride = step->slot_stride;
    float scores[MOST_QUERIES][TILE], shrink[MOST_QUERIES];
    score(queries, keys, first, stride, count, dim, scores, bf16, num_queries);
    for (int q = 0; q < num_queries; q++) shrink[q] = weigh(scores[q], count, sums + 2 * q);
    for (int64_t d = 0; d < dim;) {
        const int64_t left = (dim - d) / LANES;
#define ADD(vectors)                                                                                             \
    add_columns(values, first, stride, count, dim, d, scores, shrink, attended, bf16, num_queries, vectors), \
        d += (vectors)*LANES
        if (left >= 8 && 8 * num_queries <= ACCUMULATORS) ADD(8);
        else if (left >= 4 && 4 * num_queries <= ACCUMULATORS) ADD(4);
        else if (left >= 2) ADD(2);
        else ADD(1);
#undef ADD
    }
}

INLINE void attend_tile_of(const Step *step, const float *queries, const void *keys, const void *values, int64_t first,
                           int64_t count, float *attended, float *sums, int bf16, int64_t num_queries) {
    switch (num_queries) {
    case 1: attend_tile(step, queries, keys, values, first, count, attended, sums, bf16, 1); break;
    case 2: attend_tile(step, queries, keys, values, first, count, attended, sums, bf16, 2); break;
#if MOST_QUERIES == 4
    case 3: attend_tile(step, queries, keys, values, first, count, attended, sums, bf16, 3); break;
    case 4: attend_tile(step, queries, keys, values, first, count, attended, sums, bf16, 4); break;
#endif
    }
}

/* One item of work. The queries are scaled already. */
INLINE void attend_piece(const Step *step, int64_t number, int64_t kv_head, const float *queries, const void *keys,
                         const void *values, int bf16) {
    const Piece *piece = &step->pieces[number];
    const Sequence *sequence = &step->sequences[piece->sequence];
    const int64_t dim = step->head_dim, group = step->heads / step->kv_heads;
    float *attended = step->attended + (number * step->heads + kv_head * group) * dim;
    float *sums = step->sums + (number * step->heads + kv_head * group) * 2;
    memset(attended, 0, group * dim * sizeof(float));
    for (int64_t query = 0; query < group; query++) sums[2 * query] = -INFINITY, sums[2 * query + 1] = 0;

    const Run *run = step->runs + sequence->first_run, *last = run + sequence->num_runs;
    while (run->position + run->length <= piece->begin) run++;
    for (; run < last && run->position < piece->end; run++) {
        int64_t begin = run->position > piece->begin ? run->position : piece->begin;
        int64_t end = run->position + run->length < piece->end ? run->position + run->length : piece->end;
        for (int64_t token = begin, count; token < end; token += count) {
            count = TILE - token % TILE; /* cut by position: where blocks of TILE tokens or more lie changes no sum */
            if (count > end - token) count = end - token;
            int64_t first = kv_head * step->kv_head_stride + (run->slot + token - run->position) * step->slot_stride;
            for (int64_t query = 0; query < group; query += MOST_QUERIES) {
                int64_t few = group - query < MOST_QUERIES ? group - query : MOST_QUERIES;
                attend_tile_of(step, queries + query * dim, keys, values, first, count, attended + query * dim,
                               sums + query * 2, bf16, few);
            }
        }
    }
}

INLINE void attend_item(const Step *step, int64_t item, const void *query, int64_t token_stride, int64_t head_stride,
                        const void *keys, const void *values, float scaling, int bf16) {
    const int64_t dim = step->head_dim, group = step->heads / step->kv_heads;
    const int64_t number = item / step->kv_heads, kv_head = item % step->kv_heads;
    const int64_t row = step->sequences[step->pieces[number].sequence].row;
    float queries[group * dim];
    for (int64_t head = 0; head < group; head++)
        for (int64_t d = 0; d < dim; d++)
            queries[head * dim + d] =
                scaling * load_one(query, row * token_stride + (kv_head * group + head) * head_stride + d, bf16);
    attend_piece(step, number, kv_head, queries, keys, values, bf16);
}

/* Write one head of a sequence's row: each piece weighs exp(its largest score - the largest of all). */
INLINE void merge(const Step *step, const Sequence *sequence, int64_t head, void *output, int bf16) {
    const int64_t dim = step->head_dim, heads = step->heads;
    const int64_t begin = sequence->first_piece, end = begin + sequence->num_pieces;
    float largest = -INFINITY, total = 0, merged[dim];
    for (int64_t piece = begin; piece < end; piece++) largest = fmaxf(largest, step->sums[(piece * heads + head) * 2]);
    memset(merged, 0, sizeof merged);
    for (int64_t piece = begin; piece < end; piece++) {
        const float *sums = step->sums + (piece * heads + head) * 2;
        const float *attended = step->attended + (piece * heads + head) * dim;
        float share = expf(sums[0] - largest);
        total += share * sums[1];
        for (int64_t d = 0; d < dim; d++) merged[d] += share * attended[d];
    }
    for (int64_t d = 0; d < dim; d++)
        store_one(output, (sequence->row * heads + head) * dim + d, merged[d] / total, bf16);
}

/* query [tokens, heads, head_dim] with the strides given, keys and values [kv_heads, slots, head_dim] of one layer;
 * output [tokens, heads, head_dim], contiguous: only the sequences' rows are written. */
void decode_attention(const Step *step, const void *query, int64_t token_stride, int64_t head_stride, const void *keys,
                      const void *values, void *output, float scaling) {
    const int64_t items = step->num_pieces * step->kv_heads, rows = step->num_sequences * step->heads;
#pragma omp parallel num_threads(step->num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; item++) {
            if (step->bfloat16) attend_item(step, item, query, token_stride, head_stride, keys, values, scaling, 1);
            else attend_item(step, item, query, token_stride, head_stride, keys, values, scaling, 0);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const Sequence *sequence = &step->sequences[row / step->heads];
            if (step->bfloat16) merge(step, sequence, row % step->heads, output, 1);
            else merge(step, sequence, row % step->heads, output, 0);
        }
    }
}
