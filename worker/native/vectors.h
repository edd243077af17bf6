/* Vectors of float32 as wide as the CPU's, and what all kernels do with them: load, round, sum up, exp.
 *
 * Knows no tensors' shapes. bfloat16 is widened on the way in and rounded to nearest, ties to even, on the way out,
 * as torch does.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

#define CACHE_LINE 64 /* bytes */

#define INLINE static inline __attribute__((always_inline)) /* dtypes and small numbers become constants */

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

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

INLINE uint16_t bfloat16_of(float one) {
    uint32_t word;
    memcpy(&word, &one, sizeof word);
    const uint16_t nearest = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return one == one ? nearest : 0x7fc0;
}

INLINE float rounded(float one) {
    const uint16_t half = bfloat16_of(one);
    return load_one(&half, 0, 1);
}

INLINE void store_one(void *tensor, int64_t index, float one, int bf16) {
    if (bf16) ((uint16_t *)tensor)[index] = bfloat16_of(one);
    else ((float *)tensor)[index] = one;
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

#ifdef __AVX512DQ__

/* The largest lane of each of as many vectors. */
INLINE Floats largest_lanes(const Floats x[LANES]) {
    Floats fours[4]; /* each lane of four holds what is left of four vectors */
    for (int i = 0; i < 4; i++) {
        const Floats *four = x + 4 * i;
        const Floats first = larger(LOW_ONES(four[0], four[1]), HIGH_ONES(four[0], four[1]));
        const Floats second = larger(LOW_ONES(four[2], four[3]), HIGH_ONES(four[2], four[3]));
        fours[i] = larger(LOW_TWOS(first, second), HIGH_TWOS(first, second));
    }
#define LANES_OF(x, y, which) (Floats)_mm512_shuffle_f32x4((__m512)(x), (__m512)(y), which)
    const Floats first = larger(LANES_OF(fours[0], fours[1], 0x44), LANES_OF(fours[0], fours[1], 0xee));
    const Floats second = larger(LANES_OF(fours[2], fours[3], 0x44), LANES_OF(fours[2], fours[3], 0xee));
    return larger(LANES_OF(first, second, 0x88), LANES_OF(first, second, 0xdd));
#undef LANES_OF
}

/* 2^x for x <= 0, to about one unit in the last place: 2^floor(x) times a polynomial in the rest. */
INLINE Floats exp2_of(Floats x) {
    const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    Floats power = rest * 0.0018671306f + 0.009017029f;
    power = power * rest + 0.055799914f;
    power = power * rest + 0.24016445f;
    power = power * rest + 0.69315131f;
    power = power * rest + 1.0f;
    return (Floats)_mm512_scalef_ps((__m512)power, (__m512)x);
}

#endif
