/* attend_encoded's body on a CPU: one call serves all queries of one row and KV head over a run of
 * pages. Plain loops that a compiler turns into vector instructions; see native.py for the caller.
 *
 * A key at p0 + t, p0 the first position of a tile, meets the query as R(p0 + t) k: the query turned
 * back by p0 is made once a tile, R(t) once a call.
 */
#include "native.h"

/* Channels d and d + D/2 as a complex number, times c + i s. */
INLINE void turn(float *restrict x, const float *restrict c, const float *restrict s, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a * c[j] - b * s[j];
        x[j + half] = b * c[j] + a * s[j];
    }
}

INLINE void times(double *restrict c, double *restrict s, const double *restrict by_c,
                  const double *restrict by_s, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        double a = c[j] * by_c[j] - s[j] * by_s[j];
        s[j] = s[j] * by_c[j] + c[j] * by_s[j];
        c[j] = a;
    }
}

/* 2^x for x <= 0; Taylor's series to 1e-8 between -1/2 and 1/2. */
INLINE float power_of_two(float x) {
    x = x < -126.0f ? -126.0f : x;
    float whole = (float)(int32_t)(x - 0.5f), r = (x - whole) * 0.69314718f;
    float y = 1 / 120.f + r * (1 / 720.f + r / 5040.f);
    y = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * y))));
    union { int32_t bits; float value; } scale = {((int32_t)whole + 127) << 23};
    return y * scale.value;
}

INLINE float dot(const float *restrict a, const float *restrict b, int64_t dim) {
    v16f sum = {0};
    for (int64_t d = 0; d < dim; d += 16) sum += *(const v16f *)(a + d) * *(const v16f *)(b + d);
    float total = 0;
    for (int i = 0; i < 16; i++) total += sum[i];
    return total;
}

/* A of the block that is read, and each query on B (keys) or its weights on A so far (values). */
typedef struct {
    float left[MAX_RANK][MAX_BLOCK], inner[MAX_ROWS][MAX_RANK];
} Low;

typedef struct {
    Low k, v;
    float logits[MAX_ROWS][MAX_TILE], out[MAX_ROWS][MAX_DIM], turned[MAX_ROWS][MAX_DIM];
    float x[MAX_TILE * MAX_DIM], cos[MAX_TILE][MAX_DIM / 2], sin[MAX_TILE][MAX_DIM / 2];
    float most[MAX_ROWS], total[MAX_ROWS];
    double c[MAX_DIM / 2], s[MAX_DIM / 2], c_tile[MAX_DIM / 2], s_tile[MAX_DIM / 2];
} Work;

/* R(0), R(1), ... of a tile, the turn of a whole tile, and that of the first position. */
static void start_turning(const Task *t, Work *w, int64_t position) {
    const int64_t half = K_DIM / 2;
    double c1[MAX_DIM / 2], s1[MAX_DIM / 2];
    for (int64_t j = 0; j < half; j++) {
        double angle = 2 * M_PI * t->turns[j], at = t->turns[j] * (double)position;
        c1[j] = cos(angle), s1[j] = sin(angle), w->c_tile[j] = 1, w->s_tile[j] = 0;
        w->c[j] = cos(2 * M_PI * (at - floor(at))), w->s[j] = sin(2 * M_PI * (at - floor(at)));
    }
    for (int64_t i = 0; i < t->tile; i++) {
        for (int64_t j = 0; j < half; j++)
            w->cos[i][j] = (float)w->c_tile[j], w->sin[i][j] = (float)w->s_tile[j];
        times(w->c_tile, w->s_tile, c1, s1, half);
    }
}

/* Queries turned back to the first position of a tile; the next tile lies a tile further. */
INLINE void turn_back(const Task *t, Work *w, const float *q) {
    const int64_t dim = K_DIM, half = dim / 2;
    float c[MAX_DIM / 2], s[MAX_DIM / 2];
    for (int64_t j = 0; j < half; j++) c[j] = (float)w->c[j], s[j] = -(float)w->s[j];
    for (int64_t r = 0; r < t->rows; r++) {
        memcpy(w->turned[r], q + r * dim, (size_t)dim * sizeof(float));
        turn(w->turned[r], c, s, half);
    }
    times(w->c, w->s, w->c_tile, w->s_tile, half);
}

/* Logits of a query, seen or -inf. */
static void shape(const Task *t, float *logits, int64_t count, int64_t column, int64_t first,
                  int64_t query, float slope) {
    for (int64_t i = 0; i < count; i++) {
        int64_t back = query - column - i;
        float x = logits[i];
        if (t->cap > 0) x = (float)t->cap * tanhf(x / (float)t->cap);
        x -= slope * (float)back;
        logits[i] = back >= 0 && back < t->window && column + i >= first ? x : -INFINITY;
    }
}

/* A tile's logits of a query become weights; what was summed before is scaled to the new maximum. */
INLINE void softmax_step(Work *w, int64_t r, int64_t count, int64_t dim, int64_t rank) {
    float *p = w->logits[r], most = w->most[r], total = 0;
    for (int64_t i = 0; i < count; i++) most = p[i] > most ? p[i] : most;
    if (most == -INFINITY) {
        for (int64_t i = 0; i < count; i++) p[i] = 0;
        return;
    }
    if (most > w->most[r]) {
        float shrink = power_of_two((w->most[r] - most) * 1.44269504f);
        w->total[r] *= shrink;
        for (int64_t d = 0; d < dim; d++) w->out[r][d] *= shrink;
        for (int64_t c = 0; c < rank; c++) w->v.inner[r][c] *= shrink;
        w->most[r] = most;
    }
    for (int64_t i = 0; i < count; i++) {
        float x = power_of_two((p[i] - most) * 1.44269504f);
        p[i] = p[i] == -INFINITY ? 0 : x;
        total += p[i];
    }
    w->total[r] += total;
}

/* logits + (q B) A^T; a block's q B is made where the block begins. */
static void low_logits(const Task *t, Work *w, const uint8_t *row, int64_t head, int64_t token,
                       int64_t count, const float *q) {
    const Side *s = &t->k;
    float right[K_DIM];
    for (int64_t i = 0, n; i < count; i += n) {
        int64_t o = (token + i) % t->block, first = first_column(t, s, head, token + i);
        n = t->block - o < count - i ? t->block - o : count - i;
        for (int64_t c = 0; c < s->rank; c++) {
            if (!o) {
                float scale = scale_of(s, row, first + c);
                column_of(s, row + s->left, first + c, t->block, w->k.left[c]);
                column_of(s, row + s->right, first + c, K_DIM, right);
                for (int64_t r = 0; r < t->rows; r++)
                    w->k.inner[r][c] = dot(q + r * K_DIM, right, K_DIM) * scale;
            }
            for (int64_t r = 0; r < t->rows; r++) {
                float inner = w->k.inner[r][c];
                for (int64_t j = 0; j < n; j++) w->logits[r][i + j] += inner * w->k.left[c][o + j];
            }
        }
    }
}

/* p A of a block, times B^T where it ends; both scaled as `out` is. */
static void low_values(const Task *t, Work *w, const uint8_t *row, int64_t head, int64_t token,
                       int64_t count, int last) {
    const Side *s = &t->v;
    float right[V_DIM];
    for (int64_t i = 0, n; i < count; i += n) {
        int64_t o = (token + i) % t->block, first = first_column(t, s, head, token + i);
        n = t->block - o < count - i ? t->block - o : count - i;
        int whole = o + n == t->block || (last && i + n == count);
        for (int64_t c = 0; c < s->rank; c++) {
            if (!o) column_of(s, row + s->left, first + c, t->block, w->v.left[c]);
            for (int64_t r = 0; r < t->rows; r++) {
                float sum = 0;
                for (int64_t j = 0; j < n; j++) sum += w->logits[r][i + j] * w->v.left[c][o + j];
                w->v.inner[r][c] += sum;
            }
            if (!whole) continue;
            float scale = scale_of(s, row, first + c);
            column_of(s, row + s->right, first + c, V_DIM, right);
            for (int64_t r = 0; r < t->rows; r++) {
                float weight = w->v.inner[r][c] * scale;
                for (int64_t d = 0; d < V_DIM; d++) w->out[r][d] += weight * right[d];
                w->v.inner[r][c] = 0;
            }
        }
    }
}

INLINE void tile(const Task *t, Work *w, const uint8_t *row, int64_t b, int64_t h, int64_t at,
                 int64_t count, int last) {
    const int64_t dim = K_DIM, dim_v = V_DIM, column = at + t->sinks;
    const float *q = t->q + (b * t->heads + h) * t->rows * dim;
    decode(t, &t->k, row, h, at % t->page, count, dim, w->x);
    if (t->turns) {
        turn_back(t, w, q);
        for (int64_t i = 0; i < count; i++) turn(w->x + i * dim, w->cos[i], w->sin[i], dim / 2);
    }
    for (int64_t r = 0; r < t->rows; r++) {
        const float *own = t->turns ? w->turned[r] : q + r * dim;
        for (int64_t i = 0; i < count; i++) w->logits[r][i] = dot(own, w->x + i * dim, dim);
    }
    if (t->k.rank) low_logits(t, w, row, h, at % t->page, count, q);
    for (int64_t r = 0; r < t->rows; r++) {
        float slope = t->slopes ? t->slopes[h * t->rows + r] : 0;
        shape(t, w->logits[r], count, column, t->first[b] + t->sinks, t->query + r % t->each, slope);
        softmax_step(w, r, count, dim_v, t->v.rank);
    }
    decode(t, &t->v, row, h, at % t->page, count, dim_v, w->x);
    for (int64_t r = 0; r < t->rows; r++)
        for (int64_t d = 0; d < dim_v; d += 16) {
            v16f sum = *(v16f *)(w->out[r] + d);
            for (int64_t i = 0; i < count; i++)
                sum += w->logits[r][i] * *(const v16f *)(w->x + i * dim_v + d);
            *(v16f *)(w->out[r] + d) = sum;
        }
    if (t->v.rank) low_values(t, w, row, h, at % t->page, count, last);
}

/* Task number `n` of B * H * splits. */
void attend_body(const Task *t, int64_t n) {
    Work work, *w = &work;
    int64_t split = n % t->splits, h = n / t->splits % t->heads, b = n / t->splits / t->heads;
    int64_t pages = (t->stop - t->begin + t->page - 1) / t->page;
    int64_t share = (pages + t->splits - 1) / t->splits * t->page;
    int64_t at = t->begin + split * share, end = at + share < t->stop ? at + share : t->stop;
    memset(w->out, 0, sizeof w->out);
    memset(w->v.inner, 0, sizeof w->v.inner);
    for (int64_t r = 0; r < t->rows; r++) w->most[r] = -INFINITY, w->total[r] = 0;
    if (t->turns) start_turning(t, w, at + t->sinks + t->shift[b]);
    for (; at < end; at += t->tile) {
        const uint8_t *page = (const uint8_t *)t->pages[(at - t->begin) / t->page];
        const uint8_t *row = page + b * t->row_bytes;
        int64_t count = end - at < t->tile ? end - at : t->tile;
        tile(t, w, row, b, h, at, count, at + count == end);
    }
    for (int64_t r = 0; r < t->rows; r++) {
        float total = w->total[r];
        t->lse[n * t->rows + r] = total > 0 ? w->most[r] + logf(total) : -INFINITY;
        float *out = t->out + (n * t->rows + r) * V_DIM;
        for (int64_t d = 0; d < V_DIM; d++) out[d] = total > 0 ? w->out[r][d] / total : 0;
    }
}
