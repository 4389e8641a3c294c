"""Writes golden/rope.json: configurations as published models have them, fewer layers and narrower, with the rotary
frequencies and the attention factor that transformers computes from each.

Run: python3 tests/base/make_rope_golden.py (needs torch 2.11, transformers 5.23: versions used).
"""
import json
import pathlib
import tempfile

import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = pathlib.Path(__file__).parent / "golden"

LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 512, "initializer_range": 0.02,
    "intermediate_size": 896, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 1, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256}
LLAMA_32 = {**LLAMA_31, "head_dim": 64, "hidden_size": 256, "tie_word_embeddings": True,
            "rope_scaling": {**LLAMA_31["rope_scaling"], "factor": 32.0}}
LLAMA_2_LONG = {**LLAMA_31, "max_position_embeddings": 32768, "rope_theta": 10000.0, "vocab_size": 32000,
                "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": {"factor": 8.0, "type": "linear"}}
NEMO = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 1792,
    "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
    "use_cache": True, "vocab_size": 131072}
QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 1184,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064}
QWEN_25_YARN = {**QWEN_25, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 256, "initializer_range": 0.02,
    "intermediate_size": 768, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936}
QWEN_3_NEW = {key: value for key, value in QWEN_3.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
QWEN_3_NEW.update(dtype="bfloat16", layer_types=["full_attention"] * 2, transformers_version="5.0.0")


def yarn(**more):
    return {**QWEN_3_NEW, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
                                              "original_max_position_embeddings": 32768, **more}}


# name: (config.json, --rope-scaling, the window that follows, the same as a config.json)
CASES = {
    "llama-3.1-8b": (LLAMA_31, "", 131072, LLAMA_31),
    "llama-3.2-1b": (LLAMA_32, "", 131072, LLAMA_32),
    "llama-2-linear": (LLAMA_2_LONG, "", 32768, LLAMA_2_LONG),
    "mistral-nemo": (NEMO, "", 131072, NEMO),
    "qwen2.5-7b": (QWEN_25, "", 32768, QWEN_25),
    "qwen2.5-7b-yarn": (QWEN_25_YARN, "", 131072, QWEN_25_YARN),
    "qwen3-0.6b": (QWEN_3, "", 40960, QWEN_3),
    "yarn-attention-factor": (yarn(attention_factor=1.25, beta_fast=16, beta_slow=2), "", 131072, None),
    "yarn-mscale": (yarn(mscale=0.707, mscale_all_dim=1.5), "", 131072, None),
    "yarn-not-truncated": (yarn(truncate=False), "", 131072, None),
    "qwen2.5-7b-on-request": (QWEN_25, "yarn:4", 131072, QWEN_25_YARN),
    "qwen3-0.6b-on-request": (QWEN_3, "yarn:4:32768", 131072, yarn()),
    "llama-3.1-8b-on-request": (LLAMA_31, "llama3:32", 8192 * 32,
                                {**LLAMA_31, "rope_scaling": LLAMA_32["rope_scaling"]}),
    "nemo-linear-on-request": (NEMO, "linear:2", 262144, {**NEMO, "rope_scaling": {"type": "linear", "factor": 2.0}}),
}


def main():
    cases = []
    for name, (config, request, window, same) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "config.json").write_text(json.dumps(same or config))
            read = transformers.AutoConfig.from_pretrained(folder)
        rotary = LlamaRotaryEmbedding(read)
        cases.append({"name": name, "config": config, "rope_scaling": request, "window": window,
                      "attention_factor": rotary.attention_scaling,
                      "inverse_frequencies": [float(f"{x:.9g}") for x in rotary.inv_freq.tolist()]})
    lines = ",\n".join(" " + json.dumps(case) for case in cases)
    (HERE / "rope.json").write_text('{"command": "python3 tests/base/make_rope_golden.py", "cases": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
