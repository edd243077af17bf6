/* Linear layers for every number of rows: panels are shared out among the threads, each of them done by one. */
#include "linear.h"
#include "vectors.h"

#define AT_ONCE 2 /* pairs of panels that a thread takes: neighbours, so that it reads on where it has read */

INLINE int64_t panels_of(const Linear *linear) { return (linear->out + PANEL - 1) / PANEL; }

INLINE const uint16_t *panel_of(const Linear *linear, int64_t panel) {
    return linear->panels + panel * PANEL * linear->in;
}

/* Store a panel's sums of one row, biased and rounded; with a residual, rounded once more behind it, as torch does. */
INLINE void finish(const Linear *linear, int64_t panel, const float *sums, const uint16_t *residual, uint16_t *output) {
    const int64_t first = panel * PANEL, most = linear->out - first, count = most < PANEL ? most : PANEL;
    for (int64_t i = 0; i < count; i++) {
        float one = linear->bias ? sums[i] + load_one(linear->bias, first + i, 1) : sums[i];
        if (residual) one = rounded(one) + load_one(residual, first + i, 1);
        store_one(output, first + i, one, 1);
    }
}

INLINE void linear_pair(const Linear *linear, int64_t pair, const uint16_t *input, int packed, int64_t rows,
                        const uint16_t *residual, uint16_t *output, int64_t output_stride) {
    const int64_t left = 2 * pair, right = left + 1 < panels_of(linear) ? left + 1 : left;
    Block sums[MOST_ROWS / BLOCK_ROWS] __attribute__((aligned(CACHE_LINE)));
    for (int64_t first = 0; first < rows; first += MOST_ROWS) {
        const int64_t few = rows - first < MOST_ROWS ? rows - first : MOST_ROWS;
        multiply(input + first * linear->in, packed, few, panel_of(linear, left), panel_of(linear, right), linear->in,
                 sums);
        for (int64_t row = 0; row < few; row++) {
            const int64_t at = (first + row) * output_stride;
            const uint16_t *before = residual ? residual + at : 0;
            const float(*block)[BLOCK_ROWS][PANEL] = sums[row / BLOCK_ROWS];
            finish(linear, left, block[0][row % BLOCK_ROWS], before, output + at);
            if (right != left) finish(linear, right, block[1][row % BLOCK_ROWS], before, output + at);
        }
    }
}

void linear_in_team(const Linear *linear, const uint16_t *input, int packed, int64_t rows,
                    const uint16_t *residual, uint16_t *output, int64_t output_stride) {
    const int64_t pairs = (panels_of(linear) + 1) / 2;
#pragma omp for schedule(dynamic, AT_ONCE)
    for (int64_t pair = 0; pair < pairs; pair++)
        linear_pair(linear, pair, input, packed, rows, residual, output, output_stride);
}

void linears_in_team(const Linear *linears, int64_t num_linears, const uint16_t *input, int64_t rows,
                     uint16_t *output, int64_t output_stride) {
    int64_t all = 0;
    for (int64_t i = 0; i < num_linears; i++) all += (panels_of(&linears[i]) + 1) / 2;
#pragma omp for schedule(dynamic, AT_ONCE)
    for (int64_t item = 0; item < all; item++) {
        const Linear *linear = linears;
        int64_t pair = item, column = 0;
        for (int64_t pairs; pair >= (pairs = (panels_of(linear) + 1) / 2); linear++)
            pair -= pairs, column += linear->out;
        linear_pair(linear, pair, input, 0, rows, 0, output + column, output_stride);
    }
}

/* silu as torch has it: in float32, from and to bfloat16. */
INLINE void finish_gated(const Linear *gate, int64_t panel, const float *gates, const float *ups, const Linear *up,
                         uint16_t *output) {
    const int64_t first = panel * PANEL, most = gate->out - first, count = most < PANEL ? most : PANEL;
    float opened[PANEL], silu[PANEL];
    for (int64_t i = 0; i < PANEL; i++) {
        const int biased = i < count && gate->bias;
        opened[i] = rounded(biased ? gates[i] + load_one(gate->bias, first + i, 1) : gates[i]);
    }
    for (int64_t i = 0; i < PANEL; i += LANES) {
        const Floats x = load(opened, i, 0), small = exp_of(choose(x > 0, -x, x)); /* exp(-|x|) */
        const Floats y = x * choose(x > 0, (Floats){0} + 1, small) / (1 + small);
        memcpy(silu + i, &y, sizeof y);
    }
    for (int64_t i = 0; i < count; i++) {
        const float other = up->bias ? ups[i] + load_one(up->bias, first + i, 1) : ups[i];
        store_one(output, first + i, rounded(silu[i]) * rounded(other), 1);
    }
}

void gated_in_team(const Linear *gate, const Linear *up, const uint16_t *input, int64_t rows,
                   uint16_t *output, int64_t output_stride) {
    const int64_t panels = panels_of(gate);
#pragma omp for schedule(dynamic, 2 * AT_ONCE)
    for (int64_t panel = 0; panel < panels; panel++) {
        Block sums[MOST_ROWS / BLOCK_ROWS] __attribute__((aligned(CACHE_LINE)));
        for (int64_t first = 0; first < rows; first += MOST_ROWS) {
            const int64_t few = rows - first < MOST_ROWS ? rows - first : MOST_ROWS;
            multiply(input + first * gate->in, 0, few, panel_of(gate, panel), panel_of(up, panel), gate->in, sums);
            for (int64_t row = 0; row < few; row++) {
                const float(*block)[BLOCK_ROWS][PANEL] = sums[row / BLOCK_ROWS];
                finish_gated(gate, panel, block[0][row % BLOCK_ROWS], block[1][row % BLOCK_ROWS], up,
                             output + (first + row) * output_stride);
            }
        }
    }
}

/* Put rows [rows, in] in the order of tiles: [ceil(rows / PANEL)][in / DEPTH][PANEL][DEPTH]. */
static void pack_in_team(const uint16_t *input, int64_t rows, int64_t in, uint16_t *packed) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        uint16_t *first = packed + row / PANEL * PANEL * in + row % PANEL * DEPTH;
        for (int64_t i = 0; i < in; i += DEPTH) memcpy(first + i * PANEL, input + row * in + i, DEPTH * sizeof *input);
    }
}

/* One layer by a team of its own: input [rows, in] and output [rows, out], contiguous. `scratch` may be NULL; with room
 * for the input in whole tiles, many rows are put in their order first: rows a power of two apart keep driving each
 * other out of the caches. */
void linear(const Linear *layer, const uint16_t *input, int64_t rows, uint16_t *scratch, uint16_t *output,
            int64_t num_threads) {
    const int packed = TILES && scratch;
#pragma omp parallel num_threads(num_threads)
    {
        if (packed) pack_in_team(input, rows, layer->in, scratch);
        linear_in_team(layer, packed ? scratch : input, packed, rows, 0, output, layer->out);
    }
}
