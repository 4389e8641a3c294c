"""Official scores of public benchmarks, written anew; each names what it follows."""
from __future__ import annotations


def string_match_all(answer: str, references: list[str]) -> float:
    """github.com/NVIDIA/RULER, scripts/eval/synthetic/constants.py: the share of references in the answer."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: list[str]) -> float:
    """The same file: any reference."""
    return float(any(reference.lower() in answer.lower() for reference in references))
