#!/usr/bin/env bash
# Everything that needs GPUs, in one go: kernels and engine against fp64 and plain torch, NCCL, the service with lost
# ranks and a million tokens, the benches beside transformers. Prints a line per check and the tables; logs go to a
# folder. Usage: gpu-check.sh BIN_FOLDER [LOG_FOLDER] [check ...]; python3 needs torch, and transformers for the peer.
# REFOCUS_TORCH_ROOT: torch's folder, where python3 does not find it.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "${1:?usage: gpu-check.sh BIN_FOLDER [LOG_FOLDER] [check ...]}" && pwd)
logs=${2:-$(mktemp -d)}
shift $(($# > 2 ? 2 : $#))
checks=("$@")
mkdir -p "$logs"
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | wc -l)
if [ "$gpus" = 0 ]; then
  echo "skipped: no GPU (nvidia-smi finds none)"
  exit 77
fi
torch=${REFOCUS_TORCH_ROOT:-$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')}
LD_LIBRARY_PATH=$torch/lib:$(printf '%s:' "$torch"/../nvidia/*/lib)/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}
export LD_LIBRARY_PATH OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,vader,tcp
shape=$root/bench/shapes/qwen3-4b
bench=("$bin/context_bench" --model "$shape" --random-weights 1 --device cuda --at 0.5 --jsonl "$logs/context.jsonl")
failed=0

wanted() {
  [ ${#checks[@]} = 0 ] && return 0
  local check
  for check in "${checks[@]}"; do [ "$check" = "$1" ] && return 0; done
  return 1
}

# check NAME COMMAND...: its output to NAME.log, one line about how it went.
check() {
  local name=$1 begin=$SECONDS code=0
  shift
  wanted "$name" || return 0
  "$@" >"$logs/$name.log" 2>&1 || code=$?
  local verdict=passed
  [ $code = 77 ] && verdict=skipped
  [ $code != 0 ] && [ $code != 77 ] && verdict="FAILED ($code)" && failed=1
  printf '%-22s %-12s %4d s\n' "$name" "$verdict" $((SECONDS - begin))
}

# table NAME COMMAND...: the same, and its output.
table() {
  wanted "$1" || return 0
  check "$@"
  cat "$logs/$1.log"
}

each() { mpirun -np "$gpus" --bind-to none "$@"; }

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
check rowwise_kernels "$bin/rowwise_kernels_test"
check attention_kernels "$bin/attention_kernels_test"
check exchange_kernels "$bin/exchange_kernels_test"
# Small shapes of every kernel under the sanitizer's tools, which cost ten to a hundred times the time.
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
sanitize() { timeout 300 "$sanitizer" --tool "$1" --error-exitcode 9 "$bin/$2" --gtest_filter="$3"; }
attention='Attention.EveryGroupSize:Attention.ExtentsAnywhereInTheShard:Attention.CombineLeavesEmptyPartsOut'
attention+=':Attention.HopperEveryGroupSizeAndRest:Attention.HopperExtentsAnywhereInTheShard'
for tool in memcheck synccheck; do
  check "attention_$tool" sanitize $tool attention_kernels_test "$attention"
  check "rowwise_$tool" sanitize $tool rowwise_kernels_test '-*OffsetsAre64Bit'
done
check attention_racecheck sanitize racecheck attention_kernels_test '*SmallestOfEveryPath:*CombineLeavesEmptyPartsOut'
check rowwise_racecheck sanitize racecheck rowwise_kernels_test \
  'NormTest.*:RotateTest.*:SwigluTest.*:LossTest.UnalignedLogits:LossTest.NonFinite*:SampleTest.GreedyTakes*'
check weights "$bin/weights_cuda_test"
check engine "$bin/gpu_engine_test"
check million "$bin/gpu_million_test"
wanted million && grep -E '^(span|[0-9]+ (tokens|positions)),' "$logs/million.log"
check nccl each "$bin/collective_nccl_test"
check service python3 -B "$root/tests/e2e/gpu_test.py" "$bin" "$root"
wanted service && grep -E '^(cuda|cpu|context|adapt|ask|1048576|\|)' "$logs/service.log"
table kernels "$bin/kernel_bench" --jsonl "$logs/kernels.jsonl"
table kernels_int8 "$bin/kernel_bench" --int8 --jsonl "$logs/kernels.jsonl"
table context_one "${bench[@]}" --tokens 8192,32768,131072 --steps 12
[ "$gpus" -gt 1 ] && table context_all each "${bench[@]}" --tokens 8192,32768,131072 --steps 12
table batch "${bench[@]}" --tokens 131072 --synthetic-cache --steps 2 --batch 1,4,16,64 --adapters 0,1,8
table context_million each "${bench[@]}" --tokens 1048576 --synthetic-cache --steps 12
table context_int8 "${bench[@]}" --kv-dtype int8 --tokens 32768,131072 --steps 12
table context_million_int8 "${bench[@]}" --kv-dtype int8 --tokens 1048576 --synthetic-cache --steps 12
table transformers python3 -B "$root/bench/peer_gpu.py" "$shape" --tokens 8192,32768,131072
# Losses of adapted steps, real shapes at reduced depth.
for name in qwen3-4b llama3-8b; do
  few=("$bin/context_bench" --model "$root/bench/shapes/$name" --random-weights 1 --device cuda --at 0.5 --layers 4
       --tokens 4096 --steps 8)
  check "equal_ours_$name" "${few[@]}" --results "$logs/$name.json"
  table "equal_$name" python3 -B "$root/bench/peer_gpu.py" "$root/bench/shapes/$name" --layers 4 --tokens 4096 --steps 8 \
    --exact --ours "$logs/$name.json"
done
echo "logs: $logs"
exit $failed
