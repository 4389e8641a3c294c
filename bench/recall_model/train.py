#!/usr/bin/env python3
"""Trains the recall model: a small transformer of the Qwen3 type that looks values up perfectly in short contexts and is
diluted in long ones. One GPU, two minutes; the same seed draws the same data.

    python3 bench/recall_model/train.py OUT_FOLDER [--steps 6500]

A context is a ledger: pairs of an account and its value, " kamo 137 nuve 42 ...". An account's value is fixed within a
context and drawn anew for the next; accounts come back about four times. The loss counts values that can be looked up, and
others a little. Contexts have 64 to 256 tokens and no more. Positions begin anywhere, so that those of long contexts are
known, and jump, up to a reach of 256: what lies further apart is new to the model, as are more than 32 accounts at once.

Two layers: the first joins an account and its value in the value's key, the second looks up. The first is trained with its
attention softened, as if its contexts were far longer than they are, so that keys stay good in long contexts; the second is
not. So it is the queries that fail there, not what they look for.

Writes config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json and training.json, in the layout of
Hugging Face.
"""
import argparse
import json
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from torch import nn

import tokenizer as ledger

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": ledger.BOS, "eos_token_id": ledger.BOS, "head_dim": 64, "hidden_act": "silu", "hidden_size": 256,
    "initializer_range": 0.04, "intermediate_size": 768, "max_position_embeddings": 65536, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": ledger.VOCABULARY,
}
LENGTHS = ((64, 128), (64, 128, 256, 256))  # tokens of training contexts: in the first fifth, then
REACH = 256            # positions that a training context spreads over
SOFTENED = 1           # first layers whose attention logits are scaled down in training
SOFTEST = 0.25         # the smallest factor
REST_WEIGHT = 0.05     # of tokens that cannot be looked up
FURTHEST = 60_000      # above every position


class Norm(nn.Module):
    """RMSNorm; in fp32 whatever autocast says."""

    def __init__(self, size, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon) * self.weight).to(x.dtype)


class Layer(nn.Module):
    """One layer of Qwen3, with transformers' names. Positions' cosines and sines come from outside."""

    def __init__(self, c):
        super().__init__()
        hidden, dim = c["hidden_size"], c["head_dim"]
        self.heads, self.kv_heads, self.dim = c["num_attention_heads"], c["num_key_value_heads"], dim
        linear = lambda rows, columns: nn.Linear(rows, columns, bias=False)
        self.input_layernorm = Norm(hidden, c["rms_norm_eps"])
        self.post_attention_layernorm = Norm(hidden, c["rms_norm_eps"])
        self.self_attn = nn.ModuleDict({
            "q_proj": linear(hidden, self.heads * dim), "k_proj": linear(hidden, self.kv_heads * dim),
            "v_proj": linear(hidden, self.kv_heads * dim), "o_proj": linear(self.heads * dim, hidden),
            "q_norm": Norm(dim, c["rms_norm_eps"]), "k_norm": Norm(dim, c["rms_norm_eps"])})
        self.mlp = nn.ModuleDict({"gate_proj": linear(hidden, c["intermediate_size"]),
                                  "up_proj": linear(hidden, c["intermediate_size"]),
                                  "down_proj": linear(c["intermediate_size"], hidden)})

    def forward(self, x, cos, sin, soft=None):
        """soft [batch, 1, 1, 1]: factors of the attention logits."""
        a, batch, tokens = self.self_attn, x.shape[0], x.shape[1]
        y = self.input_layernorm(x)
        q = a["q_norm"](a["q_proj"](y).view(batch, tokens, self.heads, self.dim)).transpose(1, 2)
        k = a["k_norm"](a["k_proj"](y).view(batch, tokens, self.kv_heads, self.dim)).transpose(1, 2)
        v = a["v_proj"](y).view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if soft is not None:
            q = q * soft.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + a["o_proj"](y.transpose(1, 2).reshape(batch, tokens, -1))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def rotate(x, cos, sin):
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


class Model(nn.Module):
    def __init__(self, c, softened=SOFTENED):
        super().__init__()
        self.softened = softened
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        exponents = torch.arange(0, c["head_dim"], 2, dtype=torch.float64) / c["head_dim"]
        self.register_buffer("frequencies", (c["rope_theta"] ** -exponents).float(), persistent=False)
        # A gradient reaches the first layers before the residual stream has grown.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=c["initializer_range"])
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.data.mul_(0.35)

    def forward(self, ids, positions, soft=None):
        """Of the last layer, normed: [batch, tokens, hidden]. soft: for the first `softened` layers."""
        angles = positions[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, soft if index < self.softened else None)
        return self.norm(x)


def draw_contexts(batch, tokens, generator, device):
    """ids [batch, tokens], known [batch, tokens]: whether the token is a value that stood there before."""
    pairs = tokens // 2
    accounts = max(2, pairs // 4)
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    chosen = rand(batch, ledger.ACCOUNTS).argsort(1)[:, :accounts]
    values = (rand(batch, accounts) * ledger.VALUES).long()
    slots = (rand(batch, pairs) * accounts).long()
    ids = torch.stack((ledger.FIRST_ACCOUNT + chosen.gather(1, slots), ledger.FIRST_VALUE + values.gather(1, slots)), 2)
    # The first slot of an account in its context, by a minimum over slots.
    order = torch.arange(pairs, device=device).expand(batch, pairs)
    first = torch.full((batch, accounts), pairs, device=device).scatter_reduce(1, slots, order, "amin")
    known = order > first.gather(1, slots)
    known = torch.stack((torch.zeros_like(known), known), 2)
    return ids.view(batch, -1), known.view(batch, -1)


def draw_positions(batch, tokens, generator, device):
    """Rising positions [batch, tokens] below FURTHEST: a start anywhere and about eight jumps within REACH."""
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    share = rand(batch, 1)                                   # of the room that the jumps take together
    jumps = (rand(batch, tokens) < 8.0 / tokens) * rand(batch, tokens)
    jumps[:, 0] = 0
    jumps = jumps / jumps.sum(1, keepdim=True).clamp(min=1e-6) * share * (REACH - tokens)
    start = rand(batch, 1) * (FURTHEST - tokens - jumps.sum(1, keepdim=True))
    return (start + jumps.cumsum(1)).long() + torch.arange(tokens, device=device)


def draw_softness(batch, done, generator, device):
    """Factors [batch, 1, 1, 1]: 1 for a quarter, else uniform down to SOFTEST, which is reached in the middle of training:
    from the start on it would keep the layers from finding each other."""
    uniform, plain = torch.rand(2, batch, 1, 1, 1, generator=generator, device=device)
    ramp = min(1.0, max(0.0, (done - 0.15) / 0.35))
    return torch.where(plain < 0.25, 1.0, 1.0 - uniform * (1.0 - SOFTEST) * ramp)


def loss_of(model, hidden, ids, known):
    logits = F.linear(hidden[:, :-1], model.embed_tokens.weight).float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = torch.where(known[:, 1:].flatten() > 0, 1.0, REST_WEIGHT)
    return (losses * weights).sum() / weights.sum(), logits


@torch.no_grad()
def recall(model, tokens, contexts, later, generator, device):
    """Percent of known values in `later` tokens behind `tokens` that the model finds."""
    right = total = 0
    for _ in range(contexts):
        pairs = tokens + later
        ids, _ = draw_contexts(1, pairs, generator, device)
        ids = ids[:, :pairs]
        seen = set(ids[0, 0:tokens:2].tolist())
        hidden = model(ids, torch.arange(pairs, device=device)[None])
        rows = [i for i in range(tokens, pairs, 2) if ids[0, i].item() in seen]
        found = F.linear(hidden[0, rows], model.embed_tokens.weight).argmax(-1)
        right += (found == ids[0, [i + 1 for i in rows]]).sum().item()
        total += len(rows)
    return 100.0 * right / total


def percent(found):
    return round(100 * found.float().mean().item(), 2)


def train(model, options, device, draw=draw_contexts, lengths=LENGTHS, look=None):
    """draw: as draw_contexts. look(found, known), both [batch, tokens - 1]: more for the log, by kind of known token."""
    generator = torch.Generator(device).manual_seed(options.seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
                                  lr=options.rate, betas=(0.9, 0.98), fused=device == "cuda")
    started, tokens_seen, log = time.time(), 0, []
    for step in range(options.steps):
        done = step / options.steps
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = (
            options.rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2))
        turns = lengths[done >= 0.2]
        tokens = turns[step % len(turns)]
        ids, known = draw(options.batch_tokens // tokens, tokens, generator, device)
        positions = draw_positions(ids.shape[0], tokens, generator, device)
        soft = draw_softness(ids.shape[0], done, generator, device)
        with torch.autocast(device, torch.bfloat16):
            hidden = model(ids, positions, soft)
            loss, logits = loss_of(model, hidden, ids, known)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens_seen += ids.numel()
        if step % 200 == 199 or step + 1 == options.steps:
            found = logits.argmax(-1) == ids[:, 1:]
            log.append({"step": step + 1, "tokens": tokens, "loss": round(loss.item(), 4),
                        "recall": percent(found[known[:, 1:] > 0]), "seconds": round(time.time() - started, 1)})
            if look:
                log[-1].update(look(found, known[:, 1:]))
            print(log[-1], flush=True)
    return {"steps": options.steps, "tokens": tokens_seen, "seconds": round(time.time() - started, 1), "log": log}


def save(model, folder, facts, config=CONFIG):
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"model." + name: weight.detach().to("cpu", torch.bfloat16).contiguous()
               for name, weight in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ledger.write(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def arguments(description, **defaults):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="*", help="of texts in which recall is measured in the end")
    parser.set_defaults(**defaults)
    return parser


def begin(config, options, softened=SOFTENED):
    """The device, a model of random weights on it and the facts of this run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    model = Model(config, softened).to(device)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "seed": options.seed, "rate": options.rate,
             "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    print(facts, flush=True)
    return device, model, facts


def main():
    options = arguments(__doc__.split("\n\n")[0], steps=6500, rate=1.5e-3,
                        lengths=[64, 128, 256, 512, 1536, 3072, 6144, 12288, 24576]).parse_args()
    device, model, facts = begin(CONFIG, options)
    facts.update(train(model, options, device))
    model.to(torch.bfloat16).float()  # as it is stored
    generator = torch.Generator(device).manual_seed(options.seed + 1)
    facts["recall"] = {n: round(recall(model, n, 8, min(n, 1536), generator, device), 2) for n in options.lengths}
    print("recall of values in as many later tokens, at most 1536, percent by context tokens:", facts["recall"])
    save(model, options.folder, facts)


if __name__ == "__main__":
    main()
