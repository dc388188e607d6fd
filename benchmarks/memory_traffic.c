/* What a rotational step moves through memory, and nothing else: the floor under its time. */

#include <stdint.h>

enum { AHEAD = 256 };

typedef float Vector __attribute__((vector_size(64), aligned(4)));

static inline Vector *at(float *entries, int64_t i) { return (Vector *)(entries + i); }

/* The one look at a tensor whose neurons are rows: moments and weights are read and written, gradients read. The
weights stay as they are, which no compiler can know. The first look at columns writes directions instead. */
void look(float *weight, float *grad, float *first, float *second, float *direction, int64_t n)
{
    float *written = direction ? direction : weight;
    for (int64_t i = 0; i + 16 <= n; i += 16) {
        __builtin_prefetch(grad + i + AHEAD, 0);
        __builtin_prefetch(weight + i + AHEAD, 1);
        __builtin_prefetch(first + i + AHEAD, 1);
        const Vector g = *at(grad, i), m = 0.5f * (*at(first, i) + g);
        Vector w = *at(weight, i) + 0.0f * m;
        *at(first, i) = m;
        if (second) {
            __builtin_prefetch(second + i + AHEAD, 1);
            const Vector v = 0.5f * (*at(second, i) + g);
            *at(second, i) = v;
            w += 0.0f * v;
        }
        *at(written, i) = w;
    }
}

/* The second look at columns. */
void look_again(float *weight, float *direction, int64_t n)
{
    for (int64_t i = 0; i + 16 <= n; i += 16)
        *at(weight, i) += 0.0f * *at(direction, i);
}
