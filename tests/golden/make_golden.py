#!/usr/bin/env python3
"""Writes the small random checkpoints and their golden outputs. Needs torch, transformers, safetensors; takes 20 s.

    python3 tests/golden/make_golden.py             # everything, in place
    python3 tests/golden/make_golden.py --check     # writes nothing; compares with what is there

For each model NAME: NAME/ (checkpoint), NAME.golden.json (ids, spans, losses, tokens),
NAME.golden.safetensors (fp32 tensors).
All numbers come from reference.py in fp64, after checks against transformers, torch.optim.AdamW and finite
differences.
"""
import argparse
import json
import math
import pathlib
import shutil
import tempfile

import torch
from reference import AdamW, Reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

COMMAND = "python3 tests/golden/make_golden.py"
HERE = pathlib.Path(__file__).resolve().parent
TOKENS = 700                  # spans three blocks of 256, the last one partly
ROWS = [0, 1, 254, 255, 256, 257, 258, 511, 512, 513, 699]
LENGTHS = [1, 2, 255, 256, 257, 511, 512, 513]   # shorter contexts: the last row of each
ONE_SPAN = [(300, 37)]
TWO_SPANS = [(238, 37), (500, 21)]               # the first crosses a block's edge; the lengths differ
STEP_SPANS = [[(300, 37)], [(0, 37)], [(662, 37)], [(230, 37), (490, 37)], [(100, 1)], [(400, 37)],
              [(512, 21), (300, 37), (255, 2)], [(640, 37)]]
QUESTION_TOKENS, TARGET_TOKENS, ANSWER_TOKENS = 5, 9, 12


def llama():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=251, hidden_size=42, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=80, max_position_embeddings=4096, rope_theta=10000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=193, hidden_size=56, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=24, max_position_embeddings=4096, rope_theta=1000000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=3))


MODELS = {
    "llama": dict(make=llama, seed=1, dtype=torch.bfloat16, shard="120KB", old_config=False, clip_norm=3.0),
    "qwen3": dict(make=qwen3, seed=2, dtype=torch.float32, shard="5GB", old_config=True, clip_norm=5.0),
}


def randomize(model, generator):
    """Large enough that attention is far from uniform and norms matter."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "q_norm" in name or "k_norm" in name:
            p.data = 1.5 + 0.2 * noise
        elif p.dim() == 1:
            p.data = 1 + 0.2 * noise
        elif "q_proj" in name or "k_proj" in name:
            p.data = noise * 1.4 / math.sqrt(p.shape[1])
        elif "embed" in name or "lm_head" in name:
            p.data = noise * 0.3
        else:
            p.data = noise * 1.2 / math.sqrt(p.shape[1])


def fp64_logits(model, ids):
    """model(ids) in fp64 throughout: transformers' norms and rotary angles compute in fp32 whatever the weights are."""
    def norm(module, args):
        x = args[0]
        return module.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + module.variance_epsilon)

    class Rotary(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            turns = -torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
            self.frequency = (config.rope_parameters["rope_theta"] ** turns).float().double()

        def forward(self, x, position_ids):
            angle = position_ids.double()[..., None] * self.frequency
            angle = torch.cat([angle, angle], -1)
            return angle.cos(), angle.sin()

    with torch.no_grad():
        hooks = [m.register_forward_hook(lambda module, args, out: norm(module, args))
                 for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
        rotary, model.model.rotary_emb = model.model.rotary_emb, Rotary(model.config)
        logits = model(torch.tensor([ids])).logits[0]
        model.model.rotary_emb = rotary
        for hook in hooks:
            hook.remove()
    return logits


def check(condition, what):
    if not condition:
        raise SystemExit(f"make_golden: {what}")


def check_against_transformers(name, folder, reference, context, greedy):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(torch.tensor([context + greedy])).logits[0].double()
    theirs = fp64_logits(model.double(), context + greedy)
    ours = reference.forward(context + greedy, 0, [])
    error, fp32_error = (ours - theirs).abs().max().item(), (ours - plain).norm().item() / ours.norm().item()
    print(f"{name}: against transformers in fp64 {error:.1e} (absolute), in fp32 {fp32_error:.1e} (relative)")
    check(error < 1e-10, "the reference is not transformers' model")
    check(fp32_error < 1e-4, "transformers in fp32 computes something else")
    check(theirs[len(context) - 1:-1].argmax(-1).tolist() == greedy, "greedy tokens differ from transformers")


def check_gradient(name, reference, context, cache, gradient, generator):
    """Central differences along random directions, at delta = 0 and one span."""
    worst = 0.0
    for _ in range(3):
        direction = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in gradient]
        h = 1e-5
        with torch.no_grad():
            up = reference.loss(context, cache, ONE_SPAN, [h * d for d in direction])
            down = reference.loss(context, cache, ONE_SPAN, [-h * d for d in direction])
        expected = sum((g * d).sum().item() for g, d in zip(gradient, direction))
        worst = max(worst, abs((up - down).item() / (2 * h) - expected) / abs(expected))
    print(f"{name}: autograd against central differences: {worst:.1e}")
    check(worst < 1e-6, "autograd and finite differences differ")


def adapt(reference, context, cache, optimizer):
    """8 steps. Returns delta, losses, norms; checks every update against torch.optim.AdamW and clip_grad_norm_."""
    delta, twin = reference.zero_delta(), reference.zero_delta(requires_grad=True)
    ours = AdamW(delta, **optimizer)
    theirs = torch.optim.AdamW(twin, lr=optimizer["lr"], weight_decay=optimizer["weight_decay"])
    losses, norms = [], []
    for spans in STEP_SPANS:
        loss, gradient = reference.gradient(context, cache, spans, delta)
        losses.append(loss)
        norms.append(ours.step(gradient))
        for p, g in zip(twin, gradient):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(twin, optimizer["clip_norm"])
        theirs.step()
        check(all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(delta, twin)), "AdamW is not torch's")
    return delta, losses, norms


def older_config(file):
    """The form of transformers before 5: rope_theta at the top. Both forms are in use."""
    config = json.loads(file.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config, indent=2) + "\n")


def make(name, out):
    spec = MODELS[name]
    generator = torch.Generator().manual_seed(spec["seed"])
    model = spec["make"]()
    randomize(model, generator)
    model = model.to(spec["dtype"]).eval()
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=spec["shard"])
    (folder / "generation_config.json").unlink(missing_ok=True)
    if spec["old_config"]:
        older_config(folder / "config.json")
    reference = Reference(folder)

    draw = lambda n: torch.randint(0, reference.vocab, (n,), generator=generator).tolist()
    context, question, targets = draw(TOKENS), draw(QUESTION_TOKENS), draw(TARGET_TOKENS)
    tensors, cache = {}, []
    with torch.no_grad():
        logits = reference.forward(context, 0, cache)
        largest = reference.last_attention.amax(-1).mean().item()
        print(f"{name}: largest attention weight of a row of the last layer, mean: {largest:.2f}")
        tensors["logits.rows"] = logits[ROWS]
        tensors["logits.last_of_length"] = torch.stack([reference.forward(context[:n], 0, [])[-1] for n in LENGTHS])

    zero = reference.zero_delta()
    cases = {}
    for case, spans in (("one_span", ONE_SPAN), ("two_spans", TWO_SPANS)):
        loss, gradient = reference.gradient(context, cache, spans, zero)
        cases[case] = dict(spans=spans, loss=loss, norm=math.sqrt(sum((g * g).sum().item() for g in gradient)))
        tensors.update({f"gradient.{case}.{i}": g for i, g in enumerate(gradient)})
        if case == "one_span":
            check_gradient(name, reference, context, cache, gradient, generator)

    optimizer = dict(lr=1e-2, weight_decay=0.01, clip_norm=spec["clip_norm"])
    delta, losses, norms = adapt(reference, context, cache, optimizer)
    print(f"{name}: losses {[round(x, 3) for x in losses]}, norms {[round(x, 3) for x in norms]}")
    check(min(norms) < optimizer["clip_norm"] < max(norms), f"the clip must act in some steps only: {norms}")
    tensors.update({f"delta.{i}": d for i, d in enumerate(delta)})
    with torch.no_grad():
        tensors["adapted.logits.rows"] = torch.cat(
            [reference.forward(context[row:row + 1], row, cache, delta) for row in (400, TOKENS - 1)])
        probe = reference.loss(context, cache, ONE_SPAN, delta).item()

    answers, scores, gap = {}, {}, math.inf
    for mode, use in (("base", None), ("adapted", delta)):
        for kind, ids in (("plain", []), ("question", question)):
            tokens, logprobs, smallest = reference.answer(context, cache, use, ids, ANSWER_TOKENS)
            answers[f"{mode}.{kind}"] = dict(question=ids, tokens=tokens, logprobs=logprobs)
            gap = min(gap, smallest)
        logprobs, greedy = reference.score(context, cache, use, question, targets)
        scores[mode] = dict(question=question, targets=targets, logprobs=logprobs, greedy=greedy)
    print(f"{name}: smallest top-2 gap of all greedy tokens: {gap:.4f}")
    check(gap > 0.005, "a greedy choice is a near tie: take another seed")
    check(answers["base.question"]["tokens"] != answers["adapted.question"]["tokens"], "adapting changes no token")
    check_against_transformers(name, folder, reference, context + question, answers["base.question"]["tokens"])

    golden = dict(
        command=COMMAND, context=context, rows=ROWS, lengths=LENGTHS, gradients=cases,
        adapt=dict(optimizer=optimizer, spans=STEP_SPANS, losses=losses, grad_norms=norms,
                   adapted_rows=[400, TOKENS - 1], probe=dict(spans=ONE_SPAN, loss=probe)),
        answers=answers, scores=scores, min_top2_gap=gap)
    text = "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items()) + "\n}\n"
    (out / f"{name}.golden.json").write_text(text)
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, out / f"{name}.golden.safetensors",
              metadata={"command": COMMAND})


def compare(name, fresh):
    """Same weights, and outputs equal to the precision of fp32 storage."""
    for file in sorted(fresh.glob(f"{name}*/*.safetensors")) + [fresh / f"{name}.golden.safetensors"]:
        old, new = load_file(HERE / file.relative_to(fresh)), load_file(file)
        check(old.keys() == new.keys(), f"{file.name}: other tensors than committed")
        for key in old:
            same = torch.allclose(old[key].double(), new[key].double(), rtol=1e-5, atol=1e-7)
            check(same, f"{file.name}: {key} differs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check_only = parser.parse_args().check
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) if check_only else HERE
        for name in MODELS:
            make(name, out)
            if check_only:
                compare(name, out)
    print("same as committed" if check_only else f"written to {HERE}")


if __name__ == "__main__":
    main()
