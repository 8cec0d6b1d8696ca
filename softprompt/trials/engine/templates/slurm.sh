#!/bin/bash
#SBATCH --job-name=softprompt
#SBATCH --array=1-{{ workers }}
#SBATCH --output={{ log }}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
{% for line in options %}
#SBATCH {{ line }}
{% endfor %}
# Source: https://slurm.schedmd.com/sbatch.html and /preempt.html (24.11)

{% include "keep.sh" %}

# The worker is a step of the job: preemption sends SIGTERM to steps and not to this script, and
# Slurm requeues the job. Near the time limit it is this script that gets SIGTERM. It passes it on
# (srun would kill its tasks at once), and requeues the job when the worker has saved.
terminate() { scancel --signal=TERM "$SLURM_JOB_ID"; }

# srun does not take this over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

worker=({{ command }})
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then  # one worker of several processes
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  worker=(bash -c 'exec "$@" --distributed "$0,$SLURM_PROCID,$SLURM_NTASKS"'
    "$first:$((20000 + SLURM_JOB_ID % 10000))" "${worker[@]}")
fi

code=0
keep "{{ final | join(' ') }} 75" srun --kill-on-bad-exit=1 "${worker[@]}" || code=$?
[ -z "$stopping" ] || [[ " {{ final | join(' ') }} " == *" $code "* ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
