#!/bin/sh
# tests/trace.sh [FOLDER]: what train_llama --trace writes, by another reader than the project's own (python3's json): it loads, every rank is a process with a name, every lane a named thread, spans lie inside the run, and the
# memory counters are there, with the bytes that --log says. FOLDER holds train_llama (default build). The last line is "N passed, N failed".
programs=$(cd "${1:-build}" 2>/dev/null && pwd)
[ -x "$programs/train_llama" ] || { echo "trace: ${1:-build}/train_llama is not there: run make first"; echo "0 passed, 1 failed"; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/trace.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
cd "$work" || exit 1
passed=0 failed=0
seq 1 2000 >text

cat >check.py <<'END'
import json, sys
path, ranks, steps, expected = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split()
events = json.load(open(path))["traceEvents"]
wrong = []
def check(ok, what):
    if not ok: wrong.append(what)
processes, threads, spans, counters = {}, {}, {}, {}
for e in events:
    pid, tid = e["pid"], e["tid"]
    if e["ph"] == "M":
        if e["name"] == "process_name": processes[pid] = e["args"]["name"]
        if e["name"] == "thread_name": threads[pid, tid] = e["args"]["name"]
        check(e["name"] != "process_labels", "rank %d: events were dropped" % pid)
    elif e["ph"] == "X":
        check((pid, tid) in threads, "span %s on a lane without a name" % e["name"])
        check(e["ts"] >= 0 and e["dur"] >= 0 and e["ts"] + e["dur"] < 600e6, "span %s: ts %s dur %s" % (e["name"], e["ts"], e["dur"]))
        spans.setdefault(pid, []).append(e)
    elif e["ph"] == "C":
        counters.setdefault(pid, []).append(e)
    else: check(False, "phase %s" % e["ph"])
check(sorted(processes) == list(range(ranks)), "processes %s" % processes)
for rank in range(ranks):
    check(processes.get(rank, "").startswith("rank %d" % rank), "process %d is %s" % (rank, processes.get(rank)))
    names = [e["name"] for e in spans.get(rank, [])]
    for name in expected: check(sum(n == name or n.startswith(name + " ") for n in names) >= steps, "rank %d: fewer than %d spans of %s" % (rank, steps, name))
    check(names.count("SCALAR_REDUCE") >= steps, "rank %d: %d steps begin" % (rank, names.count("SCALAR_REDUCE")))
    check({"compute", "gather", "reduce"} <= {t for (p, _), t in threads.items() if p == rank}, "rank %d: threads" % rank)
    check(len(counters.get(rank, [])) >= 10 * steps, "rank %d: %d counters" % (rank, len(counters.get(rank, []))))
tags = ["parameters", "gathered", "gradients", "optimizer", "activations", "communication", "workspace"]
check(all(list(c["args"]) == tags for r in counters for c in counters[r]), "names of tags")
most = json.loads(open("log.jsonl").read().splitlines()[-1])["memory"]
for tag in tags: # counters are taken behind each instruction: what lives only inside one is in the peak alone
    seen = max(c["args"][tag] for c in counters[0])
    check(seen <= most[tag], "%s: a counter has %d, the log's peak is %d" % (tag, seen, most[tag]))
    check(seen == most[tag] or tag in ("activations", "workspace"), "%s: largest counter %d, the log's peak %d" % (tag, seen, most[tag]))
for line in wrong[:10]: print("    " + line)
sys.exit(bool(wrong))
END

# trace RANKS "SPAN .." OPTIONS: two steps
trace()
{
    ranks=$1 spans=$2
    shift 2
    rm -f trace.json log.jsonl
    if "$programs/train_llama" --model tiny --data text --seq-len 16 --batch 8 --steps 2 --log-every 1000 --log log.jsonl --trace trace.json "$@" >output 2>&1 && [ ! -e trace.json.tmp ] && python3 check.py trace.json "$ranks" 2 "$spans" >>output 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED --trace $*"
        sed 's/^/    /' output
    fi
}
trace 1 'FORWARD BACKWARD OPTIM'
trace 4 'GATHER FORWARD BACKWARD REDUCE OPTIM' --dp-shard 2 --tp 2
trace 4 'GATHER FORWARD RECOMPUTE BACKWARD REDUCE OPTIM FETCH STORE' --dp-shard 2 --tp 2 --sp on --overlap on --prefetch 2 --recompute full --grad-accum 2 --offload optimizer=file,activations=host --dtype bf16 --wrap half
trace 4 'FORWARD BACKWARD REDUCE OPTIM' --dp-replicate 2 --dp-shard 2 --zero 1 --optimizer adalomo
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
