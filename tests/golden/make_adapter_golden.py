#!/usr/bin/env python3
"""Writes what LoRA gradients, optimizers and schedules must give. Needs torch and safetensors; takes 10 s.

    python3 tests/golden/make_adapter_golden.py             # in place
    python3 tests/golden/make_adapter_golden.py --check     # writes nothing; compares with what is there

For each checkpoint NAME of make_golden.py: NAME.adapter.golden.json (spans, rates, losses) and
NAME.adapter.golden.safetensors. Everything in fp64 with reference.py and autograd on A and B; the steps are
torch.optim.AdamW and torch.optim.SGD with torch's own schedulers and clip_grad_norm_.
"""
import argparse
import json
import pathlib

import torch
from reference import Reference
from safetensors.torch import load_file, save_file

COMMAND = "python3 tests/golden/make_adapter_golden.py"
HERE = pathlib.Path(__file__).resolve().parent
RANK, ALPHA = 3, 5.0
TWO_SPANS = [(238, 37), (500, 21)]
STEP_SPANS = [[(300, 37)], [(0, 37)], [(230, 37), (490, 37)], [(100, 1)], [(400, 37)], [(640, 37)]]
WARMUP, STEPS = 2, len(STEP_SPANS)
RUNS = {
    "adamw_linear": dict(optimizer="adamw", lr=5e-3, weight_decay=0.05, clip_norm=3.0, schedule="linear"),
    "sgd_cosine": dict(optimizer="sgd", lr=2e-2, weight_decay=0.05, clip_norm=3.0, momentum=0.9, schedule="cosine"),
    "sgd_plain": dict(optimizer="sgd", lr=2e-2, weight_decay=0.0, clip_norm=3.0, momentum=0.0, schedule="constant"),
    "full_sgd": dict(optimizer="sgd", lr=5e-2, weight_decay=0.01, clip_norm=3.0, momentum=0.5, schedule="linear"),
}


def dense(a, b):
    return [ALPHA / RANK * y @ x for x, y in zip(a, b)]


def scheduler(optimizer, kind):
    lr = torch.optim.lr_scheduler
    warmup = lr.LinearLR(optimizer, start_factor=1 / (WARMUP + 1), end_factor=1.0, total_iters=WARMUP)
    rest = {"constant": lambda: lr.ConstantLR(optimizer, factor=1.0),
            "linear": lambda: lr.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS - WARMUP),
            "cosine": lambda: lr.CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP)}[kind]()
    return lr.SequentialLR(optimizer, [warmup, rest], milestones=[WARMUP])


def run(reference, context, cache, parameters, to_delta, settings):
    """Returns losses, gradient norms, rates; the parameters are left as the steps made them."""
    if settings["optimizer"] == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=settings["weight_decay"])
    else:
        optimizer = torch.optim.SGD(parameters, lr=settings["lr"], weight_decay=settings["weight_decay"],
                                    momentum=settings["momentum"])
    schedule = scheduler(optimizer, settings["schedule"])
    losses, norms, rates = [], [], []
    for spans in STEP_SPANS:
        optimizer.zero_grad()
        loss = reference.loss(context, cache, spans, to_delta(parameters))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings["clip_norm"]).item())
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    return losses, norms, rates


def make(name):
    golden = json.loads((HERE / f"{name}.golden.json").read_text())
    reference = Reference(HERE / name)
    context, cache = golden["context"], []
    with torch.no_grad():
        reference.forward(context, 0, cache)
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    q_dim = reference.heads * reference.head_dim
    a = [draw(RANK, reference.hidden).float().double() for _ in range(reference.layers)]
    b = [draw(q_dim, RANK).float().double() for _ in range(reference.layers)]
    fresh = lambda: [t.clone().requires_grad_(True) for t in a + b]
    split = lambda p: dense(p[:reference.layers], p[reference.layers:])
    tensors = {f"a.{i}": t for i, t in enumerate(a)} | {f"b.{i}": t for i, t in enumerate(b)}

    parameters = fresh()
    loss = reference.loss(context, cache, TWO_SPANS, split(parameters))
    loss.backward()
    for i in range(reference.layers):
        tensors[f"gradient.a.{i}"] = parameters[i].grad
        tensors[f"gradient.b.{i}"] = parameters[reference.layers + i].grad
    # Central differences along one direction.
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    with torch.no_grad():
        moved = [reference.loss(context, cache, TWO_SPANS, split([p + h * d for p, d in zip(parameters, direction)]))
                 for h in (1e-5, -1e-5)]
    expected = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction))
    error = abs((moved[0] - moved[1]).item() / 2e-5 - expected) / abs(expected)
    print(f"{name}: autograd against central differences: {error:.1e}")
    if error > 1e-5:
        raise SystemExit("autograd and finite differences differ")

    runs = {}
    for key, settings in RUNS.items():
        full = key.startswith("full")
        parameters = reference.zero_delta(requires_grad=True) if full else fresh()
        losses, norms, rates = run(reference, context, cache, parameters, (lambda p: p) if full else split, settings)
        print(f"{name} {key}: losses {[round(x, 4) for x in losses]}, norms {[round(x, 3) for x in norms]}")
        runs[key] = dict(settings, losses=losses, grad_norms=norms, rates=rates)
        with torch.no_grad():
            final = parameters if full else split(parameters)
            tensors[f"{key}.probe"] = torch.cat([reference.forward(context[row:row + 1], row, cache, final)
                                                 for row in (400, 699)])
            if not full:
                tensors |= {f"{key}.a.{i}": p for i, p in enumerate(parameters[:reference.layers])}
                tensors |= {f"{key}.b.{i}": p for i, p in enumerate(parameters[reference.layers:])}
    golden = dict(command=COMMAND, context=context, rank=RANK, alpha=ALPHA, spans=TWO_SPANS, loss=loss.item(),
                  warmup=WARMUP, step_spans=STEP_SPANS, probe_rows=[400, 699], runs=runs)
    text = "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items()) + "\n}\n"
    tensors = {k: v.detach().float().contiguous() for k, v in tensors.items()}
    return text, tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    for name in ("llama", "qwen3"):
        text, tensors = make(name)
        path = HERE / f"{name}.adapter.golden.safetensors"
        if check:
            old = load_file(path)
            same = old.keys() == tensors.keys() and all(
                torch.allclose(old[k].double(), tensors[k].double(), rtol=1e-5, atol=1e-7) for k in old)
            if not same:
                raise SystemExit(f"{path.name}: differs from what is committed")
            continue
        (HERE / f"{name}.adapter.golden.json").write_text(text)
        save_file(tensors, path, metadata={"command": COMMAND})
    print("same as committed" if check else f"written to {HERE}")


if __name__ == "__main__":
    main()
