/* y [tokens, rows] = x [tokens, columns] Wt, float32; or added to y. */

/* How a matrix meets activations: a quantized one those in int8, one of bfloat16 those in float32, or where that
   is allowed and there are instructions for it those in bfloat16. */
enum way { QUANTIZED, DENSE, ROUNDED };

struct product {
    const struct matrix *matrix;
    struct activations activations;
    const float *x;
    int64_t tokens, x_columns;
    enum way way;
    float *y;
    int adds;
    int64_t tiles, tiles_at_once;
    atomic_llong next_token, next_tile;
};

enum { LINE = 64 }; /* bytes, of a cache */

static enum way best_way(const struct matrix *m, int rounds)
{
    if (m->bits < 16)
        return QUANTIZED;
    return rounds && used->dense_rounded ? ROUNDED : DENSE;
}

static struct product new_product(const struct matrix *m, int64_t tokens, int64_t x_columns, float *y, int adds,
                                  int rounds, int64_t threads)
{
    const int64_t tiles = (m->rows + TILE_ROWS - 1) / TILE_ROWS, share = tiles / (threads * 8);
    return (struct product){.matrix = m, .tokens = tokens, .x_columns = x_columns, .y = y, .adds = adds,
                            .way = best_way(m, rounds), .tiles = tiles, .tiles_at_once = share > 1 ? share : 1};
}

static size_t group_bytes(const struct matrix *m, int64_t tokens)
{
    return m->bits == 16 ? 0 : (size_t)((tokens + MOST_TOKENS) * (m->columns / GROUP)) * sizeof(struct group);
}

static int64_t value_bytes(enum way way)
{
    return way == QUANTIZED ? sizeof(int8_t) : way == DENSE ? sizeof(float) : sizeof(uint16_t);
}

/* Bytes from one token's values to the next one's: a line more than they are, as those of 2,048 columns would
   all want the same places in the first-level cache. */
static int64_t stride(const struct matrix *m, enum way way) { return m->columns * value_bytes(way) + LINE; }

/* Enough for every way, to begin where a vector may, and to read some tokens beyond the last. */
static size_t activation_bytes(const struct matrix *m, int64_t tokens)
{
    return LINE + group_bytes(m, tokens) + (size_t)((tokens + MOST_TOKENS) * stride(m, m->bits < 16 ? QUANTIZED : DENSE));
}

static void set_activations(struct product *job, void *memory)
{
    memory = (void *)(((uintptr_t)memory + LINE - 1) / LINE * LINE);
    job->activations = (struct activations){memory, (char *)memory + group_bytes(job->matrix, job->tokens),
                                            stride(job->matrix, job->way)};
}

static void round_token(struct product *job, int64_t t, const float *x, int8_t *values)
{
    const int64_t n_groups = job->matrix->columns / GROUP, whole = job->x_columns / GROUP;
    struct group *groups = job->activations.groups + t * n_groups;
    used->round_activations(x, values, groups, whole);
    if (whole < n_groups) { /* the last group is not full */
        float rest[GROUP] = {0};
        memcpy(rest, x + whole * GROUP, (size_t)(job->x_columns - whole * GROUP) * sizeof(float));
        used->round_activations(rest, values + whole * GROUP, groups + whole, 1);
    }
}

static void prepare_token(struct product *job, int64_t t, const float *x)
{
    const int64_t columns = job->matrix->columns, n = job->x_columns;
    void *values = job->activations.values + t * job->activations.stride;
    switch (job->way) {
    case QUANTIZED: round_token(job, t, x, values); return;
    case DENSE: memcpy(values, x, (size_t)n * sizeof(float)); break;
    case ROUNDED: used->to_bfloats(x, values, n);
    }
    if (n < columns)
        memset((char *)values + n * value_bytes(job->way), 0, (size_t)((columns - n) * value_bytes(job->way)));
}

static void prepare_tokens(void *argument)
{
    struct product *job = argument;
    int64_t t;
    while ((t = atomic_fetch_add(&job->next_token, 1)) < job->tokens)
        prepare_token(job, t, job->x + t * job->x_columns);
}

/* The sums of a tile [tokens, 16] to where they belong. */
static void put(const struct product *job, int64_t tile, int64_t token, int64_t tokens, const float *sums)
{
    const int64_t first = tile * TILE_ROWS, left = job->matrix->rows - first;
    const int64_t n = left < TILE_ROWS ? left : TILE_ROWS;
    for (int64_t t = 0; t < tokens; t++, sums += TILE_ROWS) {
        float *y = job->y + (token + t) * job->matrix->rows + first;
        for (int64_t r = 0; r < n; r++)
            y[r] = job->adds ? y[r] + sums[r] : sums[r];
    }
}

static void multiply_tile(const struct product *job, int64_t tile, int64_t token, int64_t end)
{
    multiply_function *const ways[] = {used->tiles, used->dense, used->dense_rounded};
    for (int taken; token < end; token += taken) {
        float out[MOST_TOKENS * TILE_ROWS];
        taken = ways[job->way](job->matrix, tile, &job->activations, token, end - token, out);
        put(job, tile, token, taken, out);
    }
}

/* Tokens that stay in the second-level cache while a share of the tiles passes over them. */
static int64_t tokens_in_cache(const struct product *job)
{
    const int64_t columns = job->matrix->columns;
    const int64_t bytes = job->way == QUANTIZED ? columns * 5 / 4 : columns * value_bytes(job->way);
    const int64_t tokens = CACHE_BYTES / bytes / MOST_TOKENS * MOST_TOKENS;
    return tokens > MOST_TOKENS ? tokens : MOST_TOKENS;
}

static void multiply_tiles(const struct product *job, int64_t first, int64_t end)
{
    const int64_t step = tokens_in_cache(job);
    for (int64_t token = 0; token < job->tokens; token += step) {
        const int64_t stop = token + step < job->tokens ? token + step : job->tokens;
        for (int64_t tile = first; tile < end; tile++)
            multiply_tile(job, tile, token, stop);
    }
}

static void multiply_part(void *argument)
{
    struct product *job = argument;
    int64_t first;
    while ((first = atomic_fetch_add(&job->next_tile, job->tiles_at_once)) < job->tiles) {
        const int64_t share = first + job->tiles_at_once, end = share < job->tiles ? share : job->tiles;
        multiply_tiles(job, first, end);
    }
}

static _Thread_local struct {
    void *memory;
    size_t bytes;
} scratch;

static void *at_least(size_t bytes)
{
    if (scratch.bytes < bytes) {
        free(scratch.memory);
        scratch.memory = malloc(bytes);
        scratch.bytes = scratch.memory ? bytes : 0;
    }
    return scratch.memory;
}

/* `rounds`: activations may be rounded to bfloat16 for a matrix of it. 0 when there was no memory. */
EXPORT int cake_multiply(const struct matrix *m, const float *x, int64_t x_columns, int64_t tokens, float *y,
                         int rounds, int64_t threads)
{
    void *memory = at_least(activation_bytes(m, tokens));
    if (!memory)
        return 0;
    struct product job = new_product(m, tokens, x_columns, y, 0, rounds, threads);
    job.x = x;
    set_activations(&job, memory);
    if (tokens > 16)
        on_threads(prepare_tokens, &job, threads);
    else
        prepare_tokens(&job);
    on_threads(multiply_part, &job, threads);
    return 1;
}

