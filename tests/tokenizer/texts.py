"""Texts for comparing tokenizers: random Unicode of every kind, by seed; the novels; source code."""
import glob
import random
import struct
import unicodedata
import zlib

SPACES = [chr(c) for c in (9, 10, 11, 12, 13, 32, 0x85, 0xa0, 0x1680, 0x180e, *range(0x2000, 0x200c), 0x2028, 0x2029,
                           0x202f, 0x205f, 0x2060, 0x3000, 0xfeff)]
WORDS = ("the and of don't I'M we'Ll it's THEY'RE x'D 'S 'ſ 'k ''t 123 4567 3.14 0x7f ½ Ⅷ ٣٤٥ १२३ 𝟘𝟙 naïve café "
         "cafe\u0301 Å Å A\u030a e\u0323\u0302 ﬁ ﬀ ß İ ǅ 中文字 日本語 한국어 \u1112\u1161\u11ab สวัสดี العربية "
         "עִבְרִית हिन्दी 👍🏽 👩‍👩‍👧‍👦 🇩🇪 € ™ \u0338= <\u0338 \U00011935\U00011930 \u0f73\u0f71 \u0344 \u212b \u2126").split(" ")
RANGES = [(0, 0x7f), (0x80, 0x2ff), (0x300, 0x36f), (0x370, 0x58f), (0x590, 0x8ff), (0x900, 0xdff), (0xe00, 0x13ff),
          (0x1100, 0x11ff), (0x1ab0, 0x1aff), (0x1dc0, 0x20ff), (0x2000, 0x2bff), (0x3000, 0x9fff), (0xac00, 0xd7a3),
          (0xe000, 0xffff), (0x10000, 0x1ffff), (0x11900, 0x11950), (0x1d100, 0x1d7ff), (0x1e000, 0x1e8ff),
          (0x1f300, 0x1faff), (0x20000, 0x3ffff), (0x0, 0x10ffff), (0xe0000, 0x10ffff)]
NUMBERS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c))[0] == "N"]
MARKS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c))[0] == "M"]


def character(rng):
    low, high = rng.choice(RANGES)
    while True:
        c = rng.randint(low, high)
        if not 0xd800 <= c < 0xe000:
            return chr(c)


def random_text(rng, specials=()):
    parts = []
    for _ in range(rng.randint(1, 24)):
        kind = rng.randrange(10)
        n = rng.choice((1, 1, 1, 2, 3, 5, 9))
        if kind == 0:
            parts += rng.choices(SPACES, k=n)
        elif kind == 1:
            parts.append(rng.choice(" \n\t\r") * n)
        elif kind in (2, 3):
            parts += [rng.choice(("", " ", "  ")) + rng.choice(WORDS)]
        elif kind == 4:
            parts += rng.choices(NUMBERS, k=n)
        elif kind == 5:
            parts += [rng.choice("aeioun=<>" + "\u1100\uac00\u0915"), *rng.choices(MARKS, k=n)]
        elif kind == 6 and specials:
            text = rng.choice(specials)
            parts.append(text if rng.random() < 0.7 else text[:rng.randint(0, len(text))])
        elif kind == 7:
            parts += rng.choices("abcXYZ0123456789 .,;:!?'\"()[]{}<>|/\\_-+*&^%$#@~`\n\t", k=3 * n)
        else:
            parts += [character(rng) for _ in range(n)]
    return "".join(parts)


CODE = ("def f(x: int) -> str:\n\treturn f'{x!r}'  # über\n", "if (a<=b && c!=d) { x->y[0] += 0xFFu; }\r\n",
        "    for(auto&& [k, v] : m)\n        std::cout<<k<<'\\n';\n", "SELECT * FROM t WHERE a='it''s' -- é\n",
        '{"key": [1, 2.5e-3, null], "\\u00e9": "\\\\n"}', "<p class=\"a-b_c\">&nbsp;</p>\n\n\n",
        "#!/bin/sh\nrm -rf $HOME/*.o\n", "#include <a/b.h>\n\n\n\n//// x\n/**/\n",
        "camelCaseHTTPServer2XML snake_case_1 kConst __init__", "\\frac{a}{b}^{2} $$\\alpha$$")
LANGUAGES = ("The quick brown fox", "Der Fuchs fährt nach Köln", "Быстрая лиса", "敏捷的棕色狐狸。", "すばやいキツネは！",
             "빠른 갈색 여우", "الثعلب البني", "สุนัขจิ้งจอก", "तेज़ भूरी लोमड़ी", "Γρήγορη αλεπού", "სწრაფი ᲛᲔᲚᲐ", "Nhanh nhẹn cáo")
EMOJI = ("\U0001f469\u200d\U0001f680", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
         "\u2764\ufe0f\u200d\U0001f525", "#\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\u263a")
CONTROL = [chr(c) for c in (*range(32), *range(127, 160), 0xad, 0x200e, 0x202e, 0x2066, 0xfff9, 0xe0001)]
ENDLESS = ("ab", "abcdefghij", "éè", "中文", "0123456789", "=-", " ", "\U0001f44d")


def messy_text(rng, specials=()):
    """What real inputs are made of: languages side by side, emoji, control characters, code, words without end, and text
    that was cut within a character and decoded all the same."""
    parts = []
    for _ in range(rng.randint(2, 10)):
        kind = rng.randrange(8)
        if kind == 0:
            parts.append(rng.choice(CODE))
        elif kind == 1:
            parts += [rng.choice(LANGUAGES), rng.choice(("", " ", "\n", "\u3000", ", "))]
        elif kind == 2:
            parts += rng.choices(EMOJI, k=rng.randint(1, 4))
        elif kind == 3:
            parts += rng.choices(CONTROL, k=rng.randint(1, 5))
        elif kind == 4:
            parts.append("".join(rng.choices(rng.choice(ENDLESS), k=rng.choice((30, 100, 300)))))
        elif kind == 5:
            whole = "".join(rng.choices(LANGUAGES + EMOJI, k=2)).encode()
            first, last = sorted(rng.choices(range(len(whole)), k=2))
            parts.append(whole[first:last].decode(errors="replace"))
        elif kind == 6 and specials:
            text = rng.choice(specials)
            parts.append(text if rng.random() < 0.7 else text[:rng.randint(0, len(text))])
        else:
            parts.append(random_text(rng, specials))
    return "".join(parts)


def novels(path):
    """The six texts of an R data file (row by row)."""
    data = open(path, "rb").read()
    at = 0

    def number(b, p):
        return struct.unpack(">i", b[p:p + 4])[0]

    while at + 4 < len(data):
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data[at + 4:])
        at = len(data) - len(unpacker.unused_data)
        p = 18 + number(text, 14)
        count = number(text, p + 4)
        p += 8
        lines = []
        for _ in range(count):
            size = max(number(text, p + 4), 0)
            lines.append(text[p + 8:p + 8 + size].decode())
            p += 8 + size
        yield "\n".join(lines) + "\n"


def code(limit):
    """Header files of this machine."""
    total = 0
    for name in sorted(glob.glob("/usr/include/**/*.h", recursive=True)):
        try:
            text = open(name, encoding="utf-8").read()
        except (OSError, UnicodeDecodeError):
            continue
        yield text
        total += len(text)
        if total > limit:
            return
