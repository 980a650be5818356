/* A whole transformer block in one call: norm, products, rotation, attention, gate, sums. Included by
   matrix.c. The steps are those of cake/model/llama.py, which computes the same where this cannot. */

struct block {
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const struct matrix *qkv, *output, *gate_up, *down;
    int64_t n_heads, n_kv_heads, head_dim;
    int64_t rounds; /* whether activations may be rounded to bfloat16 for matrices of it */
    double eps;
};

/* Consecutive tokens of one session, and its cache [n_blocks, 2, n_kv_heads, capacity, head_dim]: keys
   before values, float32 (bits 32) or bfloat16 (16). */
struct segment {
    int64_t first_row, length, position, capacity, bits;
    char *cache;
};

struct run {
    const struct block *block;
    const struct segment *segments;
    int64_t index, n_segments, tokens, threads; /* index: the block's place in the caches */
    float *x;              /* [tokens, hidden] */
    const float *cos, *sin; /* [positions, head_dim] */
    float *wide;           /* [tokens, the most rows of qkv and gate_up] */
    float *mixed;          /* [tokens, n_heads * head_dim] */
    struct product products[4];
    atomic_llong next[6];
};

enum { QKV, OUTPUT, GATE_UP, DOWN };

/* Keys (which = 0) or values (1) of a head, [capacity, head_dim]. */
static void *cached(const struct run *run, const struct segment *s, int which, int64_t kv_head)
{
    const struct block *b = run->block;
    const int64_t row = ((run->index * 2 + which) * b->n_kv_heads + kv_head) * s->capacity;
    return s->cache + row * b->head_dim * s->bits / 8;
}

/* The threads share the tokens of a step, then wait for one another. */
#define EACH_TOKEN(run, step) \
    for (int64_t t; (t = atomic_fetch_add(&(run)->next[step], 1)) < (run)->tokens;)

static void normalize(struct run *run, int step, int product, const float *weight)
{
    struct product *to = &run->products[product];
    const int64_t hidden = to->x_columns;
    float row[hidden];
    EACH_TOKEN(run, step)
    {
        used->norm(run->x + t * hidden, weight, (float)run->block->eps, row, hidden);
        prepare_token(to, t, row);
    }
}

/* Keys or values of one token into a head's cache. */
static void store(const struct segment *s, void *head, int64_t position, const float *row, int64_t head_dim)
{
    if (s->bits == 32) {
        memcpy((float *)head + position * head_dim, row, (size_t)head_dim * sizeof *row);
        return;
    }
    uint16_t *to = (uint16_t *)head + position * head_dim;
    for (int64_t d = 0; d < head_dim; d++)
        to[d] = to_bfloat(row[d]);
}

static void rotate_and_store(struct run *run, int step)
{
    const struct block *b = run->block;
    const int64_t dim = b->head_dim, heads = b->n_heads, kv_heads = b->n_kv_heads;
    EACH_TOKEN(run, step)
    {
        float *row = run->wide + t * b->qkv->rows;
        const struct segment *s = run->segments;
        while (t >= s->first_row + s->length)
            s++;
        const int64_t position = s->position + t - s->first_row;
        for (int64_t head = 0; head < heads + kv_heads; head++)
            used->rotate(row + head * dim, run->cos + position * dim, run->sin + position * dim, dim);
        for (int64_t head = 0; head < kv_heads; head++) {
            const float *key = row + (heads + head) * dim, *value = key + kv_heads * dim;
            store(s, cached(run, s, 0, head), position, key, dim);
            store(s, cached(run, s, 1, head), position, value, dim);
        }
    }
}

/* One key head, and the queries of some tokens that look at it. */
static void attend_tokens(const struct run *run, const struct segment *s, int64_t first, int64_t n_tokens,
                          int64_t kv_head)
{
    const struct block *b = run->block;
    const int64_t dim = b->head_dim, group = b->n_heads / b->n_kv_heads;
    const struct seen of = {cached(run, s, 0, kv_head), cached(run, s, 1, kv_head), s->bits};
    const float *q[QUERIES];
    float *out[QUERIES];
    int64_t n_seen[QUERIES];
    int n = 0;
    for (int64_t i = 0; i < n_tokens * group; i++) {
        const int64_t token = first + i / group, row = s->first_row + token, head = kv_head * group + i % group;
        q[n] = run->wide + row * b->qkv->rows + head * dim;
        out[n] = run->mixed + (row * b->n_heads + head) * dim;
        n_seen[n++] = s->position + token + 1;
        if (n == QUERIES || i + 1 == n_tokens * group) {
            used->attend(n, q, &of, n_seen, dim, out);
            n = 0;
        }
    }
}

static void attention(struct run *run, int step)
{
    const int64_t kv_heads = run->block->n_kv_heads, group = run->block->n_heads / kv_heads;
    const int64_t at_once = group < QUERIES ? QUERIES / group : 1; /* tokens that share the reading of keys */
    int64_t unit = atomic_fetch_add(&run->next[step], 1), before = 0;
    for (int64_t i = 0; i < run->n_segments; i++) {
        const struct segment *s = &run->segments[i];
        const int64_t units = (s->length + at_once - 1) / at_once * kv_heads;
        for (; unit < before + units; unit = atomic_fetch_add(&run->next[step], 1)) {
            const int64_t first = (unit - before) / kv_heads * at_once, left = s->length - first;
            attend_tokens(run, s, first, left < at_once ? left : at_once, (unit - before) % kv_heads);
        }
        before += units;
    }
}

static void take_over(struct run *run, int step, int product, float *rows, int64_t stride, int gated)
{
    struct product *to = &run->products[product];
    EACH_TOKEN(run, step)
    {
        float *row = rows + t * stride;
        if (gated)
            used->gate(row, row + to->x_columns, to->x_columns);
        prepare_token(to, t, row);
    }
}

static void run_block(void *argument)
{
    struct run *run = argument;
    const struct block *b = run->block;
    normalize(run, 0, QKV, b->attention_norm);
    wait_for_all(run->threads);
    multiply_part(&run->products[QKV]);
    wait_for_all(run->threads);
    rotate_and_store(run, 1);
    wait_for_all(run->threads);
    attention(run, 2);
    wait_for_all(run->threads);
    take_over(run, 3, OUTPUT, run->mixed, b->n_heads * b->head_dim, 0);
    wait_for_all(run->threads);
    multiply_part(&run->products[OUTPUT]);
    wait_for_all(run->threads);
    normalize(run, 4, GATE_UP, b->mlp_norm);
    wait_for_all(run->threads);
    multiply_part(&run->products[GATE_UP]);
    wait_for_all(run->threads);
    take_over(run, 5, DOWN, run->wide, b->gate_up->rows, 1);
    wait_for_all(run->threads);
    multiply_part(&run->products[DOWN]);
}

static int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

/* Pass `x` [tokens, hidden] through a block, in place. 0 when there was no memory. */
EXPORT int cake_block(const struct block *b, int64_t index, float *x, int64_t tokens, const float *cos,
                      const float *sin, const struct segment *segments, int64_t n_segments, int64_t threads)
{
    threads = parallel ? threads : 1;
    const int64_t hidden = b->output->rows, inner = b->gate_up->rows / 2, mixed = b->n_heads * b->head_dim;
    struct run run = {.block = b, .index = index, .segments = segments, .n_segments = n_segments, .tokens = tokens,
                      .threads = threads, .x = x, .cos = cos, .sin = sin};
    const struct matrix *matrices[] = {b->qkv, b->output, b->gate_up, b->down};
    const int64_t columns[] = {hidden, mixed, hidden, inner};
    size_t most = 0;
    for (int i = 0; i < 4; i++) {
        const size_t bytes = activation_bytes(matrices[i], tokens);
        most = bytes > most ? bytes : most;
    }
    const size_t wide = (size_t)(tokens * larger(b->qkv->rows, b->gate_up->rows)) * sizeof(float);
    char *memory = at_least(wide + (size_t)(tokens * mixed) * sizeof(float) + most);
    if (!memory)
        return 0;
    run.wide = (float *)memory;
    run.mixed = (float *)(memory + wide);
    for (int i = 0; i < 4; i++) {
        const int adds = i == OUTPUT || i == DOWN;
        run.products[i] = new_product(matrices[i], tokens, columns[i], adds ? x : run.wide, adds,
                                      (int)b->rounds, threads);
        set_activations(&run.products[i], run.mixed + tokens * mixed);
    }
    on_threads(run_block, &run, threads);
    return 1;
}
