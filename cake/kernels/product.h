/* y [tokens, rows] = x [tokens, columns] Wt, float32; or added to y. */

/* How a matrix meets activations: a quantized one those in int8, tile by tile. One of bfloat16 meets few
   tokens row by row, in float32 or where that is allowed in bfloat16; many in panels of float32, or in pairs
   of bfloat16. */
enum way { TILES, ROWS, ROUNDED_ROWS, PANELS, PAIRS };

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

enum { ALIGNMENT = 64, FEWEST_FOR_PAIRS = 17, FEWEST_FOR_PANELS = 20 };

static enum way best_way(const struct matrix *m, int64_t tokens, int rounds)
{
    if (m->bits < 16)
        return TILES;
    if (rounds && used->multiply_pairs && tokens >= FEWEST_FOR_PAIRS && m->columns % 2 == 0)
        return PAIRS;
    if (tokens >= FEWEST_FOR_PANELS)
        return PANELS;
    return rounds && used->dense_rounded ? ROUNDED_ROWS : ROWS;
}

static struct product new_product(const struct matrix *m, int64_t tokens, int64_t x_columns, float *y, int adds,
                                  int rounds, int64_t threads)
{
    const int64_t tiles = (m->rows + TILE_ROWS - 1) / TILE_ROWS, share = tiles / (threads * 8);
    return (struct product){.matrix = m, .tokens = tokens, .x_columns = x_columns, .y = y, .adds = adds,
                            .way = best_way(m, tokens, rounds), .tiles = tiles, .tiles_at_once = share > 1 ? share : 1};
}

static size_t group_bytes(const struct matrix *m, int64_t tokens)
{
    return m->bits == 16 ? 0 : (size_t)(tokens * (m->columns / GROUP)) * sizeof(struct group);
}

static int64_t vectors_of(int64_t tokens) { return (tokens + PAIR_LANES - 1) / PAIR_LANES; }

/* Enough for every way, and to begin where a vector may; half of it is enough for pairs, of 17 tokens too. */
static size_t activation_bytes(const struct matrix *m, int64_t tokens)
{
    const int64_t columns = (m->columns + PANEL - 1) / PANEL * PANEL;
    const size_t values = (size_t)(tokens * columns) * (m->bits == 16 ? sizeof(float) : sizeof(int8_t));
    return ALIGNMENT + group_bytes(m, tokens) + values;
}

static void set_activations(struct product *job, void *memory)
{
    memory = (void *)(((uintptr_t)memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    job->activations = (struct activations){memory, (char *)memory + group_bytes(job->matrix, job->tokens)};
}

/* What the panel that begins at column `c` is multiplied with, from token `t` on. */
static float *packed(const struct product *job, int64_t c, int64_t t)
{
    return (float *)job->activations.values + (c / PANEL * job->tokens + t) * PANEL;
}

/* Tokens from `first` on, a multiple of PAIR_TOKENS, as pairs [columns / 2, vectors, PAIR_LANES]: of these the
   vectors, and where they are. */
static int pair_vectors(const struct product *job, int64_t first)
{
    const int64_t vectors = vectors_of(job->tokens - first);
    return vectors < PAIR_VECTORS ? (int)vectors : PAIR_VECTORS;
}

static uint32_t *pairs_from(const struct product *job, int64_t first)
{
    return (uint32_t *)job->activations.values + first * job->matrix->columns / 2;
}

static void prepare_pairs(struct product *job, int64_t t, const float *x)
{
    const int64_t n = job->matrix->columns / 2, within = t % PAIR_TOKENS;
    const int64_t width = pair_vectors(job, t - within) * PAIR_LANES;
    uint32_t *to = pairs_from(job, t - within) + within, pairs[n];
    used->to_bfloats(x, (uint16_t *)pairs, 2 * n);
    for (int64_t c = 0; c < n; c++)
        to[c * width] = pairs[c];
}

static void prepare_panels(struct product *job, int64_t t, const float *x)
{
    const int64_t columns = job->matrix->columns;
    for (int64_t c = 0; c < columns; c += PANEL) {
        const int64_t left = columns - c;
        memcpy(packed(job, c, t), x + c, (size_t)(left < PANEL ? left : PANEL) * sizeof(float));
    }
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
    const int64_t columns = job->matrix->columns;
    void *values = job->activations.values;
    switch (job->way) {
    case TILES: round_token(job, t, x, (int8_t *)values + t * columns); break;
    case ROWS: used->split_pairs(x, (float *)values + t * columns, columns); break;
    case ROUNDED_ROWS: used->to_bfloats(x, (uint16_t *)values + t * columns, columns); break;
    case PANELS: prepare_panels(job, t, x); break;
    case PAIRS: prepare_pairs(job, t, x);
    }
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
    const struct matrix *m = job->matrix;
    for (int at_once; token < end; token += at_once) {
        const int64_t rest = end - token;
        at_once = rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        float out[MOST_TOKENS * TILE_ROWS];
        (job->way == TILES ? used->tiles : job->way == ROUNDED_ROWS ? used->dense_rounded : used->dense)(
            m, tile, &job->activations, token, at_once, out);
        put(job, tile, token, at_once, out);
    }
}

/* Tokens that stay in the second-level cache while a share of the tiles passes over them. */
static int64_t tokens_in_cache(const struct matrix *m)
{
    const int64_t bytes = m->bits == 16 ? m->columns * 4 : m->columns * 5 / 4;
    const int64_t tokens = CACHE_BYTES / bytes / MOST_TOKENS * MOST_TOKENS;
    return tokens > MOST_TOKENS ? tokens : MOST_TOKENS;
}

static void multiply_tiles(const struct product *job, int64_t first, int64_t end)
{
    const int64_t step = tokens_in_cache(job->matrix);
    for (int64_t token = 0; token < job->tokens; token += step) {
        const int64_t stop = token + step < job->tokens ? token + step : job->tokens;
        for (int64_t tile = first; tile < end; tile++)
            multiply_tile(job, tile, token, stop);
    }
}

/* The columns from `first` on of a tile's rows, to `panel` [columns, 16]. Eight rows at a time: those of a
   matrix with 2,048 columns all want the same eight places in the first-level cache. */
static void widen(const struct matrix *m, int64_t tile, int64_t first, int64_t columns, float *panel)
{
    const uint16_t *w = (const uint16_t *)m->weights + tile * TILE_ROWS * m->columns + first;
    for (int half = 0; half < TILE_ROWS; half += 8) {
        int64_t c = 0;
        for (; c + 16 <= columns; c += 16)
            widen_square(w + half * m->columns + c, m->columns, panel + c * TILE_ROWS + half);
        for (; c < columns; c++)
            for (int r = half; r < half + 8; r++)
                panel[c * TILE_ROWS + r] = from_bfloat(w[r * m->columns + c]);
    }
}

enum { PANEL_TILES = 8, PANEL_MOST_TOKENS = 128 }; /* their sums are 64 KiB */

/* Some tiles times some tokens: of the columns one panel's at a time, so that the tokens' values stay in
   the second-level cache while tile after tile is widened. */
static void multiply_panels(const struct product *job, int64_t first, int64_t tiles, int64_t token, int64_t tokens)
{
    const struct matrix *m = job->matrix;
    _Alignas(64) float panel[PANEL * TILE_ROWS];
    _Alignas(64) float sums[PANEL_TILES][PANEL_MOST_TOKENS * TILE_ROWS];
    memset(sums, 0, (size_t)tiles * sizeof *sums);
    for (int64_t c = 0; c < m->columns; c += PANEL) {
        const int64_t left = m->columns - c, columns = left < PANEL ? left : PANEL;
        for (int64_t i = 0; i < tiles; i++) {
            widen(m, first + i, c, columns, panel);
            for (int64_t t = 0; t < tokens;)
                t += used->multiply_panel(panel, columns, packed(job, c, token + t), tokens - t,
                                          sums[i] + t * TILE_ROWS);
        }
    }
    for (int64_t i = 0; i < tiles; i++)
        put(job, first + i, token, tokens, sums[i]);
}

static void multiply_pairs(const struct product *job, int64_t first, int64_t end)
{
    const struct matrix *m = job->matrix;
    _Alignas(64) float sums[PAIR_TOKENS * TILE_ROWS];
    for (int64_t tile = first; tile < end; tile++)
        for (int64_t token = 0; token < job->tokens; token += PAIR_TOKENS) {
            const int64_t left = job->tokens - token;
            used->multiply_pairs((const uint16_t *)m->weights + tile * TILE_ROWS * m->columns, m->columns,
                                 pairs_from(job, token), pair_vectors(job, token), sums);
            put(job, tile, token, left < PAIR_TOKENS ? left : PAIR_TOKENS, sums);
        }
}

static void multiply_all_panels(const struct product *job, int64_t first, int64_t end)
{
    for (int64_t tile = first; tile < end; tile += PANEL_TILES)
        for (int64_t token = 0; token < job->tokens; token += PANEL_MOST_TOKENS) {
            const int64_t tiles = end - tile, tokens = job->tokens - token;
            multiply_panels(job, tile, tiles < PANEL_TILES ? tiles : PANEL_TILES, token,
                            tokens < PANEL_MOST_TOKENS ? tokens : PANEL_MOST_TOKENS);
        }
}

static void multiply_part(void *argument)
{
    struct product *job = argument;
    int64_t first;
    while ((first = atomic_fetch_add(&job->next_tile, job->tiles_at_once)) < job->tiles) {
        const int64_t share = first + job->tiles_at_once, end = share < job->tiles ? share : job->tiles;
        switch (job->way) {
        case PANELS: multiply_all_panels(job, first, end); break;
        case PAIRS: multiply_pairs(job, first, end); break;
        default: multiply_tiles(job, first, end);
        }
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

