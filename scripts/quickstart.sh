#!/usr/bin/env bash
# From a bare machine to a trained, killed, resumed and evaluated ResNet-152, in a few minutes and without a GPU.
# Usage: scripts/quickstart.sh [FOLDER]        (default: runs/quickstart; a second call continues what is there)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
pipeline_env ""

folder=${1:-runs/quickstart}
data=$folder/data
run=$folder/run
log=$folder/train.log
mkdir -p "$folder"
threads=${OMP_NUM_THREADS:-}
export OMP_NUM_THREADS=${threads:-1} # for torchrun, which would set it so and warn; each rank takes its share of the cores

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
while ((32 % processes)); do processes=$((processes - 1)); done # they share batches of 32 images

python -m pipeline synth "$data" --classes 4 --train-per-class 64 --val-per-class 16 --size 128

# As an operator would start it; the same command again continues the run.
train=(torchrun --nproc-per-node="$processes" --rdzv-backend=c10d --rdzv-endpoint=localhost:0 --local-addr=127.0.0.1
    -m pipeline train --config smoke --data.root "$data" --run_dir "$run" --tracking.print_every_s 5)

steps_done() { grep -c '"kind": "train"' "$run/metrics.jsonl" 2>/dev/null || true; }

if [ ! -e "$run/finished" ]; then
    echo
    echo "== training ResNet-152 on $processes processes: ${train[*]}"
    "${train[@]}" >"$log" 2>&1 &
    job=$!
    tail -n +1 --pid="$job" -f "$log" 2>/dev/null &
    until [ "$(steps_done)" -ge 14 ] 2>/dev/null || ! kill -0 "$job" 2>/dev/null; do sleep 0.2; done
    if kill -0 "$job" 2>/dev/null; then
        echo "== kill -9 after step $(steps_done); now the same command again"
        kill -9 "$job"
    fi
    wait "$job" 2>/dev/null || true
    wait
fi
"${train[@]}"

echo
echo "== is every batch, before and after the kill, the one that recipe, seed and index say?"
[ -n "$threads" ] || unset OMP_NUM_THREADS
python -m pipeline audit "$run"
echo
echo "== the best checkpoint on the whole validation set"
python -m pipeline evaluate "$run"
python - "$run/metrics.jsonl" <<'PYTHON'
import json, statistics, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
train = [row for row in rows if row["kind"] == "train"]
evals = [row for row in rows if row["kind"] == "eval"]
starts = [row for row in rows if row["kind"] == "event" and row["event"] in ("started", "resumed")]
print(f"""
  steps         {len(train)}, each once: {[row['step'] for row in train] == list(range(1, len(train) + 1))}
  starts        {len(starts)}, from steps {', '.join(str(row['step']) for row in starts)}
  loss          {train[0]['loss']:.3f} -> {train[-1]['loss']:.3f}
  top-1         {evals[-1]['val_top1']:.1f} % (chance: 25 %)
  training      {statistics.median(row['images_per_s'] for row in train):.0f} images/s""")
PYTHON
cat <<END
  run folder    $run

Now with real ImageNet:
  scripts/fetch_imagenet.sh /data/imagenet
  . $PIPELINE_VENV/bin/activate
  torchrun --nproc-per-node=8 -m pipeline train --config resnet152 --data.root /data/imagenet --run_dir runs/resnet152
or on a Slurm cluster:
  DATA_ROOT=/data/imagenet sbatch slurm/resnet152.sh
END
