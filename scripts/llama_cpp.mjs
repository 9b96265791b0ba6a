// What llama.cpp makes of a GGUF file. Reads a JSON object from standard input, {"model", "texts", "windows",
// "prompt", "tokens"}, and writes {"tokens", "nll", "written"}: the tokens of each text, the mean negative
// log-likelihood per token of each window of tokens, and what it writes after the prompt, greedily.
//
// Needs the npm package node-llama-cpp (tried with 3.21.1, which brings llama.cpp built), in the directory
// LLAMA_CPP_NODE or beside this script.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire((process.env.LLAMA_CPP_NODE ?? import.meta.dirname) + "/_.js");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: asked.model});
// One thread: several wait for each other by spinning, which is slow where others compute as well.
const context = await model.createContext({contextSize: 1024, sequences: 1, threads: 1});
const sequence = context.getSequence();

const AT_ONCE = 32;
const nll = [];
for (const window of asked.windows ?? []) {
    await sequence.clearHistory();
    let sum = 0;
    // A few at a time: each comes with the probabilities of the whole vocabulary.
    for (let from = 0; from + 1 < window.length; from += AT_ONCE) {
        const part = window.slice(from, Math.min(from + AT_ONCE, window.length - 1));
        const seen = await sequence.controlledEvaluate(
            part.map((id) => [id, {generateNext: {probabilities: true}}]));
        part.forEach((_, i) => { sum -= Math.log(seen[i].next.probabilities.get(window[from + i + 1])); });
    }
    nll.push(sum / (window.length - 1));
}
const written = [];
if (asked.prompt) {
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(asked.prompt, {temperature: 0})) {
        written.push(token);
        if (written.length === asked.tokens) break;
    }
}
const tokens = (asked.texts ?? []).map((text) => model.tokenize(text, true));
process.stdout.write(JSON.stringify({tokens, nll, written}) + "\n");
await llama.dispose();
process.exit(0);
