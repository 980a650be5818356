/* The inner loops of a block besides its products: norm, rotation, attention, gate. Included by
   tile.h, and so once for every instruction set. */

/* Root mean square norm of one token. */
static TARGET void NAME(norm)(const float *x, const float *weight, float eps, float *out, int64_t n)
{
    float parts[8] = {0}, sum = 0;
    for (int64_t i = 0; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++)
            parts[k] += x[i + k] * x[i + k];
    for (int64_t i = n / 8 * 8; i < n; i++)
        sum += x[i] * x[i];
    for (int k = 0; k < 8; k++)
        sum += parts[k];
    const float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

/* Turn one head by its position; channel i pairs with i + half. */
static TARGET void NAME(rotate)(float *x, const float *cos, const float *sin, int64_t head_dim)
{
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cos[i] - second * sin[i];
        x[half + i] = second * cos[half + i] + first * sin[half + i];
    }
}

/* silu(gate) * up, into `gate`. */
static TARGET void NAME(gate)(float *gate, const float *up, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* Rows `first` ... of keys or values as float32: where they lie, or widened into `wide`. */
static inline __attribute__((always_inline)) TARGET const float *
NAME(floats)(const void *rows, int64_t bits, int64_t first, int64_t n, int64_t head_dim, float *wide)
{
    if (bits == 32)
        return (const float *)rows + first * head_dim;
    const uint16_t *narrow = (const uint16_t *)rows + first * head_dim;
    for (int64_t i = 0; i < n * head_dim; i++)
        wide[i] = from_bfloat(narrow[i]);
    return wide;
}

/* Scores of R queries `q` [R, head_dim] with the next keys [n_keys, head_dim], into `scores` [R, KEYS]. */
static inline __attribute__((always_inline)) TARGET void
NAME(score)(const int R, const float *const *q, const float *keys, int64_t n_keys, int64_t head_dim, float scale,
            float *scores)
{
    for (int64_t j = 0; j < n_keys; j++) {
        FLOAT sums[R];
        for (int r = 0; r < R; r++)
            sums[r] = FLOAT_ZERO();
        for (int64_t d = 0; d < head_dim; d += LANES) {
            const FLOAT key = LOAD_FLOATS(keys + j * head_dim + d);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                sums[r] = PLUS_PRODUCT(sums[r], key, LOAD_FLOATS(q[r] + d));
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            float lanes[LANES], sum = 0;
            STORE(lanes, sums[r]);
            for (int i = 0; i < LANES; i++)
                sum += lanes[i];
            scores[r * KEYS + j] = sum * scale;
        }
    }
}

/* Add R rows of weighted values to `out` [R, head_dim]. */
static inline __attribute__((always_inline)) TARGET void
NAME(weigh)(const int R, const float *weights, const float *values, int64_t n_keys, int64_t head_dim, float *const *out)
{
    for (int64_t d = 0; d < head_dim; d += 2 * LANES) {
        FLOAT sums[R][2];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 2; i++)
                sums[r][i] = LOAD_FLOATS(out[r] + d + i * LANES);
        for (int64_t j = 0; j < n_keys; j++) {
            const float *value = values + j * head_dim + d;
            const FLOAT low = LOAD_FLOATS(value), high = LOAD_FLOATS(value + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const FLOAT weight = FLOAT_SET(weights[r * KEYS + j]);
                sums[r][0] = PLUS_PRODUCT(sums[r][0], low, weight);
                sums[r][1] = PLUS_PRODUCT(sums[r][1], high, weight);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 2; i++)
                STORE(out[r] + d + i * LANES, sums[r][i]);
    }
}

/* Attention of up to four queries, query r over its first `n_seen[r]` keys, with a softmax that needs to
   see only KEYS scores at a time (Milakov and Gimelshein, arXiv:1805.02867). */
static inline __attribute__((always_inline)) TARGET void
NAME(attend_some)(const int R, const float *const *q, const struct seen *of, const int64_t *n_seen, int64_t head_dim,
                  float *const *out)
{
    const float scale = 1.0f / sqrtf((float)head_dim);
    float most[R], total[R], wide[KEYS * head_dim] ALIGNED;
    int64_t longest = 0;
    for (int r = 0; r < R; r++) {
        most[r] = -INFINITY;
        total[r] = 0;
        longest = n_seen[r] > longest ? n_seen[r] : longest;
        memset(out[r], 0, (size_t)head_dim * sizeof(float));
    }
    for (int64_t first = 0; first < longest; first += KEYS) {
        const int64_t n_keys = longest - first < KEYS ? longest - first : KEYS;
        float scores[R * KEYS];
        const float *keys = NAME(floats)(of->keys, of->bits, first, n_keys, head_dim, wide);
        NAME(score)(R, q, keys, n_keys, head_dim, scale, scores);
        for (int r = 0; r < R; r++) {
            float *row = scores + r * KEYS;
            const int64_t seen = n_seen[r] - first < n_keys ? n_seen[r] - first : n_keys;
            float here = most[r];
            for (int64_t j = 0; j < seen; j++)
                here = row[j] > here ? row[j] : here;
            for (int64_t j = seen > 0 ? seen : 0; j < KEYS; j++)
                row[j] = -INFINITY;
            if (here == -INFINITY) { /* sees none of these, and has seen none: a NaN came in */
                here = 0;
            }
            float parts[8] = {0};
            for (int64_t j = 0; j < KEYS; j += 8)
                for (int k = 0; k < 8; k++) {
                    row[j + k] = exponential(row[j + k] - here);
                    parts[k] += row[j + k];
                }
            const float faded = exponential(most[r] - here);
            total[r] *= faded;
            for (int k = 0; k < 8; k++)
                total[r] += parts[k];
            if (faded != 1.0f)
                for (int64_t d = 0; d < head_dim; d++)
                    out[r][d] *= faded;
            most[r] = here;
        }
        const float *values = NAME(floats)(of->values, of->bits, first, n_keys, head_dim, wide);
        NAME(weigh)(R, scores, values, n_keys, head_dim, out);
    }
    for (int r = 0; r < R; r++)
        for (int64_t d = 0; d < head_dim; d++)
            out[r][d] /= total[r];
}

#include "attend_many.h"

/* Attention of up to QUERIES queries to the same keys and values, query r over its first `n_seen[r]`. */
static TARGET void NAME(attend)(int queries, const float *const *q, const struct seen *of, const int64_t *n_seen,
                                int64_t head_dim, float *const *out)
{
    enum { MOST = MOST_VECTORS * LANES };
    for (int n; queries > 0; queries -= n, q += n, n_seen += n, out += n) {
        n = queries < MOST ? queries : MOST;
        switch (n) {
        case 1: NAME(attend_some)(1, q, of, n_seen, head_dim, out); break;
        case 2: NAME(attend_some)(2, q, of, n_seen, head_dim, out); break;
        case 3: NAME(attend_some)(3, q, of, n_seen, head_dim, out); break;
        case 4: NAME(attend_some)(4, q, of, n_seen, head_dim, out); break;
        default:
            switch ((n + LANES - 1) / LANES) {
            case 1: NAME(attend_panel)(1, n, q, of, n_seen, head_dim, out); break;
            case 2: NAME(attend_panel)(2, n, q, of, n_seen, head_dim, out); break;
            default: NAME(attend_panel)(3, n, q, of, n_seen, head_dim, out);
            }
        }
    }
}
