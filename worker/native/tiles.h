/* AMX: what is known of a CPU's tiles when the kernels are built, and how a thread gets them ready. */
#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && !defined(NO_TILES)
#define TILES 1
#else
#define TILES 0
#endif

#define TILE_ROWS 16
#define TILE_BYTES 64 /* of a row */

#if TILES

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Tiles;

/* All eight tiles of full size; whoever wants smaller ones changes this before it is loaded. */
INLINE Tiles whole_tiles(void) {
    Tiles tiles = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) tiles.row_bytes[tile] = TILE_BYTES, tiles.rows[tile] = TILE_ROWS;
    return tiles;
}

#endif
