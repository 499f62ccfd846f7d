// How a product's input comes into a block's shared memory, and how the sums of its rows leave it.
//
//   hidden      f32 [whole units of H], the residual stream h as far as the layers have come
//   parts       f32 [tiles, WARPS, 16], what each warp has of the rows (stream.cuh)
//
// A thread has eight consecutive channels of a unit, a warp a whole unit in each step: k = unit · 256 + lane · 8, the units
// of a vector going round the warps. So what is said of a unit (its largest number, its sum) is said by one warp.
//
// Products put out what they are multiplied to, with their bias, and nothing that it is added to: every block has all of h
// and adds to it what all of its blocks are told. The sums are the same numbers in the same order, so all blocks have the
// same h. A norm after a product, a norm before the next one and the addition between them are one step.
//
// What a norm before a product divides by comes after it: a product of γ·h is as good, so a warp whose units of h are there
// goes on, and only who finishes a row needs the sum of all squares. Where units go round the warps evenly, a warp multiplies
// what it staged itself, and no block's warps wait for each other between staging and the end of the product.
//
// Constants: H, I, WARPS, PARTS (bytes); BEFORE and AFTER (0 or 1: whether attention and feed-forward have a norm before
// them, and one after); ACTIVATION (common.cuh); DEC (whether tiles are divided between blocks). `All` is the team of a
// block's threads.
#pragma once
#include "flow.cuh"
#include "stream.cuh"

static_assert(UNIT == 256, "a warp's threads hold eight channels each of a unit");

#define UNITS_OF(k) (((k) + UNIT - 1) / UNIT)
// Steps in which a block's threads go through a vector.
#define STEPS_OF(k) ((UNITS_OF(k) + WARPS - 1) / WARPS)

// This thread's first channel in step `s`.
__device__ __forceinline__ int own_channel(int s) { return 8 * (s * THREADS + this_thread()); }

__device__ __forceinline__ void store_x(const Operand& to, int k, const Eights& v) {
    float eight[8];
#pragma unroll
    for (int i = 0; i < 8; i++) eight[i] = v[i];
    to.store(k, eight);
}

// A vector of K channels that others put out: this thread's, once all are there.
template <int K>
__device__ __forceinline__ void await_own(const Sum& x, Eights (&v)[STEPS_OF(K)]) {
    AskedEights asked[STEPS_OF(K)] = {};
#pragma unroll
    for (int s = 0; s < STEPS_OF(K); s++)
        if (own_channel(s) < K) asked[s] = AskedEights::nothing_yet(x);
    bool there;
    Patience patience;
    do {
        there = true;
#pragma unroll
        for (int s = 0; s < STEPS_OF(K); s++) asked[s].ask_missing(x, own_channel(s));
#pragma unroll
        for (int s = 0; s < STEPS_OF(K); s++) there &= asked[s].there();
    } while (patience.warp_goes_on(there));
#pragma unroll
    for (int s = 0; s < STEPS_OF(K); s++) v[s] = asked[s].sum();
}

// The stream of a token. A thread keeps the channels that it stages; halves of eights lie apart, which no two lanes' share
// a bank for.
struct Hidden {
    float4* halves;

    __device__ __forceinline__ float4* at(int k) const { return halves + k / UNIT * 64 + k % UNIT / 8; }
    __device__ __forceinline__ Eights operator[](int k) const { return Eights{at(k)[0], at(k)[32]}; }
    __device__ __forceinline__ void put(int k, const Eights& v) const { at(k)[0] = v.a, at(k)[32] = v.b; }
    __device__ __forceinline__ void clear() const {
#pragma unroll
        for (int s = 0; s < STEPS_OF(H); s++)
            if (own_channel(s) < UNITS_OF(H) * UNIT) put(own_channel(s), Eights{});
    }
};

// A γ's channels that are this thread's.
__device__ __forceinline__ void own_weights(const float* gamma, Eights (&w)[STEPS_OF(H)]) {
#pragma unroll
    for (int s = 0; s < STEPS_OF(H); s++) w[s] = own_channel(s) < H ? Eights::at(gamma + own_channel(s)) : Eights{};
}

__device__ __forceinline__ float own_squares(const Eights (&v)[STEPS_OF(H)]) {
    float sum = 0;
#pragma unroll
    for (int s = 0; s < STEPS_OF(H); s++) sum += v[s].squares();
    return sum;
}

// What a norm of the block's H channels divides by, inverted.
__device__ __forceinline__ float norm_scale(const Eights (&v)[STEPS_OF(H)], float eps, float* scratch) {
    return 1.0f / sqrtf(team_sum<All>(own_squares(v), scratch) / H + eps);
}

// The same, from what each warp has of the squares.
struct Later {
    const float* squares;
    float eps;

    __device__ __forceinline__ float scale() const {
        if (!squares) return 1.0f;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += squares[w];
        return 1.0f / sqrtf(sum / H + eps);
    }
};

// A branch on its way into the stream: what its last product put out, and the norms after that (or null) and before what
// comes next (or null).
struct Branch {
    Sum y;
    Norm after, before;
};

// h += y, or norm(y)·γ. v: this thread's channels of h then. scratch: a number for each warp.
__device__ __forceinline__ void take_in(const Branch& branch, const Hidden& h, float* scratch, Eights (&v)[STEPS_OF(H)]) {
    bool normed = AFTER && branch.after.gamma;
    Eights weights[STEPS_OF(H)];
    if (normed) own_weights(branch.after.gamma, weights);
    await_own<H>(branch.y, v);
    float scale = normed ? norm_scale(v, branch.after.eps, scratch) : 1.0f;
#pragma unroll
    for (int s = 0; s < STEPS_OF(H); s++) {
        int k = own_channel(s);
        if (normed) v[s].scale(scale, weights[s]);
        if (k >= UNITS_OF(H) * UNIT) continue;
        v[s].add(h[k]);
        h.put(k, v[s]);
    }
}

// The stream as the next product's input, but for what its norm divides by. scratch: two numbers for each warp.
__device__ __forceinline__ Later stage_hidden(const Branch& branch, const Hidden& h, float* scratch, const Operand& to) {
    Eights v[STEPS_OF(H)], weights[STEPS_OF(H)];
    if (BEFORE) own_weights(branch.before.gamma, weights);
    take_in(branch, h, scratch, v);
    if (BEFORE) {
        float squares = warp_sum(own_squares(v));
        if (this_thread() % 32 == 0) scratch[WARPS + this_thread() / 32] = squares;
    }
#pragma unroll
    for (int s = 0; s < STEPS_OF(H); s++) {
        if (BEFORE) v[s].scale(1, weights[s]);
        if (own_channel(s) < UNITS_OF(H) * UNIT) store_x(to, own_channel(s), v[s]);
    }
    return Later{BEFORE ? scratch + WARPS : nullptr, branch.before.eps};
}

// What attention put out, K channels.
template <int K>
__device__ __forceinline__ void stage_attended(const float* attended, const Operand& to) {
    Eights v[STEPS_OF(K)];
    await_own<K>(Sum{attended, nullptr, nullptr}, v);
#pragma unroll
    for (int s = 0; s < STEPS_OF(K); s++)
        if (own_channel(s) < UNITS_OF(K) * UNIT) store_x(to, own_channel(s), v[s]);
}

// The activations between gate-up and down, which are in 16 bits on their way.
__device__ __forceinline__ void stage_act(const u16* act, const Operand& to) {
    constexpr int STEPS = STEPS_OF(I);
    uint4 v[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        u32 nothing = own_channel(s) < I ? MISSING : 0;
        v[s] = make_uint4(nothing, nothing, nothing, nothing);
    }
    bool there;
    Patience patience;
    do {
        there = true;
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            if (!is_there(v[s])) v[s] = ask4(act + own_channel(s));
#pragma unroll
        for (int s = 0; s < STEPS; s++) there &= is_there(v[s]);
    } while (patience.warp_goes_on(there));
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        if (own_channel(s) < UNITS_OF(I) * UNIT) store_x(to, own_channel(s), widened(v[s]));
}

// Between staging x and multiplying it.
template <int K>
__device__ __forceinline__ void wait_for_staged() {
    if (UNITS_OF(K) % WARPS == 0)
        __syncwarp();
    else
        All::sync();
}

__device__ __forceinline__ float total(const float* parts, int tile, int r) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[(tile * WARPS + w) * 16 + r];
    return sum;
}

// This thread's row of a finished product, if there is one. Where tiles are divided, one may have begun in the block before:
// of its rows this block's part goes to `rest`, where there is nothing of others.
template <int UNITS>
__device__ __forceinline__ void finish(const Route& r, const float* parts, const Later& norm, const float* bias, float* y,
                                       float* rest) {
    int i = this_thread(), row = r.first_tile * 16 + i;
    if (i >= r.tiles * 16) return;
    float v = total(parts, i / 16, i % 16) * norm.scale();
    if (DEC && i < 16 && r.offset > 0) {
        put(rest + row, v);
    } else {
        put(y + row, bias ? v + bias[row] : v);
        if (DEC && r.end >= (r.first_tile + i / 16 + 1) * UNITS) put(rest + row, 0.0f);
    }
}

// Rows of gate and up: activation(gate)·up, in pairs. Compensations are waited for before the block's other warps are.
__device__ __forceinline__ void finish_pairs(const Route& r, const float* parts, const Later& norm, const float* bias,
                                             const float* delta, u16* act, float* act32, u32* beyond) {
    constexpr int STEPS = (PARTS / (4 * WARPS * 2) + THREADS - 1) / THREADS;
    int tiles = r.tiles, rows = tiles * 16, first = r.first_tile * 16;
    float gate[STEPS] = {}, up[STEPS] = {};
    if (delta) {
        bool there;
        Patience patience;
        do {
            there = true;
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                int i = s * THREADS + this_thread();
                if (i < rows) gate[s] = ask1(delta + first + i), up[s] = ask1(delta + I + first + i);
            }
#pragma unroll
            for (int s = 0; s < STEPS; s++) there &= !missing(gate[s]) & !missing(up[s]);
        } while (patience.warp_goes_on(there));
    }
    All::sync();
    float scale = norm.scale();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int i = s * THREADS + this_thread(), row = first + i;
        float v = 0;
        if (i < rows) {
            gate[s] += scale * total(parts, i / 16, i % 16), up[s] += scale * total(parts, tiles + i / 16, i % 16);
            if (bias) gate[s] += bias[row], up[s] += bias[I + row];
            v = activated(gate[s], ACTIVATION) * up[s];
            if (act32) put(act32 + row, v);
        }
        float after = __shfl_down_sync(FULL, v, 1);
        if (i < rows && i % 2 == 0) {
            u32 two = narrow2(v, after);
            Beyond lost;
            lost.add(two), lost.tell(beyond);
            put((u32*)(act + row), two);
        }
    }
}
