# Grading: a file that replaces slots of a table, or an assignment, against the suites in this folder. Needs cc and make. docs/teaching.md
#   make grade COMM=file.c    make grade OP=file.c    make grade ASSIGNMENT=1_collectives FILE=file.c    BYTES=report: sending more than the formula is no failure

build/grade/%.o: tests/conformance/%.c $(wildcard tests/conformance/*.h) llmpar.h
	@mkdir -p $(@D)
	@$(CC) -std=gnu99 -O1 -g -Wall -Wextra -Wshadow -I. -Itests/conformance -c $< -o $@

grading := $(EXAMPLE_LIB) build/grade/comm.o build/grade/device.o

grade: $(grading)
	@CC='$(CC)' CXX='$(CXX)' COMM='$(COMM)' OP='$(OP)' ASSIGNMENT='$(ASSIGNMENT)' FILE='$(FILE)' BYTES='$(BYTES)' tests/conformance/grade.sh

# The grader itself: untouched tables and the reference solutions pass; the stubs and every wrong file fail with the text that they expect.
test-grade: $(grading)
	@CC='$(CC)' CXX='$(CXX)' tests/conformance/run.sh

# A training step in lockstep under gdb. Without optimisation: every argument of every collective can be printed.
build/gdb/llmpar.o: build/dev/llmpar.h
	@mkdir -p $(@D)
	@$(CC) -O0 -g -x c -DLLMPAR_IMPLEMENTATION -c $< -o $@

build/gdb/step: tests/gdb_step.c build/gdb/llmpar.o
	@$(CC) -O0 -g -Wall -Wextra -Ibuild/dev $^ -o $@ $(LDLIBS)

run-gdb: build/gdb/step
	@tests/gdb.sh build/gdb/step

test-gdb:
	@CC='$(CC)' tests/need.sh gdb gdb -- $(MAKE) --no-print-directory run-gdb

.PHONY: grade test-grade run-gdb test-gdb
