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

/* Sixteen rows of sixteen words become columns. */
INLINE void transpose(__m512i rows[16]) {
    __m512i turned[16];
    for (int i = 0; i < 16; i += 2) {
        turned[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        turned[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(turned[i + j], turned[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(turned[i + j], turned[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            turned[j + i] = _mm512_shuffle_i32x4(rows[j + i], rows[j + i + 4], 0x88);
            turned[j + i + 4] = _mm512_shuffle_i32x4(rows[j + i], rows[j + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(turned[i], turned[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(turned[i], turned[i + 8], 0xdd);
    }
}

#endif
