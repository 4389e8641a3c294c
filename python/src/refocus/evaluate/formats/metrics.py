"""Official scores of public benchmarks, written anew; each names what it follows. All are shares of 0 to 1."""
from __future__ import annotations

import collections
import difflib
import re
import string
from collections.abc import Sequence


# ---- RULER: scripts/eval/synthetic/constants.py and evaluate.py.

def ruler_clean(answer: str) -> str:
    """Control characters become line breaks."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()


def string_match_all(answer: str, references: list[str]) -> float:
    """The share of references that the answer contains."""
    said = ruler_clean(answer).lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(answer: str, references: list[str]) -> float:
    """Any reference."""
    return float(any(reference.lower() in ruler_clean(answer).lower() for reference in references))


# ---- LongBench: LongBench/metrics.py. Chinese needs the package jieba, as there.

CHINESE_MARKS = ("！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
                 "–—‘’‛“”„‟…‧﹏.")


def normal_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def overlap_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    same = sum((collections.Counter(answer) & collections.Counter(reference)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(answer: str, reference: str) -> float:
    return overlap_f1(normal_words(answer), normal_words(reference))


def has_jieba() -> bool:
    try:
        import jieba  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        return False
    return True


def _chinese(text: str) -> list[str]:
    import jieba  # type: ignore[import-not-found,unused-ignore]
    return list(jieba.cut(text, cut_all=False))


def qa_f1_chinese(answer: str, reference: str) -> float:
    marks = set(string.punctuation + CHINESE_MARKS)
    words = [["".join("".join(c for c in word.lower() if c not in marks).split()) for word in _chinese(text)]
             for text in (answer, reference)]
    return overlap_f1(*([word for word in side if word] for side in words))


def _common(first: list[str], second: list[str]) -> set[str]:
    """Words of one longest common subsequence; among equals that of the package rouge 1.0.1."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        row, above = table[i], table[i - 1]
        for j, b in enumerate(second, 1):
            row[j] = above[j - 1] + 1 if a == b else max(above[j], row[j - 1])
    found, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.add(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_l(answer: str, reference: str) -> float:
    """F of the package rouge 1.0.1: sentences end at full stops, words count once (exclusive=True)."""
    said, wanted = ([" ".join(part.split()).split(" ") for part in text.split(".") if part]
                    for text in (answer, reference))
    if not said or not wanted:
        return 0.0
    union: set[str] = set()
    for sentence in wanted:
        for other in said:
            union |= _common(sentence, other)
    recall = len(union) / len({word for sentence in wanted for word in sentence})
    precision = len(union) / len({word for sentence in said for word in sentence})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def rouge_l_chinese(answer: str, reference: str) -> float:
    return rouge_l(" ".join(_chinese(answer)), " ".join(_chinese(reference)))


def numbers(answer: str, wanted: str) -> float:
    """The share of the answer's numbers that are the wanted one."""
    found = re.findall(r"\d+", answer)
    return found.count(wanted) / len(found) if found else 0.0


def paragraph(answer: str, reference: str, word: str) -> float:
    return numbers(answer, re.findall(rf"{word}(\d+)", reference)[0])


def code_similarity(answer: str, reference: str) -> float:
    """Of the first line that is no comment or fence; fuzz.ratio of fuzzywuzzy 0.18 without python-Levenshtein."""
    line = next((line for line in answer.lstrip("\n").split("\n")
                 if "`" not in line and "#" not in line and "//" not in line), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return int(round(100 * difflib.SequenceMatcher(None, line, reference).ratio())) / 100


def one_class(answer: str, reference: str, classes: Sequence[str]) -> float:
    """Classes named in the answer; those that are part of the reference's name are taken out while the list is walked,
    as the official loop does, which skips the one after each."""
    named = [name for name in classes if name in answer]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1.0 / len(named) if reference in named else 0.0


# ---- ZeroSCROLLS, by the definitions of arXiv 2305.14196, section 3.

def exponential_similarity(answer: str, reference: str) -> float:
    """2 ** (-10 |p - q|) of two percentages; 0 where the answer has none."""
    said, wanted = (re.search(r"(\d+(?:\.\d+)?)", text) for text in (answer, reference))
    if said is None or wanted is None:
        return 0.0
    return float(2.0 ** (-10 * abs(min(100.0, float(said.group(1))) - float(wanted.group(1))) / 100))


def concordance(answer: str, reference: str) -> float:
    """The share of pairs in the right order; 0 for what is no permutation."""
    said, wanted = ([int(n) for n in re.findall(r"\d+", text)] for text in (answer, reference))
    if sorted(said) != sorted(wanted) or len(wanted) < 2:
        return float(said == wanted)
    place = {value: i for i, value in enumerate(said)}
    pairs = [(a, b) for i, a in enumerate(wanted) for b in wanted[i + 1:]]
    return sum(place[a] < place[b] for a, b in pairs) / len(pairs)


def letter(answer: str, reference: str) -> float:
    """The first letter A to D that stands by itself."""
    said, wanted = (re.search(r"\b([A-D])\b", text) for text in (answer, reference))
    return float(said is not None and wanted is not None and said.group(1) == wanted.group(1))
