"""Tiny random models for the tests of bench/'s Python. Imported with the repository as the first argument; ends with
77, skipped, where this Python has no torch or transformers."""
import pathlib
import sys
import unittest

try:
    import torch
    import transformers
    import safetensors
except ImportError as missing:
    if missing.name not in ("torch", "transformers", "safetensors"):
        raise
    print(f"skipped: {missing}")
    sys.exit(77)

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
sys.path.insert(0, str(ROOT / "bench"))
import rivals

torch.set_num_threads(1)
rivals.LATER = 64
TOKENS = 192
SHAPE = dict(vocab_size=rivals.ledgers.ledger.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
             attn_implementation="sdpa", initializer_range=0.2)


def tiny(family="Qwen3"):
    torch.manual_seed(1)
    config = getattr(transformers, family + "Config")(**SHAPE)
    return getattr(transformers, family + "ForCausalLM")(config).eval().requires_grad_(False)


def copied(tensors):
    return [tuple(x.clone() for x in pair) for pair in tensors]


class OnATinyModel(unittest.TestCase):
    def setUp(self):
        self.model = tiny()
        self.shape = rivals.shape_of(self.model.config)
        self.ledger = rivals.draw_ledger(TOKENS, 3)
        self.kv = rivals.prefill(self.model, self.ledger.ids[:TOKENS])

    def assert_same_bits(self, before, after):
        for x, y in zip(before, after, strict=True):
            self.assertTrue(all(torch.equal(a, b) for a, b in zip(x, y, strict=True)))

    def assert_close(self, a, b):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
