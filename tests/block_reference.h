/* Checks a transformer block of the kernels against the same in float64. Included by
   kernels_reference.c. */

struct block { /* as in block.h */
    const float *attention_norm, *mlp_norm;
    const struct matrix *qkv, *output, *gate_up, *down;
    int64_t n_heads, n_kv_heads, head_dim;
    int64_t rounds;
    double eps;
};

struct segment { /* as in block.h */
    int64_t first_row, length, position, capacity, bits;
    void *cache;
};

int cake_block(const struct block *b, int64_t index, float *x, int64_t tokens, const float *cos, const float *sin,
               const struct segment *segments, int64_t n_segments, int64_t threads);

static int blocks; /* compared so far */

static double *doubles(int64_t n) { return memory((size_t)n * sizeof(double)); }

static float *random_floats(int64_t n, float middle, float size)
{
    float *x = memory((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        x[i] = middle + size * uniform();
    return x;
}

static const struct matrix *random_matrix(int64_t rows, int64_t columns, int bits)
{
    struct matrix *m = memory(sizeof *m);
    *m = new_matrix(rows, columns, bits);
    fill(m, random_floats(rows * columns, 0, 3 / sqrtf((float)columns)), columns, 1);
    return m;
}

/* The steps of a block in float64, for one token. */

static void multiply(const struct matrix *m, const double *kept, const double *x, int64_t x_columns, double *y,
                     int adds)
{
    double *rounded = doubles(m->columns), *doubt = doubles(m->columns);
    if (m->bits < 16)
        round_token(x, x_columns, m->columns, rounded, doubt);
    for (int64_t r = 0; r < m->rows; r++) {
        double sum = adds ? y[r] : 0;
        for (int64_t c = 0; c < x_columns; c++)
            sum += kept[r * m->columns + c] * (m->bits < 16 ? rounded : x)[c];
        y[r] = sum;
    }
}

static double *normalized(const double *x, const float *weight, double eps, int64_t n)
{
    double *out = doubles(n), sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] / sqrt(sum / (double)n + eps) * weight[i];
    return out;
}

static void rotate(double *x, const float *cos, const float *sin, int64_t n)
{
    for (int64_t i = 0; i < n / 2; i++) {
        const double first = x[i], second = x[n / 2 + i];
        x[i] = first * cos[i] - second * sin[i];
        x[n / 2 + i] = second * cos[n / 2 + i] + first * sin[n / 2 + i];
    }
}

static void attend(const double *q, const double *keys, const double *values, int64_t n_keys, int64_t dim,
                   double *out)
{
    double *weights = doubles(n_keys), most = -INFINITY, total = 0;
    for (int64_t j = 0; j < n_keys; j++) {
        for (int64_t d = 0; d < dim; d++)
            weights[j] += q[d] * keys[j * dim + d] / sqrt((double)dim);
        most = fmax(most, weights[j]);
    }
    for (int64_t j = 0; j < n_keys; j++)
        total += weights[j] = exp(weights[j] - most);
    for (int64_t j = 0; j < n_keys; j++)
        for (int64_t d = 0; d < dim; d++)
            out[d] += weights[j] / total * values[j * dim + d];
}

/* As a cache of so many bits keeps it. */
static double rounded_to(int64_t bits, double x)
{
    return bits == 32 ? x : to_digits(8, x);
}

/* `kept` is what the four matrices keep; `cache` that of this block alone, [2, n_kv_heads, capacity,
   head_dim]; cosines and sines those of every position. */

/* Queries, keys and values of a token, turned by its position. */
static double *qkv_for(const struct block *b, double *const kept[4], const double *x, const float *cos,
                       const float *sin, int64_t position)
{
    const int64_t hidden = b->output->rows, dim = b->head_dim;
    double *qkv = doubles(b->qkv->rows);
    multiply(b->qkv, kept[0], normalized(x, b->attention_norm, b->eps, hidden), hidden, qkv, 0);
    for (int64_t head = 0; head < b->n_heads + b->n_kv_heads; head++)
        rotate(qkv + head * dim, cos + position * dim, sin + position * dim, dim);
    return qkv;
}

static void remember(const struct block *b, const double *qkv, double *cache, const struct segment *s,
                     int64_t position)
{
    const int64_t dim = b->head_dim;
    for (int64_t i = 0; i < 2 * b->n_kv_heads; i++) /* keys, then values */
        for (int64_t d = 0; d < dim; d++)
            cache[(i * s->capacity + position) * dim + d] = rounded_to(s->bits, qkv[(b->n_heads + i) * dim + d]);
}

static void block_for(const struct block *b, double *const kept[4], double *x, const float *cos, const float *sin,
                      const double *cache, const struct segment *s, int64_t position)
{
    const int64_t capacity = s->capacity;
    const int64_t hidden = b->output->rows, dim = b->head_dim, inner = b->gate_up->rows / 2;
    const double *qkv = qkv_for(b, kept, x, cos, sin, position);
    double *mixed = doubles(b->n_heads * dim), *gate_up = doubles(2 * inner);
    for (int64_t head = 0; head < b->n_heads; head++) {
        const double *keys = cache + head / (b->n_heads / b->n_kv_heads) * capacity * dim;
        attend(qkv + head * dim, keys, keys + b->n_kv_heads * capacity * dim, position + 1, dim, mixed + head * dim);
    }
    multiply(b->output, kept[1], mixed, b->n_heads * dim, x, 1);
    multiply(b->gate_up, kept[2], normalized(x, b->mlp_norm, b->eps, hidden), hidden, gate_up, 0);
    for (int64_t i = 0; i < inner; i++)
        gate_up[i] *= gate_up[inner + i] / (1 + exp(-gate_up[i]));
    multiply(b->down, kept[3], gate_up, inner, x, 1);
}

static double distance(const float *found, const double *expected, int64_t n)
{
    double apart = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        apart += (found[i] - expected[i]) * (found[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    return sqrt(apart / size);
}

/* Whether numbers lie as near to those of float64 as is allowed. */
static int near(const char *what, const struct block *b, int64_t cache_bits, double distance, double allowed)
{
    if (distance <= allowed)
        return 1;
    printf("%s of a block of bits %d, %d with %d, %d heads of %d: %g apart\n", what, (int)b->qkv->bits,
           (int)cache_bits, (int)b->n_heads, (int)b->n_kv_heads, (int)b->head_dim, distance);
    return 0;
}

static float cache_at(const struct segment *s, int64_t i)
{
    return s->bits == 32 ? ((float *)s->cache)[i] : from_bfloat(((uint16_t *)s->cache)[i]);
}

static void set_cache(const struct segment *s, int64_t i, float x)
{
    if (s->bits == 32)
        ((float *)s->cache)[i] = x;
    else
        ((uint16_t *)s->cache)[i] = to_bfloat(x);
}

/* Three sessions in one batch, through the second of two blocks. What no token has reached yet of their
   caches, and the other block's part, is no number: reading it shows. */
static int block_agrees(int bits, int64_t cache_bits, int64_t n_heads, int64_t n_kv_heads, int64_t dim,
                        int64_t hidden, int64_t inner, int rounds)
{
    enum { SESSIONS = 3, TOKENS = 49, POSITIONS = 105 };
    const int64_t rows = (n_heads + 2 * n_kv_heads) * dim;
    const struct block b = {random_floats(hidden, 1, 0.5f), random_floats(hidden, 1, 0.5f),
                            random_matrix(rows, hidden, bits), random_matrix(hidden, n_heads * dim, bits),
                            random_matrix(2 * inner, hidden, bits), random_matrix(hidden, inner, bits),
                            n_heads, n_kv_heads, dim, rounds, 1e-5};
    struct segment segments[SESSIONS] = {{0, 44, 61, 110, cache_bits, 0}, {44, 1, 0, 4, cache_bits, 0},
                                         {45, 4, 33, 37, cache_bits, 0}};
    double *caches[SESSIONS];
    for (int s = 0; s < SESSIONS; s++) {
        const int64_t capacity = segments[s].capacity, half = 2 * n_kv_heads * capacity * dim;
        segments[s].cache = memory((size_t)(2 * half * cache_bits / 8));
        caches[s] = doubles(half);
        for (int64_t i = 0; i < 2 * half; i++)
            if (i < half || i / dim % capacity >= segments[s].position)
                set_cache(&segments[s], i, NAN);
            else {
                set_cache(&segments[s], i, uniform());
                caches[s][i - half] = cache_at(&segments[s], i);
            }
    }
    float *x = random_floats(TOKENS * hidden, 0, 1);
    const float *cos = random_floats(POSITIONS * dim, 0, 1), *sin = random_floats(POSITIONS * dim, 0, 1);
    double *kept[] = {kept_values(b.qkv), kept_values(b.output), kept_values(b.gate_up), kept_values(b.down)};
    double *expected = doubles(TOKENS * hidden);
    for (int64_t i = 0; i < TOKENS * hidden; i++)
        expected[i] = x[i];
    if (!cake_block(&b, 1, x, TOKENS, cos, sin, segments, SESSIONS, 1))
        return 0;
    const int quantized = bits < 16, rounded = !quantized && rounds && knows_bfloats; /* for every product */
    const double in_cache = quantized || rounded ? 5e-3 : cache_bits == 16 ? 5e-4 : 5e-6;
    for (int s = 0; s < SESSIONS; s++) {
        const struct segment *of = segments + s;
        const int64_t half = 2 * n_kv_heads * of->capacity * dim;
        for (int64_t i = 0, t = of->first_row; i < of->length; i++, t++) {
            const int64_t position = of->position + i;
            remember(&b, qkv_for(&b, kept, expected + t * hidden, cos, sin, position), caches[s], of, position);
        }
        for (int64_t i = 0; i < 2 * n_kv_heads; i++) {
            const int64_t at = i * of->capacity * dim, seen = (of->position + of->length) * dim;
            float *found = memory((size_t)seen * sizeof *found);
            for (int64_t j = 0; j < seen; j++)
                found[j] = cache_at(of, half + at + j);
            if (!near("cache", &b, cache_bits, distance(found, caches[s] + at, seen), in_cache))
                return 0;
            for (int64_t j = 0; j < seen; j++) /* a number on the edge of two may fall to either in the cache */
                caches[s][at + j] = found[j];
        }
        for (int64_t i = 0, t = of->first_row; i < of->length; i++, t++)
            block_for(&b, kept, expected + t * hidden, cos, sin, caches[s], of, of->position + i);
    }
    int far = 0; /* tokens of which an activation fell to the other side of an edge where it is rounded to int8 */
    for (int64_t t = 0; t < TOKENS; t++) {
        const double apart = distance(x + t * hidden, expected + t * hidden, hidden);
        far += apart > 5e-3;
        if (!near("token", &b, cache_bits, apart, rounded ? 1.5e-2 : !quantized ? 5e-6 : far > 1 ? 5e-3 : 2e-2))
            return 0;
    }
    blocks++;
    return 1;
}

/* Queries that share a key head, and ones that do not; sizes that fill no group. */
static int blocks_agree(void)
{
    static const int BITS[] = {4, 8, 16};
    for (int i = 0; i < 3; i++)
        for (int cache_bits = 16; cache_bits <= 32; cache_bits += 16)
            for (int rounds = 0; rounds <= (BITS[i] == 16); rounds++)
                if (!block_agrees(BITS[i], cache_bits, 6, 2, 32, 80, 112, rounds) ||
                    !block_agrees(BITS[i], cache_bits, 3, 3, 96, 101, 33, rounds))
                    return 0;
    return 1;
}
