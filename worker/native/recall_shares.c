/* How much each piece of what has left the window is asked for: its share in a softmax over all pieces.
 *
 * Queries and representatives are int8. A piece is as near as its nearest representative. Sums of products are whole
 * numbers, the same in any order and on any CPU; with AMX they are taken by tiles of one piece's representatives and
 * sixteen queries. The layout of the structs is repeated in recall_kernel.py.
 */
#include "tiles.h"

#if TILES && defined(__AMX_INT8__)
#define WHOLE_TILES 1
#else
#define WHOLE_TILES 0
#endif

#define FEW 16       /* queries at once: a tile's columns */
#define DEPTH 64     /* products that a tile's row sums up */
#define MOST_DEPTHS 4 /* of a head */
#define UNITS 64     /* pieces whose scores are turned at once */
#define PARTS 64     /* parts of a work item */
#define NOWHERE -1e30f

typedef struct { const int8_t *keys; const float *scales; int64_t units, first_unit; } Part;

typedef struct {
    const Part *parts;         /* keys [heads, units, each, head_dim], scales [heads, units] */
    const int8_t *queries;     /* [heads, rows, head_dim]; heads are the KV heads of all layers */
    const float *query_scales; /* [heads, rows] */
    float *scores;             /* [heads, rows, stride]: scratch */
    float *shares;             /* [heads, stride] */
    const int64_t *looking;    /* [num_looking]: heads that look; of the others nothing is written */
    int64_t num_parts, num_looking, rows, stride, units, each, head_dim; /* stride is units, up to a multiple of 16 */
    int64_t num_threads;
} Look;

typedef float Nearest[FEW]; /* one piece's nearest representative to each of a few queries */

#if WHOLE_TILES

/* The tiles, by number: the compiler writes them into the instructions' names. */
#define SUMS 0
#define KEYS 1
#define QUERIES_0 2
#define QUERIES_1 3
#define QUERIES_2 4
#define QUERIES_3 5

INLINE int is_tiled(const Look *look) {
    return look->head_dim % DEPTH == 0 && look->head_dim <= DEPTH * MOST_DEPTHS && look->each <= TILE_ROWS;
}

/* Fours of a query's numbers stand together, those of sixteen queries beside each other. */
static void configure(const Look *look, const int8_t *queries, int64_t few) {
    int8_t packed[MOST_DEPTHS][TILE_ROWS][FEW][4] __attribute__((aligned(CACHE_LINE)));
    memset(packed, 0, sizeof packed);
    for (int64_t query = 0; query < few; query++)
        for (int64_t d = 0; d < look->head_dim; d += 4)
            memcpy(packed[d / DEPTH][d % DEPTH / 4][query], queries + query * look->head_dim + d, 4);
    Tiles tiles = whole_tiles();
    tiles.rows[SUMS] = tiles.rows[KEYS] = look->each;
    _tile_loadconfig(&tiles);
    _tile_loadd(QUERIES_0, packed[0], TILE_BYTES);
    _tile_loadd(QUERIES_1, packed[1], TILE_BYTES);
    _tile_loadd(QUERIES_2, packed[2], TILE_BYTES);
    _tile_loadd(QUERIES_3, packed[3], TILE_BYTES);
}

#define ADD_DEPTH(number)                              \
    if (dim > number * DEPTH) {                        \
        _tile_loadd(KEYS, keys + number * DEPTH, dim); \
        _tile_dpbssd(SUMS, KEYS, QUERIES_##number);    \
    }

INLINE void nearest_by_tiles(const int8_t *keys, int64_t each, int64_t dim, float scale, Nearest nearest) {
    int32_t sums[TILE_ROWS][FEW] __attribute__((aligned(CACHE_LINE)));
    _tile_zero(SUMS);
    ADD_DEPTH(0)
    ADD_DEPTH(1)
    ADD_DEPTH(2)
    ADD_DEPTH(3)
    _tile_stored(SUMS, sums, TILE_BYTES);
    __m512i most = _mm512_load_si512(sums[0]);
    for (int64_t one = 1; one < each; one++) most = _mm512_max_epi32(most, _mm512_load_si512(sums[one]));
    _mm512_storeu_ps(nearest, _mm512_mul_ps(_mm512_cvtepi32_ps(most), _mm512_set1_ps(scale)));
}

#endif

INLINE void nearest_by_sums(const int8_t *queries, int64_t few, const int8_t *keys, int64_t each, int64_t dim,
                            float scale, Nearest nearest) {
    for (int64_t query = 0; query < few; query++) {
        int32_t most = INT32_MIN;
        for (int64_t one = 0; one < each; one++) {
            int32_t sum = 0;
            for (int64_t d = 0; d < dim; d++) sum += (int32_t)queries[query * dim + d] * keys[one * dim + d];
            most = sum > most ? sum : most;
        }
        nearest[query] = (float)most * scale;
    }
}

/* The scores of up to UNITS pieces from `unit` of a part on, for a few queries of one head. */
INLINE void score_units(const Look *look, const Part *part, int64_t head, int64_t row, int64_t few, int64_t unit,
                        int64_t count) {
    const int64_t unit_bytes = look->each * look->head_dim, at = head * part->units + unit;
    const int8_t *queries = look->queries + (head * look->rows + row) * look->head_dim;
    Nearest nearest[UNITS] __attribute__((aligned(CACHE_LINE)));
    for (int64_t i = 0; i < count; i++) {
        const int8_t *keys = part->keys + (at + i) * unit_bytes;
#if WHOLE_TILES
        if (is_tiled(look)) {
            nearest_by_tiles(keys, look->each, look->head_dim, part->scales[at + i], nearest[i]);
            continue;
        }
#endif
        nearest_by_sums(queries, few, keys, look->each, look->head_dim, part->scales[at + i], nearest[i]);
    }
    for (int64_t query = 0; query < few; query++) {
        const float scale = look->query_scales[head * look->rows + row + query];
        float *scores = look->scores + (head * look->rows + row + query) * look->stride + part->first_unit + unit;
        for (int64_t i = 0; i < count; i++) scores[i] = nearest[i][query] * scale;
    }
}

/* One head's scores for some of the parts. */
static void score_parts(const Look *look, int64_t head, int64_t begin, int64_t end) {
    const int64_t unit_bytes = look->each * look->head_dim;
    for (int64_t row = 0; row < look->rows; row += FEW) {
        const int64_t few = look->rows - row < FEW ? look->rows - row : FEW;
#if WHOLE_TILES
        if (is_tiled(look)) configure(look, look->queries + (head * look->rows + row) * look->head_dim, few);
#endif
        for (const Part *part = look->parts + begin; part < look->parts + end; part++) {
            if (row == 0 && part + 1 < look->parts + end) { /* where it lies, only its table knows */
                const int8_t *next = part[1].keys + head * part[1].units * unit_bytes;
                const int64_t bytes = (part[1].units < UNITS ? part[1].units : UNITS) * unit_bytes;
                for (int64_t line = 0; line < bytes; line += CACHE_LINE) __builtin_prefetch(next + line);
            }
            for (int64_t unit = 0; unit < part->units; unit += UNITS) {
                const int64_t left = part->units - unit;
                score_units(look, part, head, row, few, unit, left < UNITS ? left : UNITS);
            }
        }
#if WHOLE_TILES
        if (is_tiled(look)) _tile_release();
#endif
    }
}

/* One head's scores become shares; of all its queries the largest counts. */
static void share_out(const Look *look, int64_t head) {
    float *shares = look->shares + head * look->stride;
    memset(shares, 0, look->stride * sizeof *shares);
    for (int64_t row = 0; row < look->rows; row++) {
        float *scores = look->scores + (head * look->rows + row) * look->stride;
        for (int64_t unit = look->units; unit < look->stride; unit++) scores[unit] = NOWHERE;
        Floats largest = load(scores, 0, 0), sums = {0};
        for (int64_t unit = LANES; unit < look->stride; unit += LANES) largest = larger(largest, load(scores, unit, 0));
        const float top = largest_lane(largest);
        for (int64_t unit = 0; unit < look->stride; unit += LANES) {
            const Floats parts = exp_of(load(scores, unit, 0) - top);
            sums += parts;
            memcpy(scores + unit, &parts, sizeof parts);
        }
        const float total = sum_lanes(sums);
        for (int64_t unit = 0; unit < look->stride; unit += LANES) {
            const Floats most = larger(load(shares, unit, 0), load(scores, unit, 0) / total);
            memcpy(shares + unit, &most, sizeof most);
        }
    }
}

void recall_shares(const Look *look) {
    const int64_t pieces = (look->num_parts + PARTS - 1) / PARTS;
#pragma omp parallel num_threads(look->num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < look->num_looking * pieces; item++) {
            const int64_t begin = item % pieces * PARTS, end = begin + PARTS;
            score_parts(look, look->looking[item / pieces], begin, end < look->num_parts ? end : look->num_parts);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < look->num_looking; item++) share_out(look, look->looking[item]);
    }
}
