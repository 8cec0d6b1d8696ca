"""A worker of nothing: counts in a file, saves on SIGTERM, and goes on from what it saved.

`python counting_worker.py FOLDER COUNT SECONDS`: counts to COUNT, SECONDS each. Exit code 0 when it
has counted, 75 after SIGTERM. FOLDER/count has the number, FOLDER/log a line for every start,
number and end.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    folder, last, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    count = int((folder / "count").read_text()) if (folder / "count").exists() else 0
    say(folder, f"start {os.getpid()} at {count}")
    while count < last and not stopped:
        time.sleep(seconds)
        count += 1
        say(folder, f"count {count}")
    (folder / "count").write_text(str(count))
    say(folder, "done" if count == last else "saved")
    return 0 if count == last else 75


def say(folder: Path, line: str) -> None:
    with (folder / "log").open("a") as log:
        log.write(f"{line}\n")


if __name__ == "__main__":
    raise SystemExit(main())
