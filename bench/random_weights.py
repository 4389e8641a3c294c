#!/usr/bin/env python3
"""The weights that `refocus-worker --random-weights SEED` makes, for a transformers model of the same configuration.

    model = AutoModelForCausalLM.from_config(config); fill(model, seed)

Every element follows from seed, tensor name and index (worker/random_weights.h has the formula). Works where the model
lives, in pieces; any floating dtype holds the values, since they are bf16. As a program it prints, for every tensor of
a configuration, its first and last values and the sum of all their bits:

    python3 bench/random_weights.py FOLDER_WITH_CONFIG_JSON --seed 7
"""
import argparse

import torch

PIECE = 1 << 24
GOLDEN = 0x9E3779B97F4A7C15
WIDTH = 0.069282032  # 0.02 * sqrt(12)
MASK = (1 << 64) - 1


def signed(value):
    """The 64 bits of an unsigned number as torch's int64 has them."""
    return value - (1 << 64) if value >> 63 else value


def mix(z):
    """splitmix64's last step: a Python int, or a tensor of int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        if isinstance(z, int):
            z ^= z >> shift
            z = z if factor is None else z * factor & MASK
        else:
            z = z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))  # torch shifts the sign in
            z = z if factor is None else z * signed(factor)
    return z


def key(seed, name):
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 & MASK
    return mix(value ^ mix(seed))


def values(seed, name, first, count, device="cpu"):
    """Elements [first, first + count) of the matrix `name`, bf16."""
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    top = (mix(index * signed(GOLDEN) + signed(key(seed, name))) >> 40) & 0xFFFFFF
    return ((top.float() * 2.0 ** -24 - 0.5) * WIDTH).bfloat16()


@torch.no_grad()
def fill(model, seed):
    """Overwrites every parameter. Tied embeddings are one parameter under the name of the embedding."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith(".bias"):
            parameter.fill_(1)
            continue
        flat = parameter.data.view(-1)
        for first in range(0, flat.numel(), PIECE):
            part = flat[first:first + PIECE]
            part.copy_(values(seed, name, first, part.numel(), part.device))
    return model


def main():
    from transformers import AutoConfig, AutoModelForCausalLM
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.folder)
    model = fill(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), args.seed)
    for name, parameter in model.named_parameters():
        bits = parameter.detach().reshape(-1).view(torch.int16).long() & 0xFFFF
        print(f"{name} {bits[0]:#06x} {bits[-1]:#06x} {int(bits.sum())}")


if __name__ == "__main__":
    main()
