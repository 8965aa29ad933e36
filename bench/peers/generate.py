#!/usr/bin/env python3
"""Texts here and from llama.cpp: the same shape, prompt, number of tokens, threads and precision, text by text in turns, in one run.

  bench/peers/generate.py [--model 110m] [--dtype f32] [--threads 1,2] [--prompt 256] [--tokens 64] [--rounds 7] [--json FILE]

PYTHON is the interpreter that has llama-cpp-python and gguf (default: this one); where it has not, the peer is skipped by name. Ratios are of neighbours: median over the rounds of (the peer's seconds / the mean of ours before
and after); above 1 ours is faster. "a text" is prompt and tokens together: ours turns the weights into streams in between, and back."""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


class Side:
    def __init__(self, name, command):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
        self.ready = self.process.stdout.readline().strip()
        if not self.ready.startswith("ready"):
            self.failed = (self.process.stderr.read().strip().splitlines() or ["ended without a word"])[-1]
            self.ready = ""

    def text(self):
        self.process.stdin.write("text\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline().split()
        if len(line) != 3:
            raise SystemExit(f"{self.name} ended: {self.process.stderr.read().strip()}")
        return [float(x) for x in line]

    def end(self):
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait()


def run(options, threads, rows):
    rest = [options.model, options.dtype, str(threads), str(options.prompt), str(options.tokens)]
    us = Side("llmpar", [os.path.join(ROOT, "build/bench/text")] + rest)
    if not us.ready:
        raise SystemExit(f"build/bench/text: {us.failed}")
    peer = Side("llama.cpp", [os.environ.get("PYTHON", sys.executable), "text_llama_cpp.py"] + rest)
    head = f"{options.model} {options.dtype}, {threads} thread{'s' if threads > 1 else ''}"
    if not peer.ready:
        print(f"  llama.cpp: skipped: {peer.failed}", flush=True)
        us.end()
        return 0
    us.text()
    ours, theirs = [us.text()], []
    for _ in range(options.rounds):
        theirs.append(peer.text())
        ours.append(us.text())
    us.end()
    peer.end()
    for i, (what, count) in enumerate((("prompt", options.prompt), ("tokens", options.tokens - 1), ("text", 1))):
        ratios = sorted(theirs[r][i] / ((ours[r][i] + ours[r + 1][i]) / 2) for r in range(options.rounds))
        mine, other = statistics.median(x[i] for x in ours), statistics.median(x[i] for x in theirs)
        low, high = ratios[len(ratios) // 4], ratios[len(ratios) - 1 - len(ratios) // 4]
        ratio = statistics.median(ratios)
        unit = "s" if what == "text" else "tokens/s"
        value, bound = (other, mine) if what == "text" else (count / mine, count / other)
        rows.append({"name": f"{head}: {what} of llama.cpp, of llmpar", "value": round(value, 4), "unit": unit, "bound": round(bound, 4), "of": peer.ready.replace("ready ", "llama.cpp: "), "ratio": round(ratio, 4), "quartiles": [round(low, 4), round(high, 4)]})
        shown = f"{other:9.3f} s of {mine:9.3f} s" if what == "text" else f"{count / mine:9.1f} of {count / other:9.1f} tokens/s"
        print(f"  {head}: {what + ' of ' + str(options.prompt) if what == 'prompt' else what:<14} {shown}   {ratio:5.2f} x ({low:.2f} .. {high:.2f})   {peer.ready.replace('ready ', '')}", flush=True)
    return 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("15m", "110m", "300m", "1b"), default="110m")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default=os.environ.get("BENCH_JSON"))
    options = parser.parse_args()
    if subprocess.run(["make", "-s", "build/bench/text"], cwd=ROOT).returncode:
        return 1
    rows, compared = [], 0
    for threads in options.threads.split(","):
        compared += run(options, int(threads), rows)
    if options.json:
        version = subprocess.run([os.environ.get("PYTHON", sys.executable), "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True).stdout.strip()
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        with open("/proc/cpuinfo") as f:
            processor = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "")
        head = {"part": "peers", "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "processor": processor, "cores": len(os.sched_getaffinity(0)), "llama-cpp-python": version, "commit": commit, "command": " ".join(["bench/peers/generate.py"] + sys.argv[1:])}
        with open(options.json, "w") as f:
            f.write(json.dumps(head, indent=0)[:-2] + ',\n"rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n]\n}\n")
    return 0 if compared else 1


if __name__ == "__main__":
    sys.exit(main())
