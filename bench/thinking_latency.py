"""Seconds of 32 x 128 adaptation steps beside as many seconds of thinking as cost the same operations: a service on random
weights of a real shape, one context a length, everything through the command line. Prints Markdown rows.

    python3 bench/thinking_latency.py BIN_FOLDER [--model bench/shapes/qwen3-4b] [--device cuda] [--tokens 8192 32768 131072]

Tokens of thinking: the most whose decoding behind the context costs no more operations than the steps, counted by
python/src/refocus/evaluate/flops.py from the model's shapes. All of them are generated and timed.
"""
import argparse
import importlib.util
import json
import pathlib
import random
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/e2e"))
import harness  # noqa: E402  (starts and ends the service)


def operations():
    """flops.py alone: the package around it wants gRPC."""
    spec = importlib.util.spec_from_file_location("flops", ROOT / "python/src/refocus/evaluate/flops.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["flops"] = module
    spec.loader.exec_module(module)
    return module


def shape_of(flops, config):
    heads = config["num_attention_heads"]
    return flops.Shape(config["num_hidden_layers"], config["hidden_size"], heads, config["num_key_value_heads"],
                       config.get("head_dim") or config["hidden_size"] // heads, config["intermediate_size"],
                       config["vocab_size"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bin", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "bench/shapes/qwen3-4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--span", type=int, default=128)
    parser.add_argument("--kv-memory")
    options = parser.parse_args()
    flops = operations()
    shape = shape_of(flops, json.loads((options.model / "config.json").read_text()))
    print(f"| context | prefill | {options.steps} x {options.span} steps | tokens of equal operations | thinking them | times as long "
          "| tokens in the steps' time |\n|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder, harness.Service(
            options.bin, options.model, options.ranks, "--device", options.device, "--random-weights", "1",
            kv_memory=options.kv_memory) as service:
        for tokens in options.tokens:
            generator = random.Random(tokens)
            ids = pathlib.Path(folder) / f"{tokens}.ids"
            ids.write_text(" ".join(str(generator.randrange(shape.vocabulary * 9 // 10)) for _ in range(tokens)))
            matched = flops.matched_tokens(shape, tokens, flops.adapt(shape, tokens, options.steps, options.span))
            name = f"c{tokens}"
            prefill = service.events("context", "create", ids, "--ids", "--id", name)[-1]["usage"]["seconds"]
            steps = ["adapt", name, "--steps", str(options.steps), "--span-tokens", str(options.span), "--seed", "1",
                     "--probe-spans", "0", "--learning-rate", "1e-6"]
            service.events(*steps)  # the first ones record graphs
            adapt = service.events(*steps)[-1]["usage"]["seconds"]
            ask = ["ask", name, "1 2 3", "--base", "--ids", "--ignore-eos", "--max-tokens"]
            service.call(*ask, "16")
            answer = json.loads(service.call(*ask, str(matched), "--json", timeout=3600).splitlines()[-1])["summary"]
            assert int(answer["generated_tokens"]) == matched
            rate = answer["tokens_per_second"]
            print(f"| {tokens:,} | {prefill:.2f} s | {adapt:.3f} s | {matched:,} | {matched / rate:.1f} s | "
                  f"{matched / rate / adapt:.0f} | {adapt * rate:.0f} |", flush=True)
            service.call("context", "rm", name)
        service.stop()


if __name__ == "__main__":
    main()
