r"""math-verify in a process of its own: it reads two answers a line and writes true or false.

    $ echo '["\\frac{14}{2}", "7"]' | python tasks/judge.py
    ready
    true

A formula such as 9^{9^{9^9}} keeps math-verify busy for longer than anybody waits. Python cannot
interrupt code in C, so the whole process ends when its time is up, and whoever asked reads the end
of the file. It also ends when its stdin is closed: it outlives nobody.
"""

import faulthandler
import json
import sys

from math_verify import parse, verify

SECONDS = 10


def is_equal(prediction, truth):
    try:
        prediction = parse(f"\\boxed{{{prediction}}}", parsing_timeout=None)
        truth = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
        return bool(verify(truth, prediction, timeout_seconds=None))
    except Exception:  # of many types: not known to be right
        return False


answers = sys.stdout
sys.stdout = sys.stderr  # whatever a library prints is no verdict
print("ready", file=answers, flush=True)  # imports are not thinking time
for line in sys.stdin:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a thread in C, which waits for no lock
    verdict = is_equal(*json.loads(line))
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(verdict), file=answers, flush=True)
