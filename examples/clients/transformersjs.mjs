// The text-generation pipeline of transformers.js on a unified package: node transformersjs.mjs PACKAGE PROMPT [NEW_TOKENS]

import { basename, dirname, resolve } from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, prompt, newTokens = "32"] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder)) + "/";
const generate = await pipeline("text-generation", basename(resolve(folder)), {
  subfolder: "", // model.onnx lies in the package itself
  dtype: "fp32",
  use_external_data_format: true,
});
const [{ generated_text }] = await generate(prompt, {
  max_new_tokens: Number(newTokens),
  do_sample: false,
  return_full_text: false,
});
console.log(JSON.stringify(generated_text));
