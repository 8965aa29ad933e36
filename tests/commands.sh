# commands: what scripts share that run programs and look at what these say; read by `. tests/commands.sh` from the root. Afterwards the working directory is an empty one, $work, that goes at the end;
# the last command read is to be `ends`.
top=$(pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/commands.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
cd "$work" || exit 1
export LC_ALL=C
unset BENCH_JSON LLMPAR_CPU
passed=0 failed=0
check() # WHAT COMMAND..: the command succeeds; else what it said, in the files stdout and stderr
{
    what=$1
    shift
    if "$@"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAILED $what"
        sed 's/^/    stdout: /' stdout
        sed 's/^/    stderr: /' stderr
    fi
}
ends() # the last line, and the exit code
{
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}
