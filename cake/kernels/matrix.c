/* Products with compressed matrices on a CPU: y = x Wt, with W in four, eight or sixteen bits.

   A matrix is cut into tiles of 16 rows. A tile lies together in memory, so that it is read from one end to the
   other however many tokens it meets, and in bfloat16 two, in int8 four columns of all 16 rows come before
   the next ones, so that one instruction that adds up as many products serves as many rows as a
   vector has lanes.

   The columns of a quantized matrix come in groups of 32. In int4 a byte holds column c of a group in its low half
   and column c + 16 in its high half.

     int8:  value = row_scale * scale * q                 q -127..127, scale 0..255
     int4:  value = row_scale * scale * (q - zero / 16)   q 0..15, scale 0..255, zero 0..240

   Activations are rounded to int8 with one scale per token and group of 32, so that one outlier
   spoils only its own group. Knows nothing of Python; kernels/__init__.py calls it through ctypes. */

#define _DEFAULT_SOURCE /* for madvise in spite of -std=c11 */
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { TILE_ROWS = 16, GROUP = 32, MOST_TOKENS = 8, CACHE_BYTES = 192 << 10, KEYS = 32 };
/* Ahead of the weights in use: two pages, as the processor's own prefetching ends with each; and into the
   second-level cache (what __builtin_prefetch calls 2), as the first is full of what is in use. */
enum { PREFETCH_BYTES = 8192, SECOND_LEVEL = 2 };
enum { QUERIES = 48, MOST_VECTORS = 3 }; /* at once in attention */

struct matrix {
    uint8_t *weights;      /* bits 4, 8: [tiles, groups, ...] as above; 16: [tiles, columns / 2, 16, 2] */
    uint8_t *scales;       /* [tiles, groups, 16 scales, and in int4 16 zeros] */
    float *row_scales;     /* [tiles * 16] */
    int64_t rows, columns; /* columns: a multiple of 32, where bits is 16 of 2 */
    int64_t bits;
};

struct group {
    float scale, sum; /* sum: of the int8 values, divided by 16 as zeros are */
};

/* For a quantized matrix int8 and groups; for one of bfloat16 float32 or bfloat16. */
struct activations {
    struct group *groups; /* [tokens, groups] */
    char *values;         /* of each token [columns], the next `stride` bytes behind */
    int64_t stride;
};

/* What queries look at: keys and values [.., head_dim], float32 (bits 32) or bfloat16 (16). */
struct seen {
    const void *keys, *values;
    int64_t bits;
};

/* Multiplies a tile and the next tokens, at most `tokens` of them, to `out` [tokens, 16]; how many they were. */
typedef int multiply_function(const struct matrix *, int64_t tile, const struct activations *, int64_t token,
                              int64_t tokens, float *out);

/* What one instruction set knows how to do; see tile.h. */
struct instruction_set {
    multiply_function *tiles, *dense;
    multiply_function *dense_rounded; /* activations in bfloat16; null where there are no instructions for it */
    void (*to_bfloats)(const float *x, uint16_t *rounded, int64_t columns);
    void (*round_activations)(const float *x, int8_t *values, struct group *groups, int64_t n_groups);
    void (*quantize_row)(const struct matrix *, int64_t row, const float *x);
    void (*norm)(const float *x, const float *weight, float eps, float *out, int64_t n);
    void (*rotate)(float *x, const float *cos, const float *sin, int64_t head_dim);
    void (*gate)(float *gate, const float *up, int64_t n);
    void (*attend)(int queries, const float *const *q, const struct seen *of, const int64_t *n_seen,
                   int64_t head_dim, float *const *out);
};

/* Keeps the compiler from moving what is in memory into registers across this line. */
#define IN_MEMORY() __asm__ volatile("" ::: "memory")

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))

/* Plain C that every instruction set compiles for itself. */

INLINE float from_bfloat(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest bfloat16, of two the even one, as torch does. */
INLINE uint16_t to_bfloat(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

/* To the nearest whole number, for |x| < 2^22; vectorizes, as rintf does not everywhere. */
INLINE float nearest(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23 */
    return (x + magic) - magic;
}

/* e^x to float32's precision; below e^-87 it is 0. As in Cephes: 2^n times a polynomial. */
INLINE float exponential(float x)
{
    const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = nearest(bounded * 1.44269504f);
    const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : y * power;
}

INLINE float largest(const float *x)
{
    uint32_t bits[GROUP], most = 0;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < GROUP; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffff; /* orders as the numbers do */
        most = magnitude > most ? magnitude : most;
    }
    float value;
    memcpy(&value, &most, 4);
    return value;
}

INLINE struct group round_group(const float *x, int8_t *values)
{
    float most = largest(x), inverse = most > 0 ? 127.0f / most : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t q = (int32_t)nearest(x[i] * inverse);
        values[i] = (int8_t)q;
        sum += q;
    }
    return (struct group){most / 127.0f, (float)sum / 16.0f};
}

#include "quantize.h"
#include "sets.h"

/* Threads: those of torch's OpenMP, whose entry points the caller hands in. A second pool of our own
   would spin against torch's. */

typedef void parallel_function(void (*)(void *), void *, unsigned, unsigned);
typedef void barrier_function(void);
static parallel_function *parallel;
static barrier_function *barrier;

EXPORT void cake_set_threads(parallel_function *gomp_parallel, barrier_function *gomp_barrier)
{
    parallel = gomp_parallel;
    barrier = gomp_barrier;
}

static void on_threads(void (*function)(void *), void *argument, int64_t threads)
{
    if (parallel && threads > 1)
        parallel(function, argument, (unsigned)threads, 0);
    else
        function(argument);
}

static void wait_for_all(int64_t threads)
{
    if (threads > 1)
        barrier();
}

/* Memory that nobody has written to yet: in pages of 2 MiB where the system has them, a tenth faster to read
   from end to end than in those of 4 KiB; and touched by all threads, as the system clears a page when it is
   touched first, which takes longer than to fill it. */

enum { LARGE_PAGE = 2 << 20, SMALL_PAGE = 4 << 10 };

struct touching {
    uintptr_t start, end;
    atomic_uintptr_t next; /* the beginning of a large page */
};

static void touch_part(void *argument)
{
    struct touching *job = argument;
    uintptr_t page;
    while ((page = atomic_fetch_add(&job->next, LARGE_PAGE)) < job->end)
        for (uintptr_t at = page; at < page + LARGE_PAGE && at < job->end; at += SMALL_PAGE)
            if (at >= job->start)
                *(volatile char *)at = 0;
}

EXPORT void cake_fresh_memory(void *memory, size_t bytes, int64_t threads)
{
    const uintptr_t start = (uintptr_t)memory, end = start + bytes;
    struct touching job = {start, end, start / LARGE_PAGE * LARGE_PAGE};
#ifdef MADV_HUGEPAGE
    const uintptr_t first = (start + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE, last = end / LARGE_PAGE * LARGE_PAGE;
    if (last > first)
        madvise((void *)first, last - first, MADV_HUGEPAGE); /* a wish; refusal costs nothing */
#endif
    on_threads(touch_part, &job, bytes < LARGE_PAGE ? 1 : threads);
}

/* Quantize rows `first` ... of a matrix from `source` [rows, columns], float32 or bfloat16. */

struct quantizing {
    const struct matrix *matrix;
    const void *source;
    int64_t first, rows, source_columns;
    int bfloat;
    atomic_llong next;
};

static float *wide_row(const struct quantizing *job, int64_t row, float *x)
{
    const int64_t columns = job->source_columns;
    if (job->bfloat)
        for (int64_t c = 0; c < columns; c++)
            x[c] = from_bfloat(((const uint16_t *)job->source)[row * columns + c]);
    else
        memcpy(x, (const float *)job->source + row * columns, (size_t)columns * sizeof(float));
    return x;
}

static void quantize_part(void *argument)
{
    struct quantizing *job = argument;
    const struct matrix *m = job->matrix;
    const int packs = m->bits == 16 && job->bfloat && job->source_columns == m->columns;
    float *x = calloc((size_t)m->columns, sizeof(float)); /* columns beyond the source's stay 0 */
    int64_t row;
    while (x && (row = atomic_fetch_add(&job->next, TILE_ROWS)) < job->rows) {
        const int64_t end = row + TILE_ROWS < job->rows ? row + TILE_ROWS : job->rows;
        if (packs)
            pack_rows(m, job->first + row, end - row, (const uint16_t *)job->source + row * m->columns);
        else
            for (; row < end; row++)
                used->quantize_row(m, job->first + row, wide_row(job, row, x));
    }
    free(x);
}

EXPORT void cake_quantize(const struct matrix *matrix, const void *source, int bfloat, int64_t first, int64_t rows,
                          int64_t source_columns, int64_t threads)
{
    struct quantizing job = {matrix, source, first, rows, source_columns, bfloat, 0};
    on_threads(quantize_part, &job, threads);
}

#include "product.h"
#include "block.h"
