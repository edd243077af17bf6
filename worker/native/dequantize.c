/* A quantized block's codes as the bfloat16 keys and values that they stand for: one pass, straight into the pool.
 *
 * The parts are those of worker/tiers/codecs/form.py; every number is what torch's operations, one after the other,
 * give on any device: nothing is fused, and what is rounded there is rounded here.
 */
#pragma GCC optimize("fp-contract=off")
#include <stdint.h>
#include <string.h>

#define MAX_DIM 512

typedef struct {
    const uint8_t *sinks, *key_bases, *value_bases, *key_units, *key_scales, *key_middles, *value_scales, *keys, *values;
    const float *cos, *sin; /* [tokens, pairs]; pairs 0: keys are not turned */
    uint16_t *out;          /* [layers, 2, heads, tokens, dim], of which the last two are as in the pool */
    int64_t layer_stride, kind_stride, head_stride; /* of `out`, in elements */
    int64_t layers, heads, tokens, dim, key_group, value_group, num_sinks, pairs;
    int64_t nibble_keys, nibble_values;
} Block;

static inline uint16_t to_bfloat16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)rounded;
}

static inline int32_t int16_at(const uint8_t *part, int64_t index) {
    int16_t number;
    memcpy(&number, part + 2 * index, 2);
    return number;
}

static inline float from_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline float scale(uint8_t code, int32_t base) { return from_bits((uint32_t)(code + base) << 19); }

/* One token's codes; of nibbles, the lower ones hold the first half of the tokens. */
static inline void read_codes(const uint8_t *part, int64_t token, const Block *b, int64_t nibbles, float *codes) {
    if (!nibbles) {
        const int8_t *row = (const int8_t *)part + token * b->dim;
        for (int64_t d = 0; d < b->dim; d++) codes[d] = (float)row[d];
        return;
    }
    int64_t half = b->tokens / 2, is_upper = token >= half;
    const uint8_t *row = part + (token - (is_upper ? half : 0)) * b->dim;
    if (is_upper)
        for (int64_t d = 0; d < b->dim; d++) codes[d] = (float)(int8_t)(row[d] & 0xF0) + 7.5f;
    else
        for (int64_t d = 0; d < b->dim; d++) codes[d] = (float)(int8_t)(uint8_t)(row[d] << 4) + 7.5f;
}

static void decode_keys(const Block *b, int64_t row, uint16_t *out) {
    int64_t dim = b->dim, groups = b->tokens / b->key_group, code_tokens = b->nibble_keys ? b->tokens / 2 : b->tokens;
    const uint8_t *codes = b->keys + row * code_tokens * dim;
    const uint8_t *scales = b->key_scales + row * groups * dim;
    const int8_t *middles = (const int8_t *)b->key_middles + row * groups * dim;
    int32_t base = int16_at(b->key_bases, row);
    float unit = from_bits((uint32_t)int16_at(b->key_units, row) << 16);
    float scaled[MAX_DIM], middle[MAX_DIM], key[MAX_DIM];
    for (int64_t token = 0; token < b->tokens; token++) {
        if (token % b->key_group == 0) {
            const uint8_t *group_scales = scales + token / b->key_group * dim;
            const int8_t *group_middles = middles + token / b->key_group * dim;
            for (int64_t d = 0; d < dim; d++) scaled[d] = scale(group_scales[d], base);
            for (int64_t d = 0; d < dim; d++) middle[d] = (float)group_middles[d] * unit;
        }
        read_codes(codes, token, b, b->nibble_keys, key);
        for (int64_t d = 0; d < dim; d++) {
            float product = key[d] * scaled[d];
            key[d] = product + middle[d];
        }
        const float *cos = b->cos + token * b->pairs, *sin = b->sin + token * b->pairs;
        for (int64_t p = 0; p < b->pairs; p++) {
            float first = key[p], second = key[p + b->pairs];
            float along = first * cos[p], across = first * sin[p], back = second * sin[p], turned = second * cos[p];
            key[p] = along - back;
            key[p + b->pairs] = turned + across;
        }
        for (int64_t d = 0; d < dim; d++) out[token * dim + d] = to_bfloat16(key[d]);
    }
}

static void decode_values(const Block *b, int64_t row, uint16_t *out) {
    int64_t dim = b->dim, groups = dim / b->value_group, code_tokens = b->nibble_values ? b->tokens / 2 : b->tokens;
    const uint8_t *codes = b->values + row * code_tokens * dim;
    const uint8_t *scales = b->value_scales + row * b->tokens * groups;
    int32_t base = int16_at(b->value_bases, row);
    float value[MAX_DIM];
    for (int64_t token = 0; token < b->tokens; token++) {
        read_codes(codes, token, b, b->nibble_values, value);
        for (int64_t group = 0; group < groups; group++) {
            float by = scale(scales[token * groups + group], base);
            for (int64_t d = group * b->value_group; d < (group + 1) * b->value_group; d++)
                out[token * dim + d] = to_bfloat16(value[d] * by);
        }
    }
}

void dequantize(const Block *b) {
    int64_t sinks = b->num_sinks * b->dim;
    for (int64_t row = 0; row < b->layers * b->heads; row++) {
        uint16_t *keys = b->out + row / b->heads * b->layer_stride + row % b->heads * b->head_stride;
        uint16_t *values = keys + b->kind_stride;
        decode_keys(b, row, keys);
        decode_values(b, row, values);
        memcpy(keys, b->sinks + 2 * (2 * row) * sinks, 2 * sinks);
        memcpy(values, b->sinks + 2 * (2 * row + 1) * sinks, 2 * sinks);
    }
}
