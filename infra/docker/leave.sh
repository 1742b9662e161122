#!/usr/bin/env bash
# leave.sh SECONDS: what a node runs before it goes, as on a spot node's notice. Tells Ray, whereupon no new work comes and a
# training writes a checkpoint, and returns when this node's Ray has ended, or after SECONDS.
set -uo pipefail
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "this node goes" --deadline-remaining-seconds "$1"
for ((waited = 0; waited < $1; waited++)); do
    DARKROOM_HEALTH=${RAYLET_HEALTH:-http://127.0.0.1:52365/api/local_raylet_healthz} \
        python "$(dirname "$0")/healthy.py" 2> /dev/null || exit 0
    sleep 1
done
