/* Attention of decoding queries over the block pool on a CPU: one call a layer for all sequences of a step.
 *
 * A sequence's keys are cut into pieces of positions. A piece and one key head are one item of work, which a thread
 * does alone: it reads the piece's keys and values once, for all query heads that share them. Then the pieces of each
 * sequence are merged by their shares of the softmax's sum. Scores, weights and sums are float32.
 *
 * Knows no torch.
 */
#include "attention.h"
#include "vectors.h"

#ifdef __AVX512F__
#define ACCUMULATORS 16 /* of 32 registers */
#define MOST_QUERIES 4
#else
#define ACCUMULATORS 8 /* of 16 registers */
#define MOST_QUERIES 2
#endif

#define TILE 64       /* tokens whose keys and values stay in the nearest cache while all queries see them */
#define AHEAD 32      /* tokens between what is asked of memory and what is used */

/* scores[query][token] = queries[query] . keys[token], for `count` tokens; -inf up to a whole number of vectors. */
INLINE void score(const float *queries, const void *keys, const int64_t *at, int64_t count, int64_t dim,
                  float scores[][TILE], int bf16, int num_queries) {
    const char *bytes = keys;
    const int64_t width = bf16 ? 2 : 4;
    for (int64_t token = 0; token < count; token += 4) {
        Floats sums[MOST_QUERIES][4] = {0};
        const int64_t *four = at + token; /* past the last token they say where it lies once more */
        for (int i = 0; i < 4; i++)
            for (int64_t line = 0; line < dim * width; line += CACHE_LINE)
                __builtin_prefetch(bytes + four[AHEAD + i] * width + line);
        for (int64_t d = 0; d < dim; d += LANES) {
            Floats parts[4];
            for (int i = 0; i < 4; i++) parts[i] = load(keys, four[i] + d, bf16);
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
INLINE void add_columns(const void *values, const int64_t *at, int64_t count, int64_t dim, int64_t d,
                        float weights[][TILE], const float *shrink, float *attended, int bf16, int num_queries,
                        int vectors) {
    const char *bytes = values;
    const int64_t width = bf16 ? 2 : 4;
    Floats sums[MOST_QUERIES][ACCUMULATORS];
    for (int q = 0; q < num_queries; q++)
        for (int v = 0; v < vectors; v++) sums[q][v] = load(attended, q * dim + d + v * LANES, 0) * shrink[q];
    for (int64_t token = 0; token < count; token++) {
        for (int64_t line = 0; line < vectors * LANES * width; line += CACHE_LINE)
            __builtin_prefetch(bytes + (at[token + AHEAD] + d) * width + line);
        for (int v = 0; v < vectors; v++) {
            Floats part = load(values, at[token] + d + v * LANES, bf16);
            for (int q = 0; q < num_queries; q++) sums[q][v] += weights[q][token] * part;
        }
    }
    for (int q = 0; q < num_queries; q++)
        for (int v = 0; v < vectors; v++) memcpy(attended + q * dim + d + v * LANES, &sums[q][v], sizeof(Floats));
}

/* Attend to `count` <= TILE tokens, whose keys and values lie at `at`, with `num_queries` neighbouring heads. */
INLINE void attend_tile(const Step *step, const float *queries, const void *keys, const void *values,
                        const int64_t *at, int64_t count, float *attended, float *sums, int bf16, int num_queries) {
    const int64_t dim = step->head_dim;
    float scores[MOST_QUERIES][TILE], shrink[MOST_QUERIES];
    score(queries, keys, at, count, dim, scores, bf16, num_queries);
    for (int q = 0; q < num_queries; q++) shrink[q] = weigh(scores[q], count, sums + 2 * q);
    for (int64_t d = 0; d < dim;) {
        const int64_t left = (dim - d) / LANES;
#define ADD(vectors)                                                                             \
    add_columns(values, at, count, dim, d, scores, shrink, attended, bf16, num_queries, vectors), \
        d += (vectors)*LANES
        if (left >= 8 && 8 * num_queries <= ACCUMULATORS) ADD(8);
        else if (left >= 4 && 4 * num_queries <= ACCUMULATORS) ADD(4);
        else if (left >= 2) ADD(2);
        else ADD(1);
#undef ADD
    }
}

INLINE void attend_tile_of(const Step *step, const float *queries, const void *keys, const void *values,
                           const int64_t *at, int64_t count, float *attended, float *sums, int bf16,
                           int64_t num_queries) {
    switch (num_queries) {
    case 1: attend_tile(step, queries, keys, values, at, count, attended, sums, bf16, 1); break;
    case 2: attend_tile(step, queries, keys, values, at, count, attended, sums, bf16, 2); break;
#if MOST_QUERIES == 4
    case 3: attend_tile(step, queries, keys, values, at, count, attended, sums, bf16, 3); break;
    case 4: attend_tile(step, queries, keys, values, at, count, attended, sums, bf16, 4); break;
#endif
    }
}

/* places[i] = where the key (and the value) of the piece's position i begins; its last once more for what would be read
 * or asked for behind it. */
INLINE void find(const Step *step, const Sequence *sequence, const Piece *piece, int64_t kv_head, int64_t *places) {
    const int64_t length = piece->end - piece->begin;
    const Run *run = step->runs + sequence->first_run;
    for (int64_t i = 0; i < length; i++) {
        while (run->position + run->length <= piece->begin + i) run++;
        const int64_t slot = run->slot + piece->begin + i - run->position;
        places[i] = kv_head * step->kv_head_stride + slot * step->slot_stride;
    }
    for (int64_t i = length; i < length + AHEAD + 4; i++) places[i] = places[length - 1];
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

    int64_t places[PIECE_TOKENS + AHEAD + 4];
    find(step, sequence, piece, kv_head, places);
    for (int64_t token = piece->begin, count; token < piece->end; token += count) {
        const int64_t *at = places + (token - piece->begin);
        count = TILE - token % TILE; /* cut by position: where blocks lie changes no sum */
        if (count > piece->end - token) count = piece->end - token;
        for (int64_t query = 0; query < group; query += MOST_QUERIES) {
            int64_t few = group - query < MOST_QUERIES ? group - query : MOST_QUERIES;
            attend_tile_of(step, queries + query * dim, keys, values, at, count, attended + query * dim,
                           sums + query * 2, bf16, few);
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

/* attention.h says what this does. */
void attend_in_team(const Step *step, const void *query, int64_t token_stride, int64_t head_stride, const void *keys,
                    const void *values, void *output, float scaling) {
    const int64_t items = step->num_pieces * step->kv_heads, rows = step->num_sequences * step->heads;
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

void decode_attention(const Step *step, const void *query, int64_t token_stride, int64_t head_stride, const void *keys,
                      const void *values, void *output, float scaling) {
#pragma omp parallel num_threads(step->num_threads)
    attend_in_team(step, query, token_stride, head_stride, keys, values, output, scaling);
}
