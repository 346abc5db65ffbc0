/* attend_encoded's body on a CPU: one call serves all queries of one row and KV head over a run of
 * pages. Plain loops that a compiler turns into vector instructions; see native.py for the caller.
 *
 * A key at p0 + t, p0 the first position of a tile, meets the query as R(p0 + t) k: the query turned
 * back by p0 is made once a tile, R(t) once a call.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_DIM (K_DIM > V_DIM ? K_DIM : V_DIM)
#define MAX_ROWS 64
#define MAX_TILE 128

/* K_DIM and V_DIM, the channels of a head, are given to the compiler: inlined, loops over them have
 * constant ends. */
#define INLINE static inline __attribute__((always_inline))

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32), may_alias));
typedef float v16f __attribute__((vector_size(64), aligned(4), may_alias));

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { CALIBRATED, TOKEN, GROUP, CHANNEL };

/* The fields of native.py's _Side and _Task, in their order. */
typedef struct {
    int64_t codes, scale_at, zero_at, index, value, start; /* offsets in a row of a page */
    const float *lut, *scale, *zero;                       /* calibrated ranges [H, D] */
    int64_t bits, dim, kind, group, slots, store;
} Side;

typedef struct {
    Side k, v;
    const int64_t *pages;
    const float *q;      /* [B, H, R, D], scaled */
    const double *turns; /* [D / 2] revolutions a position, NULL without RoPE */
    const int64_t *shift, *first;
    const float *slopes; /* [H * R], NULL without */
    float *out, *lse;    /* [B, H, splits, R, Dv], [B, H, splits, R] */
    int64_t heads, rows, each, splits, row_bytes, page, tile, block;
    int64_t begin, stop, sinks, query, window; /* each: new tokens, query columns of a head */
    double cap;
} Task;

INLINE float number(const uint8_t *p, int64_t i, int64_t store) {
    if (store == FLOAT32) return ((const float *)p)[i];
    if (store == FLOAT16) return (float)((const _Float16 *)p)[i];
    union { uint32_t bits; float value; } x = {(uint32_t)((const uint16_t *)p)[i] << 16};
    return x.value;
}

INLINE int64_t integer(const uint8_t *p, int64_t i, int wide) {
    return wide ? ((const uint16_t *)p)[i] : p[i];
}

/* A plane of codes: a byte holds 8 / width channels that lie `size` apart. */
INLINE void plane(const uint8_t *restrict p, int64_t size, int width, int low,
                         uint8_t *restrict code) {
    for (int slot = 0; slot < 8 / width; slot++)
        for (int64_t j = 0; j < size; j++) {
            uint8_t part = (uint8_t)((p[j] >> slot * width) & ((1 << width) - 1));
            code[slot * size + j] = low ? code[slot * size + j] | (uint8_t)(part << low) : part;
        }
}

/* Codes of a token in natural order. Shifts are constant where a plane is: bytes stay bytes. */
INLINE void unpack(const uint8_t *p, int64_t bits, int64_t dim, uint8_t *code) {
    int low = 0;
    if (bits == 8) memcpy(code, p, (size_t)dim);
    if (bits >= 4 && bits < 8) plane(p, dim / 2, 4, 0, code), p += dim / 2, low = 4;
    if (bits & 2 && low) plane(p, dim / 4, 2, 4, code), p += dim / 4, low = 6;
    if (bits & 2 && !low) plane(p, dim / 4, 2, 0, code), p += dim / 4, low = 2;
    if (bits & 1 && low == 6) plane(p, dim / 8, 1, 6, code);
    if (bits & 1 && low == 4) plane(p, dim / 8, 1, 4, code);
    if (bits & 1 && low == 2) plane(p, dim / 8, 1, 2, code);
    if (bits == 1) plane(p, dim / 8, 1, 0, code);
}

/* Ranges of the channels of a token. */
static void ranges(const Side *s, const uint8_t *row, int64_t head, int64_t token, int64_t page,
                   float *scale, float *zero) {
    const uint8_t *a = row + s->scale_at, *b = row + s->zero_at;
    int64_t dim = s->dim;
    if (s->kind == CHANNEL) {
        int64_t at = (head * (page / s->group) + token / s->group) * dim;
        for (int64_t d = 0; d < dim; d++) {
            scale[d] = number(a, at + d, s->store);
            zero[d] = number(b, at + d, s->store);
        }
    } else {
        int64_t at = (head * page + token) * (dim / s->group);
        for (int64_t d = 0; d < dim; d++) {
            scale[d] = number(a, at + d / s->group, s->store);
            zero[d] = number(b, at + d / s->group, s->store);
        }
    }
}

static void corrections(const Task *t, const Side *s, const uint8_t *row, int64_t head,
                        int64_t token, int64_t count, float *x) {
    int64_t each = t->block * s->slots, dim = s->dim;
    int wide = t->block * dim > 256, wide_start = each > 255;
    for (int64_t b = token / t->block; b * t->block < token + count; b++) {
        int64_t first = integer(row + s->start, b * (t->heads + 1) + head, wide_start);
        int64_t last = integer(row + s->start, b * (t->heads + 1) + head + 1, wide_start);
        int64_t base = (b * t->block - token) * dim;
        for (int64_t i = b * each + first; i < b * each + last; i++) {
            int64_t place = base + integer(row + s->index, i, wide);
            if (place < count * dim) x[place] += number(row + s->value, i, s->store);
        }
    }
}

/* Levels of codes. A codebook of up to 16 fits two registers. */
INLINE void levels(const Side *s, const uint8_t *code, int64_t count, float *x) {
    v8f half[2] = {{0}, {0}};
    if (s->bits > 4) {
        for (int64_t i = 0; i < count; i++) x[i] = s->lut[code[i]];
        return;
    }
    for (int64_t i = 0; i < 1 << s->bits; i++) half[i / 8][i % 8] = s->lut[i];
    for (int64_t i = 0; i < count; i += 16) {
        int32_t wide[16] __attribute__((aligned(64)));
        for (int j = 0; j < 16; j++) wide[j] = code[i + j];
        for (int j = 0; j < 16; j += 8) {
            v8f level = __builtin_shuffle(half[0], half[1], *(v8i *)(wide + j));
            memcpy(x + i + j, &level, sizeof level);
        }
    }
}

/* Undo the normalisation. */
INLINE void denormalise(const Task *t, const Side *s, const uint8_t *row, int64_t head,
                        int64_t token, int64_t count, int64_t dim, float *x) {
    float own[2][MAX_DIM];
    const float *scale = own[0], *zero = own[1];
    if (s->kind == CALIBRATED) scale = s->scale + head * dim, zero = s->zero + head * dim;
    for (int64_t i = 0; i < count; i++, x += dim) {
        if (s->kind == TOKEN) {
            float a = number(row + s->scale_at, token + i, s->store);
            float b = number(row + s->zero_at, token + i, s->store);
            for (int64_t d = 0; d < dim; d++) x[d] = x[d] * a + b;
            continue;
        }
        if (s->kind == GROUP || (s->kind == CHANNEL && i == 0))
            ranges(s, row, head, token + i, t->page, own[0], own[1]);
        for (int64_t d = 0; d < dim; d++) x[d] = x[d] * scale[d] + zero[d];
    }
}

/* Dense tokens [count, D] of a head from `token` of a page on. */
INLINE void decode(const Task *t, const Side *s, const uint8_t *row, int64_t head, int64_t token,
                   int64_t count, int64_t dim, float *x) {
    uint8_t code[MAX_TILE * MAX_DIM] __attribute__((aligned(64)));
    const uint8_t *p = row + s->codes + (head * t->page + token) * dim * s->bits / 8;
    for (int64_t i = 0; i < count; i++) unpack(p + i * dim * s->bits / 8, s->bits, dim, code + i * dim);
    levels(s, code, count * dim, x);
    denormalise(t, s, row, head, token, count, dim, x);
    if (s->slots) corrections(t, s, row, head, token, count, x);
}

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

typedef struct {
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
INLINE void softmax_step(Work *w, int64_t r, int64_t count, int64_t dim) {
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
        w->most[r] = most;
    }
    for (int64_t i = 0; i < count; i++) {
        float x = power_of_two((p[i] - most) * 1.44269504f);
        p[i] = p[i] == -INFINITY ? 0 : x;
        total += p[i];
    }
    w->total[r] += total;
}

INLINE void tile(const Task *t, Work *w, const uint8_t *row, int64_t b, int64_t h, int64_t at,
                 int64_t count) {
    const int64_t dim = K_DIM, dim_v = V_DIM, column = at + t->sinks;
    const float *q = t->q + (b * t->heads + h) * t->rows * dim;
    decode(t, &t->k, row, h, at % t->page, count, dim, w->x);
    if (t->turns) {
        turn_back(t, w, q);
        for (int64_t i = 0; i < count; i++) turn(w->x + i * dim, w->cos[i], w->sin[i], dim / 2);
    }
    for (int64_t r = 0; r < t->rows; r++) {
        const float *own = t->turns ? w->turned[r] : q + r * dim;
        float slope = t->slopes ? t->slopes[h * t->rows + r] : 0;
        for (int64_t i = 0; i < count; i++) w->logits[r][i] = dot(own, w->x + i * dim, dim);
        shape(t, w->logits[r], count, column, t->first[b] + t->sinks, t->query + r % t->each, slope);
        softmax_step(w, r, count, dim_v);
    }
    decode(t, &t->v, row, h, at % t->page, count, dim_v, w->x);
    for (int64_t r = 0; r < t->rows; r++)
        for (int64_t d = 0; d < dim_v; d += 16) {
            v16f sum = *(v16f *)(w->out[r] + d);
            for (int64_t i = 0; i < count; i++)
                sum += w->logits[r][i] * *(const v16f *)(w->x + i * dim_v + d);
            *(v16f *)(w->out[r] + d) = sum;
        }
}

/* Task number `n` of B * H * splits. */
void attend_body(const Task *t, int64_t n) {
    Work work, *w = &work;
    int64_t split = n % t->splits, h = n / t->splits % t->heads, b = n / t->splits / t->heads;
    int64_t pages = (t->stop - t->begin + t->page - 1) / t->page;
    int64_t share = (pages + t->splits - 1) / t->splits * t->page;
    int64_t at = t->begin + split * share, end = at + share < t->stop ? at + share : t->stop;
    memset(w->out, 0, sizeof w->out);
    for (int64_t r = 0; r < t->rows; r++) w->most[r] = -INFINITY, w->total[r] = 0;
    if (t->turns) start_turning(t, w, at + t->sinks + t->shift[b]);
    for (; at < end; at += t->tile) {
        const uint8_t *page = (const uint8_t *)t->pages[(at - t->begin) / t->page];
        const uint8_t *row = page + b * t->row_bytes;
        int64_t count = end - at < t->tile ? end - at : t->tile;
        tile(t, w, row, b, h, at, count);
    }
    for (int64_t r = 0; r < t->rows; r++) {
        float total = w->total[r];
        t->lse[n * t->rows + r] = total > 0 ? w->most[r] + logf(total) : -INFINITY;
        float *out = t->out + (n * t->rows + r) * V_DIM;
        for (int64_t d = 0; d < V_DIM; d++) out[d] = total > 0 ? w->out[r][d] / total : 0;
    }
}
