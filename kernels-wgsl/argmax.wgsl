// argmax: tokens[at] = the index of the largest logit, the lowest among equals; NaN is passed over, and where the
//         largest is infinite or there is none, tokens[at] = NO_TOKEN
//
// logits  u32 [vocab_size], bit patterns
// tokens  u32, tokens[at] overwritten
//
// One group; each of its threads looks at every 256th logit, one compares their 256 finds. Logits are compared as
// unsigned keys in the order of the numbers, so that no implementation's view of NaN matters.
// groups (1)

override NO_TOKEN: u32 = 0u;

struct Parameters {
    vocab_size: u32,
    at: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read_write> tokens: array<u32>;
var<immediate> p: Parameters;

const WIDE: u32 = 256u;

// Keys of −∞ and ∞.
const LEAST: u32 = 0x007fffffu;
const MOST: u32 = 0xff800000u;

var<workgroup> keys: array<u32, WIDE>;
var<workgroup> ids: array<u32, WIDE>;

fn key(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 0u;
    }
    // −0 equals 0
    let sign = bits >> 31u == 1u && bits != 0x80000000u;
    return select((bits & 0x7fffffffu) | 0x80000000u, ~bits, sign);
}

@compute @workgroup_size(WIDE)
fn argmax(@builtin(local_invocation_index) thread: u32) {
    var best = 0u;
    var id = thread;
    for (var i = thread; i < p.vocab_size; i += WIDE) {
        let candidate = key(logits[i]);
        if candidate > best {
            best = candidate;
            id = i;
        }
    }
    keys[thread] = best;
    ids[thread] = id;
    workgroupBarrier();
    if thread == 0u {
        for (var i = 1u; i < WIDE; i++) {
            if keys[i] > best || (keys[i] == best && ids[i] < id) {
                best = keys[i];
                id = ids[i];
            }
        }
        tokens[p.at] = select(NO_TOKEN, id, best > LEAST && best < MOST);
    }
}
