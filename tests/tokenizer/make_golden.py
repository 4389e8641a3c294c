"""Writes the small tokenizers and golden ids of this folder with the `tokenizers` library (0.23.3).

    make_golden.py RDATA [MODEL.gguf]

RDATA holds the public-domain novels the vocabularies are trained on. With MODEL.gguf, golden ids of that
model's own tokenizer too.
"""
import json
import pathlib
import random
import sys

import texts
from compare_reference import LLAMA, QWEN, TEKKEN, from_gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
ByteLevel, Sequence, Split, Digits = (pre_tokenizers.ByteLevel, pre_tokenizers.Sequence, pre_tokenizers.Split,
                                      pre_tokenizers.Digits)


def plain():
    return ByteLevel(add_prefix_space=False, use_regex=False)


KINDS = {
    "gpt-2": dict(pre=ByteLevel(add_prefix_space=False)),
    "smollm": dict(pre=Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
    "llama-bpe": dict(pre=Sequence([Split(Regex(LLAMA), "isolated"), plain()])),
    "qwen2": dict(pre=Sequence([Split(Regex(QWEN), "isolated"), plain()]), normalizer=normalizers.NFC()),
    "tekken": dict(pre=Sequence([Split(Regex(TEKKEN), "isolated"), plain()])),
    # No known model: the remaining steps that are supported.
    "mixed": dict(pre=Sequence([Split("--", "isolated"), Split(Regex(r"[^\t]+"), "removed", invert=True),
                                Digits(individual_digits=False), ByteLevel(add_prefix_space=True)]),
                  normalizer=normalizers.Sequence([normalizers.NFC()])),
}


def train(kind, corpus):
    out = Tokenizer(models.BPE())
    settings = KINDS[kind]
    out.pre_tokenizer = settings["pre"]
    if "normalizer" in settings:
        out.normalizer = settings["normalizer"]
    out.decoder = decoders.ByteLevel()
    # SmolLM's vocabulary lacks bytes that its training text never had.
    alphabet = [] if kind == "smollm" else ByteLevel.alphabet()
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if kind == "smollm" else []
    out.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=(200 if kind == "smollm" else 256) + 600 +
                                                        len(first),
                                                        initial_alphabet=alphabet, special_tokens=first,
                                                        show_progress=False))
    tree = json.loads(out.to_str())
    if kind in ("llama-bpe", "tekken"):
        tree["model"]["ignore_merges"] = True
        for text in ("\u0120unmergeable", "qzqzqz"):
            tree["model"]["vocab"][text] = len(tree["model"]["vocab"])
    if kind == "mixed":
        tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    out = Tokenizer.from_str(json.dumps(tree))
    if kind != "smollm":
        out.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                for t in ("<|begin|>", "<|end|>", "<|end|>>", "<|t\u00e9l\u00e9|>")])
    if kind in ("qwen2", "mixed"):
        out.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("A\u030angstr\u00f6m", normalized=True),
                        AddedToken("<|end", normalized=False)])
    if kind == "mixed":
        # Names say what they take with them.
        out.add_tokens([AddedToken("<L>", normalized=False, lstrip=True), AddedToken("<R>", normalized=False, rstrip=True),
                        AddedToken("<LR>", normalized=False, lstrip=True, rstrip=True),
                        AddedToken("word", normalized=False, single_word=True),
                        AddedToken("\u00e9t\u00e9", normalized=True, single_word=True, lstrip=True)])
    if kind == "llama-bpe":
        bos = out.token_to_id("<|begin|>")
        out.post_processor = processors.Sequence([ByteLevel_post(), processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|>:1 $B:1", special_tokens=[("<|begin|>", bos)])])
    return out


def ByteLevel_post():
    return processors.ByteLevel(trim_offsets=False)


def cases(tokenizer, seed, count, excerpts):
    rng = random.Random(seed)
    specials = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    items = ["", " ", "  ", "\n", " \n \n  x", "a" * 100, " " * 70 + "x", "ab" * 90,
             "<|end|>>", "<|end|><|end|>", "x<|end|",
             "cafe\u0301 A\u030angstr\u00f6m \u00c5ngstro\u0308m \u212bngstr\u00f6m", " unmergeable qzqzqz",
             "e" + "\u0301\u0323" * 40,
             # Where versions of Unicode and engines differ: spaces, new letters and numbers, new combining marks,
             # case folding.
             "a \u180e b\u180e\u180ec \u180e", "x\U00031350\U00013460! \U00010d40\U000116d0\U00011de0a\U00016ff4",
             "a\u0345\u1ac1 e\u0334\u0898 \U00011935\U00011930", "a'\u017f a'\u212a A'RE",
             "a--b---c----\t\td 12 345x6", "HTTPServer McDonald iPhone \u01c5ungla \u02b0x \u0646\u0635 a/b//\n/ //\r\n/",
             "\u10d50\u1c89x\ua7cdY \U00010d50\U00010d70\U00016d43", "\x00\x01\x1f\x7f\u0080\u009f a\u200db\u200c",
             "  <L>  <R>  <LR>  a <L><R> <LR> ", "\u3000<R>\u2003\u200b<L>\u1680<LR>\u180e", "<L> <L>\n\t<R>\r\n<R>",
             "word words aword a word. word_ word\u0301 \u4e2dword \u00b7word\u2118 1word \u24b6word word\u200d (word)",
             "  \u00e9te\u0301  e\u0301t\u00e9s \u00e9t\u00e9", *excerpts, *(texts.random_text(rng, specials) for _ in range(count)),
             *(texts.messy_text(rng, specials) for _ in range(16))]
    out = []
    for i, text in enumerate(items):
        special = i % 3 != 0
        tokenizer.encode_special_tokens = not special
        out.append({"text": text, "special": special, "ids": tokenizer.encode(text, add_special_tokens=False).ids})
    return out


def write(path, tree):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree, separators=(",", ":")) + "\n")


def main():
    novels = list(texts.novels(sys.argv[1]))
    rng = random.Random(7)
    corpus = [novels[5][:200000], *(texts.random_text(rng) for _ in range(400))]
    excerpts = [novels[4][3000:4500]]
    for i, kind in enumerate(KINDS):
        tokenizer = train(kind, corpus if kind != "smollm" else corpus[:1])
        write(HERE / kind / "tokenizer.json", json.loads(tokenizer.to_str()))
        write(HERE / kind / "golden.json", cases(tokenizer, i, 41, excerpts))
    if len(sys.argv) > 2:
        write(HERE / "smollm2_golden.json", cases(from_gguf(sys.argv[2]), 99, 41, excerpts))


if __name__ == "__main__":
    main()
