#!/usr/bin/env python3
"""A reply generated here and in what one would take instead: the same shape, random weights, prompt, tokens, precision and threads, greedy, reply by reply in turns, in one run.

  bench/peers/generate.py [--models 110m,1.1b|tiny] [--dtypes f32,bf16] [--threads 1,2] [--prompt 256] [--tokens 64] [--rounds 5] [--peers llama.cpp,transformers] [--json FILE]

  llama.cpp     through llama-cpp-python, built for this processor; weights F32 or BF16 in a GGUF file of random numbers (package gguf) under --directory; its cache as
                by default (f16) and in the precision of the weights; flash attention on or off, whichever is faster here
  transformers  LlamaForCausalLM on PyTorch

PYTHON is the interpreter that has them (default: this one). A peer that is not there, or fails, is skipped by name; where nobody is left, ours is read alone. Exit code 1 where ours fails, or nothing could be compared. Rates: prompt tokens a second to
the first token, tokens a second behind it (median of a reply), and those of the whole reply, prompt and all. Ratios, ours of theirs, are of neighbours: median over the rounds of (a peer's seconds / the mean of
ours before and after)."""
import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

# vocabulary, hidden, intermediate, layers, heads, kv heads, head dim, tied: as in bench/bench_generate.c
SHAPES = {"tiny": (256, 128, 384, 4, 8, 4, 16, 0), "110m": (32000, 768, 2048, 12, 12, 12, 64, 1), "1.1b": (32000, 2048, 5632, 22, 32, 4, 64, 0)}
MEASURES = ("prompt tokens", "tokens", "reply")
DTYPES, PEERS = ("f32", "bf16"), ("llama.cpp", "transformers")


# ---- a peer's own process ----

def reply(begin, follow, prompt, tokens, vocab):
    """One reply: seconds to its first token, of a token behind it (median), of all. follow(ids) takes the ids into the cache and says which is next."""
    start = time.monotonic()
    begin()
    at, ids = [], [i * 2654435761 % 2**32 % vocab for i in range(prompt)]
    for _ in range(tokens):
        ids = [follow(ids)]
        at.append(time.monotonic())
    return at[0] - start, statistics.median(b - a for a, b in zip(at, at[1:])), at[-1] - start


def serve(begin, follow, prompt, tokens, vocab, about=""):
    """Each line "step" on stdin is a reply; the first one, "ready", is not counted."""
    print("ready", *(f"{s:.6f}" for s in reply(begin, follow, prompt, tokens, vocab)), about, flush=True)
    while sys.stdin.readline().startswith("step"):
        print(*(f"{s:.6f}" for s in reply(begin, follow, prompt, tokens, vocab)), flush=True)


def write_gguf(path, model, dtype):
    """Random weights of this shape; every block has the same ones, each in its own place."""
    import gguf
    import numpy as np
    vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, tied = SHAPES[model]
    kind = gguf.GGMLQuantizationType.BF16 if dtype == "bf16" else gguf.GGMLQuantizationType.F32
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bf16" else gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(vocab)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")

    def weight(rows, columns):
        return gguf.quants.quantize(0.02 * random.standard_normal((rows, columns), dtype=np.float32), kind)

    def add(name, data):
        writer.add_tensor(name + ".weight", data, raw_dtype=kind if data.ndim > 1 else gguf.GGMLQuantizationType.F32)

    ones = np.ones(hidden, dtype=np.float32)
    block = {"attn_norm": ones, "attn_q": weight(heads * head_dim, hidden), "attn_k": weight(kv_heads * head_dim, hidden), "attn_v": weight(kv_heads * head_dim, hidden), "attn_output": weight(hidden, heads * head_dim),
             "ffn_norm": ones, "ffn_gate": weight(intermediate, hidden), "ffn_up": weight(intermediate, hidden), "ffn_down": weight(hidden, intermediate)}
    add("token_embd", weight(vocab, hidden))
    for layer in range(layers):
        for name, data in block.items():
            add(f"blk.{layer}.{name}", data)
    add("output_norm", ones)
    if not tied:
        add("output", weight(vocab, hidden))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- turns ----

def side_class():
    from run import Side, seconds_of

    class Reply(Side):
        """One program that makes replies on request: `seconds` holds the three of each."""

        def answer(self, words):
            first, token, whole = (seconds_of(words[i]) for i in range(3))
            if len(words) > 3:
                self.name += " (" + " ".join(words[3:]) + ")"
            return first, token, whole

    return Reply


def run(options, python, file, model, dtype, threads, rows):
    from run import ROOT, quartiles, take_turns
    Side = side_class()
    rest = [str(options.prompt), str(options.tokens), str(threads)]
    us = Side("llmpar", [os.path.join(ROOT, "build/bench/bench_generate"), "tokens", "--model", model, "--dtype", dtype, "--layout", f"1x1t{threads}", "--prompt", rest[0], "--tokens", rest[1], "--serve"])
    others = [Side(f"llama.cpp, cache {kv}", [python, "generate_llama_cpp.py", file, kv, *rest]) for kv in ("f16", dtype) if file]
    if "transformers" in options.peers:
        others.append(Side("transformers", [python, "generate_transformers.py", model, dtype, *rest], {"OMP_NUM_THREADS": str(threads)}))
    for side in [us] + others:
        if not side.wait_ready():
            print(f"  {side.name}: skipped: {side.failed}", flush=True)
    ratios = take_turns(us, others, options.rounds, lambda theirs, before, after: [2 * t / (b + a) for t, b, a in zip(theirs, before, after)])
    if us.failed and us.ready:
        print(f"  {us.name}: failed in a reply: {us.failed}", flush=True)
        ratios = {}
    counts = (options.prompt, 1, options.tokens)
    head = f"{model} {dtype} {options.prompt} + {options.tokens}, {threads} thread{'s' if threads > 1 else ''}"
    for m, measure in enumerate(MEASURES if us.ready and not us.failed and not any(side.ready for side in others) else ()):
        row = {"name": f"{head}: {measure}", "value": counts[m] / statistics.median(s[m] for s in us.seconds), "unit": "1/s"}
        rows.append(row)
        print(f"  {row['name']:<88} {row['value']:8.1f} /s", flush=True)
    for side in others:
        if side.ready is False and side.name in ratios:
            print(f"  {side.name}: failed in a reply: {side.failed}", flush=True)
            continue
        for m, measure in enumerate(MEASURES if ratios.get(side.name) else ()):
            mine, theirs = (counts[m] / statistics.median(s[m] for s in x.seconds) for x in (us, side))
            values = [r[m] for r in ratios[side.name]]
            ratio, (bad, good) = statistics.median(values), quartiles(values)
            row = {"name": f"{head}: {measure}, beside {side.name}", "value": mine, "unit": "1/s", "bound": theirs, "of": side.name, "ratio": round(ratio, 4), "quartiles": [round(bad, 4), round(good, 4)]}
            rows.append(row)
            print(f"  {row['name']:<88} {mine:8.1f} of {theirs:8.1f} /s {ratio:5.2f} x ({bad:.2f} .. {good:.2f})", flush=True)
    for side in [us] + others:
        side.end()
    return us.failed


def versions(python):
    """Of the peers' packages, by name; those that are there."""
    found = {}
    for name, module in (("llama.cpp", "llama_cpp"), ("gguf", "gguf"), ("transformers", "transformers"), ("pytorch", "torch")):
        ask = f"import {module} as m\nfrom importlib.metadata import version\nprint(getattr(m, '__version__', None) or version('{module}'))"
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
        found[name] = "none" if done.returncode else done.stdout.strip().split("\n")[-1]
    return found


def words_of(expected):
    """Words separated by commas, all of them expected ones."""
    def parse(text):
        words = text.split(",")
        for word in words:
            if word not in expected:
                raise argparse.ArgumentTypeError(f'"{word}", expected {", ".join(expected)}')
        return words
    return parse


def number_of(least, most):
    def parse(text):
        if not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f'"{text}", expected a whole number {least} .. {most}')
        return int(text)
    return parse


def main():
    from run import CORES, ROOT, write_json
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=words_of(tuple(SHAPES)), default="110m,1.1b")
    parser.add_argument("--dtypes", type=words_of(DTYPES), default="f32,bf16")
    parser.add_argument("--threads", type=lambda text: [number_of(1, CORES)(word) for word in text.split(",")], default="1,2" if CORES > 1 else "1")
    parser.add_argument("--prompt", type=number_of(1, 4032), default=256)
    parser.add_argument("--tokens", type=number_of(3, 64), default=64)
    parser.add_argument("--rounds", type=number_of(1, 1000), default=5)
    parser.add_argument("--peers", type=words_of(PEERS), default="llama.cpp,transformers")
    parser.add_argument("--directory", help="of the GGUF file, which is removed again (default: the one for temporary files)")
    parser.add_argument("--json", default=os.environ.get("BENCH_JSON"))
    parser.add_argument("--gguf", nargs=3, metavar=("FILE", "MODEL", "DTYPE"), help="write FILE and end")
    options = parser.parse_args()
    if options.gguf:
        return write_gguf(*options.gguf)
    if not os.path.exists(os.path.join(ROOT, "build/bench/bench_generate")):
        sys.exit("bench/peers/generate.py: build/bench/bench_generate is missing: make build/bench/bench_generate")
    python, rows, failed = os.environ.get("PYTHON", sys.executable), [], False
    if not shutil.which(python):
        parser.error(f'PYTHON: "{python}", expected an interpreter')
    if options.directory and not os.path.isdir(options.directory):
        parser.error(f'argument --directory: "{options.directory}", expected a directory')
    if options.json and (os.path.isdir(options.json) or not os.path.isdir(os.path.dirname(options.json) or ".")):
        parser.error(f'argument --json: "{options.json}", expected a file in a directory that is there')
    found = versions(python)
    print("  ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    for model in options.models:
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory(dir=options.directory) as directory:
                file = os.path.join(directory, "random.gguf") if "llama.cpp" in options.peers else None
                if file:
                    done = subprocess.run([python, __file__, "--gguf", file, model, dtype], capture_output=True, text=True)
                    if done.returncode:
                        print(f"  llama.cpp: skipped: no GGUF file: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
                        file = None
                for threads in options.threads:
                    failed = run(options, python, file, model, dtype, threads, rows) is not None or failed
    if options.json:
        write_json(options.json, rows, **found)
    sys.exit(failed or not any("bound" in row for row in rows))


if __name__ == "__main__":
    main()
