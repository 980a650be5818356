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
    const int64_t groups = m->columns / GROUP, row_bytes = m->columns;
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
        INT dots[MOST_TOKENS][VECTORS];
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

#define WITH_TOKENS(function, tokens, ...)                                                             \
    switch (tokens) {                                                                                  \
    case 1: NAME(function)(1, __VA_ARGS__); break;                                                     \
    case 2: NAME(function)(2, __VA_ARGS__); break;                                                     \
    default: NAME(function)(4, __VA_ARGS__);                                                           \
    }

static TARGET void NAME(tiles)(const struct matrix *m, int64_t tile, const struct activations *a, int64_t token,
                               int tokens, float *out)
{
    if (m->bits == 4)
        WITH_TOKENS(tile, tokens, 4, m, tile, a, token, out)
    else
        WITH_TOKENS(tile, tokens, 8, m, tile, a, token, out)
}

/* Some rows of a bfloat16 matrix times T tokens, into `out` [T, 16] at row `row`. The activations are
   float32, in blocks of 2 * LANES the even columns before the odd ones: a vector of pairs of weights
   becomes two of float32 by a shift and a mask.

   For one token row after row, as they lie in memory, which the processor follows best. Several tokens'
   activations are too many for the first-level cache: four rows share each reading of them, and ask for
   the next four. Into the second level, as rows of 2,048 columns all want the same places in the first. */
static inline __attribute__((always_inline)) TARGET void
NAME(rows)(const int T, const int ROWS, const uint16_t *w, int64_t columns, const float *x, float *out)
{
    enum { STEP = 2 * LANES };
    FLOAT evens[MOST_TOKENS][MOST_ROWS], odds[MOST_TOKENS][MOST_ROWS];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < ROWS; r++)
            evens[t][r] = odds[t][r] = FLOAT_ZERO();
    int64_t whole = columns / STEP * STEP;
    for (int64_t c = 0; c < whole; c += STEP) {
        FLOAT even[MOST_ROWS], odd[MOST_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            if (ROWS > 1)
                __builtin_prefetch(w + ROWS * (columns + c) + r * STEP, 0, SECOND_LEVEL);
            else if (!FOLLOWS_A_STREAM)
                __builtin_prefetch(w + c + PREFETCH_BYTES / 2, 0, SECOND_LEVEL);
            INT pairs = LOAD(w + r * columns + c);
            even[r] = LOW_BFLOATS(pairs);
            odd[r] = HIGH_BFLOATS(pairs);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            FLOAT x_even = LOAD_FLOATS(x + t * columns + c), x_odd = LOAD_FLOATS(x + t * columns + c + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                evens[t][r] = PLUS_PRODUCT(evens[t][r], even[r], x_even);
                odds[t][r] = PLUS_PRODUCT(odds[t][r], odd[r], x_odd);
            }
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < ROWS; r++) {
            float lanes[LANES], sum = 0;
            STORE(lanes, PLUS(evens[t][r], odds[t][r]));
            for (int i = 0; i < LANES; i++)
                sum += lanes[i];
            for (int64_t c = whole; c < columns; c++)
                sum += from_bfloat(w[r * columns + c]) * x[t * columns + c];
            out[t * TILE_ROWS + r] = sum;
        }
}

#define WITH_ROWS(function, tokens, w, columns, x, out)                                                  \
    switch (tokens) {                                                                                  \
    case 1: NAME(function)(1, 1, w, columns, x, out); break;                                           \
    case 2: NAME(function)(2, MOST_ROWS, w, columns, x, out); break;                                   \
    default: NAME(function)(4, MOST_ROWS, w, columns, x, out);                                         \
    }

static TARGET void NAME(dense)(const struct matrix *m, int64_t tile, const struct activations *a, int64_t token,
                               int tokens, float *out)
{
    const int64_t columns = m->columns;
    const uint16_t *w = (const uint16_t *)m->weights + tile * TILE_ROWS * columns;
    const float *x = (const float *)a->values + token * columns;
    for (int r = 0; r < TILE_ROWS; r += tokens == 1 ? 1 : MOST_ROWS)
        WITH_ROWS(rows, tokens, w + r * columns, columns, x, out + r)
}

#ifdef DOT_BFLOATS
/* As rows, of activations that are bfloat16 as well: one instruction for 2 * LANES products. */
static inline __attribute__((always_inline)) TARGET void
NAME(rounded_rows)(const int T, const int ROWS, const uint16_t *w, int64_t columns, const uint16_t *x, float *out)
{
    enum { STEP = 2 * LANES };
    FLOAT sums[MOST_TOKENS][MOST_ROWS];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < ROWS; r++)
            sums[t][r] = FLOAT_ZERO();
    int64_t whole = columns / STEP * STEP;
    for (int64_t c = 0; c < whole; c += STEP) {
        INT pairs[MOST_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            if (ROWS > 1)
                __builtin_prefetch(w + ROWS * (columns + c) + r * STEP, 0, SECOND_LEVEL);
            pairs[r] = LOAD(w + r * columns + c);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const INT x_pairs = LOAD(x + t * columns + c);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                sums[t][r] = DOT_BFLOATS(sums[t][r], pairs[r], x_pairs);
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < ROWS; r++) {
            float lanes[LANES], sum = 0;
            STORE(lanes, sums[t][r]);
            for (int i = 0; i < LANES; i++)
                sum += lanes[i];
            for (int64_t c = whole; c < columns; c++)
                sum += from_bfloat(w[r * columns + c]) * from_bfloat(x[t * columns + c]);
            out[t * TILE_ROWS + r] = sum;
        }
}

static TARGET void NAME(dense_rounded)(const struct matrix *m, int64_t tile, const struct activations *a,
                                       int64_t token, int tokens, float *out)
{
    const int64_t columns = m->columns;
    const uint16_t *w = (const uint16_t *)m->weights + tile * TILE_ROWS * columns;
    const uint16_t *x = (const uint16_t *)a->values + token * columns;
    for (int r = 0; r < TILE_ROWS; r += tokens == 1 ? 1 : MOST_ROWS)
        WITH_ROWS(rounded_rows, tokens, w + r * columns, columns, x, out + r)
}

#include "pairs.h"
#endif

static TARGET void NAME(split_pairs)(const float *x, float *split, int64_t columns)
{
    enum { STEP = 2 * LANES };
    int64_t whole = columns / STEP * STEP;
    for (int64_t c = 0; c < whole; c += STEP)
        for (int i = 0; i < LANES; i++) {
            split[c + i] = x[c + 2 * i];
            split[c + LANES + i] = x[c + 2 * i + 1];
        }
    memcpy(split + whole, x + whole, (size_t)(columns - whole) * sizeof(float));
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

#include "panel.h"
#include "attend.h"

static const struct instruction_set NAME(set) = {
    NAME(tiles), NAME(dense),
#ifdef DOT_BFLOATS
    NAME(dense_rounded), NAME(multiply_pairs),
#else
    NULL, NULL,
#endif
    NAME(multiply_panel), NAME(split_pairs), NAME(to_bfloats),
    NAME(round_activations), NAME(quantize_row),
    NAME(norm), NAME(rotate), NAME(gate), NAME(attend),
};

#undef WITH_TOKENS
#undef WITH_ROWS
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
#undef PANEL_TOKENS
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
