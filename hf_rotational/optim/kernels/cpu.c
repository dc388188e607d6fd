/* One step of a rotational optimizer on float32 weights, in one pass over memory. cpu.py builds and calls it.

While the moments of a neuron are updated, the sums u.u, u.w and w.w over its updates u and weights w are taken. They
give in closed form how large the tangent update is and how long the neuron will be after the step, so what the rotation
core (rotate_ in ../rotation.py, whose formulas these are) does by projection, step and rescaling is here one
w = a w - b u + c, done while w and u are in cache.

One thread works on a neuron, in an order that depends on shapes alone: results do not depend on how many threads there
are. Sums are double, in lanes that are added up side by side, so that compilers may vectorize without leave to reorder. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { ADAM, MOMENTUM, SGD, LION };     /* Group.kind; SGD: without momentum */
enum { UU, UW, WW, U, W, GRADS, SUMS }; /* GRADS counts gradients that are not 0 */
enum { LANES = 16, CHUNK = 512, AHEAD = 256, BLOCK = 32768, PANEL = 4096, MOST_THREADS = 256 };
enum { APART = PANEL + 2 * LANES }; /* of the sums of columns: not a multiple of a page, which would slow down stores */
enum { TABLES = 2 * SUMS * APART + 3 * PANEL }; /* floats of a thread's scratch memory for what columns need */

static const double ROUNDING_SQ = 64.0 * 0x1p-46; /* what a projection leaves: 8 units of float rounding, squared */

/* Hyperparameters of a parameter group, with this step's learning rate and target angle. */
typedef struct {
    int64_t kind, nesterov, center, forgetful, maximize, decoupled;
    double lr, angle, beta1, beta2, eps, weight_decay, dampening, decay, rotational_eps;
} Group;

/* A contiguous tensor of shape (batch, outer, neurons, inner): a neuron spans outer and inner. */
typedef struct {
    const Group *group;
    const float *grad; /* null: the tensor is left out */
    float *weight, *first, *second, *step, *update_norm_sq;
    const float *norm; /* null: the tensor does not rotate, and is all inner */
    int64_t batch, outer, neurons, inner;
    int64_t rotation_step; /* this one included */
    double relative_size_sq;
    /* Worked out here: how many blocks there are for threads to take, and factors that depend on the count of steps. */
    int64_t blocks;
    double late; /* what the running average of the updates' sizes has seen of a whole one */
    float first_new, second_new, l2, l2_first, root_scale, eps, from_grad, from_first;
} Tensor;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Updates the moments of one entry, if they are to be kept; returns what to subtract per unit of learning rate. */
static inline float direction(const Tensor *t, const int kind, const bool keep, float g, float w, float *m, float *v)
{
    const float beta1 = t->group->beta1, beta2 = t->group->beta2, turning = g + t->l2_first * w;
    if (kind == SGD)
        return t->from_grad * turning;
    const float mean = beta1 * *m + t->first_new * turning;
    if (kind == LION) {
        if (keep)
            *m = beta2 * *m + t->second_new * g;
        return (float)(mean > 0) - (float)(mean < 0);
    }
    if (keep)
        *m = mean;
    if (kind == MOMENTUM)
        return t->from_grad * turning + t->from_first * mean;
    const float whole = g + t->l2 * w, square = beta2 * *v + t->second_new * whole * whole;
    if (keep)
        *v = square;
    return mean / (t->root_scale * sqrtf(square) + t->eps);
}

/* Writes the directions u of n entries, and adds up u.u, u.w and w.w: entry i in lane i,
modulo LANES unless spread. Always inlined, so that what is constant is so in the loops. */
static inline __attribute__((always_inline)) void
sweep(const Tensor *tensor, const int kind, const bool keep, double *sums, bool spread, int64_t at, int64_t n, float *restrict u)
{
    const Tensor copy = *tensor, *t = &copy; /* which no store can change */
    const float *restrict g = t->grad + at, *restrict w = t->weight + at;
    float *restrict m = t->first + at, *restrict v = t->second + at;
    const int64_t apart = spread ? APART : LANES;
    double *restrict uu = sums, *restrict uw = sums + apart, *restrict ww = sums + 2 * apart;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        /* Processors that fetch ahead by themselves stop at the end of a page. */
        __builtin_prefetch(g + i + AHEAD, 0);
        __builtin_prefetch(w + i + AHEAD, 1);
        __builtin_prefetch(m + i + AHEAD, 1);
        __builtin_prefetch(v + i + AHEAD, 1);
        for (int64_t l = i; l < i + LANES; l++)
            u[l] = direction(t, kind, keep, g[l], w[l], m + l, v + l);
        if (sums)
            for (int64_t l = 0; l < LANES; l++) {
                const double a = u[i + l], b = w[i + l];
                uu[l] += a * a;
                uw[l] += a * b;
                ww[l] += b * b;
            }
        if (sums && spread)
            uu += LANES, uw += LANES, ww += LANES;
    }
    for (int64_t l = 0; i < n; i++, l++) {
        u[i] = direction(t, kind, keep, g[i], w[i], m + i, v + i);
        if (sums) {
            const double a = u[i], b = w[i];
            uu[l] += a * a;
            uw[l] += a * b;
            ww[l] += b * b;
        }
    }
}

#define SWEEPS(name, keep, sums, spread)                                                                                \
    static void name(const Tensor *t, double *lanes, int64_t at, int64_t n, float *u)                                   \
    {                                                                                                                   \
        switch (t->group->kind) {                                                                                       \
        case ADAM: sweep(t, ADAM, keep, sums, spread, at, n, u); break;                                                 \
        case MOMENTUM: sweep(t, MOMENTUM, keep, sums, spread, at, n, u); break;                                         \
        case SGD: sweep(t, SGD, keep, sums, spread, at, n, u); break;                                                   \
        default: sweep(t, LION, keep, sums, spread, at, n, u);                                                          \
        }                                                                                                               \
        (void)lanes;                                                                                                    \
    }
SWEEPS(update, true, NULL, false)
SWEEPS(update_and_sum, true, lanes, false)
SWEEPS(sum, false, lanes, false)
SWEEPS(update_and_sum_columns, true, lanes, true)
SWEEPS(sum_columns, false, lanes, true)

/* Adds up what only some settings need, in the same lanes. */
static void sum_more(const Tensor *t, double *sums, bool spread, int64_t at, int64_t n, const float *u)
{
    const float *w = t->weight + at, *g = t->grad + at;
    const int64_t apart = spread ? APART : LANES, mask = spread ? -1 : LANES - 1;
    if (t->group->center)
        for (int64_t i = 0; i < n; i++) {
            sums[U * apart + (i & mask)] += u[i];
            sums[W * apart + (i & mask)] += w[i];
        }
    if (t->group->forgetful)
        for (int64_t i = 0; i < n; i++)
            sums[GRADS * apart + (i & mask)] += g[i] != 0;
}

/* The coefficients of a neuron's w = a w - b u + c; it stays as it is where b is 0. */
typedef struct {
    float a, b, c;
} Move;

/* Closes a neuron's step from its sums. */
static Move close_step(const Tensor *t, int64_t neuron, const double *sums)
{
    const Group *group = t->group;
    const double fan_in = (double)t->outer * t->inner, norm = t->norm[neuron];
    const bool rotates = norm > 0;
    const double mean = group->center ? sums[U] / fan_in : 0.0, ww = sums[WW];
    const double uu = sums[UU] - mean * sums[U], uw = sums[UW] - mean * sums[W];
    const double inverse_sq = rotates ? 1.0 / (norm * norm) : 0.0, radial = uw * inverse_sq;
    const double removed_sq = mean * mean * fan_in + uw * radial;
    float size_sq = uu - 2.0 * radial * uw + radial * radial * ww;
    if (!(size_sq > ROUNDING_SQ * removed_sq))
        size_sq = 0.0f;
    float *average = t->update_norm_sq + neuron;
    if (!group->forgetful || sums[GRADS] > 0)
        *average += (*average == 0 ? t->late : 1.0 - group->decay) * (size_sq / t->relative_size_sq - *average);
    if (!isfinite(sums[UU] + sums[UW] + ww))
        return (Move){NAN, NAN, NAN};
    if (!rotates)
        return (Move){1.0f, group->lr, group->lr * mean};
    const double size = sqrt(*average * t->relative_size_sq / t->late) + group->rotational_eps;
    if (size_sq == 0 || size == 0) /* an average of updates so small may be 0 though they are not */
        return (Move){1.0f, 0.0f, 0.0f};
    const double b = group->angle * norm / size;
    const double scale = norm / sqrt(ww - 2.0 * b * (uw - radial * ww) + b * b * size_sq);
    return (Move){scale * (1.0 + b * radial), scale * b, scale * b * mean};
}

/* Adds up lanes, in place. */
static inline double total(double *lanes)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] += lanes[l + half];
    return lanes[0];
}

/* Neurons that lie in one piece. */
static void rows(const Tensor *t, int64_t first, int64_t last, float *scratch, int64_t scratch_size)
{
    const int64_t length = t->inner;
    const bool fits = length <= scratch_size; /* else directions are worked out twice */
    const int used = t->group->center || t->group->forgetful ? SUMS : WW + 1;
    double lanes[SUMS * LANES], sums[SUMS] = {0};
    for (int64_t neuron = first; neuron < last; neuron++) {
        const int64_t start = neuron * length, end = start + length;
        memset(lanes, 0, used * LANES * sizeof(double));
        for (int64_t at = start; at < end; at += CHUNK) {
            const int64_t n = least(CHUNK, end - at);
            float *u = scratch + (fits ? at - start : 0);
            (fits ? update_and_sum : sum)(t, lanes, at, n, u);
            sum_more(t, lanes, false, at, n, u);
        }
        for (int s = 0; s < used; s++)
            sums[s] = total(lanes + s * LANES);
        const Move move = close_step(t, neuron, sums);
        const bool moves = t->group->lr != 0 && move.b != 0;
        if (fits && !moves)
            continue;
        for (int64_t at = start; at < end; at += CHUNK) {
            const int64_t n = least(CHUNK, end - at);
            const float *restrict u = scratch + (fits ? at - start : 0);
            float *restrict w = t->weight + at;
            if (!fits)
                update(t, NULL, at, n, scratch);
            for (int64_t i = 0; moves && i < n; i++)
                w[i] = move.a * w[i] - (move.b * u[i] - move.c);
        }
    }
}

/* Neurons that lie across rows of memory. Rows are read from end to end: pieces of them would come much more slowly. */
static void columns(const Tensor *t, int64_t batch, int64_t first, int64_t last, float *scratch, int64_t scratch_size)
{
    const int64_t width = (last - first) * t->inner, stride = t->neurons * t->inner;
    const int64_t start = batch * t->outer * stride + first * t->inner;
    const bool fits = width * t->outer <= scratch_size - TABLES;
    double *lanes = (double *)scratch, sums[SUMS];
    float *restrict a = (float *)(lanes + SUMS * APART), *restrict b = a + PANEL, *restrict c = b + PANEL;
    float *kept = c + PANEL;
    for (int s = 0; s < SUMS; s++)
        memset(lanes + s * APART, 0, width * sizeof(double));
    for (int64_t r = 0; r < t->outer; r++) {
        float *u = kept + (fits ? r * width : 0);
        (fits ? update_and_sum_columns : sum_columns)(t, lanes, start + r * stride, width, u);
        sum_more(t, lanes, true, start + r * stride, width, u);
    }
    for (int64_t l = 0; l < width; l += t->inner) {
        for (int s = 0; s < SUMS; s++) {
            sums[s] = 0;
            for (int64_t k = l; k < l + t->inner; k++)
                sums[s] += lanes[s * APART + k];
        }
        const Move move = close_step(t, batch * t->neurons + first + l / t->inner, sums);
        for (int64_t k = l; k < l + t->inner; k++)
            a[k] = move.a, b[k] = move.b, c[k] = move.c;
    }
    for (int64_t r = 0; r < t->outer; r++) {
        const float *restrict u = kept + (fits ? r * width : 0);
        float *restrict w = t->weight + start + r * stride;
        if (!fits)
            update(t, NULL, start + r * stride, width, kept);
        for (int64_t l = 0; t->group->lr != 0 && l < width; l++)
            w[l] = b[l] != 0 ? a[l] * w[l] - (b[l] * u[l] - c[l]) : w[l];
    }
}

/* The plain update of what does not rotate. */
static void plain(const Tensor *t, int64_t first, int64_t last, float *scratch)
{
    const Group *group = t->group;
    const float lr = group->lr, left = group->decoupled ? 1.0 - group->lr * group->weight_decay : 1.0;
    for (int64_t at = first; at < last; at += CHUNK) {
        const int64_t n = least(CHUNK, last - at);
        const float *restrict u = scratch;
        float *restrict w = t->weight + at;
        update(t, NULL, at, n, scratch);
        for (int64_t i = 0; lr != 0 && i < n; i++)
            w[i] = left * w[i] - lr * u[i];
    }
}

/* How many entries, rows or columns of a tensor a thread takes at a time. */
static int64_t block_size(const Tensor *t)
{
    const int64_t size = t->norm ? (t->outer > 1 ? PANEL : BLOCK) / t->inner : BLOCK;
    return size ? size : 1;
}

typedef struct {
    Tensor *tensors;
    int64_t count, scratch_size;
    float *scratch;
    atomic_int_least64_t next_block, next_thread;
} Job;

static void *work(void *argument)
{
    Job *job = argument;
    float *scratch = job->scratch + atomic_fetch_add(&job->next_thread, 1) * job->scratch_size;
    const Tensor *t = job->tensors, *end = t + job->count;
    for (int64_t before = 0;;) {
        const int64_t block = atomic_fetch_add(&job->next_block, 1);
        while (t < end && block >= before + t->blocks)
            before += (t++)->blocks;
        if (t == end)
            return NULL;
        const int64_t size = block_size(t), units = t->norm ? t->neurons : t->inner, per_batch = (units + size - 1) / size;
        const int64_t batch = (block - before) / per_batch, first = (block - before) % per_batch * size;
        const int64_t last = least(first + size, units);
        if (!t->norm)
            plain(t, first, last, scratch);
        else if (t->outer > 1)
            columns(t, batch, first, last, scratch, job->scratch_size);
        else
            rows(t, first, last, scratch, job->scratch_size);
    }
}

/* Counts the step of a tensor, and works out what depends on the count. */
static void begin(Tensor *t)
{
    const Group *group = t->group;
    const int64_t size = block_size(t), units = t->norm ? t->neurons : t->inner;
    t->blocks = t->grad ? t->batch * ((units + size - 1) / size) : 0;
    if (!t->grad)
        return;
    const double step = *t->step += 1.0f, sign = group->maximize ? -1.0 : 1.0;
    t->late = 1.0 - pow(group->decay, t->rotation_step);
    /* A gradient is taken uphill by the sign of its factors; L2 goes downhill always. */
    t->l2 = group->decoupled ? 0.0 : sign * group->weight_decay;
    t->l2_first = t->norm ? 0.0f : t->l2;
    t->first_new = sign * (1.0 - group->beta1);
    t->second_new = 1.0 - group->beta2;
    t->from_grad = sign;
    if (group->kind == ADAM) {
        const double correction = 1.0 - pow(group->beta1, step);
        t->root_scale = correction / sqrt(1.0 - pow(group->beta2, step));
        t->eps = correction * group->eps;
    } else if (group->kind == LION) {
        t->second_new *= sign;
    } else if (group->kind == MOMENTUM) {
        t->first_new = sign * (step == 1 ? 1.0 : 1.0 - group->dampening); /* the first gradient enters undamped */
        t->from_grad = group->nesterov ? sign : 0.0;
        t->from_first = group->nesterov ? group->beta1 : 1.0;
    }
}

/* Takes one step of every tensor that has a gradient. Each thread has scratch_size floats of scratch. */
void rotational_step(Tensor *tensors, int64_t count, int64_t threads, float *scratch, int64_t scratch_size)
{
    Job job = {.tensors = tensors, .count = count, .scratch = scratch, .scratch_size = scratch_size};
    pthread_t started[MOST_THREADS];
    int64_t blocks = 0, running = 0;
    for (int64_t i = 0; i < count; i++) {
        begin(tensors + i);
        blocks += tensors[i].blocks;
    }
    threads = least(least(threads, blocks), MOST_THREADS);
    while (running < threads - 1 && pthread_create(started + running, NULL, work, &job) == 0)
        running++; /* threads that cannot be had are done without */
    work(&job);
    while (running)
        pthread_join(started[--running], NULL);
}
