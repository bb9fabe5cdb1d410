#!/usr/bin/env bash
# All that needs a GPU, in one call of less than nine minutes: the kernels' checks, then the benches, from the source
# tree with the machine's own python3. Results go to $OUT, else to bench/results, and stay if something fails; the exit
# status is 1 if a check or a bench does. Where there is no .git, SGSC_COMMIT names the commit.
#
#     bench/gpu.sh [SECTION ...]      checks, ceilings, linear, fake_quantize, training, conv2d
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE
results=${OUT:-bench/results}
all=530 each=190 # seconds at most, should something hang; the sections' own budgets are shorter
status=0
[ $# -gt 0 ] || set -- checks ceilings linear fake_quantize training conv2d
for section; do
  left=$((all - SECONDS))
  [ $left -lt $each ] || left=$each
  if [ $left -lt 5 ]; then
    echo "gpu.sh: no time left for $section" >&2
    status=1
    continue
  fi
  if [ "$section" = checks ]; then
    job=(bench.gpu_check)
  else
    job=(bench.gpu --only "$section")
  fi
  timeout -k 5 $left python3 -m "${job[@]}" --results "$results" || status=1
done
exit $status
