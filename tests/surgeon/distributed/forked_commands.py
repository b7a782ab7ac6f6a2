"""Commands of several ranks, forked from a process in which a first one, of one rank, has imported everything.

python -m tests.surgeon.distributed.forked_commands WORD ...    # of the first command

Then every line of standard input is a JSON list: ``[NAME, COUNT, WORD, ...]`` starts a command, whose rank r writes to
``NAME-r.out`` and ``NAME-r.err``, and prints the ids of its processes; ``[]`` waits for those and prints their codes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback

import torch.distributed as dist

from llm_surgeon.cli.app import main
from llm_surgeon.cli.signals import run_answering_signals
from tests.surgeon.distributed.runs import variables


def command(words: list[str], name: str, own: dict[str, str]) -> int:
    """A child that carries out a command as one of its ranks."""
    child = os.fork()
    if child:
        return child
    code: object = 99
    try:
        os.environ |= own
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}-{own['RANK']}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        run_answering_signals(lambda: main(words))
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if dist.is_initialized():  # as an interpreter ends: others notice, and ask the first rank's store meanwhile
            dist.destroy_process_group()
            time.sleep(0.5)
        os._exit(code if isinstance(code, int) else 99)


def serve() -> None:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
        main(sys.argv[1:])
    children: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            name, count, *words = request
            children = [command(words, name, own) for own in variables(count)]
            print(json.dumps(children), flush=True)
        else:
            ends = [os.waitpid(child, 0)[1] for child in children]
            print(json.dumps([os.waitstatus_to_exitcode(end) for end in ends]), flush=True)


if __name__ == "__main__":
    serve()
