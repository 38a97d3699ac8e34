"""What `benchmarks.versions` runs with another version of transformers: the models of the zoo that are like Llama.

python tests/zoo_versions.py    # a line of JSON for each model
"""

import json
import warnings

import torch
import transformers
import zoo_check

CORE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2",
        "glm4", "granite", "gpt_oss", "deepseek_v3")  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name in CORE:
        try:
            result = zoo_check.check(name)
        except Exception as error:
            result = {"crashed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main()
