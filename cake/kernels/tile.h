/* The inner loops, written once for every instruction set.

   matrix.c includes this file several times, each time after it has defined TARGET (the function
   attribute), NAME(x), LANES (of 32 bits in a vector), INT and FLOAT (vector types), the operations that
   are undefined again at the end, and FOLLOWS_A_STREAM: whether a core that only streams weights reads them
   faster if it is left alone, as a Zen 4 does by a third; a Zen 3, whose own prefetching ends with each
   page of 4 KiB, is faster if asked ahead. */

#define VECTORS (TILE_ROWS / LANES)

/* A tile of 16 rows times T tokens, into `out` [T, 16]. T and `bits` are constants where this is
   called, so that the compiler keeps every sum in a register. */
static inline __attribute__((always_inline)) TARGET void
NAME(tile)(const int T, const int bits, const struct matrix *m, int64_t tile, const struct activations *a,
           int64_t token, float *out)
{
    const int64_t groups = m->columns / GROUP, row_bytes = a->stride;
    const int group_bytes = bits == 4 ? TILE_ROWS * GROUP / 2 : TILE_ROWS * GROUP;
    const int scale_bytes = bits == 4 ? 2 * TILE_ROWS : TILE_ROWS;
    const uint8_t *w = m->weights + tile * groups * group_bytes;
    const uint8_t *s = m->scales + tile * groups * scale_bytes;
    for (int t = 0; t < T; t++)
        for (int v = 0; v < VECTORS; v++)
            STORE(out + t * TILE_ROWS + v * LANES, FLOAT_ZERO());
    for (int64_t g = 0; g < groups; g++, w += group_bytes, s += scale_bytes) {
        if (T > 1 || bits == 4 || !FOLLOWS_A_STREAM) /* else the processor alone asks too late */
            for (int i = 0; i < group_bytes; i += 64)
                __builtin_prefetch(w + PREFETCH_BYTES + i, 0, SECOND_LEVEL);
        const int8_t *x = (const int8_t *)a->values + token * row_bytes + g * GROUP;
        INT dots[AT_ONCE][VECTORS];
        for (int t = 0; t < T; t++)
            for (int v = 0; v < VECTORS; v++)
                dots[t][v] = INT_ZERO();
        if (bits == 4) {
            /* A byte holds a column of the first half of the group and one of the second. */
            for (int c = 0; c < GROUP / 8; c++) {
                INT low[VECTORS], high[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    INT both = LOAD(w + c * 4 * TILE_ROWS + v * 4 * LANES);
                    low[v] = LOW_NIBBLES(both);
                    high[v] = HIGH_NIBBLES(both);
                }
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    INT x_low = BROADCAST(x + t * row_bytes + 4 * c);
                    INT x_high = BROADCAST(x + t * row_bytes + 4 * c + GROUP / 2);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) {
                        dots[t][v] = DOT4(dots[t][v], low[v], x_low);
                        dots[t][v] = DOT4(dots[t][v], high[v], x_high);
                    }
                }
            }
        } else {
            for (int c = 0; c < GROUP / 4; c++) {
                INT row[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    row[v] = LOAD(w + c * 4 * TILE_ROWS + v * 4 * LANES);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    INT x_part = BROADCAST(x + t * row_bytes + 4 * c);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++)
                        dots[t][v] = DOT8(dots[t][v], row[v], x_part);
                }
            }
        }
        IN_MEMORY();
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            FLOAT scale = BYTES(s + v * LANES);
            FLOAT zero = bits == 4 ? BYTES(s + TILE_ROWS + v * LANES) : FLOAT_SET(ZERO8);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const struct group *of = a->groups + (token + t) * groups + g;
                FLOAT dot = TO_FLOAT(bits == 4 ? FOLD4(dots[t][v]) : dots[t][v]);
                if (bits == 4 || ZERO8 != 0)
                    dot = MINUS_PRODUCT(dot, zero, FLOAT_SET(of->sum));
                float *sum = out + t * TILE_ROWS + v * LANES;
                STORE(sum, PLUS_PRODUCT(LOAD_FLOATS(sum), TIMES(scale, FLOAT_SET(of->scale)), dot));
            }
        }
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < VECTORS; v++) {
            float *sum = out + t * TILE_ROWS + v * LANES;
            STORE(sum, TIMES(LOAD_FLOATS(sum), LOAD_FLOATS(m->row_scales + tile * TILE_ROWS + v * LANES)));
        }
}

/* Calls a function for at most AT_ONCE tokens, and returns how many they were. It is compiled for some numbers
   of them, and multiplies what lies behind the last token too where there are fewer: one more is cheaper
   than reading the weights twice. */
#define WITH_TOKENS(function, tokens, ...)                                                             \
    if (tokens > 4)                                                                                    \
        NAME(function)(AT_ONCE, __VA_ARGS__);                                                          \
    else if (tokens > 2)                                                                               \
        NAME(function)(4, __VA_ARGS__);                                                                \
    else if (tokens == 2)                                                                              \
        NAME(function)(2, __VA_ARGS__);                                                                \
    else                                                                                               \
        NAME(function)(1, __VA_ARGS__);                                                                \
    return tokens < AT_ONCE ? (int)tokens : AT_ONCE;

static TARGET int NAME(tiles)(const struct matrix *m, int64_t tile, const struct activations *a, int64_t token,
                              int64_t tokens, float *out)
{
    if (m->bits == 4) {
        WITH_TOKENS(tile, tokens, 4, m, tile, a, token, out)
    }
    WITH_TOKENS(tile, tokens, 8, m, tile, a, token, out)
}

static TARGET void NAME(to_bfloats)(const float *x, uint16_t *rounded, int64_t columns)
{
    for (int64_t c = 0; c < columns; c++)
        rounded[c] = to_bfloat(x[c]);
}

static TARGET void NAME(round_activations)(const float *x, int8_t *values, struct group *groups, int64_t n_groups)
{
    for (int64_t g = 0; g < n_groups; g++)
        groups[g] = round_group(x + g * GROUP, values + g * GROUP);
}

static TARGET void NAME(quantize_row)(const struct matrix *m, int64_t row, const float *x)
{
    quantize_row(m, row, x);
}

#include "dense.h"
#include "attend.h"

static const struct instruction_set NAME(set) = {
    NAME(tiles), NAME(dense),
#ifdef DOT_BFLOATS
    NAME(dense_rounded),
#else
    NULL,
#endif
    NAME(to_bfloats), NAME(round_activations), NAME(quantize_row),
    NAME(norm), NAME(rotate), NAME(gate), NAME(attend),
};

#undef WITH_TOKENS
#undef AT_ONCE
#undef DOT_BFLOATS
#undef VECTORS
#undef TARGET
#undef NAME
#undef LANES
#undef FOLLOWS_A_STREAM
#undef INT
#undef FLOAT
#undef INT_ZERO
#undef FLOAT_ZERO
#undef FLOAT_SET
#undef LOAD
#undef LOAD_FLOATS
#undef STORE
#undef LOW_BFLOATS
#undef HIGH_BFLOATS
#undef BROADCAST
#undef LOW_NIBBLES
#undef HIGH_NIBBLES
#undef DOT4
#undef DOT8
#undef FOLD4
#undef ZERO8
#undef BYTES
#undef TO_FLOAT
#undef TIMES
#undef PLUS
#undef PLUS_PRODUCT
#undef MINUS_PRODUCT
