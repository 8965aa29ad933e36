#!/usr/bin/env python3
"""A step of training here and in what one would take instead: the same model, tokens, batch and precision, step by step in turns, in one run.

  bench/peers/run.py [--model 110m] [--seq 1024] [--batch 2] [--dtype f32] [--rounds 5] [--recompute none] [--groups process,fsdp,tp,portable] [--json FILE]

  gpu      build/cuda/gpu_train in FAST mode beside PyTorch eager and torch.compile, on one GPU; batch = tokens / seq; memory is the device's
  process  1 rank x 2 threads beside PyTorch eager and torch.compile on 2 threads     portable  beside our own portable kernels
  fsdp     dp-shard 2 beside FSDP2 over gloo, 2 processes of 1 thread     tp   tp 2 beside DTensor over gloo, 2 processes of 1 thread

PYTHON is the interpreter that has PyTorch (default: this one). A peer that is not there, or fails, is skipped by name; exit code 1 where ours fails, or nothing could be compared. Ratios are of neighbours:
median over the rounds of (a peer's seconds / the mean of ours before and after). Memory is the most that the processes of one side were resident with
at once (VmHWM, added up), their libraries included; ours without the libraries that are not there."""
import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
CORES = len(os.sched_getaffinity(0))


def children(pid):
    found = [pid]
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            for child in f.read().split():
                found += children(int(child))
    except OSError:
        pass
    return found


def seconds_of(word):
    value = float(word)
    if not 0 < value < math.inf:
        raise ValueError(word)
    return value


class Side:
    """One program that makes steps on request."""

    def __init__(self, name, command, env=None):
        self.name, self.seconds, self.loss, self.failed, self.device_memory = name, [], [], None, None
        self.errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would be full some day
        env = {name: value for name, value in dict(os.environ, **(env or {})).items() if name != "BENCH_JSON"}  # the results are ours to write
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=HERE, env=env)
        self.ready = False

    def answer(self, words):
        """What the words of an answer say; ValueError or IndexError: they are none."""
        seconds, loss = seconds_of(words[0]), float(words[2])
        if len(words) > 4:
            self.device_memory = int(words[4])
        self.loss.append(loss)
        return seconds

    def read(self):
        line = self.process.stdout.readline()
        try:
            return self.answer(line.replace("ready ", "", 1).split())
        except (ValueError, IndexError):
            self.end(killed=bool(line))
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            self.failed = f'answered "{line.strip()}"' if line.strip() else said[-1] if said else "ended without a word"
            return None

    def wait_ready(self):
        self.ready = self.read() is not None
        return self.ready

    def step(self):
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except OSError:  # it has ended: its last words say why
            pass
        seconds = self.read()
        if seconds is not None:
            self.seconds.append(seconds)
        return seconds

    def memory(self):
        if self.device_memory is not None:
            return self.device_memory
        total = 0
        for pid in children(self.process.pid):
            with open(f"/proc/{pid}/status") as f:
                total += sum(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
        return total

    def end(self, killed=False):
        """It ends by itself where its input does."""
        if killed:
            self.process.kill()
        try:
            self.process.stdin.close()
        except OSError:  # a word that it never read
            pass
        self.process.wait()


def ours(options, layout, level=None):
    command = [os.path.join(ROOT, "build/bench/train_step"), "--model", options.model, "--seq", str(options.seq), "--dtype", options.dtype, "--layout", layout, "--batch", str(options.batch), "--recompute", options.recompute, "--serve"]
    return Side(f"llmpar {layout}{' ' + level if level else ''}{' recompute ' + options.recompute if options.recompute != 'none' else ''}", command + (["--level", level] if level else []))


def torch(options, script, mode, *rest):
    dtype = "autocast" if options.dtype == "bf16" and script == "train_torch.py" else options.dtype
    return Side(f"PyTorch {mode}", [os.environ.get("PYTHON", sys.executable), script, mode, options.model, str(options.seq), str(options.batch), dtype, *rest], {"OMP_NUM_THREADS": rest[0] if script == "train_torch.py" else "1"})


def gpu(options):
    """On the card: our own attention, and the vendor's where it was built in."""
    command = [os.path.join(ROOT, options.gpu_program), "--model", options.model, "--seq", str(options.seq), "--tokens", str(options.tokens), "--dtype", options.dtype, "--mode", "fast", "--serve"] + (["--cudnn"] if options.cudnn else [])
    python = os.environ.get("PYTHON", sys.executable)
    bar = 1.0 if options.seq <= 2048 or options.cudnn else 0.85
    return Side("llmpar" + (" with cuDNN" if options.cudnn else ""), command), [(Side(f"PyTorch {mode}", [python, "gpu_train_torch.py", options.model, str(options.seq), str(options.tokens), mode]), bar, 1.0) for mode in options.modes.split(",")]


def group(options, which):
    """Ours, and the others with the bar of their time and of our memory beside theirs."""
    if which == "gpu":
        return gpu(options)
    two = str(min(2, CORES))
    if which == "process":
        return ours(options, "1x1t" + two), [(torch(options, "train_torch.py", mode, two), 1.2, 0.6) for mode in ("eager", "compile")]
    if which == "portable":
        return ours(options, "1x1t" + two), [(ours(options, "1x1t" + two, "portable"), None, None)]
    return ours(options, {"fsdp": "dp2", "tp": "tp2"}[which]), [(torch(options, "train_torch_sharded.py", which, "2"), 2.0, 0.6)]


def have_torch():
    return subprocess.run([os.environ.get("PYTHON", sys.executable), "-c", "import torch"], capture_output=True).returncode == 0


def take_turns(us, others, rounds, ratio):
    """By name of the others: ratio(theirs, ours before, ours after) of each round. Who fails in one is no longer ready; where nobody is, ours goes on alone."""
    ratios = {side.name: [] for side in others if side.ready}
    before = us.step() if us.ready else None
    for _ in range(rounds if before else 0):
        theirs = [(side, side.step()) for side in others if side.ready]
        after = us.step()
        if after is None:
            break
        for side, seconds in theirs:
            if seconds is None:
                side.ready = False
            else:
                ratios[side.name].append(ratio(seconds, before, after))
        before = after
    return ratios


def quartiles(values):
    values = sorted(values)
    return values[len(values) // 4], values[len(values) - 1 - len(values) // 4]


def run(options, which, rows):
    head = f"{options.model} {options.dtype} T {options.seq} B {options.tokens // options.seq if which == 'gpu' else options.batch}"
    us, others = group(options, which)
    sides = [us] + [side for side, _, _ in others]
    for side in sides:
        if not side.wait_ready():
            print(f"  {side.name}: skipped: {side.failed}", flush=True)
    alive = [o for o in others if o[0].ready]
    if us.ready and alive:
        ratios = take_turns(us, [side for side, _, _ in alive], options.rounds, lambda theirs, before, after: 2 * theirs / (before + after))
        if us.failed:
            print(f"  {us.name}: failed in a step: {us.failed}", flush=True)
            alive = []
        else:
            our_memory = us.memory()
        for side, bar, memory_bar in alive:
            if not side.ready:
                print(f"  {side.name}: failed in a step: {side.failed}", flush=True)
                continue
            ratio, (bad, good), seconds, mine = statistics.median(ratios[side.name]), quartiles(ratios[side.name]), statistics.median(side.seconds), statistics.median(us.seconds)
            row = {"name": f"{head}: step of {side.name}, of {us.name}", "value": seconds, "unit": "s", "bound": mine, "of": us.name, "ratio": round(ratio, 4), "quartiles": [round(bad, 4), round(good, 4)]}
            if bar:
                row.update(bar=f">= {bar}", met=ratio >= bar)
            rows.append(row)
            print(f"  {row['name']:<60} {seconds:8.3f} s of {mine:8.3f} s  {ratio:5.2f} x ({bad:.2f} .. {good:.2f})" + (f"   bar >= {bar}: {'met' if ratio >= bar else 'NOT met'}" if bar else ""), flush=True)
            theirs = side.memory() if memory_bar else 0
            if not theirs:  # on a device that does not say
                continue
            row = {"name": f"{head}: memory of {us.name}, of {side.name}", "value": our_memory / 1e6, "unit": "MB", "bound": theirs / 1e6, "of": side.name, "ratio": round(our_memory / theirs, 4), "bar": f"<= {memory_bar}", "met": our_memory <= memory_bar * theirs}
            rows.append(row)
            print(f"  {row['name']:<60} {our_memory / 1e6:8.0f} MB of {theirs / 1e6:8.0f} MB {our_memory / theirs:4.2f} x   bar <= {memory_bar}: {'met' if row['met'] else 'NOT met'}", flush=True)
            print(f"    losses: {side.name} {' '.join(f'{x:.3f}' for x in side.loss[:4])} .., {us.name} {' '.join(f'{x:.3f}' for x in us.loss[:4])} ..", flush=True)
    for side in sides:
        side.end()
    return us.failed


def first_line(command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip().split("\n")[0]


def write_json(path, rows, **about):
    """The file of results: who ran what where, then the rows."""
    with open("/proc/cpuinfo") as f:
        processor = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "?")
    with open(path, "w") as f:
        head = {"part": "peers", "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "processor": processor, "cores": CORES, **about,
                "commit": first_line(["git", "describe", "--always", "--dirty", "--abbrev=12"]), "command": " ".join(sys.argv)}
        f.write(json.dumps(head, indent=0)[:-2] + ',\n"rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n]\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "15m", "110m", "300m", "1b"), default="110m")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", default="none", metavar="none|selective|full[,N]", help="of our blocks in backward, as torch.compile decides it for itself")
    parser.add_argument("--groups", default="process,fsdp,tp,portable")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step (gpu)")
    parser.add_argument("--modes", default="compile", help="of PyTorch (gpu): eager,compile")
    parser.add_argument("--cudnn", action="store_true", help="cuDNN's attention (gpu)")
    parser.add_argument("--gpu-program", default="build/cuda/gpu_train")
    parser.add_argument("--json", default=os.environ.get("BENCH_JSON"))
    options = parser.parse_args()
    for which in options.groups.split(","):
        program = options.gpu_program if which == "gpu" else "build/bench/train_step"
        if not os.path.exists(os.path.join(ROOT, program)):
            sys.exit(f"bench/peers/run.py: {program} is missing: make {program}")
    rows, failed = [], False
    version = "none"
    if have_torch():
        version = first_line([os.environ.get("PYTHON", sys.executable), "-c", "import torch; print(torch.__version__)"])
    print(f"PyTorch {version}", flush=True)
    for which in options.groups.split(","):
        if which not in ("gpu", "process", "fsdp", "tp", "portable"):
            sys.exit(f"bench/peers/run.py: --groups: expected gpu, process, fsdp, tp, portable, got {which}")
        failed = run(options, which, rows) is not None or failed
    if options.json:
        write_json(options.json, rows, pytorch=version)
    sys.exit(failed or not rows)


if __name__ == "__main__":
    main()
