#!/usr/bin/env bash
# All results of this machine's processor: every layer of FBI-LLM, forced instruction sets, all threads and one, beside
# torch and, where llama-cpp-python is installed, ggml; then whole models; then the page. About an hour on two cores,
# which should have nothing else to do.
#
#   bash benchmarks/cpu.sh                      into benchmarks/results/
#   RESULTS=/tmp/results bash benchmarks/cpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
RESULTS=${RESULTS:-benchmarks/results}
SHAPES=130m,1.3b,7b,4096x14336
TOKENS=1,4,16,64,512

kernels() {  # name, instruction set, further options
  local name=$1 isa=$2
  shift 2
  if ! BITINFER_CPU_ISA=$isa python -c 'import torch, bitinfer; torch.ops.bitinfer_native.cpu_isa()' 2>/dev/null; then
    echo "left out: this processor does not run $isa"
    return
  fi
  bitinfer bench kernels --isa "$isa" --shapes "$SHAPES" --tokens "$TOKENS" --json "$RESULTS/cpu-$name.json" "$@" >/dev/null
}

kernels amx amx
kernels amx-1-thread amx --threads 1 --peers ""
kernels avx512 avx512 --peers ""
# torch's own libraries held to what the kernels may use
export ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
kernels avx2 avx2 --peers ""
kernels avx2-1-thread avx2 --threads 1 --peers ""
unset ONEDNN_MAX_CPU_ISA MKL_ENABLE_INSTRUCTIONS

for shape in 130m 1.3b; do
  bitinfer bench model "$shape" --head-bits 8 --json "$RESULTS/cpu-model-$shape.json" >/dev/null
done
python benchmarks/report.py --plot
