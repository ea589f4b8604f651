#!/usr/bin/env bash
# From a video and its tracks to a ranked picture: who is this, and where else was he seen?
#
#     examples/own_video.sh OUT SOURCE [WEIGHTS [TRACKS [CAMERA]]]
#
# SOURCE is a video or a folder of its pictures with TRACKS, or MOTChallenge sequences, which bring theirs. WEIGHTS is
# whatever `keyreid embed` takes; without it, or as `random`, a small network with random weights shows that the road
# works. Keypoints are found where OpenPifPaf is installed and CHECKPOINT names its checkpoint; otherwise the local
# branch is not guided.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1 source=$2 weights=${3:-random} tracks=${4:-} camera=${5:-}
run() { echo "\$ $*"; "$@"; }
mkdir -p "$out"

# Tracks of people, two pictures a tracklet: so that neighbours in time are there to be found.
run keyreid import video "$source" --out "$out/people" ${tracks:+--tracks "$tracks"} ${camera:+--camera "$camera"} \
    --identity track --max-frames "${MAX_FRAMES:-2}"

if [ -n "${CHECKPOINT:-}" ]; then
    run keyreid pose folder "$out/people" --out "$out/people/keypoints" --checkpoint "$CHECKPOINT" --trust
fi
run keyreid shard folder "$out/people" --out "$out/shards"

if [ "$weights" = random ]; then
    weights=$out/random.safetensors
    python - "$weights" <<'END'
import sys
from pathlib import Path

import torch

from keyreid.config import ClipConfig, ModelConfig
from keyreid.model import build_model
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights

torch.manual_seed(0)
model = ModelConfig(backbone="vit_tiny_patch16_224", depth=4)
clip = ClipConfig(frames=2, height=128, width=64)
network = build_model(model, clip, num_identities=2, num_cameras=1)
write_weights(Path(sys.argv[1]), network.state_dict(), WeightsHeader(model, clip, [1, 2], [1], {"run": "random"}))
END
fi

run keyreid embed "$weights" "$out/shards" --out "$out/vectors.parquet"
# Every tracklet asks all the others.
run keyreid search "$out/vectors.parquet" --query "$out/vectors.parquet" --top 8 \
    --json "$out/found.json" --picture "$out/found.png" | tail -n 2
