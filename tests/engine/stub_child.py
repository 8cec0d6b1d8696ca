"""A worker's child whose trials only sleep, step by step. It imports no JAX.

A trial's config says what it does: {"steps": n, "seconds": of a step, "then": "done", "error",
"mistake", "kill" (after each checkpoint, itself) or "die" (before the first)}. It goes on after the
newest checkpoint in its folder. Arguments: a file to which each trial's end is appended, and the
connection. A file "unable" beside it says how many children find no device, and why.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from softprompt import interrupts
from softprompt.trials.engine.child import serve
from softprompt.trials.engine.link import parent
from softprompt.trials.engine.publish import WHOLE, newest_step


def run_one(link, job, ends):
    """Runs a trial; its checkpoints are empty folders, and its log has a line for each step."""
    folder, config = Path(job["folder"]), job["config"]
    step = newest_step(folder)
    folder.mkdir(parents=True, exist_ok=True)
    while step < config["steps"] and not job["fail"]:
        if config["then"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(config["seconds"])
        step += 1
        (folder / "checkpoints" / f"{step}.tmp").mkdir(parents=True)
        (folder / "checkpoints" / f"{step}.tmp" / "state").write_text(str(step))
        (folder / "checkpoints" / f"{step}.tmp" / WHOLE).write_text("")
        (folder / "checkpoints" / f"{step}.tmp").rename(folder / "checkpoints" / str(step))
        with (folder / "metrics.jsonl").open("a") as log:
            log.write(f'{{"step": {step}}}\n')
        link.send("stage", trial="", text=f"step {step}")
        if config["then"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if interrupts.requested():
            raise SystemExit(75)
    done = config["then"] in ("done", "kill") and not job["fail"]
    error = "" if done else job["fail"] or config["then"]
    row = {"trial": job["trial"], "status": "done" if done else "failed", "error": error}
    (folder / "result.json").write_text(json.dumps(row))
    with ends.open("a") as file:
        file.write(f"{job['trial']} {os.getppid()}\n")
    final = done or bool(job["fail"]) or config["then"] == "mistake"
    link.send("ended", trial=job["trial"], done=done, error=error, final=final)


def unable(file):
    """Why this child opens no device, while there are such; else None."""
    found = json.loads(file.read_text()) if file.exists() else {"times": 0}
    file.write_text(json.dumps(found | {"times": found["times"] - 1}))
    return found["reason"] if found["times"] > 0 else None


def main():
    link, ends = parent(), Path(sys.argv[1])
    if reason := unable(ends.with_name("unable")):
        link.send("unable", **reason)
        return 1
    facts = {"backend": "cpu", "dtype": "", "devices": "1 x stub", "chips": 1, "width": 2}
    link.send("ready", **facts, programs="stub")

    def run(jobs):
        with interrupts.deferred_signals():
            for job in jobs:
                run_one(link, job, ends)
        return True

    return serve(link, run, link.receive)


if __name__ == "__main__":
    sys.exit(main())
