#!/usr/bin/env bash
# The benches, one after the other, on the small model: Markdown tables on stdout. Usage: bench.sh BIN_FOLDER
# Figures are only worth something on a machine that does nothing else.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "${1:?usage: bench.sh BIN_FOLDER}" && pwd)
model=$root/.deps/data/SmolLM2-135M-Instruct.Q4_1.gguf
novels=$root/.deps/data/novels
cores=$(nproc)

# As `refocus serve` sets them: one machine, also as root, also in a container.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader,tcp

headline() { printf '\n## %s\n\n' "$*"; }

headline "Tokenizer, one core"
"$bin/tokenizer_bench" "$model" "$novels"/*.txt
headline "Attention and linear layers, $cores threads"
"$bin/attention_bench" --threads "$cores"
headline "A context of 4,096 tokens: 1 rank, $cores threads"
"$bin/context_bench" --model "$model" --tokens 4096 --threads "$cores"
headline "The same: 2 ranks, 1 thread each"
mpirun --oversubscribe --bind-to none -np 2 "$bin/context_bench" --model "$model" --tokens 4096 --threads 1
