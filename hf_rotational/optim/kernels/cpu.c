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
enum { LANES = 8, TILE = 16, ROWS = 8, CHUNK = 512, AHEAD = 256, BLOCK = 32768, PANEL = 4096, MOST_THREADS = 256 };
enum { TOGETHER = 6144 };           /* entries of short neurons whose steps are closed together */
enum { APART = PANEL + 2 * TILE }; /* of the sums of columns: not a multiple of a page, which would slow down stores */
enum { TABLES = 2 * SUMS * APART + 3 * PANEL }; /* floats of a thread's scratch memory for what columns need */

static const double ROUNDING_SQ = 64.0 * 0x1p-46; /* what a projection leaves: 8 units of float rounding, squared */

typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));

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

/* Updates the moments of one entry; returns what to subtract per unit of learning rate. */
static inline float direction(const Tensor *t, const int kind, float g, float w, float *m, float *v)
{
    const float beta1 = t->group->beta1, beta2 = t->group->beta2, turning = g + t->l2_first * w;
    if (kind == SGD)
        return t->from_grad * turning;
    const float mean = beta1 * *m + t->first_new * turning;
    if (kind == LION) {
        *m = beta2 * *m + t->second_new * g;
        return (float)(mean > 0) - (float)(mean < 0);
    }
    *m = mean;
    if (kind == MOMENTUM)
        return t->from_grad * turning + t->from_first * mean;
    const float whole = g + t->l2 * w, square = beta2 * *v + t->second_new * whole * whole;
    *v = square;
    return mean / (t->root_scale * sqrtf(square) + t->eps);
}

static inline Doubles load(const float *from)
{
    Doubles doubles;
    for (int l = 0; l < LANES; l++)
        doubles[l] = from[l];
    return doubles;
}

/* Steps the moments of up to TILE entries, if they are to be kept, and writes their directions u, 0 after the last. Adds
u.u, u.w and w.w to the given sums: entry i to lane i, modulo LANES unless spread. Always inlined, as its callers are:
what is constant there is so in the loops. */
static inline __attribute__((always_inline)) void
tile(const Tensor *t, const int kind, const bool keep, int64_t at, const int64_t n, float *restrict u, bool sums, bool spread,
     Doubles *uu, Doubles *uw, Doubles *ww)
{
    const float *restrict g = t->grad + at, *restrict w = t->weight + at;
    float *restrict m = t->first + at, *restrict v = t->second + at, rest[TILE];
#pragma GCC ivdep
    for (int64_t l = 0; l < TILE; l++) {
        const bool in = l < n;
        float first = in && kind != SGD ? m[l] : 0, second = in && kind == ADAM ? v[l] : 1;
        const float to = direction(t, kind, in ? g[l] : 0, in ? w[l] : 0, &first, &second);
        if (in && keep && kind != SGD)
            m[l] = first;
        if (in && keep && kind == ADAM)
            v[l] = second;
        u[l] = in ? to : 0;
        rest[l] = in ? w[l] : 0;
    }
    for (int64_t l = 0; sums && l < TILE; l += LANES) {
        const Doubles a = load(u + l), b = load((n < TILE ? rest : w) + l);
        const int64_t sum = spread ? l / LANES : 0;
        uu[sum] += a * a;
        uw[sum] += a * b;
        ww[sum] += b * b;
    }
}

/* The same of n entries; u has room for whole tiles. */
static inline __attribute__((always_inline)) void
sweep(const Tensor *tensor, const int kind, const bool keep, Doubles *sums, bool spread, int64_t at, int64_t n, float *restrict u)
{
    const Tensor copy = *tensor, *t = &copy; /* which no store can change */
    Doubles *uu = sums, *uw = sums + APART / LANES, *ww = sums + 2 * APART / LANES, lanes[WW + 1];
    if (sums && !spread) {
        memcpy(lanes, sums, sizeof lanes);
        uu = lanes, uw = lanes + 1, ww = lanes + 2;
    }
    int64_t i = 0;
    for (; i + TILE <= n; i += TILE) {
        /* Processors that fetch ahead by themselves stop at the end of a page. */
        __builtin_prefetch(t->grad + at + i + AHEAD, 0);
        __builtin_prefetch(t->weight + at + i + AHEAD, 1);
        __builtin_prefetch(t->first + at + i + AHEAD, 1);
        __builtin_prefetch(t->second + at + i + AHEAD, 1);
        if (spread)
            __builtin_prefetch(u + i + AHEAD, 1);
        tile(t, kind, keep, at + i, TILE, u + i, sums, spread, uu, uw, ww);
        if (spread)
            uu += TILE / LANES, uw += TILE / LANES, ww += TILE / LANES;
    }
    if (i < n)
        tile(t, kind, keep, at + i, n - i, u + i, sums, spread, uu, uw, ww);
    if (sums && !spread)
        memcpy(sums, lanes, sizeof lanes);
}

#define SWEEPS(name, keep, sums, spread)                                                                                \
    static void name(const Tensor *t, Doubles *lanes, int64_t at, int64_t n, float *u)                                  \
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

/* The coefficients of w = a w - b u + c for some neurons; one stays as it is where b is 0. */
typedef struct {
    float a[ROWS], b[ROWS], c[ROWS];
} Moves;

/* Closes the step of up to ROWS neurons, from the given one on, whose sums lie side by side. As vectors, since the roots
and divisions of one neuron after the other would take as long as the entries of a short one: so nothing branches, not
even by && and nested conditions, which compilers make branches of. */
static void close_steps(const Tensor *t, int64_t neuron, int64_t n, const double *sums, int64_t apart, Moves *moves)
{
    const Group *group = t->group;
    const bool center = group->center, forgetful = group->forgetful;
    const double fan_in = (double)t->outer * t->inner, share = center ? 1.0 / fan_in : 0.0;
    const double angle = group->angle, lr = group->lr, eps = group->rotational_eps;
    const double late = t->late, fresh = 1.0 - group->decay, relative_sq = t->relative_size_sq;
    double all[SUMS][ROWS] = {{0}}, norms[ROWS] = {0}, averages[ROWS] = {0}, weights[ROWS] = {0};
    for (int s = 0; s < SUMS; s++)
        if (s <= WW || (s == GRADS ? forgetful : center))
            memcpy(all[s], sums + s * apart, n * sizeof(double));
    for (int64_t i = 0; i < n; i++) {
        norms[i] = t->norm[neuron + i];
        averages[i] = t->update_norm_sq[neuron + i];
        weights[i] = forgetful && !(all[GRADS][i] > 0) ? 0.0 : averages[i] == 0 ? late : fresh;
    }
    for (int64_t i = 0; i < ROWS; i++) {
        const double norm = norms[i], mean = share * all[U][i], ww = all[WW][i];
        const double uu = all[UU][i] - mean * all[U][i], uw = all[UW][i] - mean * all[W][i];
        const double norm_sq = norm > 0 ? norm * norm : INFINITY, radial = uw / norm_sq;
        const double removed_sq = mean * mean * fan_in + uw * radial;
        const float tangent_sq = uu - 2.0 * radial * uw + radial * radial * ww;
        const double size_sq = tangent_sq > ROUNDING_SQ * removed_sq ? tangent_sq : 0.0;
        const float average = averages[i] + weights[i] * (size_sq / relative_sq - averages[i]);
        const double size = sqrt(average * relative_sq / late) + eps, turn = angle * norm / size;
        const double scale = norm / sqrt(ww - 2.0 * turn * (uw - radial * ww) + turn * turn * size_sq);
        const double a = scale * (1.0 + turn * radial), b = scale * turn, b_else = norm > 0 ? 0.0 : lr;
        /* An average of updates so small may be 0 though they are not. */
        const double turns = (norm > 0 ? 1.0 : 0.0) * (size_sq > 0 ? 1.0 : 0.0) * (size > 0 ? 1.0 : 0.0);
        const double b_now = turns > 0 ? b : b_else;
        const double unless_finite = (all[UU][i] + all[UW][i] + ww) * 0.0; /* NaN */
        all[UU][i] = (turns > 0 ? a : 1.0) + unless_finite;
        all[UW][i] = b_now + unless_finite;
        all[WW][i] = b_now * mean + unless_finite;
        averages[i] = weights[i] != 0 ? average : averages[i];
    }
    for (int64_t i = 0; i < n; i++) {
        moves->a[i] = all[UU][i], moves->b[i] = all[UW][i], moves->c[i] = all[WW][i];
        t->update_norm_sq[neuron + i] = averages[i];
    }
}

/* What lanes add up to. */
static inline double total(Doubles lanes)
{
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* Neurons that lie in one piece; several at a time, if they are short. */
static void rows(const Tensor *t, int64_t first, int64_t last, float *scratch, int64_t scratch_size)
{
    const int64_t length = t->inner, apart = (length + TILE - 1) / TILE * TILE;
    const bool fits = apart <= scratch_size; /* else directions are worked out twice */
    const int64_t together = TOGETHER / length ? least(ROWS, TOGETHER / length) : 1;
    const bool more = t->group->center || t->group->forgetful;
    double sums[SUMS * ROWS];
    Moves moves;
    for (int64_t neuron = first; neuron < last; neuron += together) {
        const int64_t count = least(together, last - neuron);
        for (int64_t k = 0; k < count; k++) {
            const int64_t start = (neuron + k) * length, end = start + length;
            Doubles lanes[SUMS] = {{0}};
            for (int64_t at = start; at < end; at += CHUNK) {
                const int64_t n = least(CHUNK, end - at);
                float *u = scratch + (fits ? k * apart + at - start : 0);
                (fits ? update_and_sum : sum)(t, lanes, at, n, u);
                if (more)
                    sum_more(t, (double *)lanes, false, at, n, u);
            }
            for (int s = 0; s < (more ? SUMS : WW + 1); s++)
                sums[s * ROWS + k] = total(lanes[s]);
        }
        close_steps(t, neuron, count, sums, ROWS, &moves);
        for (int64_t k = 0; k < count; k++) {
            const int64_t start = (neuron + k) * length, end = start + length;
            const float a = moves.a[k], b = moves.b[k], c = moves.c[k];
            const bool turns = t->group->lr != 0 && b != 0;
            if (fits && !turns)
                continue;
            for (int64_t at = start; at < end; at += CHUNK) {
                const int64_t n = least(CHUNK, end - at);
                const float *restrict u = scratch + (fits ? k * apart + at - start : 0);
                float *restrict w = t->weight + at;
                if (!fits)
                    update(t, NULL, at, n, scratch);
                for (int64_t i = 0; turns && i < n; i++)
                    w[i] = a * w[i] - (b * u[i] - c);
            }
        }
    }
}

/* Neurons that lie across rows of memory. Rows are read from end to end: pieces of them would come much more slowly. */
static void columns(const Tensor *t, int64_t batch, int64_t first, int64_t last, float *scratch, int64_t scratch_size)
{
    const int64_t width = (last - first) * t->inner, stride = t->neurons * t->inner;
    const int64_t start = batch * t->outer * stride + first * t->inner;
    const bool fits = width * t->outer + TILE <= scratch_size - TABLES;
    double *lanes = (double *)scratch;
    float *restrict a = (float *)(lanes + SUMS * APART), *restrict b = a + PANEL, *restrict c = b + PANEL;
    float *kept = c + PANEL;
    for (int s = 0; s < SUMS; s++)
        memset(lanes + s * APART, 0, width * sizeof(double));
    for (int64_t r = 0; r < t->outer; r++) {
        float *u = kept + (fits ? r * width : 0);
        (fits ? update_and_sum_columns : sum_columns)(t, (Doubles *)lanes, start + r * stride, width, u);
        sum_more(t, lanes, true, start + r * stride, width, u);
    }
    if (t->inner > 1)
        for (int s = 0; s < SUMS; s++)
            for (int64_t k = 0; k < last - first; k++) {
                double sum = 0;
                for (int64_t i = 0; i < t->inner; i++)
                    sum += lanes[s * APART + k * t->inner + i];
                lanes[s * APART + k] = sum;
            }
    for (int64_t k = 0; k < last - first; k += ROWS) {
        const int64_t n = least(ROWS, last - first - k);
        Moves moves;
        close_steps(t, batch * t->neurons + first + k, n, lanes + k, APART, &moves);
        for (int64_t l = 0; l < n * t->inner; l++) {
            const int64_t to = k * t->inner + l, from = l / t->inner;
            a[to] = moves.a[from], b[to] = moves.b[from], c[to] = moves.c[from];
        }
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
