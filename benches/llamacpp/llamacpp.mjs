// Decoding and prompt speed of llama.cpp on the CPU: node llamacpp.mjs MODEL.gguf THREADS TOKENS PROMPT
// prints "decode TOKENS/S prompt TOKENS/S". Greedy, from a short text; the prompt's tokens are any.
import {getLlama} from "node-llama-cpp";

const [model, threads, tokens, prompt] = process.argv.slice(2).map((value, i) => (i ? Number(value) : value));
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const loaded = await llama.loadModel({modelPath: model});
const context = await loaded.createContext({contextSize: prompt + tokens + 64, threads, batchSize: 512});
const sequence = context.getSequence();
const perSecond = (count, since) => (count / ((performance.now() - since) / 1000)).toFixed(1);

// The first token waits for the text before it: the clock starts behind it.
let made = 0;
let start = 0;
for await (const token of sequence.evaluate(loaded.tokenize("Once upon a time"), {temperature: 0, yieldEogToken: true})) {
    if (made === 0) start = performance.now();
    if (++made > tokens) break;
}
const decode = perSecond(made - 1, start);

await sequence.clearHistory();
const text = Array.from({length: prompt}, (_, i) => 100 + ((i * 37) % 40000));
start = performance.now();
await sequence.evaluateWithoutGeneratingNewTokens(text);
console.log(`decode ${decode} prompt ${perSecond(prompt, start)}`);
process.exit(0);
