"""A process that trains, for the tests that need one of its own: python child.py OUT CONFIG.json [options]."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from statescan.train import Callback, RunConfig, checkpoint, train


class Signal(Callback):
    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_log(self, row):
        if row["step"] == self.step:
            os.kill(os.getpid(), self.number)


def hang(where):
    print(f"hanging in {where}", flush=True)
    time.sleep(600)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--signal", type=int, nargs=2, metavar=("NUMBER", "STEP"))
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--hang", nargs=2, metavar=("WHERE", "STEP"))
    options = parser.parse_args()
    if options.double:
        torch.set_default_dtype(torch.float64)
    if options.hang:
        where, step = options.hang
        step = f"step-{int(step):08d}"
        write, commit = checkpoint._write, checkpoint._commit
        if where == "write":

            def write_or_hang(path, content):
                if step in str(path) and path.name == "trainer.json":
                    path.write_text('{"cut')
                    hang(where)
                write(path, content)

            checkpoint._write = write_or_hang
        else:

            def commit_or_hang(temporary, path):
                if path.name == step:
                    hang(where)
                commit(temporary, path)

            checkpoint._commit = commit_or_hang
    callbacks = [Signal(signal.Signals(options.signal[0]), options.signal[1])] if options.signal else []
    result = train(
        RunConfig.from_json(options.config), options.out, resume=options.resume, progress=False, callbacks=callbacks
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(json.dumps({"steps": result.steps, "interrupted": result.interrupted, "loss": result.train_loss}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
