// A question about a picture, of a unified package that takes images, in transformers.js:
// node transformersjs_images.mjs PACKAGE QUESTION NEW_TOKENS [PICTURE]

import { readFileSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, Tensor, env, load_image } from "@huggingface/transformers";

const [folder, text, newTokens, ...pictures] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder)) + "/";
const name = basename(resolve(folder));
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, {
  subfolder: "", // the graphs lie in the package itself, and name their weights
  dtype: "fp32",
});
const content = [...pictures.map(() => ({ type: "image" })), { type: "text", text }];
const prompt = processor.apply_chat_template([{ role: "user", content }], {
  add_generation_prompt: true,
  chat_template: readFileSync(join(folder, "chat_template.jinja"), "utf8"), // which some of its processors do not read
});
const images = pictures.length ? await Promise.all(pictures.map((file) => load_image(file))) : null;
const inputs = await processor(prompt, images, { add_special_tokens: false });
// without a list of grids, and be it an empty one, Qwen's classes go on at wrong positions after the prompt
inputs.image_grid_thw ??= new Tensor("int64", [], [0, 3]);
const tokens = await model.generate({ ...inputs, max_new_tokens: Number(newTokens), do_sample: false });
const answer = tokens.slice(null, [inputs.input_ids.dims[1], null]);
console.log(JSON.stringify(processor.batch_decode(answer, { skip_special_tokens: true })[0]));
