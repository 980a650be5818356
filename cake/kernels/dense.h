/* A tile of a bfloat16 matrix, two columns of all 16 rows after two columns, times T tokens. A row's sum goes from
   the first column to the last, so that it is the same however many tokens are multiplied together.
   Included by tile.h. */

/* Adds two columns' products with T tokens `x` in float32, each `stride` bytes behind the one before: a vector of
   pairs of weights becomes two of float32 by a shift and a mask. */
static inline __attribute__((always_inline)) TARGET void
NAME(add_floats)(const int T, const uint8_t *w, const char *x, int64_t stride, FLOAT sums[][VECTORS])
{
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        FLOAT here[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            here[v] = odd ? HIGH_BFLOATS(LOAD(w + v * 4 * LANES)) : LOW_BFLOATS(LOAD(w + v * 4 * LANES));
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const FLOAT x_here = FLOAT_SET(((const float *)(x + t * stride))[odd]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[t][v] = PLUS_PRODUCT(sums[t][v], here[v], x_here);
        }
    }
}

#ifdef DOT_BFLOATS
/* The same in bfloat16: one instruction for 2 * LANES products. */
static inline __attribute__((always_inline)) TARGET void
NAME(add_bfloats)(const int T, const uint8_t *w, const char *x, int64_t stride, FLOAT sums[][VECTORS])
{
    INT pairs[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
        pairs[v] = LOAD(w + v * 4 * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        const INT x_pair = BROADCAST(x + t * stride);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[t][v] = DOT_BFLOATS(sums[t][v], pairs[v], x_pair);
    }
}
#endif

/* All columns, into `out` [T, 16]. T and `rounded`, whether activations are bfloat16, are constants where this is
   called. */
static inline __attribute__((always_inline)) TARGET void
NAME(dense_of)(const int T, const int rounded, const uint8_t *w, int64_t columns, const char *x, int64_t stride,
               float *out)
{
    (void)rounded; /* where there are no instructions for it */
    FLOAT sums[AT_ONCE][VECTORS];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[t][v] = FLOAT_ZERO();
    for (int64_t c = 0; c < columns; c += 2, w += 4 * TILE_ROWS) {
        if (T > 1 || !FOLLOWS_A_STREAM)
            __builtin_prefetch(w + PREFETCH_BYTES, 0, SECOND_LEVEL);
#ifdef DOT_BFLOATS
        if (rounded)
            NAME(add_bfloats)(T, w, x + c * (int64_t)sizeof(uint16_t), stride, sums);
        else
#endif
            NAME(add_floats)(T, w, x + c * (int64_t)sizeof(float), stride, sums);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            STORE(out + t * TILE_ROWS + v * LANES, sums[t][v]);
}

static TARGET int NAME(dense)(const struct matrix *m, int64_t tile, const struct activations *a, int64_t token,
                              int64_t tokens, float *out)
{
    const uint8_t *w = m->weights + tile * TILE_ROWS * m->columns * 2;
    WITH_TOKENS(dense_of, tokens, 0, w, m->columns, a->values + token * a->stride, a->stride, out)
}

#ifdef DOT_BFLOATS
static TARGET int NAME(dense_rounded)(const struct matrix *m, int64_t tile, const struct activations *a,
                                      int64_t token, int64_t tokens, float *out)
{
    const uint8_t *w = m->weights + tile * TILE_ROWS * m->columns * 2;
    WITH_TOKENS(dense_of, tokens, 1, w, m->columns, a->values + token * a->stride, a->stride, out)
}
#endif
