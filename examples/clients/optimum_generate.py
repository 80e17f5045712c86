"""generate() and a pipeline of optimum on a unified package: python optimum_generate.py PACKAGE "PROMPT" [NEW_TOKENS]

Needs optimum-onnx[onnxruntime], in an environment of its own: it wants an older transformers than popcompile does.
"""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, pipeline

package, prompt, new_tokens = sys.argv[1], sys.argv[2], int((sys.argv[3:] or ["32"])[0])
model = ORTModelForCausalLM.from_pretrained(package, trust_remote_code=False, local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(package, trust_remote_code=False, local_files_only=True)
options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
text = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, return_full_text=False, **options)
assert text[0]["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)
print(json.dumps(tokens))
