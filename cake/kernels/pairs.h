/* Many tokens in bfloat16 times one tile of a bfloat16 matrix, with an instruction that adds products of
   pairs. A vector holds the same pair of columns of LANES tokens, and meets that pair of one row after the
   other: so it is the tokens that are laid out anew, once, and the weights are used as they lie in memory.
   Every token's sum goes from the first column to the last, however many tokens come with it.
   Included by tile.h, for the instruction sets that have it. */

/* Some rows times `vectors` vectors of tokens `x` [columns / 2, vectors, LANES], to `out` [tokens, 16]. */
static inline __attribute__((always_inline)) TARGET void
NAME(rows_of_pairs)(const int VECTORS_OF, const int ROWS, const uint16_t *w, int64_t columns, const uint32_t *x,
                    float *out)
{
    FLOAT sums[PAIR_ROWS][PAIR_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS_OF; v++)
            sums[r][v] = FLOAT_ZERO();
    for (int64_t c = 0; c < columns; c += 2, x += VECTORS_OF * LANES) {
        INT tokens[PAIR_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS_OF; v++)
            tokens[v] = LOAD(x + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const INT pair = BROADCAST(w + r * columns + c);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS_OF; v++)
                sums[r][v] = DOT_BFLOATS(sums[r][v], pair, tokens[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS_OF; v++) {
            float lanes[LANES];
            STORE(lanes, sums[r][v]);
            for (int i = 0; i < LANES; i++)
                out[(v * LANES + i) * TILE_ROWS + r] = lanes[i];
        }
}

/* As many rows at a time as there are registers for their sums. */
static TARGET void NAME(multiply_pairs)(const uint16_t *w, int64_t columns, const uint32_t *x, int vectors, float *out)
{
    for (int r = 0; r < TILE_ROWS; r += vectors == 4 ? 4 : PAIR_ROWS)
        switch (vectors) {
        case 1: NAME(rows_of_pairs)(1, PAIR_ROWS, w + r * columns, columns, x, out + r); break;
        case 2: NAME(rows_of_pairs)(2, PAIR_ROWS, w + r * columns, columns, x, out + r); break;
        case 3: NAME(rows_of_pairs)(3, PAIR_ROWS, w + r * columns, columns, x, out + r); break;
        default: NAME(rows_of_pairs)(4, 4, w + r * columns, columns, x, out + r);
        }
}
