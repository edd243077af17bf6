/* Rows of bfloat16 times two panels of weights: the one inner loop of all linear layers.
 *
 * With AMX by tiles of 16 rows and 32 inputs; else by vectors, which multiply pairs where the CPU has AVX512-BF16 and
 * widen them to float32 where it has not. Weights are read once for all rows, in the order they lie.
 */
#include "linear.h"
#include "vectors.h"

#define AHEAD 512 /* bytes between what is asked of memory and what is used, of each panel: measured, half a tile */
#define STEP (DEPTH * PANEL) /* elements of a panel that one step takes: a tile */
#define LENGTH 256 /* inputs whose weights stay in the nearest cache */

INLINE void ask_for(const uint16_t *panel) {
    for (int64_t line = 0; line < STEP * 2; line += CACHE_LINE)
        __builtin_prefetch((const char *)panel + AHEAD + line);
}

#if TILES

/* The tiles, by number: the compiler writes them into the instructions' names. */
#define LEFT 0
#define RIGHT 1
#define LOWER_LEFT 2
#define LOWER_RIGHT 3
#define UPPER_INPUT 4
#define LOWER_INPUT 5
#define LEFT_PANEL 6
#define RIGHT_PANEL 7

/* Make the tiles as high as the rows are many; all of them are 0 then. */
INLINE void configure(int upper, int lower) {
    Tiles tiles = whole_tiles();
    tiles.rows[LEFT] = tiles.rows[RIGHT] = tiles.rows[UPPER_INPUT] = upper;
    if (lower) tiles.rows[LOWER_LEFT] = tiles.rows[LOWER_RIGHT] = tiles.rows[LOWER_INPUT] = lower;
    _tile_loadconfig(&tiles);
}

/* Add the inputs [begin, end) to the sums of one block of rows. `asks`: the panels are not in a cache yet. */
INLINE void add_inputs(const uint16_t *input, int64_t in, int packed, int lower, const uint16_t *left,
                       const uint16_t *right, int64_t begin, int64_t end, Block sums, int asks) {
    const int64_t row_bytes = (packed ? DEPTH : in) * 2, step = packed ? PANEL : 1;
    if (begin) {
        _tile_loadd(LEFT, sums[0], CACHE_LINE);
        _tile_loadd(RIGHT, sums[1], CACHE_LINE);
        if (lower) _tile_loadd(LOWER_LEFT, sums[0][PANEL], CACHE_LINE);
        if (lower) _tile_loadd(LOWER_RIGHT, sums[1][PANEL], CACHE_LINE);
    } else {
        _tile_zero(LEFT);
        _tile_zero(RIGHT);
        if (lower) _tile_zero(LOWER_LEFT);
        if (lower) _tile_zero(LOWER_RIGHT);
    }
    for (int64_t i = begin; i < end; i += DEPTH) {
        if (asks) ask_for(left + i * PANEL);
        if (asks) ask_for(right + i * PANEL);
        _tile_loadd(LEFT_PANEL, left + i * PANEL, CACHE_LINE);
        _tile_loadd(RIGHT_PANEL, right + i * PANEL, CACHE_LINE);
        _tile_loadd(UPPER_INPUT, input + i * step, row_bytes);
        _tile_dpbf16ps(LEFT, UPPER_INPUT, LEFT_PANEL);
        _tile_dpbf16ps(RIGHT, UPPER_INPUT, RIGHT_PANEL);
        if (!lower) continue;
        _tile_loadd(LOWER_INPUT, input + PANEL * in + i * step, row_bytes);
        _tile_dpbf16ps(LOWER_LEFT, LOWER_INPUT, LEFT_PANEL);
        _tile_dpbf16ps(LOWER_RIGHT, LOWER_INPUT, RIGHT_PANEL);
    }
    _tile_stored(LEFT, sums[0], CACHE_LINE);
    _tile_stored(RIGHT, sums[1], CACHE_LINE);
    if (lower) _tile_stored(LOWER_LEFT, sums[0][PANEL], CACHE_LINE);
    if (lower) _tile_stored(LOWER_RIGHT, sums[1][PANEL], CACHE_LINE);
}

/* Whole blocks of rows take the panels in lengths that stay in the nearest cache until all blocks have seen them. What
 * is left of the rows takes them in one go: the sums of a row are the same ones, in the same order. */
void multiply(const uint16_t *input, int packed, int64_t rows, const uint16_t *left, const uint16_t *right,
              int64_t in, Block *sums) {
    const int64_t blocks = rows / BLOCK_ROWS, left_over = rows % BLOCK_ROWS;
    if (blocks) {
        configure(PANEL, PANEL);
        for (int64_t begin = 0; begin < in; begin += LENGTH) {
            const int64_t end = begin + LENGTH < in ? begin + LENGTH : in;
            for (int64_t block = 0; block < blocks; block++)
                add_inputs(input + block * BLOCK_ROWS * in, in, packed, PANEL, left, right, begin, end, sums[block],
                           block == 0);
        }
    }
    if (left_over) {
        const int upper = left_over < PANEL ? left_over : PANEL, lower = left_over - upper;
        configure(upper, lower);
        add_inputs(input + blocks * BLOCK_ROWS * in, in, packed, lower, left, right, 0, in, sums[blocks], !blocks);
    }
    _tile_release();
}

#else

typedef float Sums __attribute__((vector_size(PANEL * 4)));
typedef uint32_t Pairs __attribute__((vector_size(PANEL * 4)));

#ifdef __AVX512F__
#define FEW 8 /* rows whose sums stay in registers */
#else
#define FEW 2
#endif

/* sums + the pair of inputs times the pairs of weights */
INLINE Sums add_pairs(Sums sums, uint32_t inputs, Pairs weights) {
#ifdef __AVX512BF16__
    return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(inputs), (__m512bh)weights);
#else
    const uint32_t words[2] = {inputs << 16, inputs & 0xffff0000u};
    float one, other;
    memcpy(&one, &words[0], sizeof one);
    memcpy(&other, &words[1], sizeof other);
    sums += one * (Sums)(weights << 16);
    return sums + other * (Sums)(weights & 0xffff0000u);
#endif
}

INLINE void multiply_few(const uint16_t *input, int rows, const uint16_t *left, const uint16_t *right, int64_t in,
                         float first[][PANEL], float second[][PANEL]) {
    Sums sums[2][FEW] = {0};
    for (int64_t i = 0; i < in; i += 2, left += 2 * PANEL, right += 2 * PANEL) {
        Pairs weights[2];
        memcpy(&weights[0], left, sizeof(Pairs));
        memcpy(&weights[1], right, sizeof(Pairs));
        __builtin_prefetch((const char *)left + AHEAD);
        __builtin_prefetch((const char *)right + AHEAD);
        for (int row = 0; row < rows; row++) {
            uint32_t inputs;
            memcpy(&inputs, input + row * in + i, sizeof inputs);
            for (int side = 0; side < 2; side++) sums[side][row] = add_pairs(sums[side][row], inputs, weights[side]);
        }
    }
    memcpy(first, sums[0], rows * sizeof(Sums));
    memcpy(second, sums[1], rows * sizeof(Sums));
}

void multiply(const uint16_t *input, int packed, int64_t rows, const uint16_t *left, const uint16_t *right,
              int64_t in, Block *sums) {
    (void)packed; /* never, without tiles */
    for (int64_t row = 0; row < rows;) {
        const uint16_t *from = input + row * in;
        const int64_t block = row / BLOCK_ROWS, first = row % BLOCK_ROWS; /* few rows never cross a block */
#define ROWS(few)                                                                                             \
    multiply_few(from, few, left, right, in, &sums[block][0][first], &sums[block][1][first]), row += few
        if (rows - row >= 8 && FEW >= 8) ROWS(8);
        else if (rows - row >= 4 && FEW >= 4) ROWS(4);
        else if (rows - row >= 2) ROWS(2);
        else ROWS(1);
#undef ROWS
    }
}

#endif
