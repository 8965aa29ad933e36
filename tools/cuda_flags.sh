#!/bin/sh
# tools/cuda_flags.sh [NVCC] [all|ci|native]   which -gencode flags nvcc gets.
#   all     sm_80, sm_90a, sm_100 where this nvcc knows it, and PTX of the newest of them for what comes later
#   ci      sm_80 and sm_90a
#   native  the first GPU of this machine (by nvidia-smi); nothing and exit code 1 where there is none
nvcc=${1:-nvcc} which=${2:-all}
known=$("$nvcc" --list-gpu-code 2>/dev/null | tr '\n' ' ')
flag() { printf -- '-gencode arch=compute_%s,code=%s_%s ' "$1" "$2" "$1"; }
case $which in
all)
    flag 80 sm
    flag 90a sm
    case " $known " in
    *" sm_100 "*) flag 100 sm; flag 100 compute ;;
    *) flag 90 compute ;;
    esac
    ;;
ci)
    flag 80 sm
    flag 90a sm
    ;;
native)
    code=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
    [ -n "$code" ] || exit 1
    [ "$code" != 90 ] || code=90a
    flag "$code" sm
    ! "$nvcc" --help | grep -q -- --split-compile || printf -- '--split-compile 0 ' # one file on all processors
    ;;
*)
    echo "tools/cuda_flags.sh: \"$which\", expected all, ci or native" >&2
    exit 2
    ;;
esac
echo
