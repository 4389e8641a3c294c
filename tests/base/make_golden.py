"""Writes golden/: two small GGUF files of mixed tensor types, and the same weights as transformers reads them
from GGUF.

Run: python3 tests/base/make_golden.py (needs torch 2.11, transformers 5.23, safetensors 0.8, gguf 0.19: versions used).
The GGUF side is written by gguf-py from random weights, Llama's query and key rows interleaved as llama.cpp wants them;
the other side is what transformers makes of that file, saved as fp32 safetensors. The test expects the two to be equal
bit for bit. dequantize.gguf holds blocks of random bytes of every type, and what gguf-py decodes them to.
"""
import pathlib
import sys

import gguf
import numpy as np
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "golden"
TYPES = {"F32": gguf.GGMLQuantizationType.F32, "F16": gguf.GGMLQuantizationType.F16,
         "Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_1": gguf.GGMLQuantizationType.Q4_1}
ROWS, COLUMNS = 3, 512  # of dequantize.gguf
MODELS = {
    "llama": dict(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, mlp=64, vocab=37, tied=True, eps=1e-5,
                  theta=50000.0, types=["Q4_1", "Q8_0", "F16", "F32"]),
    "qwen3": dict(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=32, mlp=64, vocab=29, tied=False, eps=1e-6,
                  theta=1e6, types=["F16", "Q8_0", "Q4_1"]),
}


def interleave(rows, heads):
    """Half-split rotary rows -> neighbouring pairs: row i and i + D/2 of each head become 2i and 2i + 1."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(name, m, path):
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(name)
    writer.add_block_count(m["layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(m["hidden"])
    writer.add_feed_forward_length(m["mlp"])
    writer.add_head_count(m["heads"])
    writer.add_head_count_kv(m["kv_heads"])
    writer.add_key_length(m["head_dim"])
    writer.add_value_length(m["head_dim"])
    writer.add_layer_norm_rms_eps(m["eps"])
    writer.add_rope_freq_base(m["theta"])
    writer.add_vocab_size(m["vocab"])
    if name == "llama":
        writer.add_rope_dimension_count(m["head_dim"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    count = 0

    def norm(tensor, size):
        writer.add_tensor(tensor, (1 + 0.1 * random.standard_normal(size)).astype(np.float32))

    def matrix(tensor, rows, columns, heads=0):
        nonlocal count
        weights = (0.2 * random.standard_normal((rows, columns))).astype(np.float32)
        if heads and name == "llama":
            weights = interleave(weights, heads)
        kind = TYPES[m["types"][count % len(m["types"])]]
        count += 1
        writer.add_tensor(tensor, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    q_dim, kv_dim = m["heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"]
    matrix("token_embd.weight", m["vocab"], m["hidden"])
    for i in range(m["layers"]):
        norm(f"blk.{i}.attn_norm.weight", m["hidden"])
        matrix(f"blk.{i}.attn_q.weight", q_dim, m["hidden"], m["heads"])
        matrix(f"blk.{i}.attn_k.weight", kv_dim, m["hidden"], m["kv_heads"])
        matrix(f"blk.{i}.attn_v.weight", kv_dim, m["hidden"])
        matrix(f"blk.{i}.attn_output.weight", m["hidden"], q_dim)
        if name == "qwen3":
            norm(f"blk.{i}.attn_q_norm.weight", m["head_dim"])
            norm(f"blk.{i}.attn_k_norm.weight", m["head_dim"])
        norm(f"blk.{i}.ffn_norm.weight", m["hidden"])
        matrix(f"blk.{i}.ffn_gate.weight", m["mlp"], m["hidden"])
        matrix(f"blk.{i}.ffn_up.weight", m["mlp"], m["hidden"])
        matrix(f"blk.{i}.ffn_down.weight", m["hidden"], m["mlp"])
    norm("output_norm.weight", m["hidden"])
    if not m["tied"]:
        matrix("output.weight", m["vocab"], m["hidden"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_blocks(path):
    """Any bytes but for the scales: a random f16 may be NaN, of which only the sign of being one is defined."""
    random = np.random.default_rng(11)
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"):
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ROWS * COLUMNS // block, size), dtype=np.uint8)
        scales = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [size - 2], "F16": [0]}.get(name, [])
        for at in scales:
            values = (random.standard_normal(len(blocks)) * 10.0 ** random.integers(-7, 3, len(blocks))).astype(np.float16)
            blocks[:, at:at + 2] = values.view(np.uint8).reshape(-1, 2)
        if name == "BF16":
            blocks[:, 1] &= 0xBF  # below infinity
        data = blocks.reshape(ROWS, -1)
        writer.add_tensor(name, data, raw_dtype=kind)
        writer.add_tensor(name + ".expected", gguf.quants.dequantize(data, kind).astype(np.float32).reshape(ROWS, COLUMNS))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    HERE.mkdir(exist_ok=True)
    write_blocks(HERE / "dequantize.gguf")
    for name, m in MODELS.items():
        path = HERE / f"{name}.gguf"
        write_gguf(name, m, path)
        config = transformers.AutoConfig.from_pretrained(HERE, gguf_file=path.name)
        config.head_dim = m["head_dim"]  # transformers leaves Qwen3's key_length unread
        model = transformers.AutoModelForCausalLM.from_pretrained(HERE, gguf_file=path.name, config=config,
                                                                  dtype=torch.float32)
        # save_pretrained refuses a model that came from GGUF, although its weights are plain fp32 by now.
        config = model.config
        del config.quantization_config
        config.architectures = [type(model).__name__]
        config.save_pretrained(HERE / name)
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        if m["tied"]:
            del tensors["lm_head.weight"]
        safetensors.torch.save_file(tensors, HERE / name / "model.safetensors")
        print(name, path.stat().st_size, "bytes of GGUF,", m["types"], file=sys.stderr)


if __name__ == "__main__":
    main()
