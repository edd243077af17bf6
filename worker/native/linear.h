/* Linear layers in bfloat16, weights in panels. The layout of the struct is repeated in linear_cpu.py.
 *
 * A panel holds the weights of 16 outputs: [in / 2][16][2], so that one vector (a row of a tile, too) is two
 * neighbouring inputs' weights for all 16 of them. Sums are float32, and each output's are taken in an order that
 * depends on nothing but the number of inputs: a row's result is the same alone and in any batch.
 */
#pragma once
#include "tiles.h"

#define PANEL 16
#define BLOCK_ROWS 32 /* whose sums stay in tiles */
#define MOST_ROWS 256 /* that see a panel at once */
#define DEPTH 32     /* inputs come in multiples of this */

typedef struct {
    const uint16_t *panels; /* [ceil(out / PANEL)] of them, one after the other; what is beyond the last output is 0 */
    const uint16_t *bias;   /* [out], or NULL */
    int64_t in, out;
} Linear;

typedef float Block[2][BLOCK_ROWS][PANEL]; /* sums of BLOCK_ROWS rows, with a left and a right panel */

/* sums[row / BLOCK_ROWS][side][row % BLOCK_ROWS] = input[row] . panel, for 0 < rows <= MOST_ROWS rows. */
void multiply(const uint16_t *input, int packed, int64_t rows, const uint16_t *left, const uint16_t *right,
              int64_t in, Block *sums);

/* Called by every thread of a team, as those below; returns when all is written.
 * output[row] = linear(input[row]), plus `residual[row]` unless that is NULL, which may be the output itself. Rows of
 * input stand one behind the other, or `packed`, in tiles; those of output `output_stride` elements apart. */
void linear_in_team(const Linear *linear, const uint16_t *input, int packed, int64_t rows,
                    const uint16_t *residual, uint16_t *output, int64_t output_stride);

/* The same for several layers of one input; their outputs stand one behind the other in a row of `output`. */
void linears_in_team(const Linear *linears, int64_t num_linears, const uint16_t *input, int64_t rows,
                     uint16_t *output, int64_t output_stride);

/* output[row] = silu(gate(input[row])) * up(input[row]) */
void gated_in_team(const Linear *gate, const Linear *up, const uint16_t *input, int64_t rows,
                   uint16_t *output, int64_t output_stride);
