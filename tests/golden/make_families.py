#!/usr/bin/env python3
"""Writes families/: small random checkpoints of every family, as Hugging Face folders and as GGUF, and what transformers
computes from them with every kind of RoPE. Needs torch, transformers, safetensors, gguf; takes a minute.

    python3 tests/golden/make_families.py

families.golden.json, one case a line: `model` (folder or .gguf), `config` (fields that replace those of config.json),
`rope_scaling` (the request that gives the same model without them, where there is one), `logits` of `rows`, `loss` and
`norm` of `span` (start, rows): the next-token cross-entropy and the norm of its gradient with respect to W_Q with K and V
held fixed, and the greedy `tokens` behind context and question. All from transformers' own forward pass in fp64.
"""
import json
import math
import pathlib
import shutil

import gguf
import numpy as np
import torch
from transformers import (AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OUT = pathlib.Path(__file__).resolve().parent / "families"
TOKENS, WINDOW, FACTOR = 400, 128, 4     # the window before stretching; beyond it lie most of the context's positions
ROWS = [0, 127, 128, 300, 399]
SPAN = (220, 37)                         # crosses a block's edge
QUESTION, ANSWER = 5, 8
Type = gguf.GGMLQuantizationType

COMMON = dict(vocab_size=48, num_hidden_layers=2, max_position_embeddings=WINDOW * FACTOR, bos_token_id=1,
              eos_token_id=2)
MODELS = {
    "llama": LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=32, num_attention_heads=2,
                                          num_key_value_heads=1, head_dim=16, rope_theta=500000.0,
                                          tie_word_embeddings=True, rms_norm_eps=1e-5, **COMMON)),
    "mistral": MistralForCausalLM(MistralConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4,
                                                num_key_value_heads=2, head_dim=32, rope_theta=1000000.0,
                                                sliding_window=None, tie_word_embeddings=False, rms_norm_eps=1e-5,
                                                **COMMON)),
    "qwen2": Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=96, num_attention_heads=4,
                                          num_key_value_heads=2, rope_theta=1000000.0, sliding_window=128,
                                          use_sliding_window=False, tie_word_embeddings=False, rms_norm_eps=1e-6,
                                          **COMMON)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(hidden_size=64, intermediate_size=64, num_attention_heads=2,
                                          num_key_value_heads=1, head_dim=32, rope_theta=1000000.0,
                                          tie_word_embeddings=True, rms_norm_eps=1e-6, **COMMON)),
}
ROPES = {
    "none": (None, "none"),
    "linear": (dict(rope_type="linear", factor=4.0), f"linear:{FACTOR}:{WINDOW}"),
    "llama3": (dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=WINDOW), f"llama3:{FACTOR}:{WINDOW}"),
    "yarn": (dict(type="yarn", factor=4.0, original_max_position_embeddings=WINDOW), f"yarn:{FACTOR}:{WINDOW}"),
}
MSCALE = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=WINDOW, mscale=0.707, mscale_all_dim=2.0,
              beta_fast=8, beta_slow=2, truncate=False)
# What the tensors of a GGUF file are stored as, in turn; and its RoPE.
GGUF = {
    "llama": ([Type.Q4_K, Type.Q6_K], "llama3"),
    "mistral": ([Type.Q4_0, Type.Q8_0, Type.F16], "none"),
    "qwen2": ([Type.Q8_0, Type.Q4_0, Type.Q4_1], "yarn"),
    "qwen3": ([Type.BF16, Type.F16, Type.F32], "linear"),
}


def randomize(model, generator):
    """Large enough that attention is far from uniform, and norms and biases matter."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "q_norm" in name or "k_norm" in name:
            p.data = 1.5 + 0.2 * noise
        elif name.endswith("bias"):
            p.data = noise
        elif p.dim() == 1:
            p.data = 1 + 0.2 * noise
        elif "embed" in name or "lm_head" in name:
            p.data = noise * 0.3
        else:
            p.data = noise * (1.4 if "q_proj" in name or "k_proj" in name else 1.2) / math.sqrt(p.shape[1])


class Rotary(torch.nn.Module):
    """transformers' frequencies and attention factor, angles in fp64."""

    def __init__(self, theirs):
        super().__init__()
        self.frequency, self.factor = theirs.inv_freq.double(), theirs.attention_scaling

    def forward(self, x, position_ids):
        angle = position_ids.double()[..., None] * self.frequency
        angle = torch.cat([angle, angle], -1)
        return angle.cos() * self.factor, angle.sin() * self.factor


def wide(model):
    """The model in fp64 throughout: transformers' norms and rotary angles compute in fp32 whatever the weights are."""
    frequencies = model.model.rotary_emb
    model = model.double().eval()
    model.model.rotary_emb = Rotary(frequencies)

    def norm(module, args, out):
        x = args[0]
        return module.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(norm)
    return model


def measure(model, draw):
    context, question = draw(TOKENS), draw(QUESTION)
    model = wide(model)
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0]
        tokens, gap = [], math.inf
        for _ in range(ANSWER):
            last = model(torch.tensor([context + question + tokens])).logits[0, -1]
            best = last.topk(2)
            gap = min(gap, (best.values[0] - best.values[1]).item())
            tokens.append(best.indices[0].item())
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def frozen(module, q, k, v, *rest, **named):
        return plain(module, q, k.detach(), v.detach(), *rest, **named)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = frozen
    start, rows = SPAN
    found = model(torch.tensor([context])).logits[0, start:start + rows]
    loss = torch.nn.functional.cross_entropy(found, torch.tensor(context[start + 1:start + rows + 1]))
    model.zero_grad()
    loss.backward()
    ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
    squares = sum((p.grad ** 2).sum().item() for name, p in model.named_parameters() if name.endswith("q_proj.weight"))
    return gap, dict(context=context, question=question, rows=ROWS, span=SPAN, loss=loss.item(), norm=math.sqrt(squares),
                     tokens=tokens, logits=[[float(f"{x:.7g}") for x in logits[row].tolist()] for row in ROWS])


def interleave(rows, heads):
    """Half-split rotary rows -> neighbouring pairs: row i and i + D/2 of each head become 2i and 2i + 1."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def separate(rows, heads):
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def random_blocks(kind, shape, random):
    """gguf-py does not quantise to Q4_K and Q6_K: any bytes are a matrix, once the scales are small."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    if kind == Type.Q4_K:
        scale = np.float16([0.0002, 0.0015])
        blocks[:, :4] = np.frombuffer(scale.tobytes(), np.uint8)
    else:
        blocks[:, -2:] = np.frombuffer(np.float16([0.00004]).tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)


GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
              "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
              "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name):
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def write_gguf(family, model, path):
    """Writes the file and gives the model the values that it then holds."""
    kinds, rope = GGUF[family]
    random = np.random.default_rng(5)
    c = model.config
    arch = "llama" if family in ("llama", "mistral") else family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if family != "qwen2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if rope in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN if rope == "yarn" else gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(FACTOR))
    if rope == "yarn":
        writer.add_rope_scaling_orig_ctx_len(WINDOW)
    if rope == "llama3":
        scaled = model.model.rotary_emb.inv_freq
        plain = c.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled.double()).numpy().astype(np.float32))
    writer.add_vocab_size(c.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    matrices, used = 0, {}
    for name, p in model.named_parameters():
        values = p.detach().float().numpy()
        if p.dim() == 1:
            writer.add_tensor(gguf_name(name), values)
            continue
        kind = kinds[matrices % len(kinds)]
        matrices += 1
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2], 0)
        turned = heads and arch == "llama"
        if values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] != 0:
            kind = Type.Q8_0
        if kind in (Type.Q4_K, Type.Q6_K):
            data = random_blocks(kind, values.shape, random)
        else:
            data = gguf.quants.quantize(interleave(values, heads) if turned else values, kind)
        used[kind.name] = used.get(kind.name, 0) + 1
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        held = gguf.quants.dequantize(data, kind).reshape(values.shape).astype(np.float32)
        p.data = torch.from_numpy(np.ascontiguousarray(separate(held, heads) if turned else held))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(path.name, path.stat().st_size, "bytes,", rope, used)


def load(folder, config):
    """The model of `folder` with fields of its config.json replaced, as transformers reads such a folder."""
    changed = folder.with_name("changed")
    shutil.copytree(folder, changed)
    fields = {**json.loads((changed / "config.json").read_text()), **config}
    (changed / "config.json").write_text(json.dumps(fields))
    model = AutoModelForCausalLM.from_pretrained(changed, dtype=torch.float32)
    shutil.rmtree(changed)
    return model


def overrides(fields, rope):
    """Llama and Qwen2 as files of transformers before 5 have it, the others as newer ones do."""
    if rope is None:
        return {}
    if "rope_parameters" in fields:
        return {"rope_parameters": {**{"rope_theta": fields["rope_parameters"]["rope_theta"]}, **rope}}
    return {"rope_scaling": rope}


def older_config(file):
    config = json.loads(file.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config, indent=2) + "\n")


def main():
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    cases = []
    for number, (family, made) in enumerate(MODELS.items()):
        generator = torch.Generator().manual_seed(10 + number)
        randomize(made, generator)
        folder = OUT / family
        shutil.rmtree(folder, ignore_errors=True)
        made.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB" if family == "qwen2" else "5GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        if family in ("llama", "qwen2"):
            older_config(folder / "config.json")
        fields = json.loads((folder / "config.json").read_text())

        def draw(count):
            return torch.randint(0, 48, (count,), generator=generator).tolist()

        def add(name, model, config, request, net):
            gap, numbers = measure(net, draw)
            print(f"{name}: loss {numbers['loss']:.4f}, norm {numbers['norm']:.4f}, smallest top-2 gap {gap:.4f}")
            if gap < 0.002:
                raise SystemExit("a greedy choice is a near tie: take another seed")
            cases.append(dict(name=name, model=model, config=config, rope_scaling=request, **numbers))

        for rope, (stated, request) in ROPES.items():
            config = overrides(fields, stated)
            add(f"{family}_{rope}", family, config, request, load(folder, config))
        config = overrides(fields, MSCALE)
        add(f"{family}_mscale", family, config, "", load(folder, config))
        config = overrides(fields, ROPES[GGUF[family][1]][0])
        net = load(folder, config)
        write_gguf(family, net, OUT / f"{family}.gguf")
        add(f"{family}_gguf", f"{family}.gguf", {}, "", net)
    lines = ",\n".join(" " + json.dumps(case) for case in cases)
    (OUT / "families.golden.json").write_text(
        '{"command": "python3 tests/golden/make_families.py", "cases": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
