#!/usr/bin/env bash
# Measures one GPU in at most nine minutes: bash benchmarks/gpu.sh [--toy] [PART ...]
#
# The parts, in the order in which they run when none is named:
#   machine   rate of matrix products, bandwidth of memory
#   rates     training steps of four presets, each beside a PyTorch DiT of the same sizes
#   remat     the same presets with the other two values of model.remat
#   training  cifar10 for four minutes, or for what time is left, and a grid of its samples
# A part that fails, or for which no time is left, says so, and the next one runs. Written to $OUT,
# runs/gpu by default: report.txt, figures.jsonl, log.txt, metrics.jsonl, loss.png, samples.png.
#
# A folder .bundle/ with wheels (whl/) and TFDS data sets (tfds/) is used where there is one, for
# machines without a network. --toy runs everything in small on a CPU, to test this script.
set -uo pipefail
cd "$(dirname "$0")/.."

preset_rows=("cifar10 none" "imagenet256_s2 none" "imagenet256_b2 none" "imagenet256_xl2 dots")
xl2_flags="--mesh.fsdp 1 --train.batch-size 64" # one GPU; so that it fits without remat, and in PyTorch
machine_flags="" step_flags="" model_flags="" sample_flags="--guidance 2"
training_flags="--train.steps 1000000" # more than there is time for
total_seconds=540 rates_until=290 training_seconds=240 sampling_seconds=45
if [[ ${1:-} == --toy ]]; then
  shift
  preset_rows=("cifar10 none" "imagenet256_xl2 dots")
  model_flags="--model.depth 2 --model.hidden-size 32 --model.num-heads 2 --train.batch-size 4"
  xl2_flags="--mesh.fsdp 1" machine_flags="--size 256" step_flags="--steps 2" sample_flags="--steps 4"
  training_flags="--train.steps 5"
fi
parts=${*:-machine rates remat training}

export OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
rm -f "$OUT"/{report.txt,figures.jsonl,log.txt,metrics.jsonl,loss.png,samples.png}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python=$PWD/.venv/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # one GPU
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export PYTHONUNBUFFERED=1

say() { echo "$@" | tee -a "$OUT/report.txt"; }

# Runs a command for at most some seconds, and never past the second `until` of this script.
limited() { # UNTIL SECONDS COMMAND ...
  local seconds=$(($1 - SECONDS)) status
  ((seconds > $2)) && seconds=$2
  shift 2
  if ((seconds < 5)); then
    say "no time left for ${*:2:4}"
    return 1
  fi
  echo "== $SECONDS s: $*" >>"$OUT/log.txt"
  timeout --kill-after=20 "$seconds" "$@" 2>>"$OUT/log.txt" | tee -a "$OUT/report.txt"
  status=${PIPESTATUS[0]}
  ((status == 0)) || say "exit status $status (124: time ran out), see log.txt: ${*:2:4}"
  return "$status"
}

use_bundle() {
  export PYTHONPATH=$scratch/site:$PYTHONPATH TFDS_DATA_DIR=$PWD/.bundle/tfds
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --target "$scratch/site" .bundle/whl/*.whl 2>>"$OUT/log.txt" || say "the bundle is incomplete"
}

time_step() { # SECONDS PRESET FLAGS ...
  local seconds=$1 flags=(--presets "$2" --rounds 1 --json "$OUT/figures.jsonl" "${@:3}")
  # shellcheck disable=SC2206
  flags+=($step_flags $model_flags)
  limited "$rates_until" "$seconds" "$python" benchmarks/train_step.py "${flags[@]}"
}

# shellcheck disable=SC2086
measure_machine() {
  limited "$total_seconds" 60 "$python" benchmarks/machine.py $machine_flags
}

# shellcheck disable=SC2086
measure_rates() {
  local preset remat flags
  for row in "${preset_rows[@]}"; do
    read -r preset remat <<<"$row"
    [[ $preset == imagenet256_xl2 ]] && flags=$xl2_flags || flags=""
    time_step 180 "$preset" $flags --model.remat "$remat" --modes compile ||
      time_step 180 "$preset" $flags --model.remat "$remat" --modes eager
  done
}

# shellcheck disable=SC2086
measure_remat() {
  local preset usual flags remat
  for row in "${preset_rows[@]}"; do
    read -r preset usual <<<"$row"
    [[ $preset == imagenet256_xl2 ]] && flags=$xl2_flags || flags=""
    for remat in none dots full; do
      [[ $remat == "$usual" ]] || time_step 90 "$preset" $flags --model.remat "$remat" --peer none
    done
  done
}

# It trains until it is stopped, which saves a checkpoint.
# shellcheck disable=SC2086
measure_training() {
  local run=$scratch/cifar10 seconds=$training_seconds
  local left=$((total_seconds - sampling_seconds - SECONDS))
  ((seconds > left)) && seconds=$left
  if ((seconds < 30)); then
    say "no time left for training"
    return
  fi
  say "cifar10, trained for at most $seconds s, its start included"
  timeout --kill-after=30 "$seconds" "$python" train.py cifar10 --workdir "$run" $model_flags \
    $training_flags --train.sample-every 0 --train.checkpoint-every 0 \
    >"$scratch/training.txt" 2>>"$OUT/log.txt"
  cat "$scratch/training.txt" >>"$OUT/log.txt"
  tail -n 2 "$scratch/training.txt" | tee -a "$OUT/report.txt"
  cp "$run"/{metrics.jsonl,loss.png} "$OUT"
  limited "$total_seconds" 90 "$python" sample.py "$run" $sample_flags --out "$OUT/samples.png"
}

[[ -d .bundle ]] && use_bundle
say "$("$python" -c 'import sys, jax; print(f"Python {sys.version.split()[0]}, jax", jax.__version__)')"
for part in $parts; do
  say "-- $part, from second $SECONDS"
  "measure_$part"
done
say "-- done in $SECONDS s; all of it is in $OUT"
