"""The recall model's tokens: bytes, 4096 accounts (" kamo": two syllables) and 256 values (" 0" to " 255"), as a byte-level
BPE without merges whose whole words are tokens."""
import json

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeio"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]
BOS = 0
FIRST_BYTE = 1
FIRST_ACCOUNT = FIRST_BYTE + 256
ACCOUNTS = len(SYLLABLES) ** 2
FIRST_VALUE = FIRST_ACCOUNT + ACCOUNTS
VALUES = 256
VOCABULARY = FIRST_VALUE + VALUES
BOS_TEXT = "<|begin|>"


def account(index):
    return " " + SYLLABLES[index // len(SYLLABLES)] + SYLLABLES[index % len(SYLLABLES)]


def value(index):
    return f" {index}"


def byte_names():
    """The visible character that stands for each byte in a byte-level vocabulary: printable Latin-1 for itself, the others
    from 256 on in order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, spare = {}, 256
    for byte in range(256):
        names[byte] = chr(byte) if byte in visible else chr(spare)
        spare += byte not in visible
    return names


def write(folder):
    names = byte_names()
    spell = lambda text: "".join(names[b] for b in text.encode())
    vocabulary = {BOS_TEXT: BOS}
    vocabulary.update({names[b]: FIRST_BYTE + b for b in range(256)})
    vocabulary.update({spell(account(i)): FIRST_ACCOUNT + i for i in range(ACCOUNTS)})
    vocabulary.update({spell(value(i)): FIRST_VALUE + i for i in range(VALUES)})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": BOS, "content": BOS_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
               "special": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocabulary, "merges": []}}, ensure_ascii=False) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS_TEXT, "eos_token": BOS_TEXT, "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 65536}, indent=2) + "\n")
