// Greedy tokens with onnxruntime-node alone: node onnxruntime_loop.mjs PACKAGE '[token ids]' [NEW_TOKENS]
// Takes either layout. What a step returns as present is the next one's past.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";

const [folder, prompt, newTokens = "32"] = process.argv.slice(2);
const manifest = JSON.parse(readFileSync(join(folder, "popcompile.json"), "utf8"));
const options = { enableMemPattern: false }; // of use where shapes come again, and every token has longer ones
const session = await ort.InferenceSession.create(join(folder, manifest.graphs.prefill), options);

const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const empty = () => new ort.Tensor("float32", [], [1, manifest.num_kv_heads, 0, manifest.head_size]);
let past = Object.fromEntries(manifest.inputs.slice(2).map((name) => [name, empty()]));
let fresh = JSON.parse(prompt);
let total = 0;
const tokens = [];
while (tokens.length < Number(newTokens)) {
  total += fresh.length;
  const ones = new Array(total).fill(1);
  const out = await session.run({ input_ids: int64(fresh), attention_mask: int64(ones), ...past });
  const logits = out.logits.data; // [1, 1, vocabulary]
  fresh = [logits.indexOf(logits.reduce((a, b) => Math.max(a, b)))];
  tokens.push(...fresh);
  past = Object.fromEntries(Object.keys(past).map((name) => [name, out[name.replace("past_key_values", "present")]]));
}
console.log(JSON.stringify(tokens));
