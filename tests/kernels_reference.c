/* Checks the kernels against the format that the top of matrix.c documents, on whatever runs this
   program: this CPU, or one that is emulated.

   Without an argument it prints the instruction sets, best first. Given the name of one it computes
   with that and says how much agrees; it leaves with status 1 at the first thing that is wrong, and
   with 2 where there is no such set. Decodes stored weights itself, multiplies in float64, and knows
   nothing of the kernels but what they export. */

#define _DEFAULT_SOURCE /* for MAP_ANONYMOUS in spite of -std=c11 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { TILE_ROWS = 16, GROUP = 32 };

struct matrix { /* as in matrix.c */
    uint8_t *weights, *scales;
    float *row_scales;
    int64_t rows, columns, bits;
};

const char *cake_set_name(int i);
int cake_use(const char *name);
void cake_quantize(const struct matrix *matrix, const void *source, int bfloat, int64_t first, int64_t rows,
                   int64_t source_columns, int64_t threads);
int cake_multiply(const struct matrix *m, const float *x, int64_t x_columns, int64_t tokens, float *y,
                  int rounds, int64_t threads);

static long long compared; /* products so far */
static int knows_bfloats;  /* whether the instruction set multiplies activations in bfloat16 */

/* Zeros that end where a page ends which nobody may touch: reading beyond them is noticed. Never given
   back; this is over in seconds. */
static void *memory(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    char *start = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + whole, page, PROT_NONE))
        exit(3);
    return start + whole - bytes;
}

/* The inputs. */

static uint64_t state = 0x9e3779b97f4a7c15;

static float uniform(void) /* -1 .. 1 */
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (float)(int32_t)(state >> 32) / 2147483648.0f;
}

/* Ordinary numbers with outliers, rows and groups far smaller than others, groups of one sign, groups
   and (the last of several) a row of zeros. */
static void fill_mixed(float *x, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r++) {
        const float size = r + 1 < rows || rows == 1 ? 0.01f + 3 * fabsf(uniform()) : 0;
        for (int64_t c = 0; c < columns; c++) {
            float value = size * (uniform() + uniform() + uniform()) * (c % 29 == 5 ? 20 : 1);
            switch ((c / GROUP + r) % 7) {
            case 1: value = fabsf(value); break;
            case 2: value = -fabsf(value); break;
            case 3: value *= 1e-3f; break;
            case 4: value *= r % 3 ? 1 : 0; break;
            case 5: value *= r % 3 ? 1 : 1e-7f; break;
            default: break;
            }
            x[r * columns + c] = value;
        }
    }
}

/* The largest sums that there are, of either sign. */
static void fill_extreme(float *x, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows * columns; i++)
        x[i] = i / columns % 2 ? -3.0f : 3.0f;
}

static uint16_t to_bfloat(float x) /* towards zero: which way does not matter here */
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

static float from_bfloat(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* A matrix, and what it keeps of its weights. */

static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static struct matrix new_matrix(int64_t rows, int64_t columns, int bits)
{
    const int64_t padded = round_up(rows, TILE_ROWS), width = round_up(columns, bits == 16 ? 2 : GROUP);
    const int64_t groups = bits == 16 ? 0 : padded * width / GROUP;
    const size_t row_scale_bytes = groups ? (size_t)padded * sizeof(float) : 0;
    return (struct matrix){memory((size_t)(padded * width * bits / 8)),
                           memory((size_t)(groups * (bits == 4 ? 2 : 1))), memory(row_scale_bytes), rows, width, bits};
}

/* As two windows of one tensor, the second of bfloat16; `w` becomes what was stored there. */
static void fill(const struct matrix *m, float *w, int64_t columns, int64_t threads)
{
    const int64_t split = m->rows / 2 / TILE_ROWS * TILE_ROWS, rest = m->rows - split;
    uint16_t *short_ones = memory((size_t)(m->rows * columns) * sizeof *short_ones);
    for (int64_t i = m->bits == 16 ? 0 : split * columns; i < m->rows * columns; i++)
        w[i] = from_bfloat(short_ones[i] = to_bfloat(w[i]));
    cake_quantize(m, w, 0, 0, split, columns, threads);
    cake_quantize(m, short_ones + split * columns, 1, split, rest, columns, threads);
}

/* The step of row `r` in group `g` without the row's scale, its zero, and a column's number. */

static const uint8_t *scale_of(const struct matrix *m, int64_t r, int64_t g)
{
    const int64_t group = r / TILE_ROWS * (m->columns / GROUP) + g;
    return m->scales + group * TILE_ROWS * (m->bits == 4 ? 2 : 1) + r % TILE_ROWS;
}

static double zero_of(const struct matrix *m, int64_t r, int64_t g)
{
    return m->bits == 4 ? scale_of(m, r, g)[TILE_ROWS] / 16.0 : 0;
}

static int number_at(const struct matrix *m, int64_t r, int64_t c)
{
    const int64_t group = r / TILE_ROWS * (m->columns / GROUP) + c / GROUP, in_row = r % TILE_ROWS;
    c %= GROUP;
    if (m->bits == 8)
        return (int8_t)m->weights[group * TILE_ROWS * GROUP + c / 4 * 64 + in_row * 4 + c % 4];
    const int64_t low = c % 16;
    const uint8_t byte = m->weights[group * TILE_ROWS * GROUP / 2 + low / 4 * 64 + in_row * 4 + low % 4];
    return c < 16 ? byte & 15 : byte >> 4;
}

static double *kept_values(const struct matrix *m)
{
    double *kept = memory((size_t)(m->rows * m->columns) * sizeof *kept);
    for (int64_t r = 0; r < m->rows; r++)
        for (int64_t c = 0; c < m->columns; c++) {
            double *value = kept + r * m->columns + c;
            if (m->bits == 16) {
                uint16_t stored;
                const int64_t tile = r / TILE_ROWS * TILE_ROWS * m->columns, pairs = c / 2 * 2 * TILE_ROWS;
                memcpy(&stored, m->weights + (tile + pairs + r % TILE_ROWS * 2 + c % 2) * 2, 2);
                *value = from_bfloat(stored);
            } else
                *value = (double)m->row_scales[r] * *scale_of(m, r, c / GROUP) *
                         (number_at(m, r, c) - zero_of(m, r, c / GROUP));
        }
    return kept;
}

/* What there is to check. */

static int wrong(const struct matrix *m, const char *what, int64_t row, int64_t at, double found, double expected)
{
    printf("%s of bits %d [%d, %d] at row %d, %d: %.9g, not %.9g\n", what, (int)m->bits, (int)m->rows,
           (int)m->columns, (int)row, (int)at, found, expected);
    return 0;
}

/* The range of a group's weights: of 0 and them in int4, and to their largest magnitude in int8. */
static double range_of(const struct matrix *m, const float *w, int64_t r, int64_t g, int64_t columns)
{
    double low = 0, high = 0;
    for (int64_t c = g * GROUP; c < columns && c < (g + 1) * GROUP; c++) {
        low = fmin(low, w[r * columns + c]);
        high = fmax(high, w[r * columns + c]);
    }
    return m->bits == 4 ? high - low : fmax(high, -low);
}

/* Every scale is the row's largest in 255 steps, and the smallest that holds its group but for a
   thousandth of such a step; every weight lies within half a step of what is kept of it. */
static int weights_are_kept(const struct matrix *m, const float *w, const double *kept, int64_t columns)
{
    const int64_t n_groups = m->columns / GROUP;
    const double most_steps = m->bits == 4 ? 15 : 127, little = 1e-5;
    for (int64_t r = 0; r < m->rows; r++) {
        double most = 0;
        for (int64_t g = 0; g < n_groups; g++)
            most = fmax(most, range_of(m, w, r, g, columns));
        const double unit = most / most_steps / 255;
        if (fabs(m->row_scales[r] - unit) > unit * little)
            return wrong(m, "scale", r, -1, m->row_scales[r], unit);
        for (int64_t g = 0; g < n_groups; g++) {
            const double scale = *scale_of(m, r, g);
            const double exact = most > 0 ? range_of(m, w, r, g, columns) / most_steps / unit : 0;
            if (scale < (exact - 0.001) * (1 - little) || scale >= (exact + 0.999) * (1 + little))
                return wrong(m, "group's scale", r, g, scale, exact);
            for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c++) {
                const double value = c < columns ? w[r * columns + c] : 0, found = kept[r * m->columns + c];
                if (fabs(found - value) > unit * (scale * (0.5 + little) + 0.0011 * most_steps))
                    return wrong(m, "weight", r, c, found, value);
            }
        }
    }
    return 1;
}

/* Activations as int8 in groups: the values, and which of them lie on the edge of two. */
static void round_token(const double *x, int64_t x_columns, int64_t columns, double *rounded, double *doubt)
{
    for (int64_t g = 0; g < columns; g += GROUP) {
        double most = 0;
        for (int64_t c = g; c < g + GROUP && c < x_columns; c++)
            most = fmax(most, fabs(x[c]));
        for (int64_t c = g; c < g + GROUP; c++) {
            const double exact = c < x_columns && most > 0 ? x[c] * 127 / most : 0, whole = nearbyint(exact);
            rounded[c] = whole * most / 127;
            doubt[c] = fabs(exact - whole) > 0.4999 ? most / 127 : 0;
        }
    }
}

/* One product in float64, and how far float32 may be from it. All within a group is exact in it. */
static double product_of(const struct matrix *m, const double *w, const double *x, const double *doubt,
                         double *allowed)
{
    const double rounding = 5.97e-8; /* 2^-24 */
    double sum = 0, size = 0, all = 0, edges = 0;
    for (int64_t g = 0; g < m->columns; g += GROUP) {
        const int64_t end = g + GROUP < m->columns ? g + GROUP : m->columns;
        double part = 0, part_size = 0;
        for (int64_t c = g; c < end; c++) {
            part += w[c] * x[c];
            part_size += fabs(w[c] * x[c]);
            edges += fabs(w[c]) * doubt[c];
        }
        sum += part;
        size += m->bits == 16 ? part_size : fabs(part);
        all += part_size;
    }
    *allowed = edges + size * rounding * 32 + all * 1e-14 + 1e-37; /* 1e-14: what float64 itself loses */
    return sum;
}

/* To the nearest of so many binary digits, of two the even one. */
static double to_digits(int digits, double x)
{
    int exponent;
    const double fraction = frexp(x, &exponent);
    return ldexp(nearbyint(ldexp(fraction, digits)), exponent - digits);
}

static int products_agree(const struct matrix *m, const double *kept, const float *x, int64_t x_columns,
                          int64_t tokens, int rounds, int64_t threads)
{
    const int rounded_to_bfloats = m->bits == 16 && rounds && knows_bfloats;
    const size_t n = (size_t)(tokens * m->rows);
    float *y = memory(n * sizeof *y);
    double *exact = memory((size_t)m->columns * sizeof *exact);
    double *rounded = memory((size_t)m->columns * sizeof *rounded);
    double *doubt = memory((size_t)m->columns * sizeof *doubt);
    int fine = 1;
    for (size_t i = 0; i < n; i++)
        y[i] = NAN;
    if (!cake_multiply(m, x, x_columns, tokens, y, rounds, threads))
        fine = wrong(m, "memory", -1, tokens, 0, 1);
    for (int64_t t = 0; fine && t < tokens; t++) {
        for (int64_t c = 0; c < x_columns; c++) /* beyond them are zeros */
            exact[c] = rounded_to_bfloats ? to_digits(8, x[t * x_columns + c]) : x[t * x_columns + c];
        if (m->bits < 16)
            round_token(exact, x_columns, m->columns, rounded, doubt);
        for (int64_t r = 0; fine && r < m->rows; r++) {
            double allowed;
            const double *taken = m->bits < 16 ? rounded : exact;
            const double expected = product_of(m, kept + r * m->columns, taken, doubt, &allowed);
            if (!(fabs(y[t * m->rows + r] - expected) <= allowed)) /* nor with a NaN */
                fine = wrong(m, "product", r, t, y[t * m->rows + r], expected);
            compared++;
        }
    }
    return fine;
}

typedef void fill_function(float *x, int64_t rows, int64_t columns);

static int check(int64_t rows, int64_t columns, int bits, fill_function *fill_numbers)
{
    static const int64_t TOKENS[] = {1, 2, 3, 4, 7, 33, 150};
    const struct matrix m = new_matrix(rows, columns, bits);
    float *w = memory((size_t)(rows * columns) * sizeof *w);
    fill_numbers(w, rows, columns);
    fill(&m, w, columns, 1 + columns % 3);
    double *kept = kept_values(&m);
    int fine = bits == 16 || weights_are_kept(&m, w, kept, columns);
    for (size_t i = 0; fine && i < sizeof TOKENS / sizeof *TOKENS; i++) {
        if (TOKENS[i] > 33 && (bits < 16 || columns > 600))
            continue; /* emulated, it takes its time */
        float *x = memory((size_t)(TOKENS[i] * columns) * sizeof *x);
        fill_numbers(x, TOKENS[i], columns);
        for (int rounds = 0; fine && rounds <= (bits == 16); rounds++)
            fine = products_agree(&m, kept, x, columns, TOKENS[i], rounds, 1 + (int64_t)i % 3);
    }
    return fine;
}

#include "block_reference.h"

int main(int n_arguments, char **arguments)
{
    /* Full and ragged tiles and groups, many tiles, and tokens that a cache holds only in shares. */
    static const int64_t SIZES[][2] = {{16, 32}, {64, 576},  {33, 80},  {1, 31},
                                       {5, 1},   {130, 500}, {600, 64}, {18, 5000}};
    static const int BITS[] = {4, 8, 16};
    const char *name;
    if (n_arguments < 2) {
        for (int i = 0; (name = cake_set_name(i)); i++)
            puts(name);
        return 0;
    }
    if (!cake_use(arguments[1])) {
        printf("no %s here\n", arguments[1]);
        return 2;
    }
    knows_bfloats = strstr(arguments[1], "bf16") != NULL;
    for (size_t b = 0; b < sizeof BITS / sizeof *BITS; b++) {
        for (size_t s = 0; s < sizeof SIZES / sizeof *SIZES; s++)
            if (!check(SIZES[s][0], SIZES[s][1], BITS[b], fill_mixed))
                return 1;
        if (!check(34, 96, BITS[b], fill_extreme))
            return 1;
    }
    if (!blocks_agree())
        return 1;
    printf("%s: %lld products and %d blocks agree\n", arguments[1], compared, blocks);
    return 0;
}
