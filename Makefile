# make demo | make test      a clean clone needs Python >= 3.10 and, to be fast, a C++ compiler
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
# tests of one file share what they train, so that a file is run by one process
PARALLEL ?= -n 2 --dist loadfile
BIN    := $(VENV)/bin
READY  := $(VENV)/.sgsc-ready

.PHONY: demo test plain native lint install bench clean
demo: $(READY)
	$(BIN)/sgsc compress digits --target-size 0.05 --seed 0 --out runs/digits

test: $(READY)
	$(BIN)/python -m pytest -q $(PARALLEL) --durations 20

# what a user without a compiler has; the slow demos and the Triton tests do not depend on it
plain: $(READY)
	SGSC_NO_EXT=1 $(BIN)/python -m pytest -q $(PARALLEL) tests/kernels tests/test_layers.py tests/test_quantizers.py \
	  tests/test_coupling.py --ignore-glob 'tests/kernels/test_triton*' --ignore tests/kernels/test_tuning.py

# the C++ kernels of all instruction sets, those that this machine lacks emulated; installs Debian packages, as root
native:
	tests/native/run

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.inc csrc/*.cpp tests/native/*.h tests/native/*.cpp
	$(BIN)/pyright

install: $(READY)
# torch first and by itself: the package then builds against it without an isolated copy
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[test,search,integrations,triton,lint]'
	touch $@

bench: $(READY)
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench.main_job
	$(BIN)/python -m bench.readme

clean:
	rm -rf build dist *.egg-info sgsc/_C*.so
