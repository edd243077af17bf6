/* A step of few rows through a whole model, by one team of threads: the layers of Llama and its kin.
 *
 *     hidden += attention_out(attention(turned(attention_in(norm(hidden)))))
 *     hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))
 *
 * All is bfloat16, and is rounded where transformers' modules round; sums are float32. The layout of the structs is
 * repeated in fused_step.py.
 */
#include "attention.h"
#include "linear.h"
#include "vectors.h"

#define WIDEST_HEAD 512

typedef struct {
    Linear attention_in[3]; /* queries, keys, values */
    Linear attention_out, gate, up, down;
    const uint16_t *before_attention, *before_mlp; /* weights of norms [hidden] */
    const uint16_t *query_norm, *key_norm;         /* [head_dim], or NULL */
    uint16_t *keys, *values;                       /* [kv_heads, slots, head_dim], of the pool */
    float scaling, epsilon, query_epsilon, key_epsilon;
} Layer;

typedef struct {
    const Layer *layers;
    Linear head;
    const uint16_t *last_norm; /* [hidden] */
    int64_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, kv_head_stride;
    float last_epsilon;
} Model;

typedef struct {
    const Step *const *decoding;   /* of each layer, or NULL: rows of decoding sequences */
    const Prompts *const *prompts; /* of each layer, or NULL: all other rows. NULL on a CPU without tiles */
    const int64_t *slots;         /* [rows]: where each row's key and value go */
    const uint16_t *cos, *sin;    /* [rows, head_dim] */
    const int64_t *wanted;        /* [num_wanted]: rows that logits are for */
    uint16_t *hidden;             /* [rows, hidden]: the tokens' embeddings, overwritten */
    uint16_t *normed, *parts, *attended, *gated; /* scratch; a row of parts: all heads of queries, keys and values */
    uint16_t *logits;  /* [num_wanted, vocab] */
    uint16_t *queries; /* [layers, rows, heads, head_dim]: a copy of them, turned; or NULL */
    int64_t rows, num_wanted, num_threads;
} Batch;

/* output = weight * input / rms(input); may be in place. */
INLINE void norm(const uint16_t *input, const uint16_t *weight, int64_t dim, float epsilon, uint16_t *output) {
    Floats squares = {0};
    for (int64_t d = 0; d < dim; d += LANES) {
        const Floats x = load(input, d, 1);
        squares += x * x;
    }
    const float scale = 1.0f / sqrtf(sum_lanes(squares) / dim + epsilon);
    for (int64_t d = 0; d < dim; d++)
        store_one(output, d, load_one(weight, d, 1) * rounded(load_one(input, d, 1) * scale), 1);
}

/* RoPE on one head: output[i] = head[i] * cos[i] -+ head[i + half] * sin[i]; not in place. */
INLINE void turn(const uint16_t *head, const uint16_t *cos, const uint16_t *sin, int64_t dim, uint16_t *output) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = load_one(head, i, 1), second = load_one(head, i + half, 1);
        store_one(output, i, rounded(first * load_one(cos, i, 1)) + rounded(-second * load_one(sin, i, 1)), 1);
        store_one(output, i + half,
                  rounded(second * load_one(cos, i + half, 1)) + rounded(first * load_one(sin, i + half, 1)), 1);
    }
}

INLINE int64_t width_of(const Model *model) { return (model->heads + 2 * model->kv_heads) * model->head_dim; }

/* One head of a row: norm and turn queries, and keys on their way into the pool; values go there as they are. */
INLINE void place_head(const Model *model, const Layer *layer, const Batch *batch, int64_t number, int64_t row,
                       int64_t head) {
    const int64_t dim = model->head_dim, key = head - model->heads, value = key - model->kv_heads;
    uint16_t *part = batch->parts + row * width_of(model) + head * dim, normed[WIDEST_HEAD];
    const int64_t place = (value >= 0 ? value : key) * model->kv_head_stride + batch->slots[row] * dim;
    if (value >= 0) {
        memcpy(layer->values + place, part, dim * sizeof *part);
        return;
    }
    const uint16_t *weight = key >= 0 ? layer->key_norm : layer->query_norm;
    if (weight) norm(part, weight, dim, key >= 0 ? layer->key_epsilon : layer->query_epsilon, normed);
    else memcpy(normed, part, dim * sizeof *part);
    turn(normed, batch->cos + row * dim, batch->sin + row * dim, dim, key >= 0 ? layer->keys + place : part);
    if (key < 0 && batch->queries)
        memcpy(batch->queries + ((number * batch->rows + row) * model->heads + head) * dim, part, dim * sizeof *part);
}

static void norm_in_team(const Model *model, const Batch *batch, const uint16_t *weight, float epsilon) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch->rows; row++)
        norm(batch->hidden + row * model->hidden, weight, model->hidden, epsilon, batch->normed + row * model->hidden);
}

static void layer_in_team(const Model *model, const Layer *layer, const Batch *batch, int64_t number) {
    const int64_t rows = batch->rows, hidden = model->hidden, width = width_of(model);
    const int64_t parts = model->heads + 2 * model->kv_heads;
    norm_in_team(model, batch, layer->before_attention, layer->epsilon);
    linears_in_team(layer->attention_in, 3, batch->normed, rows, batch->parts, width);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < rows * parts; item++)
        place_head(model, layer, batch, number, item / parts, item % parts);
    if (batch->decoding)
        attend_in_team(batch->decoding[number], batch->parts, width, model->head_dim, layer->keys, layer->values,
                       batch->attended, layer->scaling);
#if TILES
    if (batch->prompts)
        prompts_in_team(batch->prompts[number], batch->parts, width, model->head_dim, layer->keys, layer->values,
                        batch->attended, layer->scaling);
#endif
    linear_in_team(&layer->attention_out, batch->attended, 0, rows, batch->hidden, batch->hidden, hidden);
    norm_in_team(model, batch, layer->before_mlp, layer->epsilon);
    gated_in_team(&layer->gate, &layer->up, batch->normed, rows, batch->gated, model->intermediate);
    linear_in_team(&layer->down, batch->gated, 0, rows, batch->hidden, batch->hidden, hidden);
}

void fused_step(const Model *model, const Batch *batch) {
    const int64_t hidden = model->hidden;
#pragma omp parallel num_threads(batch->num_threads)
    {
        for (int64_t i = 0; i < model->num_layers; i++)
            layer_in_team(model, &model->layers[i], batch, i);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch->num_wanted; i++)
            norm(batch->hidden + batch->wanted[i] * hidden, model->last_norm, hidden, model->last_epsilon,
                 batch->normed + i * hidden);
        linear_in_team(&model->head, batch->normed, 0, batch->num_wanted, 0, batch->logits, model->head.out);
    }
}
