#!/usr/bin/env bash
# All that needs a GPU, in one call of less than nine minutes: the kernels' checks, then the benches, from the source
# tree with the machine's own python3. Results go to $OUT, else to bench/results, and stay if something fails; the exit
# status is 1 if a check or a bench does. Where there is no .git, SGSC_COMMIT names the commit.
#
#     bench/gpu.sh [SECTION ...]      checks, ceilings, linear, fake_quantize, training, conv2d
#     bench/gpu.sh checks             the checks alone, which then have nearly all of the time
#     bench/gpu.sh choices            both sides of each threshold of the dispatch; or variants (int8, other dtypes and
#                                     convolutions), tokens (the other shapes at every M): by name alone, a call each
#     bench/gpu.sh cifar10            or any other section of bench.sgsc but quantizers, steps: by name alone, a call each
#     bench/gpu.sh strategies-vdsr    or any network of bench.strategies, or strategies-qat: likewise
#     bench/gpu.sh search-resnet20    or any network of bench.search: likewise
#
# A call for a task measures what fits into it; repeated, it goes on with what bench/results or $OUT holds of the same
# commit, and with trainings that were cut off, which lie in runs/bench while the machine is kept. $DATA is the folder of
# the data, else ../shared/data.
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} OMP_WAIT_POLICY=PASSIVE # the search's libraries may lie elsewhere
results=${OUT:-bench/results}
all=530 each=190 # seconds at most, should something hang; the sections' own budgets are shorter
status=0
shopt -s extglob
tasks='@(mnist|names|cifar10|resnet20|shakespeare|ablation)' # sections of bench.sgsc
searches='search-@(digits|mnist|resnet20)'                                     # of bench.search
strategies='strategies-@(digits|char-lm|resnet20|resnet56|stories260k|vdsr|qat)' # of bench.strategies
[ $# -gt 0 ] || set -- checks ceilings linear fake_quantize training conv2d
for section; do
  left=$((all - SECONDS))
  case $section in
    $tasks | $searches | $strategies | choices | variants | tokens) ;;
    *) [ $# -eq 1 ] || [ $left -lt $each ] || left=$each ;;
  esac
  if [ $left -lt 5 ]; then
    echo "gpu.sh: no time left for $section" >&2
    status=1
    continue
  fi
  case $section in
    checks)
      job=(bench.gpu_check)
      [ $# -gt 1 ] || job+=(--seconds $((left - 15)))
      ;;
    $tasks | $searches | $strategies)
      file=sgsc
      [[ $section != @(search|strategies)-* ]] || file=${section%%-*}
      [ -e "$results/$file.json" ] || [ ! -e "bench/results/$file.json" ] ||
        { mkdir -p "$results" && cp "bench/results/$file.json" "$results/"; }
      job=("bench.$file" "$section" --device cuda --seconds $((left - 15)) --data "${DATA:-../shared/data}")
      ;;
    *) job=(bench.gpu --only "$section") ;;
  esac
  timeout -k 5 $left python3 -m "${job[@]}" --results "$results" || status=1
done
exit $status
