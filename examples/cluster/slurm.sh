#!/bin/bash
# examples/cifar10/train.py on two nodes of four GPUs under SLURM, preempted and restarted.
#
#   sbatch examples/cluster/slurm.sh                    from the root of a clone that all nodes see
#   RUN=mine DATA=/shared/cifar10 sbatch examples/cluster/slurm.sh
#   sbatch --nodes 4 examples/cluster/slurm.sh --epochs 60 --batch 2048     options of train.py
#
#SBATCH --job-name=jaxbn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# One task a GPU: JAX gives the task with SLURM_LOCALID 2 its node's GPU 2. So all GPUs of a node must
# be seen by all its tasks, which --gpus-per-task would prevent.
# --signal: 120 s before the end of --time each task gets the SIGTERM that a preemption sends too.

RUNS=${RUNS:-runs} RUN=${RUN:-slurm} DATA=${DATA:-/shared/cifar10} RESTARTS=${RESTARTS:-20}

more=()
[ -e "$RUNS/$RUN/config.json" ] && more=(--resume)
# The default of some clusters ends all tasks with the first; these end by themselves, and say why.
srun --kill-on-bad-exit=0 python examples/cifar10/train.py --cluster --timeout 300 \
    --data cifar10 --data-dir "$DATA" --runs "$RUNS" --name "$RUN" "${more[@]}" "$@"
status=$?

case $status in
0 | 1 | 2) exit $status ;; # done, or a fault that another start would repeat
esac
# 143: stopped by SIGTERM, the step saved; 75: another process was lost; 137: this one was killed.
if [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "slurm.sh: error: restarted $RESTARTS times, stopped; RESTARTS=N allows more" >&2
fi
exit $status
