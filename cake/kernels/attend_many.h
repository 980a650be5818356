/* Attention of many queries, one in every lane, so that no sum goes across a vector: a panel of
   V * LANES. What is kept of it is [.., V * LANES], with a row for every channel of the queries and
   results and for every key of the scores. Every sum is made in the order of `attend_some`, so that no
   bit of a token depends on its company. Included by attend.h, and so once for every instruction set. */

/* Scores of a panel with K keys: sums over every LANES-th channel, then the sum of those. */
static inline __attribute__((always_inline)) TARGET void
NAME(score_panel)(const int K, const int V, const float *q, const float *keys, int64_t head_dim, float *scores)
{
    for (int64_t lane = 0; lane < LANES; lane++) {
        FLOAT sums[4][MOST_VECTORS];
#pragma GCC unroll 4
        for (int k = 0; k < K; k++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sums[k][v] = FLOAT_ZERO();
        for (int64_t d = lane; d < head_dim; d += LANES) {
            FLOAT channel[MOST_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                channel[v] = LOAD_FLOATS(q + (d * V + v) * LANES);
#pragma GCC unroll 4
            for (int k = 0; k < K; k++) {
                const FLOAT key = FLOAT_SET(keys[k * head_dim + d]);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++)
                    sums[k][v] = PLUS_PRODUCT(sums[k][v], key, channel[v]);
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < K; k++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                float *score = scores + (k * V + v) * LANES;
                STORE(score, lane ? PLUS(LOAD_FLOATS(score), sums[k][v]) : sums[k][v]);
            }
    }
}

/* Add weighted values to the results of a panel. */
static inline __attribute__((always_inline)) TARGET void
NAME(weigh_panel)(const int V, const float *weights, const float *values, int64_t n_keys, int64_t head_dim, float *out)
{
    enum { CHANNELS = 4 };
    for (int64_t d = 0; d < head_dim; d += CHANNELS) {
        FLOAT sums[CHANNELS][MOST_VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; c++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sums[c][v] = LOAD_FLOATS(out + ((d + c) * V + v) * LANES);
        for (int64_t j = 0; j < n_keys; j++) {
            FLOAT weight[MOST_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                weight[v] = LOAD_FLOATS(weights + (j * V + v) * LANES);
#pragma GCC unroll 4
            for (int c = 0; c < CHANNELS; c++) {
                const FLOAT value = FLOAT_SET(values[j * head_dim + d + c]);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++)
                    sums[c][v] = PLUS_PRODUCT(sums[c][v], value, weight[v]);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; c++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                STORE(out + ((d + c) * V + v) * LANES, sums[c][v]);
    }
}

/* From scores to weights; totals and results fade where a larger score appeared. */
static inline __attribute__((always_inline)) TARGET void
NAME(soften_panel)(const int width, float scale, float *scores, float *most, float *total, float *out, int64_t head_dim)
{
    enum { MOST = MOST_VECTORS * LANES };
    float here[MOST], faded[MOST], parts[8][MOST];
    memcpy(here, most, (size_t)width * sizeof *here);
    for (int j = 0; j < KEYS; j++)
        for (int r = 0; r < width; r++) {
            const float score = scores[j * width + r] *= scale;
            here[r] = score > here[r] ? score : here[r];
        }
    int fades = 0;
    for (int r = 0; r < width; r++) {
        here[r] = here[r] == -INFINITY ? 0 : here[r]; /* as above: a NaN came in */
        faded[r] = exponential(most[r] - here[r]);
        total[r] *= faded[r];
        most[r] = here[r];
        fades |= faded[r] != 1.0f;
    }
    memset(parts, 0, sizeof parts);
    for (int j = 0; j < KEYS; j++)
        for (int r = 0; r < width; r++) {
            scores[j * width + r] = exponential(scores[j * width + r] - here[r]);
            parts[j % 8][r] += scores[j * width + r];
        }
    for (int k = 0; k < 8; k++)
        for (int r = 0; r < width; r++)
            total[r] += parts[k][r];
    for (int64_t d = 0; fades && d < head_dim; d++)
        for (int r = 0; r < width; r++)
            out[d * width + r] *= faded[r];
}

/* Scores of a panel with the next keys, those that a query may not see among them as -INFINITY. */
static inline __attribute__((always_inline)) TARGET void
NAME(score_tile)(const int V, const float *q, const float *keys, int64_t n_keys, int64_t head_dim,
                 const int64_t *n_seen, int64_t first, float *scores)
{
    const int width = V * LANES;
    int64_t j = 0;
    for (; j + 4 <= n_keys; j += 4)
        NAME(score_panel)(4, V, q, keys + j * head_dim, head_dim, scores + j * width);
    for (; j < n_keys; j++)
        NAME(score_panel)(1, V, q, keys + j * head_dim, head_dim, scores + j * width);
    for (int r = 0; r < width; r++)
        for (j = n_seen[r] > first ? n_seen[r] - first : 0; j < KEYS; j++)
            scores[j * width + r] = -INFINITY;
}

static inline __attribute__((always_inline)) TARGET void
NAME(attend_panel)(const int V, int queries, const float *const *q, const struct seen *of, const int64_t *n_seen,
                   int64_t head_dim, float *const *out)
{
    enum { MOST = MOST_VECTORS * LANES };
    const int width = V * LANES;
    const float scale = 1.0f / sqrtf((float)head_dim);
    float asked[head_dim * width] ALIGNED, found[head_dim * width] ALIGNED, scores[KEYS * MOST] ALIGNED;
    float most[MOST], total[MOST], wide[KEYS * head_dim] ALIGNED;
    int64_t seen[MOST] = {0}, longest = 0; /* lanes without a query see nothing */
    memset(asked, 0, sizeof asked);
    memset(found, 0, sizeof found);
    for (int r = 0; r < width; r++) {
        most[r] = -INFINITY;
        total[r] = 0;
    }
    for (int r = 0; r < queries; r++) {
        seen[r] = n_seen[r];
        longest = n_seen[r] > longest ? n_seen[r] : longest;
        for (int64_t d = 0; d < head_dim; d++)
            asked[d * width + r] = q[r][d];
    }
    for (int64_t first = 0; first < longest; first += KEYS) {
        const int64_t n_keys = longest - first < KEYS ? longest - first : KEYS;
        const float *keys = NAME(floats)(of->keys, of->bits, first, n_keys, head_dim, wide);
        NAME(score_tile)(V, asked, keys, n_keys, head_dim, seen, first, scores);
        NAME(soften_panel)(width, scale, scores, most, total, found, head_dim);
        const float *values = NAME(floats)(of->values, of->bits, first, n_keys, head_dim, wide);
        NAME(weigh_panel)(V, scores, values, n_keys, head_dim, found);
    }
    for (int r = 0; r < queries; r++)
        for (int64_t d = 0; d < head_dim; d++)
            out[r][d] = found[d * width + r] / total[r];
}
