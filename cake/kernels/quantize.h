/* Rounding rows of a matrix to int8 and int4, in the layout that matrix.c describes. Included by matrix.c. */

/* Where column `c` (0..31) of row `r` (0..15) lies in a tile's group, in bytes. */
INLINE int place(int r, int c) { return c / 4 * 4 * TILE_ROWS + r * 4 + c % 4; }

/* Where the first two columns of a row of bfloat16 lie, in bytes. */
INLINE int64_t pair_of(const struct matrix *m, int64_t row)
{
    return (row / TILE_ROWS * TILE_ROWS * m->columns + row % TILE_ROWS * 2) * 2;
}

INLINE int32_t clamp(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

/* The smallest multiple, 0..255, of `unit` that is not (noticeably) smaller than `scale`. */
INLINE int32_t multiple(float scale, float unit)
{
    return unit > 0 ? clamp((int32_t)(scale / unit + 0.999f), 0, 255) : 0;
}

INLINE void quantize_row8(const struct matrix *m, int64_t row, const float *x)
{
    const int64_t n_groups = m->columns / GROUP, first = row / TILE_ROWS * n_groups;
    const int r = (int)(row % TILE_ROWS);
    float most = 0;
    for (int64_t g = 0; g < n_groups; g++) {
        float here = largest(x + g * GROUP);
        most = here > most ? here : most;
    }
    const float row_scale = m->row_scales[row] = most / (127.0f * 255.0f);
    for (int64_t g = 0; g < n_groups; g++, x += GROUP) {
        const int32_t scale = multiple(largest(x) / 127.0f, row_scale);
        const float inverse = scale ? 1.0f / ((float)scale * row_scale) : 0.0f;
        int8_t q[GROUP];
        for (int c = 0; c < GROUP; c++)
            q[c] = (int8_t)clamp((int32_t)nearest(x[c] * inverse), -127, 127);
        uint8_t *w = m->weights + (first + g) * TILE_ROWS * GROUP;
        for (int c = 0; c < GROUP; c += 4)
            memcpy(w + place(r, c), q + c, 4);
        m->scales[(first + g) * TILE_ROWS + r] = (uint8_t)scale;
    }
}

struct range {
    float low, high;
};

/* Zero is always within: it must stay representable. */
INLINE struct range range_of(const float *x)
{
    float low[8] = {0}, high[8] = {0};
    for (int i = 0; i < GROUP; i += 8)
        for (int k = 0; k < 8; k++) {
            low[k] = x[i + k] < low[k] ? x[i + k] : low[k];
            high[k] = x[i + k] > high[k] ? x[i + k] : high[k];
        }
    struct range range = {low[0], high[0]};
    for (int k = 1; k < 8; k++) {
        range.low = low[k] < range.low ? low[k] : range.low;
        range.high = high[k] > range.high ? high[k] : range.high;
    }
    return range;
}

INLINE void quantize_row4(const struct matrix *m, int64_t row, const float *x)
{
    const int64_t n_groups = m->columns / GROUP, first = row / TILE_ROWS * n_groups;
    const int r = (int)(row % TILE_ROWS);
    float most = 0;
    for (int64_t g = 0; g < n_groups; g++) {
        const struct range range = range_of(x + g * GROUP);
        most = range.high - range.low > most ? range.high - range.low : most;
    }
    const float row_scale = m->row_scales[row] = most / (15.0f * 255.0f);
    for (int64_t g = 0; g < n_groups; g++, x += GROUP) {
        const struct range range = range_of(x);
        const int32_t scale = multiple((range.high - range.low) / 15.0f, row_scale);
        const float inverse = scale ? 1.0f / ((float)scale * row_scale) : 0.0f;
        const float zero = nearest(-16.0f * range.low * inverse);
        uint8_t q[GROUP], both[GROUP / 2];
        for (int c = 0; c < GROUP; c++)
            q[c] = (uint8_t)clamp((int32_t)nearest(x[c] * inverse + zero / 16.0f), 0, 15);
        for (int c = 0; c < GROUP / 2; c++)
            both[c] = (uint8_t)(q[c] | q[c + GROUP / 2] << 4);
        uint8_t *w = m->weights + (first + g) * TILE_ROWS * GROUP / 2;
        for (int c = 0; c < GROUP / 2; c += 4)
            memcpy(w + place(r, c), both + c, 4);
        uint8_t *scales = m->scales + (first + g) * 2 * TILE_ROWS;
        scales[r] = (uint8_t)scale;
        scales[TILE_ROWS + r] = (uint8_t)clamp((int32_t)zero, 0, 240);
    }
}

/* bfloat16 is kept as it is, and what is not becomes it. */
INLINE void pack_row(const struct matrix *m, int64_t row, const float *x)
{
    uint8_t *w = m->weights + pair_of(m, row);
    for (int64_t c = 0; c < m->columns; c += 2, w += 4 * TILE_ROWS) {
        const uint16_t pair[2] = {to_bfloat(x[c]), to_bfloat(x[c + 1])};
        memcpy(w, pair, sizeof pair);
    }
}

/* Rows `row` ... of even length that are bfloat16 already: a few columns of all of them at a time, as they come
   to lie in the same lines of the cache. */
INLINE void pack_rows(const struct matrix *m, int64_t row, int64_t rows, const uint16_t *x)
{
    enum { PIECE = 32 };
    for (int64_t c = 0; c < m->columns; c += PIECE) {
        const int64_t end = c + PIECE < m->columns ? c + PIECE : m->columns;
        for (int64_t r = 0; r < rows; r++) {
            uint8_t *w = m->weights + pair_of(m, row + r) + c * 2 * TILE_ROWS;
            for (int64_t at = c; at < end; at += 2, w += 4 * TILE_ROWS)
                memcpy(w, x + r * m->columns + at, 4);
        }
    }
}

INLINE void quantize_row(const struct matrix *m, int64_t row, const float *x)
{
    if (m->bits == 4)
        quantize_row4(m, row, x);
    else if (m->bits == 8)
        quantize_row8(m, row, x);
    else
        pack_row(m, row, x);
}
