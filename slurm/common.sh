# What the batch files share; they source it. Needs: a batch job, the folder KEYREID_HOME with slurm/ in it.
#
# Why one srun task per GPU and not torchrun: Slurm's signals reach the ranks themselves (torchrun's agents die of USR2 and
# leave their workers behind), rank r is in the same place at each start, and a failing rank ends the job in a second.

say() { printf '%s keyreid: %s\n' "$(date '+%F %T')" "$*"; }
stop() { say "$*" >&2; exit 1; }

export KEYREID_HOME PYTHONUNBUFFERED=1
: "${KEYREID_SITE:=$KEYREID_HOME/slurm/site.env}"
if [ -f "$KEYREID_SITE" ]; then . "$KEYREID_SITE"; fi
: "${KEYREID_MAX_RESTARTS:=20}" "${KEYREID_MAX_STALLS:=1}"
: "${KEYREID_SCRATCH:=${TMPDIR:-/tmp}}"

# --- Where commands run: the container if there is one, else this environment ----------------------------------------

contained=() container_options=()
case ${KEYREID_CONTAINER:+${KEYREID_CONTAINER_RUNTIME:-apptainer}} in
'')
    PATH=${KEYREID_BIN:+$KEYREID_BIN:}$PATH # the programs of the `keyreid submit` that queued this job
    command -v keyreid >/dev/null || PATH=$KEYREID_HOME/.venv/bin:$PATH
    command -v keyreid >/dev/null || stop "no keyreid in PATH nor in $KEYREID_HOME/.venv on $(hostname): see slurm/site.env.example"
    ;;
apptainer)
    contained=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} --bind "$PWD,$KEYREID_HOME${KEYREID_CONTAINER_MOUNTS:+,$KEYREID_CONTAINER_MOUNTS}" --pwd "$PWD" "$KEYREID_CONTAINER")
    ;;
pyxis)
    mounts=
    IFS=, read -ra folders <<<"$PWD,$KEYREID_HOME${KEYREID_CONTAINER_MOUNTS:+,$KEYREID_CONTAINER_MOUNTS}"
    for folder in "${folders[@]}"; do
        case $folder in *:*) mounts+=,$folder ;; *) mounts+=,$folder:$folder ;; esac
    done
    container_options=(--container-image="$KEYREID_CONTAINER" --container-mounts="${mounts#,}" --container-workdir="$PWD")
    ;;
*) stop "KEYREID_CONTAINER_RUNTIME=$KEYREID_CONTAINER_RUNTIME: apptainer or pyxis" ;;
esac

# once COMMAND...: run it one time, here.
once() {
    if [ ${#container_options[@]} -gt 0 ]; then
        srun --export=ALL --overlap --nodes=1 --ntasks=1 "${container_options[@]}" "$@"
    else
        "${contained[@]}" "$@"
    fi
}

# run_folder CONFIG [OVERRIDE...]: prints the folder of that run.
run_folder() {
    once python -c 'import sys; from keyreid.config import load_config
print(load_config(sys.argv[1], sys.argv[2:]).run_dir.absolute())' "$@" | tail -n 1
    return "${PIPESTATUS[0]}"
}

# --- Ranks -----------------------------------------------------------------------------------------------------------

ranks_a_node=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
cpus_a_rank=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / ranks_a_node))}

# escaped PATH: PATH for srun's and sbatch's file name options, where % begins a replacement.
escaped() { printf '%s' "${1//%/%%}"; }

# meeting_address: where the others find this job's first node, which is the one that this script runs on. What stays on one
# machine stays on its loopback interface; between machines it is KEYREID_INTERFACE's address, or what the node's name means.
meeting_address() {
    local address name
    if [ "$SLURM_JOB_NUM_NODES" -eq 1 ]; then
        echo 127.0.0.1
    elif [ -n "${KEYREID_INTERFACE:-}" ]; then
        address=$(ip -4 -oneline address show dev "$KEYREID_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
        [ -n "$address" ] || stop "KEYREID_INTERFACE=$KEYREID_INTERFACE: no interface of $(hostname) with an IPv4 address"
        echo "$address"
    else
        name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        address=$(getent ahostsv4 "$name" | awk '$1 !~ /^127\./ { print $1; exit }')
        echo "${address:-$name}"
    fi
}
if [ -n "${KEYREID_INTERFACE:-}" ] && [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    export GLOO_SOCKET_IFNAME="$KEYREID_INTERFACE" NCCL_SOCKET_IFNAME="=$KEYREID_INTERFACE" # NCCL: = is "no longer name"
fi

# start_ranks LOG COMMAND...: one task for every GPU of the job (CPU nodes: --ntasks-per-node), in the background as
# $step. Rank r logs to LOG-r.log.
start_ranks() {
    local log=$1 n
    shift
    [ "$cpus_a_rank" -ge 1 ] || stop "$SLURM_CPUS_ON_NODE CPUs a node for $ranks_a_node ranks: ask for" \
        "--ntasks-per-node=$ranks_a_node and --cpus-per-task too"
    # Ranks meet on the first node; the port comes from the job, so that two jobs on one node do not clash.
    MASTER_ADDR=$(meeting_address) || exit 1
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_a_rank}
    # For minutes Slurm keeps sending a lost node the messages meant for it: "end step 0 of this job", which would hit the
    # ranks of the next start. So each start's ranks are a step with a different number.
    for ((n = 0; n < ${SLURM_RESTART_COUNT:-0}; n++)); do
        srun --export=ALL --overlap --nodes=1 --ntasks=1 --quiet true || say "step $n did not run" >&2
    done
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x" \
        "$ranks_a_node ranks x $cpus_a_rank CPUs, ${SLURM_GPUS_ON_NODE:-no} GPUs a node; logs: $log-RANK.log"
    errors_begin=$(stat --dereference --format=%s "/proc/$$/fd/2")
    srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * ranks_a_node))" \
        --ntasks-per-node="$ranks_a_node" --cpus-per-task="$cpus_a_rank" --distribution=block --kill-on-bad-exit=1 \
        --open-mode=append --output="$(escaped "$log")-%t.log" "${container_options[@]}" "${contained[@]}" "$@" &
    step=$!
}

# wait_for PID: its exit status, however often a signal wakes this shell.
wait_for() {
    until wait "$1"; do
        kill -0 "$1" 2>/dev/null || break
    done
    wait "$1"
}

# first_end: how the first rank that failed ended, in srun's words: "Exited with exit code 1", "Killed" ... srun's
# own status does not tell: when a rank fails, srun ends the others, and their ends count too.
first_end() {
    tail --bytes="+$((errors_begin + 1))" "/proc/$$/fd/2" | sed -n 's/^srun: error: .*: tasks\{0,1\} [0-9,-]*: //p' | head -n 1
}

# job_state: RUNNING; COMPLETING or CANCELLED while someone else ends or requeues this job.
job_state() { scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' | tail -n 1; }

# all_nodes_answer: whether a task can be started on each node of this job. Slurm itself takes minutes (SlurmdTimeout) to
# notice that a node is lost, while the ranks on the other nodes fail at once. (KILL: at a TERM srun would have Slurm end
# this step on the lost node, later; see start_ranks.)
all_nodes_answer() {
    timeout --signal=KILL 60 srun --export=ALL --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 --quiet true 2>/dev/null
}

# log_folder: where the log of this job is.
log_folder() { dirname "$(readlink "/proc/$$/fd/1")"; }

# --- Restarts --------------------------------------------------------------------------------------------------------

newest_checkpoint() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }

# refuse_restart RESTARTS: prints why this job may not run again; prints nothing when it may.
# $starts has a line for each start of this job: the newest checkpoint then, the number of nodes, the time.
refuse_restart() {
    local stalls newest
    newest=$(newest_checkpoint)
    if [ "$1" -gt "$KEYREID_MAX_RESTARTS" ]; then
        echo "$KEYREID_MAX_RESTARTS restarts are the limit (KEYREID_MAX_RESTARTS)"
        return
    fi
    stalls=$(tac "$starts" 2>/dev/null | awk -v newest="$newest" '$1 != newest { exit } { n++ } END { print n + 0 }')
    if [ "$stalls" -gt "$KEYREID_MAX_STALLS" ]; then
        echo "no progress: the last $stalls starts left the newest checkpoint where it was ($newest);" \
            "KEYREID_MAX_STALLS=$KEYREID_MAX_STALLS"
    fi
}

note_start() { echo "$(newest_checkpoint) $SLURM_JOB_NUM_NODES $(date '+%FT%T')" >>"$starts"; }

# --- Arrays ----------------------------------------------------------------------------------------------------------

# share: "i/n", this array task's part of the work. n is the number of array tasks unless KEYREID_SHARES says
# otherwise (to run a few tasks of a larger array again). Without an array: everything.
share() {
    local task=${SLURM_ARRAY_TASK_ID:-0} shares=${KEYREID_SHARES:-${SLURM_ARRAY_TASK_COUNT:-1}}
    [ "$task" -lt "$shares" ] || stop "array task $task, but $shares shares count from 0: --array=0-$((shares - 1))," \
        "or set KEYREID_SHARES to the number of tasks of the first array"
    echo "$task/$shares"
}

# requeue_before_limit: for work that resumes where it stopped, so no time limit is too short for it.
requeue_before_limit() {
    trap '[ "${SLURM_RESTART_COUNT:-0}" -ge "$KEYREID_MAX_RESTARTS" ] || scontrol requeue "$SLURM_JOB_ID"' USR2
}
