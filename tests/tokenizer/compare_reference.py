"""Compares tokenizer_ids with the `tokenizers` library, token for token.

    compare_reference.py BINARY MODEL [--novels Rdata.rdb] [--random N] [--code BYTES] [--seed S]

MODEL is a folder with tokenizer.json, or a GGUF file (needs the `gguf` package; its reference is built from vocabulary,
merges and the documented pre-tokenizer). Not run by ctest, which has golden ids instead and needs no Python.
"""
import argparse
import random
import struct
import subprocess
import sys

import texts
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
QWEN = LLAMA.replace("{1,3}", "")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def from_gguf(path):
    import gguf
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    pre = fields["tokenizer.ggml.pre"].contents()
    out = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=pre in ("llama-bpe", "tekken")))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    steps = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
             "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA), "isolated")],
             "tekken": [pre_tokenizers.Split(Regex(TEKKEN), "isolated")],
             "qwen2": [pre_tokenizers.Split(Regex(QWEN), "isolated")]}[pre]
    out.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    if pre == "qwen2":
        out.normalizer = normalizers.NFC()
    out.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == 3])
    out.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == 4])
    return out


def ours(binary, model, items, special):
    data = b"".join(struct.pack("<q", len(b)) + b for b in (t.encode() for t in items))
    result = subprocess.run([binary, model] + (["special"] if special else []), input=data,
                            stdout=subprocess.PIPE, check=True)
    at = 0
    for _ in items:
        count = struct.unpack_from("<q", result.stdout, at)[0]
        at += 8
        yield list(struct.unpack_from(f"<{max(count, 0)}i", result.stdout, at)) if count >= 0 else None
        at += 4 * max(count, 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--novels")
    parser.add_argument("--random", type=int, default=20000)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    reference = from_gguf(args.model) if args.model.endswith(".gguf") else \
        Tokenizer.from_file(args.model + "/tokenizer.json")
    specials = [t.content for t in reference.get_added_tokens_decoder().values()]
    rng = random.Random(args.seed)
    items = ["", " ", "\n", "a", *(chr(c) for c in range(256)),
             *(a + " " + b for a in texts.SPACES for b in texts.SPACES)]
    items += [make(rng, specials) for _ in range(args.random) for make in (texts.random_text, texts.messy_text)]
    items += ["x" * 200_000, "\u00e9\u4e2d" * 50_000, "ab c" * 50_000, "\U0001f44d" * 50_000, "1" * 100_000, "\n " * 50_000]
    items += list(texts.novels(args.novels)) if args.novels else []
    items += list(texts.code(args.code)) if args.code else []
    # Every code point, in company.
    everything = [chr(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    items += ["".join(f"{c}a1 {c}'{c}" for c in everything[i:i + 512]) for i in range(0, len(everything), 512)]
    bad = tokens = 0
    for special in (False, True):
        reference.encode_special_tokens = not special
        for text, got in zip(items, ours(args.binary, args.model, items, special)):
            want = reference.encode(text, add_special_tokens=False).ids
            tokens += len(want)
            if want != got:
                bad += 1
                first = next((i for i, (a, b) in enumerate(zip(want, got or [])) if a != b),
                             min(len(want), len(got or [])))
                if bad <= 5:
                    around = [reference.id_to_token(i) for i in want[max(first - 3, 0):first + 5]]
                    print(f"special={special} differs at token {first}: {text[:80]!r} want {want[first:first + 8]} "
                          f"{around} got {got and got[first:first + 8]}")
    print(f"{args.model}: {len(items)} texts twice, {tokens} tokens, {bad} texts differ")
    return bad != 0


if __name__ == "__main__":
    sys.exit(main())
