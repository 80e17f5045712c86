// llama.cpp as a subject of `popcompile bench`: node llama_worker.mjs NODE_MODULES CONTEXT
//
// It answers as popcompile/bench/worker.py does, one prompt at a time, with node-llama-cpp of the folder NODE_MODULES,
// whose llama.cpp is compiled for each kind of CPU. CONTEXT: tokens that a prompt and what follows it have at most.
// Flash attention is on; all else is as node-llama-cpp has it by default.

import { join } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [modules, contextSize] = [process.argv[2], Number(process.argv[3])];
const { getLlama, getModuleVersion } = await import(pathToFileURL(join(modules, "node-llama-cpp/dist/index.js")));
const LIKELIEST = { generateNext: { token: true, options: { temperature: 0 } } };
let sequence;

async function load({ load: { path }, threads }) {
  const began = performance.now();
  const logger = (level, message) => console.error(message);
  const llama = await getLlama({ gpu: false, build: "never", maxThreads: threads, logLevel: "warn", logger });
  const model = await llama.loadModel({ modelPath: path });
  const options = { contextSize, flashAttention: true, threads: { ideal: threads, min: threads } };
  sequence = (await model.createContext(options)).getSequence();
  const runtime = `llama.cpp ${llama.llamaCppRelease.release} of node-llama-cpp ${await getModuleVersion()}`;
  return { seconds: seconds(began), anonymous: null, runtime };
}

// The likeliest token after `ids`, which are appended to the cache.
async function feed(ids) {
  const found = await sequence.controlledEvaluate([...ids.slice(0, -1), [ids.at(-1), LIKELIEST]]);
  return found.at(-1).next.token;
}

async function generate([ids], steps) {
  await sequence.clearHistory();
  const began = performance.now();
  const tokens = [await feed(ids)];
  const first = seconds(began);
  const picked = performance.now();
  for (let step = 0; step < steps; step++) tokens.push(await feed([tokens.at(-1)]));
  return { tokens, times: { prefill: first, time_to_first_token: first, decode: seconds(picked) } };
}

function seconds(since) {
  return (performance.now() - since) / 1e3;
}

async function answer(request) {
  if (request.load) return load(request);
  if (request.turn) return (await generate(request.turn, request.steps)).times;
  const { tokens } = await generate(request.warm_up, request.steps);
  return { first_token: tokens.slice(0, 1), tokens: [tokens], anonymous: null, peak: null };
}

process.on("SIGINT", () => {}); // Ctrl-C is the parent's to handle
for await (const line of createInterface({ input: process.stdin })) {
  const reply = await answer(JSON.parse(line)).catch((error) => ({ error: String(error), fixable: false }));
  process.stdout.write(JSON.stringify(reply) + "\n");
}
process.exit(0);
