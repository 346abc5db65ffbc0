/* How native.c reads pages: codes, ranges, corrections and factors, as the task says they lie. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MAX_DIM (K_DIM > V_DIM ? K_DIM : V_DIM)
#define MAX_ROWS 64
#define MAX_TILE 128
#define MAX_RANK 64
#define MAX_BLOCK 256

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
    int64_t left, right, factor_scale;                     /* of the factors A and B */
    const float *lut, *scale, *zero;                       /* calibrated ranges [H, D] */
    int64_t bits, dim, kind, group, slots, store, rank, width;
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

/* Float16 by integer operations: compilers convert it one by one. */
INLINE float number(const uint8_t *p, int64_t i, int64_t store) {
    if (store == FLOAT32) return ((const float *)p)[i];
    uint32_t stored = ((const uint16_t *)p)[i];
    union { uint32_t bits; float value; } x = {stored << 16};
    if (store == BFLOAT16) return x.value;
    x.bits = (stored & 0x7fff) << 13;
    x.value *= 0x1p112f;
    x.bits |= ((stored & 0x7c00) == 0x7c00 ? 0x7f800000u : 0) | (stored & 0x8000) << 16;
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
        int64_t groups = dim / s->group, at = (head * page + token) * groups;
        for (int64_t g = 0; g < groups; g++) {
            float one = number(a, at + g, s->store), two = number(b, at + g, s->store);
            for (int64_t d = g * s->group; d < (g + 1) * s->group; d++) scale[d] = one, zero[d] = two;
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

/* A column of `count` factors. Levels of codes are (2 code + 1) / 2^width - 1. */
__attribute__((noinline)) static void column_of(const Side *s, const uint8_t *p, int64_t column,
                                                int64_t count, float *x) {
    uint8_t code[MAX_BLOCK > MAX_DIM ? MAX_BLOCK : MAX_DIM];
    float step = 1.0f / (float)(1 << s->width);
    if (s->width) {
        unpack(p + column * count * s->width / 8, s->width, count, code);
        for (int64_t i = 0; i < count; i++) x[i] = (float)(2 * code[i] + 1) * step - 1;
        return;
    }
    for (int64_t i = 0; i < count; i++) x[i] = number(p, column * count + i, s->store);
}

INLINE float scale_of(const Side *s, const uint8_t *row, int64_t column) {
    return s->width ? number(row + s->factor_scale, column, s->store) : 1;
}

/* Tokens [token, token + count) of a page lie in blocks with factors of their own. */
INLINE int64_t first_column(const Task *t, const Side *s, int64_t head, int64_t token) {
    return (head * (t->page / t->block) + token / t->block) * s->rank;
}
