#!/usr/bin/env python3
"""Writes sampling.json: distributions after transformers' own logits processors, in fp32, for worker/sampler_test.cc.

Usage: make_sampling.py [--check]. Needs torch and transformers (used: 2.11, 5.23). Bias and min_tokens come from
SequenceBiasLogitsProcessor and MinNewTokensLengthLogitsProcessor, presence and frequency penalties (which transformers
lacks) from their definition in OpenAI's API, applied here in plain Python.
"""
import argparse
import json
import pathlib

import torch
from transformers import generation

VOCAB = 40
PROMPT = [3, 3, 17, 39]
ANSWER = [5, 5, 5, 17, 20]
CASES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 40},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.93, "temperature": 1.4},
    {"min_p": 0.02},
    {"min_p": 0.4, "temperature": 3.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"bias": {"0": 3.5, "11": -100.0, "39": 0.25}},
    {"min_tokens": 6, "stop_ids": [1, 7, 22]},
    {"min_tokens": 5, "stop_ids": [1, 7, 22]},
    {"bias": {"5": 2.0, "20": -1.0}, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1,
     "min_tokens": 9, "stop_ids": [2, 30], "temperature": 0.8, "top_k": 15, "top_p": 0.9, "min_p": 0.03},
    {"repetition_penalty": 1.1, "temperature": 5.0, "top_k": 30, "top_p": 0.7, "min_p": 0.1},
]


def processed(logits, case):
    ids = torch.tensor([PROMPT + ANSWER])
    scores = logits[None].clone()
    temperature = case.get("temperature", 1.0)
    if "bias" in case:
        bias = [[[int(token)], value] for token, value in case["bias"].items()]
        scores = generation.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if "repetition_penalty" in case:
        scores = generation.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])(ids, scores)
    for token in set(ANSWER):
        scores[0, token] -= case.get("frequency_penalty", 0.0) * ANSWER.count(token)
        scores[0, token] -= case.get("presence_penalty", 0.0)
    if "min_tokens" in case:
        scores = generation.MinNewTokensLengthLogitsProcessor(
            len(PROMPT), case["min_tokens"], case["stop_ids"], device="cpu")(ids, scores)
    if temperature != 1.0:
        scores = generation.TemperatureLogitsWarper(temperature)(ids, scores)
    if "top_k" in case:
        scores = generation.TopKLogitsWarper(case["top_k"])(ids, scores)
    if "top_p" in case:
        scores = generation.TopPLogitsWarper(case["top_p"])(ids, scores)
    if "min_p" in case:
        scores = generation.MinPLogitsWarper(case["min_p"])(ids, scores)
    return torch.softmax(scores[0].double(), -1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(11)) * 2
    cases = [dict(case, probabilities=[round(p, 9) for p in processed(logits, case).tolist()]) for case in CASES]
    golden = {"logits": logits.tolist(), "prompt": PROMPT, "answer": ANSWER, "cases": cases}
    path = pathlib.Path(__file__).with_name("sampling.json")
    text = json.dumps(golden, separators=(",", ":")).replace('{"', '\n{"') + "\n"
    if check:
        if path.read_text() != text:
            raise SystemExit(f"{path} differs from what transformers gives")
    else:
        path.write_text(text)


if __name__ == "__main__":
    main()
