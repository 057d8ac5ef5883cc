"""Times zero-shot tasks on a random model of a preset's shape, contexts read once and read again for each choice:

    python benchmarks/zero_shot.py --data-dir QUESTIONS --tokenizer tokenizer.json --device cuda --out zero-shot.json

Both ways are timed from text to figures, in turn; --reading times that of tokens alone too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from statescan.bench.measure import machine_facts
from statescan.data import load_tokenizer
from statescan.evaluate import StateReader, encode_pairs, evaluate_tasks, read_questions
from statescan.evaluate.tasks import TASKS, evaluate_task, find_file
from statescan.models import CausalLM, preset
from statescan.recipes.zero_shot import SIX_TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--layers", type=int, help="of the model, where the whole takes too long")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tasks", default=",".join(SIX_TASKS), help="timed from text to figures; '' for none")
    parser.add_argument("--questions", type=int, help="of HellaSwag, for the gain of sharing (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turn; the best of each counts")
    parser.add_argument("--reading", action="store_true", help="also time the reading of tokens alone")
    parser.add_argument("--warmup", type=int, default=20, help="questions read both ways before anything is timed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = preset(options.preset, **({"n_layer": options.layers} if options.layers else {}))
    model = CausalLM(config, device=options.device, dtype=getattr(torch, options.dtype))
    tokenizer = load_tokenizer(options.tokenizer)
    found: dict[str, Any] = {
        "machine": {
            **machine_facts(),
            "device": options.device,
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "threads": torch.get_num_threads(),
        },
        "model": {"preset": options.preset, "n_layer": config.n_layer, "dtype": options.dtype, "weights": "random"},
    }

    def keep() -> None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    # The first calls compile kernels and warm caches, both ways.
    for share in (True, False):
        evaluate_tasks(
            StateReader(model, share=share), tokenizer, ["hellaswag"], options.data_dir, limit=options.warmup
        )

    questions = read_questions(find_file(TASKS["hellaswag"], options.data_dir))[: options.questions]
    begun = time.perf_counter()
    requests = encode_pairs(tokenizer, [pair for one in questions for pair in one.pairs], tokenizer.end_of_text)
    encoding = time.perf_counter() - begun
    sides: dict[str, Any] = {}
    for number in range(options.rounds):
        for name, share in (("contexts read once", True), ("contexts read again", False)):
            reader = StateReader(model, share=share)
            begun = time.perf_counter()
            result = evaluate_task(reader, tokenizer, TASKS["hellaswag"], questions)
            seconds = time.perf_counter() - begun
            side = sides.setdefault(name, {"seconds": [], "reading_seconds": [], "tokens": reader.tokens_read})
            side["seconds"].append(seconds)
            side["acc_norm"] = result.headline.value
            print(f"hellaswag, {len(questions)} questions, round {number + 1}, {name}: {seconds:.2f} s", flush=True)
            if options.reading:
                begun = time.perf_counter()
                reader.score(requests)
                side["reading_seconds"].append(time.perf_counter() - begun)
                print(f"  of tokens alone {side['reading_seconds'][-1]:.2f} s", flush=True)
        once, again = sides["contexts read once"], sides["contexts read again"]
        found["hellaswag"] = {
            "questions": len(questions),
            "encoding_seconds": encoding,
            **sides,
            "gain": min(again["seconds"]) / min(once["seconds"]),
            "gain_of_reading": (
                min(again["reading_seconds"]) / min(once["reading_seconds"]) if options.reading else None
            ),
            "token_ratio": again["tokens"] / once["tokens"],
        }
        keep()
    gains = found["hellaswag"]
    print(
        f"gain {gains['gain']:.2f}, of tokens {gains['token_ratio']:.2f}, of reading alone {gains['gain_of_reading']}; "
        f"encoding {encoding:.2f} s",
        flush=True,
    )

    if options.tasks:
        reader = StateReader(model)
        begun = time.perf_counter()
        results = evaluate_tasks(reader, tokenizer, options.tasks.split(","), options.data_dir)
        seconds = time.perf_counter() - begun
        found["tasks"] = {
            "names": options.tasks.split(","),
            "questions": sum(result.questions for result in results),
            "tokens_read": reader.tokens_read,
            "seconds": seconds,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else None,
        }
        print(f"{options.tasks}: {found['tasks']['questions']:,} questions in {seconds:.1f} s", flush=True)
        keep()


if __name__ == "__main__":
    main()
