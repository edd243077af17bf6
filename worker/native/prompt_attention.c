/* Attention of prompts' chunks over the block pool on a CPU with AMX: one call a layer for all chunks of a step.
 *
 * A share of a chunk's queries and one key head are one item of work, which a thread does alone, for all query heads
 * that share the keys: they are the rows. Tile after tile of positions, keys and values are put in the order that the
 * CPU's tiles want, wherever they lie; then the rows see them, sixteen at a time, and what a row has summed up shrinks
 * as larger scores come (the softmax of Milakov and Gimelshein, 2018, as in FlashAttention). Scores and sums are
 * float32; weights are rounded to bfloat16 before they meet the values, as in torch's kernel.
 *
 * Positions are cut into tiles at multiples of KEYS: neither where blocks lie nor how a prompt was cut into chunks
 * changes a sum.
 *
 * Knows no torch.
 */
#include "attention.h"

#if TILES

#define KEYS 64      /* positions of a tile: their keys and values stay in the nearest cache while all rows see them */
#define GROUPS (KEYS / TILE_ROWS)
#define DEPTH 32     /* products that a tile's row sums up */
#define STEPS (KEYS / DEPTH)
#define LOG2_E 1.44269504f

typedef uint16_t Rows[TILE_ROWS][DEPTH];   /* a tile: bfloat16 of sixteen rows */
typedef uint16_t Packed[TILE_ROWS][DEPTH]; /* a tile: pairs of bfloat16, one pair for each of sixteen columns */
typedef float Part[TILE_ROWS][LANES];      /* a tile: sums of sixteen rows */

/* The tiles, by number: the compiler writes them into the instructions' names. */
#define LEFT 0
#define RIGHT 1
#define LOWER_LEFT 2
#define LOWER_RIGHT 3
#define ROWS 4
#define LOWER_ROWS 5
#define LEFT_COLUMNS 6
#define RIGHT_COLUMNS 7

/* keys[dim / DEPTH][GROUPS]: columns are positions. What is beyond `count` is 0. */
INLINE void pack_keys(const uint16_t *tensor, const int64_t *at, int64_t count, int64_t dim, Packed *keys) {
    for (int64_t d = 0; d < dim; d += DEPTH)
        for (int64_t group = 0; group < GROUPS; group++) {
            __m512i rows[16];
            for (int64_t i = 0; i < 16; i++) {
                const int64_t token = group * 16 + i;
                __builtin_prefetch(tensor + at[KEYS + token] + d);
                rows[i] = token < count ? _mm512_loadu_si512(tensor + at[token] + d) : _mm512_setzero_si512();
            }
            transpose(rows);
            memcpy(keys[d / DEPTH * GROUPS + group], rows, sizeof(Packed));
        }
}

/* values[dim / 16][STEPS]: columns are elements of the head. What is beyond `count` is 0. */
INLINE void pack_values(const uint16_t *tensor, const int64_t *at, int64_t count, int64_t dim, Packed *values) {
    uint16_t low[32], high[32];
    for (int i = 0; i < 16; i++) {
        low[2 * i] = i, low[2 * i + 1] = i + 32;
        high[2 * i] = i + 16, high[2 * i + 1] = i + 48;
    }
    const __m512i lows = _mm512_loadu_si512(low), highs = _mm512_loadu_si512(high);
    for (int64_t token = 0; token < KEYS; token += 2)
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512i zero = _mm512_setzero_si512();
            __builtin_prefetch(tensor + at[KEYS + token] + d);
            __builtin_prefetch(tensor + at[KEYS + token + 1] + d);
            const __m512i even = token < count ? _mm512_loadu_si512(tensor + at[token] + d) : zero;
            const __m512i odd = token + 1 < count ? _mm512_loadu_si512(tensor + at[token + 1] + d) : zero;
            Packed *tile = values + d / 16 * STEPS + token / DEPTH;
            _mm512_storeu_si512(tile[0][token % DEPTH / 2], _mm512_permutex2var_epi16(even, lows, odd));
            _mm512_storeu_si512(tile[STEPS][token % DEPTH / 2], _mm512_permutex2var_epi16(even, highs, odd));
        }
}

/* What sixteen rows have summed up so far. */
typedef struct {
    float largest[TILE_ROWS];        /* score of each row */
    float weights[TILE_ROWS][LANES]; /* the sum of each row's weights, by lane */
} Sums;

/* scores[half][row][position] = queries[half][row] . keys[position]: sixteen rows, or with `lower` twice as many. */
INLINE void score(const Rows *queries, const Packed *keys, int64_t dim, int lower, float scores[2][TILE_ROWS][KEYS]) {
    const Rows *lower_queries = queries + dim / DEPTH;
    for (int group = 0; group < GROUPS; group += 2) {
        _tile_zero(LEFT);
        _tile_zero(RIGHT);
        _tile_zero(LOWER_LEFT);
        _tile_zero(LOWER_RIGHT);
        for (int64_t part = 0; part < dim / DEPTH; part++) {
            _tile_loadd(LEFT_COLUMNS, keys[part * GROUPS + group], TILE_BYTES);
            _tile_loadd(RIGHT_COLUMNS, keys[part * GROUPS + group + 1], TILE_BYTES);
            _tile_loadd(ROWS, queries[part], TILE_BYTES);
            _tile_dpbf16ps(LEFT, ROWS, LEFT_COLUMNS);
            _tile_dpbf16ps(RIGHT, ROWS, RIGHT_COLUMNS);
            if (!lower) continue;
            _tile_loadd(LOWER_ROWS, lower_queries[part], TILE_BYTES);
            _tile_dpbf16ps(LOWER_LEFT, LOWER_ROWS, LEFT_COLUMNS);
            _tile_dpbf16ps(LOWER_RIGHT, LOWER_ROWS, RIGHT_COLUMNS);
        }
        _tile_stored(LEFT, &scores[0][0][group * 16], KEYS * 4);
        _tile_stored(RIGHT, &scores[0][0][group * 16 + 16], KEYS * 4);
        if (lower) _tile_stored(LOWER_LEFT, &scores[1][0][group * 16], KEYS * 4);
        if (lower) _tile_stored(LOWER_RIGHT, &scores[1][0][group * 16 + 16], KEYS * 4);
    }
}

/* attended[half][row] += weights[half][row][position] * values[position] */
INLINE void add_values(uint16_t weights[2][TILE_ROWS][KEYS], const Packed *values, int64_t dim, int lower,
                       Part *attended) {
    Part *lower_attended = attended + dim / LANES;
    for (int64_t part = 0; part < dim / LANES; part += 2, values += 2 * STEPS) {
        _tile_loadd(LEFT, attended[part], TILE_BYTES);
        _tile_loadd(RIGHT, attended[part + 1], TILE_BYTES);
        if (lower) _tile_loadd(LOWER_LEFT, lower_attended[part], TILE_BYTES);
        if (lower) _tile_loadd(LOWER_RIGHT, lower_attended[part + 1], TILE_BYTES);
        for (int step = 0; step < STEPS; step++) {
            _tile_loadd(LEFT_COLUMNS, values[step], TILE_BYTES);
            _tile_loadd(RIGHT_COLUMNS, values[STEPS + step], TILE_BYTES);
            _tile_loadd(ROWS, &weights[0][0][step * DEPTH], KEYS * 2);
            _tile_dpbf16ps(LEFT, ROWS, LEFT_COLUMNS);
            _tile_dpbf16ps(RIGHT, ROWS, RIGHT_COLUMNS);
            if (!lower) continue;
            _tile_loadd(LOWER_ROWS, &weights[1][0][step * DEPTH], KEYS * 2);
            _tile_dpbf16ps(LOWER_LEFT, LOWER_ROWS, LEFT_COLUMNS);
            _tile_dpbf16ps(LOWER_RIGHT, LOWER_ROWS, RIGHT_COLUMNS);
        }
        _tile_stored(LEFT, attended[part], TILE_BYTES);
        _tile_stored(RIGHT, attended[part + 1], TILE_BYTES);
        if (lower) _tile_stored(LOWER_LEFT, lower_attended[part], TILE_BYTES);
        if (lower) _tile_stored(LOWER_RIGHT, lower_attended[part + 1], TILE_BYTES);
    }
}

/* Which positions of a tile each row sees: [low, high), which may be none. */
typedef struct { int32_t low[TILE_ROWS], high[TILE_ROWS]; } Seen;

/* Make weights of scores, and let what was summed up before shrink. `scaling` counts scores in powers of two. */
INLINE void weigh(float scores[TILE_ROWS][KEYS], const Seen *seen, float scaling, Sums *sums, Part *attended,
                  int64_t dim, uint16_t weights[TILE_ROWS][KEYS]) {
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Floats nothing = (Floats){0} - INFINITY;
    Floats most[TILE_ROWS];
    for (int row = 0; row < TILE_ROWS; row++) {
        if (seen->low[row] > 0 || seen->high[row] < KEYS)
            for (int group = 0; group < GROUPS; group++) {
                const Ints position = lanes + group * 16;
                const Ints here = (position >= seen->low[row]) & (position < seen->high[row]);
                const Floats left = choose(here, load(scores[row], group * 16, 0), nothing);
                memcpy(&scores[row][group * 16], &left, sizeof left);
            }
        most[row] = larger(larger(load(scores[row], 0, 0), load(scores[row], 16, 0)),
                           larger(load(scores[row], 32, 0), load(scores[row], 48, 0)));
    }
    const Floats before = load(sums->largest, 0, 0), largest = larger(largest_lanes(most) * scaling, before);
    const Floats floor = choose(largest == nothing, (Floats){0}, largest); /* of rows that have seen nothing yet */
    const Floats shrinks = exp2_of(before - floor);
    float floors[TILE_ROWS], shrink[TILE_ROWS];
    memcpy(sums->largest, &largest, sizeof largest);
    memcpy(floors, &floor, sizeof floor);
    memcpy(shrink, &shrinks, sizeof shrinks);
    for (int row = 0; row < TILE_ROWS; row++) {
        Floats weight[GROUPS];
        for (int group = 0; group < GROUPS; group++)
            weight[group] = exp2_of(load(scores[row], group * 16, 0) * scaling - floors[row]);
        for (int group = 0; group < GROUPS; group += 2) {
            const __m512bh two = _mm512_cvtne2ps_pbh((__m512)weight[group + 1], (__m512)weight[group]);
            memcpy(&weights[row][group * 16], &two, sizeof two);
        }
        const Floats total = load(sums->weights[row], 0, 0) * shrink[row] +
                             ((weight[0] + weight[1]) + (weight[2] + weight[3]));
        memcpy(sums->weights[row], &total, sizeof total);
        if (shrink[row] == 1.0f) continue;
        for (int64_t part = 0; part < dim / LANES; part++) {
            const Floats less = load(attended[part][row], 0, 0) * shrink[row];
            memcpy(attended[part][row], &less, sizeof less);
        }
    }
}

/* at[i] = where the key (and the value) of position `begin` + i begins, for a tile up to `last`; of what is behind it,
 * that of the last. Returns the run to go on from. */
INLINE const Run *find(const Prompts *prompts, const Run *run, int64_t kv_head, int64_t begin, int64_t last,
                       int64_t *at) {
    for (int64_t i = 0; i < KEYS; i++) {
        const int64_t position = begin + i < last ? begin + i : last;
        while (run->position + run->length <= position) run++;
        at[i] = kv_head * prompts->kv_head_stride + (run->slot + position - run->position) * prompts->slot_stride;
    }
    return run;
}

/* Rows of queries that share their keys: the heads of a group at position `first`, at the next one, and so on. */
typedef struct { int64_t kv_head, group, token, first, last, window, rows; } Task;

/* Which positions of the tile at `begin` sixteen rows see, from `row` on. False if none. */
INLINE int see(const Task *task, int64_t begin, int64_t row, Seen *seen) {
    int32_t least = KEYS, most = 0;
    for (int i = 0; i < TILE_ROWS; i++) {
        int64_t position = task->first + (row + i) / task->group;
        if (position > task->last) position = task->last; /* of rows that there are not */
        const int64_t from = position - task->window + 1 - begin, to = position + 1 - begin;
        seen->low[i] = from < 0 ? 0 : from < KEYS ? from : KEYS;
        seen->high[i] = to < 0 ? 0 : to < KEYS ? to : KEYS;
        if (seen->low[i] < least) least = seen->low[i];
        if (seen->high[i] > most) most = seen->high[i];
    }
    return least < most;
}

/* Where a row's query stands in a tensor of tokens. */
INLINE int64_t token_of(const Task *task, int64_t row) { return task->token + row / task->group; }

INLINE int64_t head_of(const Task *task, int64_t row) { return task->kv_head * task->group + row % task->group; }

INLINE void gather(const Task *task, const uint16_t *query, int64_t token_stride, int64_t head_stride, int64_t dim,
                   Rows queries[][dim / DEPTH]) {
    for (int64_t row = 0; row < task->rows; row++) {
        const uint16_t *from = query + token_of(task, row) * token_stride + head_of(task, row) * head_stride;
        for (int64_t d = 0; d < dim; d += DEPTH)
            memcpy(queries[row / TILE_ROWS][d / DEPTH][row % TILE_ROWS], from + d, TILE_BYTES);
    }
}

INLINE void write_out(const Task *task, const Sums *sums, int64_t dim, Part attended[][dim / LANES], int64_t heads,
                      uint16_t *output) {
    for (int64_t row = 0; row < task->rows; row++) {
        const int64_t tile = row / TILE_ROWS, here = row % TILE_ROWS;
        const float total = sum_lanes(load(sums[tile].weights[here], 0, 0));
        uint16_t *to = output + (token_of(task, row) * heads + head_of(task, row)) * dim;
        for (int64_t part = 0; part < dim / LANES; part++) {
            const __m256bh halves = _mm512_cvtneps_pbh((__m512)(load(attended[tile][part][here], 0, 0) / total));
            memcpy(to + part * LANES, &halves, sizeof halves);
        }
    }
}

/* Up to thirty-two rows see a tile of positions. */
INLINE void attend_tile(const Task *task, int64_t tile, int64_t begin, const Rows *queries, const Packed *keys,
                        const Packed *values, int64_t dim, float scaling, Sums *sums, Part *attended) {
    const int lower = (tile + 1) * TILE_ROWS < task->rows;
    float scores[2][TILE_ROWS][KEYS] __attribute__((aligned(CACHE_LINE)));
    uint16_t weights[2][TILE_ROWS][KEYS] __attribute__((aligned(CACHE_LINE)));
    Seen seen[2];
    const int upper_sees = see(task, begin, tile * TILE_ROWS, &seen[0]);
    const int lower_sees = lower && see(task, begin, (tile + 1) * TILE_ROWS, &seen[1]);
    if (!upper_sees && !lower_sees) return;
    score(queries, keys, dim, lower, scores);
    for (int half = 0; half <= lower; half++)
        weigh(scores[half], &seen[half], scaling, &sums[half], attended + half * (dim / LANES), dim, weights[half]);
    add_values(weights, values, dim, lower, attended);
}

static void attend_share(const Prompts *prompts, const Share *share, int64_t kv_head, const uint16_t *query,
                         int64_t token_stride, int64_t head_stride, const uint16_t *keys, const uint16_t *values,
                         uint16_t *output, float scaling) {
    const Chunk *chunk = &prompts->chunks[share->chunk];
    const int64_t dim = prompts->head_dim, group = prompts->heads / prompts->kv_heads;
    const int64_t first = chunk->start + share->begin, last = chunk->start + share->end - 1;
    const int64_t token = chunk->row + share->begin, rows = (share->end - share->begin) * group;
    const Task task = {kv_head, group, token, first, last, prompts->window, rows};
    const int64_t tiles = (task.rows + TILE_ROWS - 1) / TILE_ROWS;
    Rows queries[tiles][dim / DEPTH] __attribute__((aligned(CACHE_LINE)));
    Part attended[tiles][dim / LANES] __attribute__((aligned(CACHE_LINE)));
    Sums sums[tiles] __attribute__((aligned(CACHE_LINE)));
    Packed packed_keys[dim / DEPTH * GROUPS] __attribute__((aligned(CACHE_LINE)));
    Packed packed_values[dim / LANES * STEPS] __attribute__((aligned(CACHE_LINE)));
    memset(queries, 0, sizeof queries);
    memset(attended, 0, sizeof attended);
    memset(sums, 0, sizeof sums);
    for (int64_t row = 0; row < tiles * TILE_ROWS; row++) sums[row / TILE_ROWS].largest[row % TILE_ROWS] = -INFINITY;
    gather(&task, query, token_stride, head_stride, dim, queries);

    int64_t begin = first - prompts->window + 1, at[2 * KEYS]; /* this tile's places, and the next one's */
    begin = begin < 0 ? 0 : begin - begin % KEYS;
    const Run *run = find(prompts, prompts->runs + chunk->first_run, kv_head, begin, last, at);
    for (; begin <= last; begin += KEYS) {
        const int64_t count = last + 1 - begin < KEYS ? last + 1 - begin : KEYS;
        run = find(prompts, run, kv_head, begin + KEYS, last, at + KEYS);
        pack_keys(keys, at, count, dim, packed_keys);
        pack_values(values, at, count, dim, packed_values);
        memcpy(at, at + KEYS, KEYS * sizeof *at);
        for (int64_t tile = 0; tile < tiles; tile += 2)
            attend_tile(&task, tile, begin, queries[tile], packed_keys, packed_values, dim, scaling * LOG2_E,
                        &sums[tile], attended[tile]);
    }
    write_out(&task, sums, dim, attended, prompts->heads, output);
}

/* attention.h says what this does. */
void prompts_in_team(const Prompts *prompts, const uint16_t *query, int64_t token_stride, int64_t head_stride,
                     const uint16_t *keys, const uint16_t *values, uint16_t *output, float scaling) {
    const int64_t items = prompts->num_shares * prompts->kv_heads;
    const Tiles tiles = whole_tiles();
    _tile_loadconfig(&tiles);
#pragma omp for schedule(dynamic)
    for (int64_t item = items - 1; item >= 0; item--) /* a head's last shares see most: they come first */
        attend_share(prompts, &prompts->shares[item % prompts->num_shares], item / prompts->num_shares, query,
                     token_stride, head_stride, keys, values, output, scaling);
    _tile_release();
}

void prompt_attention(const Prompts *prompts, const uint16_t *query, int64_t token_stride, int64_t head_stride,
                      const uint16_t *keys, const uint16_t *values, uint16_t *output, float scaling) {
#pragma omp parallel num_threads(prompts->num_threads)
    prompts_in_team(prompts, query, token_stride, head_stride, keys, values, output, scaling);
}

#endif
