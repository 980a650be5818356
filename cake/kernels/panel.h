/* Many tokens times one tile of a bfloat16 matrix: the tile is first widened into a panel, float32
   [columns, 16], which stays in the first-level cache while all tokens pass over it (product.h).
   Included by tile.h, and so once for every instruction set. */

/* Add T tokens `x` [T, PANEL] times the panel to `out` [T, 16]. */
static inline __attribute__((always_inline)) TARGET void
NAME(panel_of)(const int T, const float *panel, int64_t columns, const float *x, float *out)
{
    FLOAT sums[PANEL_TOKENS][VECTORS];
#pragma GCC unroll 12
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[t][v] = LOAD_FLOATS(out + t * TILE_ROWS + v * LANES);
    for (int64_t c = 0; c < columns; c++, panel += TILE_ROWS) {
        FLOAT w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            w[v] = LOAD_FLOATS(panel + v * LANES);
#pragma GCC unroll 12
        for (int t = 0; t < T; t++) {
            const FLOAT x_here = FLOAT_SET(x[t * PANEL + c]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[t][v] = PLUS_PRODUCT(sums[t][v], w[v], x_here);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            STORE(out + t * TILE_ROWS + v * LANES, sums[t][v]);
}

/* Add the next tokens, at most `tokens` of them, times the panel to `out` [tokens, 16]; how many they were. */
static TARGET int NAME(multiply_panel)(const float *panel, int64_t columns, const float *x, int64_t tokens, float *out)
{
    if (tokens >= PANEL_TOKENS) {
        NAME(panel_of)(PANEL_TOKENS, panel, columns, x, out);
        return PANEL_TOKENS;
    }
    if (tokens >= 4) {
        NAME(panel_of)(4, panel, columns, x, out);
        return 4;
    }
    if (tokens >= 2) {
        NAME(panel_of)(2, panel, columns, x, out);
        return 2;
    }
    NAME(panel_of)(1, panel, columns, x, out);
    return 1;
}
