// Tables of floating-point numbers in the type in which they are stored, two halves to a word.
// This text precedes every kernel; a kernel names the type of each of its tables by an override.

// Threads of a group, argmax's aside.
const THREADS: u32 = 64u;

const F32: u32 = 0u;
const F16: u32 = 1u;
const BF16: u32 = 2u;

// The word that holds number i.
fn slot(i: u32, kind: u32) -> u32 {
    return select(i >> 1u, i, kind == F32);
}

// Number i out of its word.
fn number(word: u32, i: u32, kind: u32) -> f32 {
    let half = (word >> (16u * (i & 1u))) & 0xffffu;
    if kind == F32 {
        return bitcast<f32>(word);
    }
    if kind == BF16 {
        return bitcast<f32>(half << 16u);
    }
    return unpack2x16float(half).x;
}

// cap · tanh(x / cap), by an exponential that cannot overflow.
fn capped(x: f32, cap: f32) -> f32 {
    let e = exp(-2.0 * abs(x / cap));
    return sign(x) * cap * ((1.0 - e) / (1.0 + e));
}

var<workgroup> sums_of_threads: array<f32, THREADS>;

// The sum of what each thread of a group has, in the order of the threads.
fn of_group(thread: u32, own: f32) -> f32 {
    sums_of_threads[thread] = own;
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < THREADS; i++) {
        sum += sums_of_threads[i];
    }
    return sum;
}
