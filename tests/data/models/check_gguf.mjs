// Loads every `model.gguf` in llama.cpp and holds its logits against those of `expected.safetensors`.
//
//     npm install node-llama-cpp        # 3.22, in a directory of its own, with this file copied into it
//     node check_gguf.mjs tests/data/models
//
// llama.cpp multiplies in f16 on a CPU, keeps keys and values in f16 and has GELU in a table of f16, hence 1 in 100.
import { readdirSync, existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

function tensors(path) {
    const data = readFileSync(path);
    const length = Number(data.readBigUInt64LE(0));
    const header = JSON.parse(data.subarray(8, 8 + length).toString());
    const found = {};
    for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
        const bytes = data.buffer.slice(data.byteOffset + 8 + length + start, data.byteOffset + 8 + length + end);
        found[name] = { shape, values: dtype === "I32" ? new Int32Array(bytes) : new Float32Array(bytes) };
    }
    return found;
}

async function furthest(model, ids, expected) {
    const context = await model.createContext({ contextSize: 256, flashAttention: false, swaFullCache: true });
    const sequence = context.getSequence();
    const [rows, vocab] = expected.shape;
    const from = ids.length - rows;
    const input = [...ids].map((id, at) => (at < from ? id : [id, { generateNext: { logits: true } }]));
    const output = await sequence.controlledEvaluate(input);
    let most = 0, largest = 0;
    for (let row = 0; row < rows; row++) {
        const logits = output[from + row].next.logits;
        for (let id = 0; id < vocab; id++) {
            const want = expected.values[row * vocab + id];
            largest = Math.max(largest, Math.abs(want));
            most = Math.max(most, Math.abs(logits.get(id) - want));
        }
    }
    await context.dispose();
    return most / largest;
}

const TOKENIZERS = {
    qwen: "qwen", llama: "llama-3", mi: "tekken", "phi-4-mini": "phi-4-mini", "phi-4": "phi-4", "phi-3": "phi-3",
    smollm3: "smollm3", gemma: "gemma", olmo: "olmo", granite: "granite", glm: "glm-4",
};

// How many of the texts of `../tokenizers/known.json` get the ids that the `tokenizers` package gives, BOS apart.
function texts(model, known, tokenizer) {
    const bos = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    const same = known.texts.filter((text, at) => {
        const want = known.tokenizers[tokenizer].ids[at].filter((id, place) => place > 0 || id !== bos[0]);
        return JSON.stringify(model.tokenize(text)) === JSON.stringify(want);
    });
    return `${same.length} of ${known.texts.length} texts`;
}

const directory = process.argv[2];
const known = JSON.parse(readFileSync(join(directory, "../tokenizers/known.json")));
const logLevel = process.argv[3] ? LlamaLogLevel.info : LlamaLogLevel.error;
const llama = await getLlama({ gpu: false, logLevel, build: "never" });
console.log("llama.cpp", llama.llamaCppRelease.release);
for (const name of readdirSync(directory).sort()) {
    const modelPath = join(directory, name, "model.gguf");
    if (!existsSync(modelPath) || (process.argv[3] && process.argv[3] !== name)) continue;
    try {
        const model = await llama.loadModel({ modelPath, ignoreMemorySafetyChecks: true });
        const { ids: short_ids, logits, long_ids, long_logits } = tensors(join(directory, name, "expected.safetensors"));
        const short = await furthest(model, short_ids.values, logits);
        const long = await furthest(model, long_ids.values, long_logits);
        const tokenizer = Object.entries(TOKENIZERS).find(([start]) => name.startsWith(start))[1];
        const ids = texts(model, known, tokenizer);
        console.log(name.padEnd(20), "short", short.toFixed(5), "long", long.toFixed(5), ids);
        await model.dispose();
    } catch (error) {
        console.log(name.padEnd(20), "not loaded:", error.message);
    }
}
process.exit(0);
