"""A dumb model in plain torch, fp64, unsharded, with autograd: what the engine's numbers are compared with.

Shares no code with the worker or with transformers; reads nothing but config.json and safetensors. Every function
below does the obvious thing with whole matrices.

Query-only training with a frozen cache: K and V of the context come from the base model once. A row at position p
attends to the cached keys 0..p (its own included), so a span adds no K/V. Only q depends on the delta: q = x W_Q^T +
x delta^T; the hidden states of later layers change with it, the cache does not. Rows after the context append their
own K/V, computed from the hidden states of the queries in use (base or adapted).
"""
import json
import math
import pathlib

import torch
from safetensors.torch import load_file


class Reference:
    def __init__(self, folder):
        folder = pathlib.Path(folder)
        c = json.loads((folder / "config.json").read_text())
        self.layers = c["num_hidden_layers"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.hidden, self.head_dim, self.vocab = c["hidden_size"], c["head_dim"], c["vocab_size"]
        self.eps = c["rms_norm_eps"]
        self.theta = c["rope_theta"] if "rope_theta" in c else c["rope_parameters"]["rope_theta"]
        self.qk_norm = c["model_type"] == "qwen3"
        self.weights = {}
        for file in sorted(folder.glob("model*.safetensors")):
            self.weights.update({name: t.double() for name, t in load_file(file).items()})
        self.tied = c["tie_word_embeddings"]

    def w(self, layer, name):
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def zero_delta(self, requires_grad=False):
        """One [heads * head_dim, hidden] matrix per layer, laid out like q_proj.weight."""
        return [torch.zeros(self.heads * self.head_dim, self.hidden, dtype=torch.float64, requires_grad=requires_grad)
                for _ in range(self.layers)]

    def norm(self, x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    def rope(self, x, pos):
        """x [rows, heads, head_dim]; element i turns with element i + head_dim / 2. Frequencies are rounded to fp32,
        which every implementation of these models does; the angles are not."""
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half, dtype=torch.float64) * 2 / self.head_dim)
        angle = pos.double()[:, None] * frequency.float().double()[None, :]
        cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(self, q, pos, keys, values):
        """q [rows, heads, head_dim]; keys, values [tokens, kv_heads, head_dim], token j at position j."""
        group = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("rhd,thd->hrt", q, keys) / math.sqrt(self.head_dim)
        hidden_key = torch.arange(keys.shape[0])[None, :] > pos[:, None]
        weights = torch.softmax(scores.masked_fill(hidden_key[None], -math.inf), -1)
        self.last_attention = weights.detach()
        return torch.einsum("hrt,thd->rhd", weights, values)

    def forward(self, ids, first_pos, cache, delta=None):
        """Logits [rows, vocab] of rows first_pos, first_pos + 1, ...; cache: one [keys, values] pair per layer, or []
        before the first call. Rows below the cache's length attend to it as it is; rows at its end append. Never both
        in one call."""
        ids = torch.as_tensor(ids, dtype=torch.int64)
        rows = ids.shape[0]
        pos = torch.arange(first_pos, first_pos + rows)
        tokens = cache[0][0].shape[0] if cache else 0
        assert first_pos == tokens or first_pos + rows <= tokens
        if not cache:
            empty = torch.zeros(0, self.kv_heads, self.head_dim, dtype=torch.float64)
            cache.extend([empty, empty] for _ in range(self.layers))
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.layers):
            a = self.norm(x, self.w(layer, "input_layernorm"))
            q = a @ self.w(layer, "self_attn.q_proj").T
            if delta is not None:
                q = q + a @ delta[layer].T
            q = q.reshape(rows, self.heads, self.head_dim)
            if self.qk_norm:
                q = self.norm(q, self.w(layer, "self_attn.q_norm"))
            q = self.rope(q, pos)
            if first_pos == tokens:
                k = (a @ self.w(layer, "self_attn.k_proj").T).reshape(rows, self.kv_heads, self.head_dim)
                v = (a @ self.w(layer, "self_attn.v_proj").T).reshape(rows, self.kv_heads, self.head_dim)
                if self.qk_norm:
                    k = self.norm(k, self.w(layer, "self_attn.k_norm"))
                cache[layer] = [torch.cat([cache[layer][0], self.rope(k, pos)]), torch.cat([cache[layer][1], v])]
            out = self.attend(q, pos, *cache[layer])
            x = x + out.reshape(rows, -1) @ self.w(layer, "self_attn.o_proj").T
            m = self.norm(x, self.w(layer, "post_attention_layernorm"))
            gate = m @ self.w(layer, "mlp.gate_proj").T
            up = m @ self.w(layer, "mlp.up_proj").T
            x = x + (gate * torch.sigmoid(gate) * up) @ self.w(layer, "mlp.down_proj").T
        output = self.weights["model.embed_tokens.weight" if self.tied else "lm_head.weight"]
        return self.norm(x, self.weights["model.norm.weight"]) @ output.T

    def loss(self, context, cache, spans, delta):
        """Mean over all rows of all spans of -log p(next token); spans: (start, rows)."""
        total, count = 0.0, 0
        for start, rows in spans:
            logits = self.forward(context[start:start + rows], start, cache, delta)
            target = torch.as_tensor(context[start + 1:start + rows + 1])
            total = total - torch.log_softmax(logits, -1)[torch.arange(rows), target].sum()
            count += rows
        return total / count

    def gradient(self, context, cache, spans, delta):
        """(loss, one gradient per layer)."""
        delta = [d.detach().clone().requires_grad_(True) for d in delta]
        loss = self.loss(context, cache, spans, delta)
        return loss.item(), torch.autograd.grad(loss, delta)

    def answer(self, context, cache, delta, question, steps):
        """Greedy continuation: (ids, log-probabilities, smallest gap of the two best logits). With no question the last
        context row is queried again against the cache as it is; it appends nothing."""
        cache = [list(pair) for pair in cache]
        with torch.no_grad():
            if len(question):
                logits = self.forward(question, len(context), cache, delta)[-1]
            else:
                logits = self.forward(context[-1:], len(context) - 1, cache, delta)[-1]
            ids, logprobs, gap = [], [], math.inf
            for step in range(steps):
                best = logits.topk(2)
                gap = min(gap, (best.values[0] - best.values[1]).item())
                ids.append(best.indices[0].item())
                logprobs.append(torch.log_softmax(logits, -1)[ids[-1]].item())
                if step + 1 < steps:
                    logits = self.forward(ids[-1:], len(context) + len(question) + step, cache, delta)[-1]
        return ids, logprobs, gap

    def score(self, context, cache, delta, question, targets):
        """Per target: log-probability after context + question + the targets before it; whether it is the argmax."""
        cache = [list(pair) for pair in cache]
        with torch.no_grad():
            logits = self.forward(list(question) + list(targets[:-1]), len(context), cache, delta)[len(question) - 1:]
            logprobs = torch.log_softmax(logits, -1)
        rows, targets = torch.arange(len(targets)), torch.as_tensor(targets)
        return logprobs[rows, targets].tolist(), (logprobs.argmax(-1) == targets).tolist()


class AdamW:
    """Decoupled decay of the delta itself; one norm over all layers; the clip is torch.nn.utils.clip_grad_norm_'s."""

    def __init__(self, delta, lr, weight_decay, clip_norm, beta1=0.9, beta2=0.999, epsilon=1e-8):
        self.delta, self.lr, self.decay, self.clip = delta, lr, weight_decay, clip_norm
        self.beta1, self.beta2, self.epsilon, self.steps = beta1, beta2, epsilon, 0
        self.m = [torch.zeros_like(d) for d in delta]
        self.v = [torch.zeros_like(d) for d in delta]

    def step(self, gradient):
        """Returns the gradient's norm before clipping."""
        self.steps += 1
        norm = math.sqrt(sum((g * g).sum().item() for g in gradient))
        scale = min(1.0, self.clip / (norm + 1e-6))
        for d, g, m, v in zip(self.delta, gradient, self.m, self.v):
            g = g * scale
            m.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
            v.mul_(self.beta2).add_(g * g, alpha=1 - self.beta2)
            d.mul_(1 - self.lr * self.decay)
            m_hat, v_hat = m / (1 - self.beta1 ** self.steps), v / (1 - self.beta2 ** self.steps)
            d.sub_(self.lr * m_hat / (v_hat.sqrt() + self.epsilon))
        return norm
